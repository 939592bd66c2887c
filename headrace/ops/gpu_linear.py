"""Kernels of linear on a GPU: few rows stream the weights through Triton, more go to torch's matmul.

triton_linear            up to 32 rows; up to 2 or 4 of them one by one, codes as integers; more over tensor cores
triton_linear_invariant  any number, always over tensor cores: a row's bits depend on no other row; each 32 rows
                         read the weights again
torch_linear             any number: quantized weights become x's type, a piece at a time, in memory first
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.gpu_machine import Gpu
from headrace.kernels.device_weight import DeviceWeight
from headrace.machine import Machine
from headrace.ops.formats import FORMATS
from headrace.ops.per_gpu import gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request, Traffic

PACKED_FOR = "weight"  # the predicate of one that is packed for another device
MOST_ROWS = 32
_TRITON = "headrace.kernels.triton.linear"
_TORCH = "headrace.kernels.torch.linear"
# What a weight's numbers are where they are stored themselves.
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TABLES = ("IQ4_NL", "IQ4_XS")  # codes that stand for numbers of a table
_UNITS = {"bfloat16": "bf16", "float16": "fp16"}


def device_request(
    tokens: int, weights: Sequence[DeviceWeight], dtype: str, precision: str, norm: bool = False
) -> Request:
    """The request of a call with weights on a device: their bytes cross memory once, and the outputs."""
    num_bytes = sum(weight.num_bytes for weight in weights)
    num_bytes += 4 * tokens * sum(weight.shape[0] for weight in weights) + 4 * tokens * weights[0].shape[1]
    flops = sum(2 * tokens * rows * cols for rows, cols in (weight.shape for weight in weights))
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, weights[0].shape[1])}
    shapes |= {f"weight{i}": weight.shape for i, weight in enumerate(weights)}
    dtypes = {"x": dtype} | {f"weight{i}": weight.format for i, weight in enumerate(weights)}
    options = {"precision": precision, "packed_for": "gpu", "norm": norm}
    return Request("linear", shapes, dtypes, Traffic(num_bytes, flops, "fp32"), options)


def packed_for(request: Request, device: str) -> list[Reason]:
    """Why weights that are packed for the other kind of device cannot be read; shapes alone are packed for either."""
    found = request.options.get("packed_for", device)
    if found == device:
        return []
    hint = (
        'headrace.ops.linear.pack(raw, format, shape, device="cuda")' if device == "gpu" else "the same without device"
    )
    return [Reason(PACKED_FOR, f"packed for a {found}", f"packed for a {device}", hint)]


@functools.cache
def kernels(gated: bool = False) -> tuple[Kernel, ...]:
    """The kernels of linear on GPUs, or of its gated form; imported when first run."""
    suffix = "_gated" if gated else ""
    few = gpu_kernel("triton_linear", _TRITON, _for_few_rows, _few_plan, function=f"run{suffix}")
    alone = gpu_kernel(
        "triton_linear_invariant", _TRITON, _packed_for_gpu, _invariant_plan, function=f"run_invariant{suffix}"
    )
    wide = gpu_kernel("torch_linear", _TORCH, _packed_for_gpu, _torch_plan, function=f"run{suffix}")
    return few, replace(alone, cost=_read_again(alone)), replace(wide, cost=_written_first(wide))


def _packed_for_gpu(request: Request) -> list[Reason]:
    return packed_for(request, "gpu")


def _for_few_rows(request: Request) -> list[Reason]:
    tokens = request.shapes["x"][0]
    if tokens > MOST_ROWS:
        return [Reason("rows of x", str(tokens), f"at most {MOST_ROWS}", "torch_linear, or fewer rows at a time")]
    return packed_for(request, "gpu")


# Costs beside those of the bytes


def _read_again(kernel: Kernel) -> Any:
    """Every 32 rows of x read the weights once more."""

    def cost(request: Request, machine: Machine | Gpu) -> float:
        return kernel.cost(request, machine) * max(1, math.ceil(request.shapes["x"][0] / MOST_ROWS))

    return cost


def _written_first(kernel: Kernel) -> Any:
    """Weights that are no floats of x's type are written in it and read again: one more launch."""

    def cost(request: Request, machine: Machine | Gpu) -> float:
        seconds = kernel.cost(request, machine)
        if not isinstance(machine, Gpu):
            return seconds
        num_bytes = 2 * _operand_bytes(request) * _converted_numbers(request)
        return seconds + num_bytes / machine.roofs["copy"] + (machine.launch_s if num_bytes else 0.0)

    return cost


def _converted_numbers(request: Request) -> int:
    shapes, dtypes = request.shapes, request.dtypes
    names = [name for name in shapes if name != "x" and _FLOATS.get(dtypes[name]) != dtypes["x"]]
    return sum(math.prod(shapes[name]) for name in names)


def _operand_bytes(request: Request) -> int:
    return 4 if request.dtypes["x"] == "float32" and request.options["precision"] != "fast" else 2


# Plans


def _few_plan(request: Request, gpu: Gpu) -> Plan:
    names = [name for label, name in request.dtypes.items() if label != "x"]
    integers = [_in_integers(name, request) for name in names]
    few = min(2 if 0 < _bits_of(name) < 8 or integer else 4 for name, integer in zip(names, integers, strict=True))
    notes: tuple[str, ...] = (
        "sums of a row are those of any number of rows on this side of it: 1-2 or 1-4, or more, up to 32",
    )
    if request.shapes["x"][0] > few:
        return Plan(workers=gpu.multiprocessors, arithmetic=_arithmetic(request), notes=notes)
    if any(integers):
        notes = (*notes, "x as 16-bit integers, sixteen columns to a scale; as it is with precision exact")
    # In the interpreter a machine that knows no other arithmetic.
    arithmetic = "int16" if any(integers) and request.device != "cpu" else "fp32"
    return Plan(workers=gpu.multiprocessors, arithmetic=arithmetic, notes=notes)


def _invariant_plan(request: Request, gpu: Gpu) -> Plan:
    return Plan(workers=gpu.multiprocessors, arithmetic=_arithmetic(request), batch_invariant=True)


def _torch_plan(request: Request, gpu: Gpu) -> Plan:
    narrow = "bf16" if request.options["precision"] == "fast" else "fp32"
    arithmetic = _UNITS.get(request.dtypes["x"], narrow)
    if request.options["precision"] == "exact" or request.device == "cpu":
        arithmetic = "fp32"
    copies = _converted_numbers(request) > 0
    return Plan(workers=gpu.multiprocessors, arithmetic=arithmetic, copies=copies, notes=("sums in torch's order",))


def _arithmetic(request: Request) -> str:
    """What tensor cores do for this request, as kernels/triton/linear_plan.py decides it; of several the costliest."""
    precision, own = request.options["precision"], request.dtypes["x"]
    if request.device == "cpu":
        return "fp32"  # in the interpreter, whose machine knows no other
    if precision == "exact" or (own == "float32" and precision == "auto"):
        return "tf32x3" if request.device != "hip" else "fp32"
    kinds = {_FLOATS.get(name, "") for label, name in request.dtypes.items() if label != "x"}
    if "float32" in kinds and precision != "fast":
        return "tf32x3"
    if "float32" in kinds or (kinds & {"float16", "bfloat16"}) - {own}:
        return "tf32"
    return _UNITS.get(own, "bf16")


def _in_integers(name: str, request: Request) -> bool:
    """Whether few rows of x meet these weights as integers, as kernels/triton/linear_plan.py decides it."""
    codes = name in ("int4", "int8") or (name in FORMATS and name not in (*_FLOATS, *_TABLES))
    return codes and request.options["precision"] != "exact" and request.device != "hip"


def _bits_of(name: str) -> int:
    """Of a code, 0 of a float."""
    if name in _FLOATS:
        return 0
    found = FORMATS.get(name)
    return {"fp8": 8, "int8": 8, "int4": 4}.get(name) or (8 if found is not None and found.bits_per_value > 8 else 4)
