"""What the latent attention kernels are launched with, and the configurations that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl

from headrace.kernels import mla_tiles
from headrace.kernels.mla_tiles import Division, block_of
from headrace.kernels.triton.launch import chip_of, named_strides, num_multiprocessors
from headrace.kernels.triton.mla_merge import MERGED_ROWS
from headrace.kernels.triton.schedule import ScheduleSetup
from headrace.kernels.triton.variants import CHIPS, Variant

LOG2_E = 1.4426950408889634
_TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
_FORMATS = {torch.float8_e4m3fn: "float8", torch.int8: "int8", torch.uint8: "int4"}
# Of codes with scales: the largest there is (kv_formats.py).
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 7.0}
# What both kernels take.
_SHARED = (
    *("key_lens", "query_starts", "sinks", "out", "lse", "partial_out", "partial_sums", "parts"),
    *("num_requests", "num_tokens", "most_keys", "left", "right", "halvings"),
    *("out_token", "out_head", "lse_token", "lse_head", "setup", "line"),
)


@dataclass(frozen=True)
class MlaSetup:
    """What is known when the kernel is compiled; `values` and `rest` are blocks with room for the numbers there are."""

    heads: int
    head_dim: int
    value_dim: int
    values: int
    rest: int
    columns: int  # that scores are made of at a time; 0: all values, and the rest
    row_stride: int
    page: int
    one_page: bool  # of a tile of keys
    format: str
    scaled: bool
    largest: float
    products: Any
    precision: str
    top_left: bool
    capped: bool
    alibi: bool
    sinks: bool
    mask: str
    rows: int
    keys: int
    keys_first: bool
    members: int
    unit_tiles: int
    shared_out: bool


@dataclass(frozen=True)
class Launch:
    """The arguments of both kernels; `merged` is empty where nothing is cut."""

    division: Division
    arguments: Mapping[str, Any]
    merged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def merge_grid(self) -> tuple[int, int]:
        return self.division.items * self.division.members, -(-self.division.tile.rows // MERGED_ROWS)


def launch_of(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Launch | None:
    """How the call is launched; None where there is nothing to fill."""
    query = arrays["query"]
    if query.shape[0] == 0 or len(arrays["key_lens"]) == 0:
        return None
    return launch_on(chip_of(query), arrays, options, num_multiprocessors(query))


def launch_on(chip: str, arrays: Mapping[str, Any], options: Mapping[str, Any], multiprocessors: int) -> Launch:
    """How the call is launched on a chip with so many multiprocessors."""
    query = arrays["query"]
    kind, products = mla_tiles.kind_of(_name(query), _name(arrays["key"]), options["precision"])
    cut = mla_tiles.division(
        query.shape[0],
        len(arrays["key_lens"]),
        query.shape[1],
        _capacity(arrays),
        chip=chip,
        kind=kind,
        multiprocessors=multiprocessors,
        invariant=options["batch_invariant"],
    )
    setup = _setup(arrays, options, cut, chip=chip, products=products)
    arguments = {
        **_arrays(arrays, setup),
        **_workspace(arrays, cut),
        **_sizes(arrays, options, cut),
        **_strides(arrays),
        **_scoring(options),
        "setup": setup,
        "line": _line(setup),
    }
    most = cut.workers or cut.units
    merged = {name: arguments[name] for name in _SHARED} | {"TAKEN": MERGED_ROWS}
    merged["MOST_PARTS"] = 1 << (most - 1).bit_length()
    return Launch(cut, arguments, merged if cut.slots else {})


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _capacity(arrays: Mapping[str, Any]) -> int:
    """Keys that a request may have."""
    pages, page_size = arrays["key"].shape[:2]
    return min(arrays["page_table"].shape[1] * page_size, mla_tiles.MOST_KEYS) if pages else 0


def _setup(
    arrays: Mapping[str, Any], options: Mapping[str, Any], cut: Division, *, chip: str, products: str
) -> MlaSetup:
    key, mask, scaled = arrays["key"], arrays.get("mask"), arrays.get("key_scales") is not None
    head_dim, value_dim, page = arrays["query"].shape[-1], arrays["out"].shape[-1], key.shape[1]
    columns = min(mla_tiles.WIDE_COLUMNS, block_of(head_dim)) if products == "float32" else 0
    bits = key.dtype == torch.float8_e4m3fn and chip not in ("sm_90", "sm_100")
    return MlaSetup(
        heads=arrays["query"].shape[1],
        head_dim=head_dim,
        value_dim=value_dim,
        values=block_of(value_dim),
        rest=block_of(head_dim - value_dim) if head_dim > value_dim and not columns else 0,
        columns=columns,
        row_stride=key.stride(1),
        page=page,
        one_page=page % cut.tile.keys == 0,
        format="float8_bits" if bits else _FORMATS.get(key.dtype, ""),
        scaled=scaled,
        largest=_LARGEST[key.dtype] if scaled else 1.0,
        products=_TYPES[products],
        precision=mla_tiles.float32_products("hip" if chip.startswith("gfx") else "cuda", options["precision"]),
        top_left=options["top_left"],
        capped=options["softcap"] > 0,
        alibi=arrays.get("alibi_slopes") is not None,
        sinks=arrays.get("sinks") is not None,
        mask="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        rows=cut.tile.rows,
        keys=cut.tile.keys,
        keys_first=cut.tile.keys_first,
        members=cut.members,
        unit_tiles=cut.unit_tiles,
        shared_out=cut.workers > 0,
    )


def _line(setup: MlaSetup) -> ScheduleSetup:
    return ScheduleSetup(
        group=setup.heads,
        rows=setup.rows * setup.members,
        unit_keys=setup.keys * setup.unit_tiles,
        top_left=setup.top_left,
        weight=setup.keys * setup.unit_tiles // 16,
        overhead=mla_tiles.OVERHEAD,
        merge_cost=mla_tiles.merge_cost(setup.rows),
        snap=mla_tiles.SNAP,
        least=mla_tiles.LEAST,
    )


def _arrays(arrays: Mapping[str, Any], setup: MlaSetup) -> dict[str, Any]:
    key, mask = arrays["key"], arrays.get("mask")
    found = {name: arrays[name] for name in ("query", "page_table", "key_lens", "query_starts", "out", "lse")}
    found |= {"scales": arrays.get("key_scales"), "slopes": arrays.get("alibi_slopes"), "sinks": arrays.get("sinks")}
    found["mask"] = mask.view(torch.uint8) if mask is not None and setup.mask == "bool" else mask
    return {**found, "latents": key.view(torch.uint8) if setup.format.startswith("float8") else key}


def _workspace(arrays: Mapping[str, Any], cut: Division) -> dict[str, Any]:
    sums, others = cut.partial_floats(arrays["out"].shape[-1])
    device = arrays["query"].device
    found = {"partial_out": torch.empty(max(sums, 1), dtype=torch.float32, device=device)}
    found["partial_sums"] = torch.empty(max(others, 1), dtype=torch.float32, device=device)
    return {**found, "parts": torch.empty(2 * cut.items, dtype=torch.int32, device=device)}


def _sizes(arrays: Mapping[str, Any], options: Mapping[str, Any], cut: Division) -> dict[str, int]:
    requests, mask = len(arrays["key_lens"]), arrays.get("mask")
    return {
        "num_requests": requests,
        "num_tokens": arrays["query"].shape[0],
        "num_pages": arrays["key"].shape[0],
        "max_pages": arrays["page_table"].shape[1],
        "most_keys": _capacity(arrays),
        "left": min(options["window_left"], mla_tiles.MOST_KEYS),
        "right": min(options["window_right"], mla_tiles.MOST_KEYS),
        "halvings": max(requests - 1, 1).bit_length(),
        "num_items": cut.items,
        "num_workers": cut.workers,
        "num_columns": 0 if mask is None else mask.shape[-1],
        "most_units": cut.units,
    }


def _strides(arrays: Mapping[str, Any]) -> dict[str, int]:
    """In elements; 0 along dimensions of one that stand for all."""
    names = {
        "page_stride": "key",
        "table_stride": "page_table",
        "query_token query_head": "query",
        "out_token out_head": "out",
        "lse_token lse_head": "lse",
        "scale_page scale_row": "key_scales",
        "mask_head mask_token": "mask",
        "slope_request": "alibi_slopes",
    }
    return named_strides(arrays, names)


def _scoring(options: Mapping[str, Any]) -> dict[str, float]:
    """What scores are multiplied by, before and after the cap: they end as logarithms to base 2."""
    cap = options["softcap"]
    return {"factor": options["scale"] / cap if cap else options["scale"] * LOG2_E, "cap": cap * LOG2_E}


# Ahead of time


@dataclass(frozen=True)
class _Shape:
    """A call of DeepSeek's dimensions: latents of 512, rotated parts of 64."""

    name: str
    heads: int
    query: torch.dtype = torch.bfloat16
    key: torch.dtype = torch.bfloat16
    page_size: int = 64
    tokens: int = 64
    options: bool = False
    chips: tuple[str, ...] = tuple(CHIPS)


_SHAPES = (
    _Shape("decode_128_heads", 128),
    _Shape("decode_32_heads", 32, chips=("sm_90", "gfx942")),
    _Shape("decode_16_heads", 16),
    _Shape("any_page_128_heads", 128, page_size=1, chips=("sm_90",)),
    _Shape("prefill_128_heads", 128, tokens=4096, chips=("sm_90",)),
    _Shape("options_128_heads", 128, options=True, chips=("sm_90",)),
    _Shape("float8_128_heads", 128, key=torch.float8_e4m3fn, chips=("sm_80", "sm_90")),
    _Shape("float8_16_heads", 16, key=torch.float8_e4m3fn, chips=("sm_90", "gfx942")),
    _Shape("int8_16_heads", 16, key=torch.int8, chips=("sm_90",)),
    _Shape("int4_16_heads", 16, key=torch.uint8, chips=("sm_90",)),
    _Shape("float32_16_heads", 16, query=torch.float32, key=torch.float32, chips=("sm_80", "sm_90", "gfx942")),
)
# What a worker remembers of its interval while it goes over keys: spilled before the loop, read again behind it.
# The sums of 64 rows take half of the registers.
_SPILLED, _SPILLED_BY_64_ROWS = 64, 256
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_SPELLED = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


def mla_variants(kernel: Any, merge_kernel: Any) -> list[Variant]:
    """Each shape on each of its chips, and the merge."""
    found = []
    for shape in _SHAPES:
        for chip in shape.chips:
            launch = launch_on(chip, _meta_arrays(shape), _meta_options(shape), _MULTIPROCESSORS[chip])
            tile = launch.division.tile
            wgmma = chip == "sm_90" and (tile.keys_first or tile.rows == 64)
            promised = {
                "instructions": {chip: ("wgmma.mma_async",)} if wgmma else {},
                "spills": {chip: _SPILLED_BY_64_ROWS if tile.rows == 64 else _SPILLED},
            }
            setting = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **promised}
            found.append(_variant(shape.name, chip, kernel, launch.arguments, setting))
            if shape.name == "decode_16_heads":
                found.append(_variant("merge_16_heads", chip, merge_kernel, launch.merged, {}))
    return found


def _meta_arrays(shape: _Shape) -> dict[str, Any]:
    """Arrays without memory."""

    def on_meta(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    tokens, heads, requests, pages = shape.tokens, shape.heads, 64, 8192
    codes = 288 if shape.key == torch.uint8 else 576
    arrays = {
        "query": on_meta(tokens, heads, 576, dtype=shape.query),
        "key": on_meta(pages, shape.page_size, 1, codes, dtype=shape.key),
        "out": on_meta(tokens, heads, 512, dtype=shape.query),
        "lse": on_meta(tokens, heads, dtype=torch.float32),
        "page_table": on_meta(requests, 8192 // shape.page_size),
        "key_lens": on_meta(requests),
        "query_starts": on_meta(requests + 1),
    }
    if shape.key in _LARGEST:
        arrays["key_scales"] = on_meta(pages, shape.page_size, 1, dtype=torch.float32)
    if shape.options:
        arrays["sinks"] = on_meta(heads, dtype=torch.float32)
        arrays["alibi_slopes"] = on_meta(requests, heads, dtype=torch.float32)
        arrays["mask"] = on_meta(1, tokens, 64, dtype=torch.float32)
    return arrays


def _meta_options(shape: _Shape) -> dict[str, Any]:
    fixed = {"top_left": False, "window_left": -1, "window_right": 0, "scale": 0.1, "batch_invariant": False}
    return {**fixed, "softcap": 30.0 if shape.options else 0.0, "precision": "auto"}


def _variant(name: str, chip: str, kernel: Any, arguments: Mapping[str, Any], setting: Mapping[str, Any]) -> Variant:
    known = ("setup", "line", "MOST_PARTS", "TAKEN")
    fixed = {n: value for n, value in arguments.items() if n in known or value is None}
    types = {n: _spelled(value) for n, value in arguments.items() if n not in fixed}
    plain = set(kernel.do_not_specialize)
    steps = [n for n in types if isinstance(arguments[n], int) and n not in plain and arguments[n] % 16 == 0]
    return Variant(name, kernel, types, fixed, chips=(chip,), aligned=tuple(steps), **setting)


def _spelled(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_SPELLED[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"
