"""Scores and weights of Hopper's attention: who sees whom, caps, distances, the online softmax in base 2.

What is added to scores is divided by the factor that the softmax multiplies them with, so that plain scores stay as the
product leaves them. Error of the cap: 2.4e-7 of it, a rational function fitted to tanh within 5.7e-9 of it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def masked(scores, tile, keys_seen, first_row, num_keys, form: gl.constexpr):
    """-inf for keys that a row does not see."""
    since, upto, _ = keys_seen
    KEYS: gl.constexpr = form.keys
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    rows = (first_row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))) // form.packed
    columns = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    seen = columns[None, :] < gl.minimum(rows + upto, num_keys)[:, None]
    if form.has_left:
        seen = seen & (columns[None, :] >= (rows + since)[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def tanh(x):
    """Within 2.4e-7 of it, relatively: one division and no exponential, for the softmax has all of these it can."""
    x = gl.minimum(gl.maximum(x, -7.9), 7.9)
    square = x * x
    above = 1.5429209709711972e-08 * square + 2.2024119971320033e-05
    above = above * square + 3.579044947400689e-03
    above = above * square + 1.3450664281845093e-01
    above = above * square + 1.0
    below = 8.599280363341677e-07 * square + 3.4237370709888637e-04
    below = below * square + 2.619243785738945e-02
    below = below * square + 4.6783992648124695e-01
    below = below * square + 1.0
    # Three instructions, where a division that is right in the last bit has eight.
    return gl.inline_asm_elementwise(
        "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x * above, below], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def adjusted(scores, tile, keys_seen, first_row, slopes, inner, form: gl.constexpr):
    """Scores as the softmax takes them: capped, and lower by the distance."""
    _, _, own = keys_seen
    if form.capped:
        scores = tanh(scores * inner)
    if form.sloped:
        KEYS: gl.constexpr = form.keys
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
        rows = (first_row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))) // form.packed + own
        columns = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        distance = rows.to(gl.float32)[:, None] - columns.to(gl.float32)[None, :]
        scores = scores - slopes[:, None] * gl.abs(distance)
    return scores


@gluon.jit
def softmax(scores, largest, total, scale):
    """Weights of a tile, the rows' new maxima and sums, and the factor for what was summed before."""
    maximum = gl.maximum(largest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - maximum[:, None])
    factor = gl.exp2(largest - maximum)
    return weights, maximum, total * factor + gl.sum(weights, 1), factor
