"""What a call of paged attention launches: configuration, workers, workspace and arguments, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from headrace.errors import ArgumentError
from headrace.kernels.paged_tiles import Heads, PagedTile, paged_tile, slots_of, units_of
from headrace.kernels.triton.arrivals import arrival_counters
from headrace.kernels.triton.launch import chip_of, named_strides, num_multiprocessors
from headrace.kernels.triton.variants import CHIPS, Variant

_PRODUCTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 16, torch.uint8: 4}
_UNBOUNDED, _FARTHEST = -1, 1 << 30
_EQUAL_ROWS = 64  # of a tile of decode and verification; in larger ones equal parts take registers that are not there
FLOAT8 = torch.float8_e4m3fn
_SMALL = (
    *("query", "query_starts", "key_lens", "page_table", "mask", "sinks", "alibi_slopes"),
    *("key_scales", "value_scales"),
)


@dataclass(frozen=True)
class PagedSetup:
    """What a kernel is compiled for. The first nine, and equal, are those of `ScheduleSetup`.

    block, rest: parts of the head dimension; values: of the value dimension; page: keys of a page.
    format: how pages hold numbers; products: what is multiplied. chunk: tiles in a unit, 1 unless batch-invariant.
    """

    group: int
    rows: int
    unit_keys: int
    top_left: bool
    weight: int
    overhead: int
    merge_cost: int
    snap: int
    least: int
    head_dim: int
    value_dim: int
    block: int
    rest: int
    values: int
    page: int
    keys: int
    chunk: int
    products: Any
    precision: str = "ieee"
    format: str = ""
    mask: str = ""
    capped: bool = False
    alibi: bool = False
    sinks: bool = False
    key_scales: bool = False
    value_scales: bool = False
    equal: bool = False

    @property
    def one_page(self) -> bool:
        """Whether a tile of keys lies in one page."""
        return self.page % self.keys == 0

    @property
    def packed(self) -> int:
        """Numbers in an item of the pages."""
        return 2 if self.format == "int4" else 1

    @property
    def shifted(self) -> bool:
        """Whether weights are of a type that their scales could overflow."""
        return self.products == tl.float16

    @property
    def evict(self) -> str:
        """Where one tile of rows is all there is, keys are read once."""
        return "evict_first" if self.rows <= 32 else ""


@dataclass(frozen=True)
class PagedLaunch:
    """A launch: as many programs as workers."""

    tile: PagedTile
    workers: int
    slots: int
    arguments: dict[str, Any]


def launch_of(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> PagedLaunch | None:
    """The launch of a call; None where there is nothing to compute."""
    arrays = repacked(arrays)
    query, key, table = (arrays[name] for name in ("query", "key", "page_table"))
    num_tokens, heads, _ = query.shape
    num_requests, max_pages = table.shape
    if 0 in (num_tokens, num_requests):
        return None
    invariant = bool(options["batch_invariant"])
    products, precision = products_of(query, key, options.get("precision", "auto"))
    dims = heads_of(query, key, arrays["value"], products)
    masked = arrays.get("mask") is not None
    tile = paged_tile(dims, num_tokens, num_requests, invariant=invariant, chip=chip_of(query), masked=masked)
    num_pages, page, kv_heads, _ = key.shape
    most_keys = max_pages * page if num_pages else 0
    num_tiles = num_tokens * dims.group // tile.rows + num_requests
    workers = num_multiprocessors(query) * tile.per_multiprocessor
    num_items = num_tiles * kv_heads
    slots = slots_of(tile, workers=workers, num_items=num_items, most_keys=most_keys, invariant=invariant)
    sizes = {
        "num_requests": num_requests,
        "num_tokens": num_tokens,
        "num_pages": num_pages,
        "max_pages": max_pages,
        "most_keys": most_keys,
        "left": bound(options["window_left"]),
        "right": bound(options["window_right"]),
        "halvings": (num_requests - 1).bit_length(),
        "num_tiles": num_tiles,
        "num_columns": arrays["mask"].shape[-1] if masked else 0,
        "most_units": units_of(tile, most_keys),
        "by_item": int(num_items < workers),
        "kv_heads": kv_heads,
        "scale": float(options["scale"]),
        "softcap": float(options["softcap"]) or 1.0,
    }
    workspace = {
        "partial_out": torch.empty(slots * tile.rows * dims.value_block, dtype=torch.float32, device=query.device),
        "partial_sums": torch.empty(slots * tile.rows * 2, dtype=torch.float32, device=query.device),
        "counters": arrival_counters(query, workers),
    }
    setup = setup_of(arrays, options, dims, tile, products=products, precision=precision)
    return PagedLaunch(tile, workers, slots, pointers(arrays) | workspace | sizes | strides(arrays) | {"setup": setup})


def setup_of(
    arrays: Mapping[str, Any],
    options: Mapping[str, Any],
    dims: Heads,
    tile: PagedTile,
    *,
    products: Any,
    precision: str,
) -> PagedSetup:
    mask, key = arrays.get("mask"), arrays["key"]
    return configured(
        dims,
        tile,
        top_left=bool(options["top_left"]),
        page=key.shape[1],
        products=products,
        precision=precision,
        format=format_of(key),
        mask="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        capped=options["softcap"] > 0,
        alibi=arrays.get("alibi_slopes") is not None,
        sinks=arrays.get("sinks") is not None,
        key_scales=arrays.get("key_scales") is not None,
        value_scales=arrays.get("value_scales") is not None,
    )


def configured(dims: Heads, tile: PagedTile, *, top_left: bool = False, **rest: Any) -> PagedSetup:
    """A setup of these heads with this tile."""
    costs = {n: getattr(tile, n) for n in ("weight", "overhead", "merge_cost", "snap", "least", "unit_keys")}
    return PagedSetup(
        group=dims.group,
        rows=tile.rows,
        top_left=top_left,
        **costs,
        head_dim=dims.head_dim,
        value_dim=dims.value_dim,
        block=dims.key_blocks[0],
        rest=dims.key_blocks[1],
        values=dims.value_block,
        keys=tile.keys,
        chunk=tile.chunk,
        equal=tile.chunk == 1 and tile.rows <= _EQUAL_ROWS,
        **rest,
    )


# What is multiplied


def products_of(query: torch.Tensor, key: torch.Tensor, precision: str) -> tuple[Any, str]:
    """The type of the products and how those of float32 are made.

    16-bit queries with keys of their type or with codes stay as they are; everything else is float32, or with "fast"
    one product of tf32, on AMD of bfloat16.
    """
    mixed = key.dtype in _PRODUCTS and key.dtype != query.dtype
    if query.dtype != torch.float32 and not mixed and precision != "exact":
        return _PRODUCTS[query.dtype], "ieee"
    on_amd = bool(torch.version.hip)
    if precision == "fast":
        return (tl.bfloat16, "ieee") if on_amd else (tl.float32, "tf32")
    return tl.float32, "ieee" if on_amd else "tf32x3"


def heads_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, products: Any) -> Heads:
    bits, packed = _BITS.get(key.dtype, 8), 2 if key.dtype == torch.uint8 else 1
    group = query.shape[1] // key.shape[2]
    return Heads(group, query.shape[2], value.shape[3] * packed, bits, wide=products == tl.float32)


def format_of(key: torch.Tensor) -> str:
    """How the kernel reads pages: "" is numbers of a type it knows."""
    if key.dtype == torch.uint8:
        return "int4"
    if key.dtype == FLOAT8:
        return "float8" if native_float8(key) else "float8_bits"
    return ""


def native_float8(tensor: torch.Tensor) -> bool:
    """Whether the device converts float8_e4m3fn itself."""
    if not tensor.is_cuda or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 9)


def bound(keys: int) -> int:
    """A side of the window in 32 bits; -1 is none."""
    return _UNBOUNDED if keys < 0 else min(int(keys), _FARTHEST)


# Memory


def pointers(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by the kernel's words, None where there are none, in types that it reads."""
    found = {name: packed(arrays[name], name) for name in ("key", "value", "out")} | {"lse": arrays["lse"]}
    found |= {name: arrays.get(name) for name in _SMALL}
    if found["mask"] is not None and found["mask"].dtype == torch.bool:
        found["mask"] = found["mask"].view(torch.uint8)
    if arrays["key"].dtype == FLOAT8:
        found |= {name: found[name].view(torch.uint8) for name in ("key", "value")}
    return found


def packed(array: torch.Tensor, name: str) -> torch.Tensor:
    """The array, if elements of its last dimension lie side by side; else an ArgumentError."""
    if array.numel() and array.shape[-1] > 1 and array.stride(-1) != 1:
        named = {"key": "key_pages", "value": "value_pages"}.get(name, name)
        raise ArgumentError(f"{named}: expected a contiguous last dimension, got strides {array.stride()}")
    return array


def repacked(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same with copies of small arrays whose last dimension is strided; those of scales may be."""
    found = dict(arrays)
    for name in set(_SMALL[:-2]) & set(found):
        array = found[name]
        if array is not None and array.numel() and array.shape[-1] > 1 and array.stride(-1) != 1:
            found[name] = array.contiguous()
    return found


def strides(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Of all arrays, in elements; 0 along dimensions of one that stand for all."""

    names = {
        "query_token query_head": "query",
        "out_token out_head": "out",
        "lse_token lse_head": "lse",
        "key_page key_row key_head": "key",
        "value_page value_row value_head": "value",
        "table_row": "page_table",
        "key_scale_page key_scale_row key_scale_head": "key_scales",
        "value_scale_page value_scale_row value_scale_head": "value_scales",
        "mask_head mask_token": "mask",
        "slopes_request": "alibi_slopes",
    }
    return named_strides(arrays, names)


# Compiling ahead of time

# Of scalars of the schedule that stay through the loop over keys; nothing in that loop is spilled.
_SPILLS = 64

_TYPES = {tl.float32: "fp32", tl.float16: "fp16", tl.bfloat16: "bf16"}


def paged_variants(kernel: Any) -> list[Variant]:
    """The configurations of common shapes on every chip."""
    common = Heads(4, 128, 128, 16)
    cases: list[tuple[str, Heads, int, dict[str, Any]]] = [
        ("decode d128 bf16", common, 1, {}),
        ("decode d128 bf16 page 64", common, 1, {"page": 64}),
        ("decode d64 fp16", Heads(4, 64, 64, 16), 1, {"products": tl.float16}),
        ("decode d576/512 bf16", Heads(16, 576, 512, 16), 1, {"page": 64}),
        ("decode d128 fp32", Heads(4, 128, 128, 32, wide=True), 1, {"products": tl.float32}),
        ("decode d128 int8", Heads(4, 128, 128, 8), 1, {"key": "i8"}),
        ("decode d128 int4", Heads(4, 128, 128, 4), 1, {"key": "u8", "format": "int4"}),
        ("decode d128 float8", Heads(4, 128, 128, 8), 1, {"key": "float8"}),
        ("batch-invariant d128 bf16", common, 1, {"invariant": True}),
        ("verify d128 bf16", common, 8, {}),
        ("prefill d128 bf16", common, 4096, {}),
    ]
    return [_variant(kernel, name, chip, dims, tokens, given) for name, dims, tokens, given in cases for chip in CHIPS]


def _variant(kernel: Any, name: str, chip: str, dims: Heads, tokens: int, given: dict[str, Any]) -> Variant:
    rest = {"page": 16, "products": tl.bfloat16} | given
    coded, invariant = rest.pop("key", ""), rest.pop("invariant", False)
    tile = paged_tile(dims, tokens, 1, invariant=invariant, chip=chip)
    products = rest["products"]
    if products == tl.float32:
        rest["precision"] = "ieee" if chip == "gfx942" else "tf32x3"
    stored = coded or _TYPES[products]
    if coded == "float8":
        stored, rest["format"] = "u8", "float8_bits" if chip in ("sm_80", "gfx942") else "float8"
    if coded:
        rest |= {"key_scales": True, "value_scales": True}
    setup = configured(dims, tile, **rest)
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("query", "out"), f"*{_TYPES[products]}")
    types |= {"key": f"*{stored}", "value": f"*{stored}", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("query_starts", "key_lens", "page_table", "counters"), "*i32")
    types |= dict.fromkeys(("lse", "partial_out", "partial_sums"), "*fp32")
    types |= {name: "*fp32" for name in ("key_scales", "value_scales") if coded}
    absent = [name for name in ("key_scales", "value_scales") if not coded] + ["mask", "sinks", "alibi_slopes"]
    constants: dict[str, Any] = {"setup": setup, **dict.fromkeys(absent)}
    return Variant(
        name,
        kernel,
        {name: kind for name, kind in types.items() if name not in constants},
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        chips=(chip,),
        aligned=tuple(n for n in types if n.startswith(("query_", "key_", "value_", "out_")) and n not in _POINTERS),
        instructions={} if chip == "gfx942" else {chip: ("cp.async",)},
        spills={chip: _SPILLS},
    )


_POINTERS = ("query_starts", "key_lens", "key_scales", "value_scales", "key_scale_row", "value_scale_row")
