"""A number the compiler cannot know: what is computed with it stays where it is written.

Warp-specialised kernels have no registers to spare, and the compilers move whatever does not change out of loops, and
what several partitions compute in front of all of them: descriptors of operands, reciprocals for divisions. What is
kept there is spilled. An address or a divisor with this 0 added is made anew in each iteration, in a few instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def unknown_zero():
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
