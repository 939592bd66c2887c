"""Kernels for the test of the ahead-of-time compiler: some keep their promises, each of the others breaks one."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from headrace.kernels.triton.variants import Variant


@triton.jit
def double(x, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, at < n) * 2, at < n)


@triton.jit
def centred(x, out, SIZE: tl.constexpr):
    """All of a row stays in registers until its largest number is known."""
    at = tl.arange(0, SIZE)
    row = tl.load(x + at)
    tl.store(out + at, row - tl.max(row, axis=0))


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    place = at[:, None] * SIZE + at[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@gluon.jit
def copied(x, out, SIZE: gl.constexpr):
    at = gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + at, gl.load(x + at))


@triton.jit
def pair_added(x, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, at < n) + missing)  # noqa: F821 - that is what it is for


ROW = {"x": "*fp32", "out": "*fp32"}
MATRICES = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
WGMMA = {"sm_90": ("wgmma.mma_async",)}
LARGE = {"SIZE": 1 << 15}


def variants():
    """In the order of the tests."""
    return [
        Variant("portable", double, {**ROW, "n": "i32"}, {"SIZE": 256}),
        Variant("gluon", copied, ROW, {"SIZE": 256}, chips=("sm_90",)),
        Variant("with_wgmma", product, MATRICES, {"SIZE": 64}, chips=("sm_90",), instructions=WGMMA),
        Variant("without_wgmma", product, MATRICES, {"SIZE": 32}, chips=("sm_90",), instructions=WGMMA),
        Variant("spills", centred, ROW, LARGE, num_warps=1, chips=("sm_90",)),
        Variant("may_spill", centred, ROW, LARGE, num_warps=1, chips=("sm_90",), spills={"sm_90": 1 << 20}),
        Variant("wrong_signature", double, ROW, {"SIZE": 256}, chips=("sm_90",)),
        Variant("does_not_compile", pair_added, {**ROW, "n": "i32"}, {"SIZE": 256}, chips=("sm_90",)),
    ]
