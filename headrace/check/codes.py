"""Whether quantized rows are those of the formula: scales but for float32's rounding, codes the nearest."""

from __future__ import annotations

import numpy as np

from headrace.check.compare import ROUNDING, rounded
from headrace.ops.norm import QuantizedRows, reference


def assert_codes_follow(found: QuantizedRows, x: np.ndarray, weight: np.ndarray, codes: str, eps: float = 1e-5) -> None:
    """Codes times scale are y but for half a step between codes, and what float32 makes of y."""
    y = reference(x, weight, eps)
    largest = 127 if codes == "int8" else 448
    exact = np.max(np.abs(y), axis=1, initial=0) / largest
    # float32 throughout: some roundings for the norm (a tree of squares), one for the scale.
    slack = 16 * ROUNDING["float32"]
    got, scales = np.asarray(found.codes).astype(np.float64), np.asarray(found.scales).astype(np.float64)
    assert np.all(np.abs(scales - exact) <= slack * exact)
    quotients = np.divide(y, exact[:, None], out=np.zeros_like(y), where=exact[:, None] > 0)
    step = (
        1.0 if codes == "int8" else np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(quotients), 2e-3)) - 3), 2**-9)
    )
    assert np.all(np.abs(got - quotients) <= step * (0.5 + slack * largest) + slack * np.abs(quotients))
    assert np.array_equal(got, rounded(got, codes).astype(np.float64))
