"""What a call of any attention op moves and computes, which kernels there are for it, and how they are run.

A cached byte is read once per request, whatever number of queries and heads share it; each query row multiplies every
key and every value it sees. Kernels: float32 arithmetic in three instruction sets, for every type; bfloat16 products
with float32 sums where an instruction set has them; float64. On a GPU: those of gpu_*.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.arrays import (
    arch_of,
    as_torch,
    check_same_device,
    device_of,
    dtype_name,
    empty_like,
    is_torch,
    shape_of,
)
from headrace.kernels.dense_pages import MOST_ROWS, page_len_of, rows_of
from headrace.machine import KernelSpeed, Machine
from headrace.ops.attention_checks import FLOATS, check_shape, check_type
from headrace.ops.attention_options import AttentionOptions, AttentionResult, checked_options
from headrace.ops.late import late
from headrace.ops.per_gpu import arithmetic_of, interpreter_asked
from headrace.ops.per_isa import CALL_SECONDS, cpu_kernel, level_in_force, native_conditions, predicted_seconds
from headrace.ops.select import Kernel, Plan, Reason, Request, Traffic, choose, count_choice, machine_at

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1, "bool": 1}
OPTION_NAMES = {field.name for field in fields(AttentionOptions)}
ARRAY_NAMES = {
    *("query", "key", "value", "query_starts", "key_starts", "key_lens", "page_table"),
    *("key_scales", "value_scales", "mask", "sinks", "alibi_slopes"),
}
WITH_BFLOAT16_PRODUCTS: tuple[str, ...] = ("avx512_bf16", "amx")


@dataclass(frozen=True)
class Extent:
    """How much there is of everything: of all requests together, except where it says per."""

    requests: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    def alike(self) -> tuple[int, ...]:
        """The same for extents that differ in their number of keys by less than an eighth, and in nothing else."""
        digits = max(self.keys.bit_length() - 4, 0)
        keys = (digits, self.keys >> digits)
        return (self.requests, self.queries, *keys, self.heads, self.kv_heads, self.head_dim, self.value_dim)


@dataclass(frozen=True)
class Call:
    """A checked call: its arrays by the words of the native side, the sizes, and the options."""

    op: str
    arrays: Mapping[str, Any]
    extent: Extent
    options: AttentionOptions
    mask_text: str | None = None  # what a mask was recognised as
    stands_for: tuple[str, str] | None = None  # device and generation of the arrays that these stand for (`explain`)

    @property
    def place(self) -> tuple[str, str]:
        """The device that holds the arrays, and its generation if it is a GPU."""
        query = self.arrays["query"]
        return self.stands_for or (device_of(query), arch_of(query))

    def request(self, out_dtype: str | None = None) -> Request:
        """What the choice of a kernel goes by. out_dtype: the query's when None."""
        shapes = {name: shape_of(array, name) for name, array in self.arrays.items()}
        dtypes = {name: dtype_name(array) for name, array in self.arrays.items()}
        dtypes["out"] = out_dtype or dtypes["query"]
        asked = attention_request(self.op, self.extent, self.options, shapes=shapes, dtypes=dtypes, place=self.place)
        said = {"mask": self.mask_text, "page_len": self.page_len, "unaligned": self.unaligned}
        more = {name: found for name, found in said.items() if found}
        return replace(asked, options={**asked.options, **more}) if more else asked

    @property
    def unaligned(self) -> str:
        """Which array lies in memory that copies in boxes, Hopper's, cannot address; "": none, or nobody would."""
        if not self.place[1].startswith("sm_9"):
            return ""
        arrays = ((name, self.arrays[name]) for name in ("query", "key", "value"))
        return next((name for name, array in arrays if is_torch(array) and not _in_boxes(array)), "")

    @property
    def page_len(self) -> int:
        """Keys of the pages that dense keys consist of, where few rows may read them so; 0: of none."""
        query, key, value = (self.arrays[name] for name in ("query", "key", "value"))
        if self.op != "attention" or len(query.shape) != 4 or rows_of(query.shape, key.shape[-2]) > MOST_ROWS:
            return 0
        there = self.place[0] != "cpu" or (is_torch(key) and interpreter_asked())
        return page_len_of(key, value) if there else 0


def split_arguments(given: Mapping[str, Any], head_dim: int) -> tuple[dict[str, Any], AttentionOptions]:
    """The arrays of a call, without those that are None, and its options, checked."""
    options = checked_options(head_dim, **{name: given[name] for name in OPTION_NAMES & set(given)})
    arrays = {name: array for name, array in given.items() if name not in OPTION_NAMES and array is not None}
    unknown = sorted(set(arrays) - ARRAY_NAMES)
    if unknown:
        raise ArgumentError(f"{unknown[0]}: attention takes no argument of this name")
    check_same_device(arrays)
    return arrays, options


def launch(
    call: Call, result: AttentionResult, *, kernel: str | None = None, require: Sequence[str] = ()
) -> AttentionResult:
    """Fills the result by the kernel chosen, or the one asked for.

    The choice is remembered for calls alike but for their keys, of which there may be up to an eighth more or less:
    a step of decoding asks for one more key each time, and choosing takes as long as reading 500 of them.
    """
    names, types = zip(*((name, dtype_name(array)) for name, array in call.arrays.items()), strict=True)
    alike = (call.op, names, types, dtype_name(result.out), call.extent.alike(), call.options, call.mask_text)
    place = call.place
    here = (place, level_in_force(), id(machine_at(*place)))
    asked = (*alike, *_details(call), kernel, tuple(require), *here)
    chosen = _chosen.get(asked)
    if chosen is None:
        chosen = choose(kernels_of(call.op), call.request(dtype_name(result.out)), kernel, require)
        if len(_chosen) >= _MOST_REMEMBERED:
            _chosen.clear()
        _chosen[asked] = chosen
    else:
        count_choice(call.op, chosen.name)
    run_kernel(chosen, {**call.arrays, "out": result.out, "lse": result.lse}, call.options)
    return result


def _details(call: Call) -> tuple[Any, ...]:
    """What else kernels of GPUs may ask for, and a key more or less does not change."""
    arrays, extent = call.arrays, call.extent
    page_size = arrays["key"].shape[1] if "page_table" in arrays else call.page_len
    mask_shape = arrays["mask"].shape if "mask" in arrays else ()
    return page_size, mask_shape[:-1], extent.queries == extent.keys, call.unaligned


def _in_boxes(tensor: Any) -> bool:
    """Whether its rows begin at whole 16 bytes."""
    width = tensor.element_size()
    steps = (step * width for size, step in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1)
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


def run_kernel(chosen: Kernel, arrays: Mapping[str, Any], options: AttentionOptions) -> None:
    """Runs a kernel of attention. Those of GPUs take tensors, and what the CPU's kernels have in their names."""
    if "cpu" in chosen.devices:
        chosen.run(arrays, options.native())
        return
    tensors = {name: as_torch(array, name) for name, array in arrays.items() if array is not None}
    _check_packed(tensors)
    chosen.run(tensors, options.native() | {"precision": options.precision})


def _check_packed(tensors: Mapping[str, Any]) -> None:
    """What native code checks of the CPU's arrays."""
    for name in _PACKED:
        tensor = tensors.get(name)
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
            found = f"{list(tensor.shape)} with another stride"
            raise ArgumentError(f"{name}: expected a contiguous last dimension, got {found}", f"{name}.contiguous()")


# In whose rows all kernels take one number after the other.
_PACKED = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
_chosen: dict[tuple[Any, ...], Kernel] = {}
_MOST_REMEMBERED = 4096


def outputs(call: Call, out: Any, out_dtype: str | None) -> AttentionResult:
    """Where the results go: `out` when given, else an array of out_dtype, by default the query's type."""
    query = call.arrays["query"]
    rows, exact = shape_of(query, "query")[:-1], dtype_name(query) == "float64"
    allowed = ("float64",) if exact else FLOATS[:3]
    wanted = out_dtype or dtype_name(query if out is None else out)
    if wanted not in allowed:
        raise ArgumentError(f"out_dtype: expected {' or '.join(allowed)}, got {wanted!r}")
    if out is None:
        out = empty_like(query, (*rows, call.extent.value_dim), wanted)
    check_shape("out", out, (*rows, call.extent.value_dim))
    check_type("out", out, (wanted,))
    check_same_device({"query": query, "out": out})
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ArgumentError("out: expected an array that can be written, got a read-only one")
    return AttentionResult(out, empty_like(query, rows, "float64" if exact else "float32"))


def attention_request(
    op: str,
    extent: Extent,
    options: AttentionOptions,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    place: tuple[str, str] = ("cpu", ""),
) -> Request:
    """The request of a call, from sizes and types alone."""
    said = {
        "causal": options.causal,
        "align": options.align,
        "window": options.window,
        "softcap": options.softcap,
        "precision": options.precision,
        "deterministic": options.deterministic,
        "num_keys": extent.keys,
    }
    # Latent attention reads its values as a part of its keys.
    read = extent.head_dim + (0 if op == "mla_attention" else extent.value_dim)
    num_bytes, flops = _traffic(extent, options, shapes, dtypes, read_dim=read)
    return Request(op, shapes, dtypes, Traffic(num_bytes, flops, unit_of(dtypes, options, place[0])), said, *place)


def _traffic(
    extent: Extent,
    options: AttentionOptions,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    read_dim: int,
) -> tuple[int, int]:
    """Bytes and operations."""
    seen, read = seen_of(extent, options)
    both = extent.head_dim + extent.value_dim
    key_bytes = read_dim * WIDTHS[dtypes["key"]] // (2 if dtypes["key"] == "uint8" else 1)
    key_bytes += 4 * ("key_scales" in shapes) + 4 * ("value_scales" in shapes)
    row_bytes = extent.head_dim * WIDTHS[dtypes["query"]] + extent.value_dim * WIDTHS[dtypes["out"]] + 4
    num_bytes = read * extent.kv_heads * key_bytes + extent.queries * extent.heads * row_bytes
    if "mask" in shapes:
        num_bytes += math.prod(shapes["mask"]) * WIDTHS[dtypes["mask"]]
    return num_bytes, 2 * seen * extent.heads * both


def seen_of(extent: Extent, options: AttentionOptions) -> tuple[int, int]:
    """Pairs of a query and a key it sees, and keys that any query sees, of all requests as if they were alike."""
    requests = max(extent.requests, 1)
    queries, keys = -(-extent.queries // requests), extent.keys // requests
    seen = seen_pairs(queries, keys, options) * extent.queries // max(queries, 1)
    return seen, keys_read(queries, keys, options) * requests


def seen_pairs(num_queries: int, num_keys: int, options: AttentionOptions) -> int:
    """Pairs of a query and a key it sees, by causality and window."""
    own = num_keys - num_queries if options.align == "bottom_right" else 0  # of the first query
    upto, before = num_queries * num_keys, 0
    if options.right is not None:
        upto = _sum_of_clipped(own + options.right + 1, num_queries, num_keys)
    if options.left is not None:
        before = _sum_of_clipped(own - options.left, num_queries, num_keys)
    return upto - before


def _sum_of_clipped(start: int, count: int, limit: int) -> int:
    """Sum of start, start + 1, ... (`count` of them), each held within 0 .. limit."""

    def below(end: int) -> int:
        rising = min(max(end, 0), limit + 1)
        return rising * (rising - 1) // 2 + max(end - limit - 1, 0) * limit

    return below(start + count) - below(start)


def keys_read(num_queries: int, num_keys: int, options: AttentionOptions) -> int:
    """Keys of a request that any of its queries sees."""
    own = num_keys - num_queries if options.align == "bottom_right" else 0
    first = 0 if options.left is None else max(own - options.left, 0)
    end = num_keys if options.right is None else min(own + num_queries + options.right, num_keys)
    return max(end - first, 0) if num_queries else 0


def unit_of(dtypes: Mapping[str, str], options: AttentionOptions, device: str = "cpu") -> str:
    """The arithmetic a call asks for."""
    if device != "cpu":
        return arithmetic_of(dtypes, options.precision, device)
    if dtypes["query"] == "float64":
        return "fp64"
    narrow = WITH_BFLOAT16_PRODUCTS and not why_not_bfloat16(dtypes, options.precision)
    return "bf16" if narrow else "fp32"


# Kernels


def why_not_bfloat16(dtypes: Mapping[str, str], precision: str) -> list[Reason]:
    """Why products may not be in bfloat16."""
    if dtypes["query"] == "float64":
        return [Reason("dtype of query", "float64", "float32, float16 or bfloat16", "cpu_float64 computes in float64")]
    if precision == "exact":
        return [Reason("precision", "exact", "auto or fast", "exact is float32 arithmetic")]
    wide = [name for name in ("query", "key") if dtypes[name] != "bfloat16"]
    if precision == "auto" and wide:
        return [Reason(f"dtype of {wide[0]}", dtypes[wide[0]], "bfloat16", 'or precision="fast"')]
    return []


def _why_not_products(request: Request) -> list[Reason]:
    return why_not_bfloat16(request.dtypes, request.options["precision"])


def _why_not_single(request: Request) -> list[Reason]:
    if request.dtypes["query"] != "float64":
        return []
    return [Reason("dtype of query", "float64", "float32, float16 or bfloat16", "cpu_float64 computes in float64")]


def _why_not_double(request: Request) -> list[Reason]:
    got = request.dtypes["query"]
    return [] if got == "float64" else [Reason("dtype of query", got, "float64", "")]


def _planned(arithmetic: str, request: Request, machine: Machine) -> Plan:
    # Gradients are added in one order whatever is asked for.
    invariant = bool(request.options["deterministic"]) or request.op == "attention_backward"
    return _plan_of(arithmetic, machine.cores, invariant, request.options.get("mask"))


@functools.lru_cache(maxsize=64)
def _plan_of(arithmetic: str, cores: int, invariant: bool, mask_text: str | None) -> Plan:
    notes = (f"mask recognised as {mask_text}",) if mask_text else ()
    return Plan(workers=cores, batch_invariant=invariant, arithmetic=arithmetic, notes=notes)


@functools.cache
def kernels_of(op: str) -> tuple[Kernel, ...]:
    """The kernels of an attention op, by its name: latent attention has some of its own in front."""
    from headrace.ops import gpu_latent

    return (*gpu_latent.kernels(), *kernels()) if op == "mla_attention" else kernels()


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of dense, ragged and paged attention, those of GPUs first, imported when first run."""
    from headrace.ops import gpu_attention, gpu_hopper, gpu_paged, gpu_split_keys, gpu_torch

    return (
        *gpu_hopper.kernels(),
        *gpu_attention.kernels(),
        *gpu_paged.kernels(),
        *gpu_split_keys.kernels(),
        *gpu_torch.kernels(),
        *kernels_over(late("headrace.kernels.cpu.attention")),
    )


def kernels_over(run: Callable[..., None]) -> tuple[Kernel, ...]:
    """A kernel for each instruction set and arithmetic of a native op: run(level, arrays, options, arithmetic=..)."""

    def of(level: str, arithmetic: str) -> Kernel:
        why_not = _why_not_products if arithmetic == "bf16" else _why_not_single
        runs = functools.partial(run, arithmetic=arithmetic)
        return cpu_kernel(level, runs, why_not, functools.partial(_planned, arithmetic))

    single = [of(level, "fp32") for level in reversed(cpu.ISAS[:3])]
    return *[of(level, "bf16") for level in reversed(WITH_BFLOAT16_PRODUCTS)], *single, _double_kernel(run)


def _double_kernel(run: Callable[..., None]) -> Kernel:

    def runs(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        run(min(cpu.isa(), cpu.ISAS[2], key=cpu.ISAS.index), arrays, options, arithmetic="fp64")

    def cost(request: Request, machine: Machine) -> float:
        return predicted_seconds(request, machine, "cpu_float64", KernelSpeed(CALL_SECONDS, 0.5))

    return Kernel("cpu_float64", native_conditions(_why_not_double), cost, runs, functools.partial(_planned, "fp64"))
