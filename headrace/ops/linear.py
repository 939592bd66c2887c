"""linear(x [tokens, cols], weight [rows, cols]) -> [tokens, rows], for every weight format

    y[t, r] = sum_c x[t, c] * w[r, c]  (+ bias[r])  (+ residual[t, r])
    linear_gated:  y[t, r] = silu(sum_c x[t, c] * gate[r, c]) * sum_c x[t, c] * up[r, c]
    with norm:  x[t] = rms_norm(x[t], norm, eps) first, which then is no pass of its own

Weights are packed once (`pack`): for the CPU into panels that every instruction set reads, for a GPU as
kernels/device_weight.py tells; formats are those of ops/formats.py, and for a GPU tensors of torch (`pack_tensor`).
On the CPU, precision "fast": quantized weights meet activations in int8, 32 to a scale, as their own format would hold
them; "auto": in 16-bit integers, 32 to a scale: free where the weights' bytes bind;
over AMX tiles, where many tokens make arithmetic bind, in bf16; "exact": float32 activations and sums throughout.
On a GPU up to 2 tokens meet codes as 16-bit integers, 16 to a scale, unless "exact"; up to 4 meet floats in float32;
what more do is told in kernels/triton/linear.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, is_torch, shape_of
from headrace.kernels.device_weight import DeviceWeight
from headrace.ops import gpu_linear
from headrace.ops.formats import FORMATS, dequantize
from headrace.ops.late import late
from headrace.ops.norm import check_norm
from headrace.ops.per_isa import per_isa, row_by_row
from headrace.ops.select import Kernel, Request, Traffic, choose, placed

if TYPE_CHECKING:
    from headrace.kernels.cpu.linear import PackedWeight

    Weight = PackedWeight | DeviceWeight

PRECISIONS = {"fast": 0, "auto": 1, "exact": 2}  # as the native side counts them
LARGEST = {"fast": 127, "auto": 127 * 256}  # integer that an activation becomes
DTYPES = ("float32", "float16", "bfloat16")
FLOAT_FORMATS = ("F32", "F16", "BF16")


LEVELS = ("portable", "avx2", "avx512", "amx")  # of the CPU's kernels


def __getattr__(name: str) -> Any:
    """PackedWeight, whose module needs native code."""
    if name != "PackedWeight":
        raise AttributeError(f"module 'headrace.ops.linear' has no attribute {name!r}")
    from headrace.kernels.cpu.linear import PackedWeight

    return PackedWeight


def pack(raw: Any, format_name: str, shape: tuple[int, int], pool: Any = None, *, device: Any = None) -> Any:
    """The matrix ready for `linear`, from its bytes in a file: uint8, rows in order, blocks as the format has them.

    device: a GPU ("cuda", a torch device), to which the bytes go as they are and where they are packed: a DeviceWeight;
    without one a PackedWeight, for the CPU. Raises ArgumentError when the shape does not fit the format or the bytes.
    """
    if format_name not in FORMATS:
        raise ArgumentError(f"format_name: expected one of {', '.join(FORMATS)}, got {format_name!r}")
    if device is not None:
        from headrace.kernels.triton.weight import from_blocks

        return from_blocks(raw, format_name, shape, device)
    from headrace.kernels.cpu import linear

    return linear.pack(np.ascontiguousarray(raw).reshape(-1).view(np.uint8), format_name, *shape, pool=pool)


def pack_tensor(
    values: Any, scale: Any = None, zero: Any = None, *, group_len: int = 0, block: tuple[int, int] = (1, 0)
) -> DeviceWeight:
    """The matrix ready for `linear` on the GPU that holds `values`, a tensor of torch [rows, cols]. By its dtype:

    float32, float16, bfloat16: as they are, and where they lie;
    float8_e4m3fn: times scale, one number, [rows], or one per block of [rows, cols] columns;
    int8: times scale, one number, [rows], or [rows, cols / group_len];
    uint8: codes of four bits, (code - zero) * scale, both [rows, cols / group_len], zero 8 unless given; one to a byte,
    or two with the first in the lower bits.
    """
    from headrace.kernels.triton import weight

    kind = dtype_name(values)
    if kind == "float8_e4m3fn":
        return weight.from_fp8(values, 1.0 if scale is None else scale, block)
    if kind == "int8":
        return weight.from_int8(values, 1.0 if scale is None else scale, group_len)
    if kind == "uint8" and scale is not None:
        return weight.from_int4(values, scale, zero, group_len=group_len)
    return weight.from_floats(values)


def linear(
    x: Any,
    weight: Weight,
    *,
    bias: Any = None,
    residual: Any = None,
    norm: Any = None,
    eps: float = 1e-6,
    out: Any = None,
    precision: str = "auto",
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> Any:
    """x times the transposed weight, plus bias and residual where given.

    x: [tokens, cols] float32, float16 or bfloat16; bias: [rows] float32; residual: [tokens, rows] float32;
    norm: [cols] float32, the weight of an rms_norm of x; out: [tokens, rows], float32 unless given. Raises
    ArgumentError for what does not fit, KernelError where no kernel, or not the one asked for, has what is required.
    """
    outs = None if out is None else [out]
    asked = _checked(x, [weight], precision, norm, eps)
    _check_on_device(asked, x, weight, {"bias": bias, "residual": residual, "norm": norm, "out": out})
    chosen = choose(kernels(), asked, kernel, require)
    return chosen.run(x, [weight], [bias], residual, outs, _told(asked), norm, float(eps))[0]


def linear_many(
    x: Any,
    weights: Sequence[Weight],
    *,
    biases: Sequence[Any] | None = None,
    norm: Any = None,
    eps: float = 1e-6,
    precision: str = "auto",
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> list[Any]:
    """One product per weight, all of the same x: what x needs (int8) is made once, and the work is shared out once."""
    asked = _checked(x, weights, precision, norm, eps)
    biases = biases or [None] * len(weights)
    for weight, bias in zip(weights, biases, strict=True):
        _check_on_device(asked, x, weight, {"bias": bias, "norm": norm})
    chosen = choose(kernels(), asked, kernel, require)
    return chosen.run(x, weights, biases, None, None, _told(asked), norm, float(eps))


def linear_gated(
    x: Any,
    gate: Weight,
    up: Weight,
    *,
    norm: Any = None,
    eps: float = 1e-6,
    out: Any = None,
    precision: str = "auto",
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> Any:
    """silu(x gate^T) * (x up^T), the two products side by side and never stored."""
    if gate.shape != up.shape:
        raise ArgumentError(f"up: expected the shape of gate {list(gate.shape)}, got {list(up.shape)}")
    asked = _checked(x, [gate, up], precision, norm, eps)
    for weight in (gate, up):
        _check_on_device(asked, x, weight, {"norm": norm}, {"out": out})
    chosen = choose(gated_kernels(), asked, kernel, require)
    return chosen.run(x, gate, up, out, _told(asked), norm, float(eps))


def reference(x: np.ndarray, raw: np.ndarray, format_name: str) -> np.ndarray:
    """The formula in float64, from the file's bytes [rows, row_bytes]."""
    return x.astype(np.float64) @ dequantize(raw, format_name).astype(np.float64).T


def integer_activations(x: np.ndarray, precision: str) -> np.ndarray:
    """What a row of activations is after a straightforward quantization to integers, 32 to a scale."""
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // 32, 32)
    scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(LARGEST[precision])
    integers = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (integers * scale).reshape(x.shape)


def request(
    tokens: int,
    weights: Sequence[tuple[str, int, int]],
    dtype: str = "float32",
    precision: str = "auto",
    packed_for: str = "cpu",
) -> Request:
    """The request of a call: weights as (format, rows, cols). Each weight byte and output crosses memory once.

    packed_for: "cpu", or "" of weights that are shapes alone; those packed for GPUs have gpu_linear.device_request.
    """
    formats = {name for name, _, _ in weights}
    exact = precision == "exact" or formats <= set(FLOAT_FORMATS)
    num_bytes = sum(_format_bytes(*weight) for weight in weights) + 4 * tokens * sum(rows for _, rows, _ in weights)
    flops = sum(2 * tokens * rows * cols for _, rows, cols in weights)
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, weights[0][2])}
    shapes |= {f"weight{i}": weight[1:] for i, weight in enumerate(weights)}
    dtypes = {"x": dtype} | {f"weight{i}": weight[0] for i, weight in enumerate(weights)}
    unit = "fp32" if exact else "int8"
    options = {"precision": precision} | ({"packed_for": packed_for} if packed_for else {})
    return Request("linear", shapes, dtypes, Traffic(num_bytes, flops, unit), options)


def _format_bytes(name: str, rows: int, cols: int) -> int:
    return rows * math.ceil(cols / FORMATS[name].block_len) * FORMATS[name].block_bytes


def _checked(x: Any, weights: Sequence[Weight], precision: str, norm: Any, eps: float) -> Request:
    shape = shape_of(x, "x")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    _check_weights(weights)
    if len(shape) != 2 or any(shape[1] != weight.shape[1] for weight in weights):
        cols = weights[0].shape[1]
        raise ArgumentError(f"x: expected [tokens, {cols}], got {list(shape)}", f"x.reshape(-1, {cols})")
    if dtype_name(x) not in DTYPES:
        raise ArgumentError(f"x: expected a dtype among {', '.join(DTYPES)}, got {dtype_name(x)}")
    if norm is not None:
        check_norm(shape, shape_of(norm, "norm"), eps, name="norm")
    if isinstance(weights[0], DeviceWeight):
        on_device = [weight for weight in weights if isinstance(weight, DeviceWeight)]
        return placed(gpu_linear.device_request(shape[0], on_device, dtype_name(x), precision, norm is not None), x)
    return placed(request(shape[0], [(w.format, *w.shape) for w in weights], dtype_name(x), precision), x)


def _check_weights(weights: Sequence[Any]) -> None:
    """ArgumentError for what was not packed, and for weights packed for several kinds of device."""
    packed = bool(weights) and all(hasattr(weight, "format") and hasattr(weight, "shape") for weight in weights)
    if not packed or len({isinstance(weight, DeviceWeight) for weight in weights}) > 1:
        raise ArgumentError("weight: expected packed weights", "headrace.ops.linear.pack(raw, format, shape)")


def _check_on_device(asked: Request, x: Any, weight: Weight, *others: dict[str, Any]) -> None:
    """What native code checks of its arrays: of a weight on a device, that all lie there and have their shapes."""
    if not isinstance(weight, DeviceWeight):
        return
    if not is_torch(x):
        raise ArgumentError(f"x: expected a tensor of torch where the weight is, got {type(x).__name__}")
    given = {name: array for each in others for name, array in each.items() if array is not None}
    check_same_device({"x": x, "weight": weight.codes, **given})
    rows, (tokens, cols) = weight.shape[0], asked.shapes["x"]
    expected = {"bias": (rows,), "norm": (cols,), "residual": (tokens, rows), "out": (tokens, rows)}
    for name, array in given.items():
        if tuple(shape_of(array, name)) != expected[name]:
            raise ArgumentError(f"{name}: expected {list(expected[name])}, got {list(array.shape)}")
        if array.stride(-1) != 1 and array.shape[-1] > 1:
            raise ArgumentError(f"{name}: expected a contiguous last dimension", f"{name}.contiguous()")
        if dtype_name(array) not in (DTYPES if name != "norm" else ("float32",)):
            raise ArgumentError(f"{name}: expected float32, got {dtype_name(array)}")


def _told(asked: Request) -> Any:
    """The precision as the kernels of the request's weights take it: native code as a number."""
    name = asked.options["precision"]
    return PRECISIONS[name] if asked.options["packed_for"] == "cpu" else name


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    return *gpu_linear.kernels(), *_of_levels(late("headrace.kernels.cpu.linear"))


@functools.cache
def gated_kernels() -> tuple[Kernel, ...]:
    """The kernels of the gated form."""
    return *gpu_linear.kernels(gated=True), *_of_levels(late("headrace.kernels.cpu.linear", "run_gated"))


def _of_levels(run: Callable[..., Any]) -> tuple[Kernel, ...]:
    def why_not(asked: Request) -> list[Any]:
        return gpu_linear.packed_for(asked, "cpu")

    vectors = per_isa(run, LEVELS[:3], why_not, row_by_row)
    return *per_isa(run, LEVELS[3:], why_not), *vectors  # over tiles, 16 tokens are computed otherwise than 1
