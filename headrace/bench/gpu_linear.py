"""Products with weights of every format for `headrace bench gpu`: a few rows of activations, where weights' bytes bind.

Several matrices make one call of a row: a layer's, one after the other, as an engine runs them. A sample of the
outputs is checked against the weight's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.bench.gpu_peers import matmul_peer
from headrace.bench.gpu_work import GpuWork, Margin, margin, normal, num_sets, poisoned
from headrace.ops.formats import FORMATS

GROUP_LEN = 128  # of int4: columns that share a scale
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_BITS = {"FP8": 8.0, "INT8": 8.0, "INT4": 4 + 16 / GROUP_LEN}
_CHECKED_ROWS = 64


def build_linear(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """weight: a format's name; shapes: [rows, cols] of each matrix; tokens."""
    from headrace.ops import linear

    name, shapes, tokens = sizes["weight"], sizes["shapes"], sizes["tokens"]
    sets = [
        [make_weight(name, shape, device, 1000 * s + i) for i, shape in enumerate(shapes)]
        for s in range(num_sets(round(sum(rows * cols for rows, cols in shapes) * bits_of(name) / 8), device))
    ]
    xs = {cols: normal((tokens, cols), _activations(name), device, cols) for _, cols in shapes}

    def call(kernel: str, number: int) -> Any:
        return [linear.linear(xs[weight.shape[1]], weight, kernel=kernel) for weight in sets[number]]

    def check(kernel: str) -> Margin:
        margins = [_margin(xs[weight.shape[1]], weight, kernel) for weight in sets[0]]
        return max(margins, key=lambda each: each.error / each.allowed)

    requests = [_request(xs[weight.shape[1]], weight) for weight in sets[0]]
    largest = max(requests, key=lambda request: request.traffic.num_bytes)
    num_bytes, flops = (sum(getattr(each.traffic, of) for each in requests) for of in ("num_bytes", "flops"))
    kernels, peers = linear.kernels(), _peers(name, shapes, xs, sets)
    return GpuWork(num_bytes, flops, largest.traffic.unit, kernels, largest, call, len(sets), check, peers)


def bits_of(name: str) -> float:
    """Bits of a weight in that format, scales included."""
    return FORMATS[name].bits_per_value if name in FORMATS else _BITS[name]


def _activations(name: str) -> str:
    """The type of x: that of weights that are floats, for then torch has the same product."""
    return FLOATS.get(name, "bfloat16")


def make_weight(name: str, shape: tuple[int, int], device: str, seed: int) -> Any:
    """A random weight on the device: of tensors, or of the bytes a file would hold."""
    import numpy as np
    import torch

    from headrace.check.blocks import random_matrix
    from headrace.ops import linear

    if name in FORMATS and name not in FLOATS:
        return linear.pack(random_matrix(name, *shape, np.random.default_rng(seed)), name, shape, device=device)
    values = normal(shape, FLOATS.get(name, "bfloat16"), device, seed)
    if name in FLOATS:
        return linear.pack_tensor(values)
    if name == "FP8":
        return linear.pack_tensor(values.to(torch.float8_e4m3fn), _scales((shape[0],), device, seed))
    if name == "INT8":
        codes = values.float().mul(40).clamp(-127, 127).to(torch.int8)
        return linear.pack_tensor(codes, _scales((shape[0],), device, seed))
    codes = values.float().mul(3).add(8).clamp(0, 15).to(torch.uint8)
    scales = _scales((shape[0], shape[1] // GROUP_LEN), device, seed).half()
    return linear.pack_tensor(codes, scales, group_len=GROUP_LEN)


def _scales(shape: Sequence[int], device: str, seed: int) -> Any:
    """Numbers about 0.02."""
    return normal(shape, "float32", device, seed + 1).abs().mul(0.01).add(0.01)


def _request(x: Any, weight: Any) -> Any:
    from headrace.ops.call_request import requests_of

    [request] = requests_of("linear", x, weight)
    return request


def _margin(x: Any, weight: Any, kernel: str) -> Margin:
    import torch

    from headrace.kernels.triton.weight import dequantize
    from headrace.ops import linear

    drawn = torch.randint(weight.shape[0], (_CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).to(x.device)
    out = poisoned((len(x), weight.shape[0]), "float32", str(x.device))
    got = linear.linear(x, weight, kernel=kernel, out=out)[:, drawn]
    numbers = dequantize(weight, drawn)
    exact = x.double() @ numbers.double().T
    return margin([got], [exact], [_straightforward(*_multiplied(kernel, x, weight, numbers))], "float32")


def _multiplied(kernel: str, x: Any, weight: Any, numbers: Any) -> tuple[Any, Any]:
    """What a straightforward product of this kernel's precision multiplies: of a few rows numbers as they are, with x,
    or with the 16-bit integers that x becomes; else numbers in x's type."""
    import torch

    from headrace.kernels.triton.linear_plan import few_rows_of, in_integers
    from headrace.ops.linear import integer_activations

    hip = bool(torch.version.hip)
    few = kernel == "triton_linear" and len(x) <= few_rows_of(weight.layout, "auto", hip)
    if few and in_integers(weight.layout, "auto", hip):
        return torch.from_numpy(integer_activations(x.float().cpu().numpy(), "auto")), numbers
    return x, numbers if few else numbers.to(x.dtype)


def _straightforward(x: Any, numbers: Any) -> Any:
    """The product in float32, one column after the other."""
    import numpy as np
    import torch

    rows, columns = x.float().cpu().numpy(), numbers.float().cpu().numpy()
    return torch.from_numpy(np.stack([np.add.accumulate(columns * row, axis=1)[:, -1] for row in rows]))


def _peers(name: str, shapes: Sequence[tuple[int, int]], xs: Mapping[int, Any], sets: Sequence[Any]) -> dict[str, Any]:
    """torch's own product, of weights that are floats: what is not, it would have to widen first."""
    if name not in FLOATS or len(shapes) > 1:
        return {}
    matrices = [[weight.codes.view(shapes[0]) for weight in weights] for weights in sets]
    return {"torch matmul": matmul_peer(xs[shapes[0][1]], matrices)}
