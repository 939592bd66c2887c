"""Heads turned by a rope table with NumPy, in float32.

Wins always on the CPU, where it is the only one: inside a model the turning is part of append_pages. Some 1 GB/s.
Error: three float32 roundings an element, then one of the output's type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.numpy.views import numpy_view


def run_rotate(x: Any, table: Any, interleaved: bool, out: Any) -> None:
    """Heads x [tokens, heads, head_dim] turned into `out`, which may be x."""
    heads, turns, y = numpy_view(x, "x"), numpy_view(table, "table"), numpy_view(out, "out")
    pairs = turns.shape[1] // 2
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    cosines, sines = turns[:, None, :pairs], turns[:, None, pairs:]
    a, b = heads[..., first].astype(np.float32), heads[..., second].astype(np.float32)
    y[..., first], y[..., second] = a * cosines - b * sines, b * cosines + a * sines
    y[..., 2 * pairs :] = heads[..., 2 * pairs :]
