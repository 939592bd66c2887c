"""The kernels without a model: a product in few bits beside the exact one: python examples/weights.py"""

import numpy as np

from headrace.ops.linear import linear, pack, reference
from headrace.weights.quantize import quantize

random = np.random.default_rng(0)
x = random.standard_normal((4, 1024), dtype=np.float32)  # [tokens, cols]
weight = random.standard_normal((512, 1024), dtype=np.float32)  # [rows, cols]
exact = x @ weight.T

for name in ("F16", "Q8_0", "Q4_K", "Q4_0"):
    raw = quantize(weight, name)
    packed = pack(raw, name, weight.shape)
    y = linear(x, packed)
    rounded = np.abs(reference(x, raw, name) - exact).max() / exact.std()
    total = np.abs(y - exact).max() / exact.std()
    print(f"{name:5} {raw.nbytes / weight.size:.2f} bytes/weight, error {total:.4f}, of that the weights {rounded:.4f}")
