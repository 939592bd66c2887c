"""append_pages on a GPU: a step's keys and values into the pages, and its queries, in one launch.

Wins: always, where the arrays are. Schedule: a program has a token and up to eight heads of its query, key or value. It
reads them once, normalizes, rotates (a partner of each element is read again, out of the first cache), spreads, makes
codes of them and writes. Programs of all three lie side by side in one grid. Source: ours; Su et al. 2021 (rotation).
Error: norm and rotation in float32; a code is the nearest to the float32 quotient of number and scale, ties to even, so
what is neither normalized nor rotated is the reference's bit for bit, scales too. Nothing is written for a slot outside
the pages; NaN becomes 0 where a caller's scale belongs to it and the type has no code. Bound: memory. Not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import rounded_to
from headrace.kernels.triton.launch import named_strides, on_device_of
from headrace.kernels.triton.variants import Variant

_CODES = {torch.float8_e4m3fn: "float8", torch.int8: "int8", torch.uint8: "int4"}
_MOST_HEADS = 8
# Added to a number and taken off again, it leaves a whole one, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@dataclass(frozen=True)
class AppendSetup:
    """What a kernel is compiled for. Formats: "" as it is, else codes; scaling: "own", "given" or "" for none.

    heads: of a program; block: elements of a row, a power of two. spread: halvings of a query's and a key's blocks.
    """

    query_heads: int
    kv_heads: int
    value_heads: int
    query_dim: int
    key_dim: int
    prefix_dim: int
    value_dim: int
    rotary_dim: int
    page: int
    heads: int
    block: int
    key_format: str = ""
    value_format: str = ""
    key_scaling: str = ""
    value_scaling: str = ""
    query_normed: bool = False
    key_normed: bool = False
    interleaved: bool = True
    query_spread: int = 0
    key_spread: int = 0

    @property
    def query_programs(self) -> int:
        return -(-self.query_heads // self.heads)

    @property
    def key_programs(self) -> int:
        return -(-self.kv_heads // self.heads)

    @property
    def programs(self) -> int:
        """Of a token."""
        return self.query_programs + self.key_programs + -(-self.value_heads // self.heads)


@triton.jit
def rotated(x, rows, live, item, table, factor, weight, setup: tl.constexpr, normed: tl.constexpr):
    """x [heads, items] turned by the table's row; items from rotary_dim on stay."""
    pairs: tl.constexpr = setup.rotary_dim // 2
    if setup.interleaved:
        partner = item ^ 1
        angle = item // 2
        first = item % 2 == 0
    else:
        first = item < pairs
        partner = tl.where(first, item + pairs, item - pairs)
        angle = tl.where(first, item, item - pairs)
    turned = (item >= 0) & (item < 2 * pairs)
    other = tl.load(rows[:, None] + partner[None, :], mask=live[:, None] & turned[None, :], other=0.0).to(tl.float32)
    if normed:
        other = other * factor[:, None] * tl.load(weight + partner, mask=turned, other=0.0)[None, :]
    cosine = tl.load(table + angle, mask=turned, other=1.0)
    sine = tl.load(table + pairs + angle, mask=turned, other=0.0)
    sine = tl.where(first, -sine, sine)
    return x * cosine[None, :] + other * sine[None, :]


@triton.jit
def spread_out(x, setup: tl.constexpr, halvings: tl.constexpr):
    """Times the Hadamard matrix of 2^halvings over its root, block by block: sums and differences of neighbours, which
    change places so that the next step's neighbours differ in the next bit of their number."""
    size: tl.constexpr = 1 << halvings
    blocks: tl.constexpr = setup.block // size
    heads: tl.constexpr = setup.heads
    block: tl.constexpr = setup.block
    for _ in tl.static_range(halvings):
        one, other = tl.split(tl.reshape(x, [heads, blocks, size // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(one + other, one - other), (0, 1, 3, 2)), [heads, block])
    return x * (1.0 / tl.sqrt(tl.full([1, 1], size, tl.float32)))


@triton.jit
def computed(
    rows,
    prefix,
    table,
    weight,
    live,
    eps,
    setup: tl.constexpr,
    dim: tl.constexpr,
    prefix_dim: tl.constexpr,
    turned: tl.constexpr,
    normed: tl.constexpr,
    halvings: tl.constexpr,
):
    """Rows [heads, block] in float32, ready to be written: normalized, rotated, spread, and what lies before them."""
    item = tl.arange(0, setup.block) - prefix_dim
    own = (item >= 0) & (item < dim)
    x = tl.load(rows[:, None] + item[None, :], mask=live[:, None] & own[None, :], other=0.0).to(tl.float32)
    factor = tl.full([setup.heads], 1.0, tl.float32)
    if normed:
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / dim + eps)
        x = x * factor[:, None] * tl.load(weight + item, mask=own, other=0.0)[None, :]
    if turned:
        x = rotated(x, rows, live, item, table, factor, weight, setup, normed)
    if prefix_dim > 0:
        before = tl.load(prefix + item + prefix_dim, mask=item < 0, other=0.0).to(tl.float32)
        x = tl.where((item < 0)[None, :], before[None, :], x)
    if halvings > 0:
        x = spread_out(x, setup, halvings)
    return x


@triton.jit
def float8_codes(x):
    """The bits of float8_e4m3fn nearest to x, ties to even; beyond 448 it is 448, NaN stays NaN."""
    size = tl.minimum(tl.abs(tl.where(x == x, x, 0.0)), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # 3 bits of the mantissa stay of 23, and the exponent's bias is 7 instead of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size * 512.0 + _ROUNDER - _ROUNDER).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def whole_numbers(x, lowest: tl.constexpr, largest: tl.constexpr):
    """The nearest whole numbers within bounds, ties to even, int32; 0 for NaN."""
    held = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), lowest), largest)
    return (held + _ROUNDER - _ROUNDER).to(tl.int32)


@triton.jit
def quotients(x, scales, live, largest: tl.constexpr, scaling: tl.constexpr):
    """x over its rows' scales, which are computed and written, or read; zeros where a scale is 0 or NaN."""
    y = x
    if scaling != "":
        if scaling == "own":
            finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1)
            scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([x.shape[0]], largest, tl.float32))
            scale = tl.where(finite > 0, scale, float("nan"))
            tl.store(scales, scale, mask=live)
        else:
            scale = tl.load(scales, mask=live, other=1.0)
        usable = (scale > 0)[:, None]
        divisor = tl.broadcast_to(tl.where(usable, scale[:, None], 1.0), x.shape)
        y = tl.div_rn(tl.where(usable, x, 0.0), divisor)
    return y


@triton.jit
def write(
    pages,
    scales,
    x,
    live,
    setup: tl.constexpr,
    dim: tl.constexpr,
    format: tl.constexpr,
    scaling: tl.constexpr,
):
    """Rows to their places in the pages, or in the queries, as what is kept there."""
    item = tl.arange(0, setup.block)
    inside = live[:, None] & (item < dim)[None, :]
    places = pages[:, None] + item[None, :]
    # Queries may be written over themselves: all of the program have read them by now.
    tl.debug_barrier()
    if format == "float8":
        tl.store(places, float8_codes(quotients(x, scales, live, 448.0, scaling)), mask=inside)
    elif format == "int8":
        codes = whole_numbers(quotients(x, scales, live, 127.0, scaling), -128.0, 127.0)
        tl.store(places, codes.to(tl.int8), mask=inside)
    elif format == "int4":
        codes = whole_numbers(quotients(x, scales, live, 7.0, scaling), -8.0, 7.0)
        low, high = tl.split(tl.reshape(codes, [setup.heads, setup.block // 2, 2]))
        pair = tl.arange(0, setup.block // 2)
        there = live[:, None] & (2 * pair < dim)[None, :]
        tl.store(pages[:, None] + pair[None, :], ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=there)
    else:
        tl.store(places, rounded_to(x, pages.dtype.element_ty), mask=inside)


@triton.jit
def append_kernel(
    query,
    out,
    key,
    prefix,
    value,
    key_pages,
    value_pages,
    key_scales,
    value_scales,
    slots,
    table,
    query_norm,
    key_norm,
    num_slots,
    eps,
    query_token,
    query_head,
    out_token,
    out_head,
    key_token,
    key_head,
    prefix_token,
    value_token,
    value_head,
    key_page,
    key_row,
    key_page_head,
    value_page,
    value_row,
    value_page_head,
    key_scale_page,
    key_scale_row,
    key_scale_head,
    value_scale_page,
    value_scale_row,
    value_scale_head,
    table_token,
    setup: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    turned: tl.constexpr = setup.rotary_dim > 0
    dim: tl.constexpr = setup.prefix_dim + setup.key_dim
    angles = table
    if turned:
        angles = table + token * table_token
    slot = tl.load(slots + token)
    known = (slot >= 0) & (slot < num_slots)
    page = (slot // setup.page).to(tl.int64)
    row = (slot % setup.page).to(tl.int64)
    in_part = tl.arange(0, setup.heads)
    if setup.query_heads > 0 and part < setup.query_programs:
        head = (part * setup.heads + in_part).to(tl.int64)
        live = head < setup.query_heads
        rows = query + token * query_token + head * query_head
        normed: tl.constexpr = setup.query_normed
        halvings: tl.constexpr = setup.query_spread
        width: tl.constexpr = setup.query_dim
        x = computed(rows, query, angles, query_norm, live, eps, setup, width, 0, turned, normed, halvings)
        write(out + token * out_token + head * out_head, out, x, live, setup, width, "", "")
    part -= setup.query_programs
    if (part >= 0) & (part < setup.key_programs):
        head = (part * setup.heads + in_part).to(tl.int64)
        live = head < setup.kv_heads
        rows = key + token * key_token + head * key_head
        before = key
        if setup.prefix_dim > 0:
            before = prefix + token * prefix_token
        key_normed: tl.constexpr = setup.key_normed
        key_halvings: tl.constexpr = setup.key_spread
        key_dim: tl.constexpr = setup.key_dim
        prefix_dim: tl.constexpr = setup.prefix_dim
        x = computed(
            rows, before, angles, key_norm, live, eps, setup, key_dim, prefix_dim, turned, key_normed, key_halvings
        )
        key_format: tl.constexpr = setup.key_format
        key_scaling: tl.constexpr = setup.key_scaling
        to = key_pages + page * key_page + row * key_row + head * key_page_head
        scales = key_pages
        if key_scaling != "":
            scales = key_scales + page * key_scale_page + row * key_scale_row + head * key_scale_head
        write(to, scales, x, live & known, setup, dim, key_format, key_scaling)
    part -= setup.key_programs
    if setup.value_heads > 0 and part >= 0:
        head = (part * setup.heads + in_part).to(tl.int64)
        live = head < setup.value_heads
        rows = value + token * value_token + head * value_head
        value_dim: tl.constexpr = setup.value_dim
        x = computed(rows, value, angles, value, live, eps, setup, value_dim, 0, False, False, 0)
        value_format: tl.constexpr = setup.value_format
        value_scaling: tl.constexpr = setup.value_scaling
        to = value_pages + page * value_page + row * value_row + head * value_page_head
        scales = value_pages
        if value_scaling != "":
            scales = value_scales + page * value_scale_page + row * value_scale_row + head * value_scale_head
        write(to, scales, x, live & known, setup, value_dim, value_format, value_scaling)


def run(arrays: Mapping[str, Any], interleaved: bool, eps: float, spread: bool = False) -> None:
    """Writes to the pages, the scales and `out` among the arrays: tensors that fit each other."""
    given = _with_heads(arrays)
    setup = _setup_of(given, interleaved, spread)
    tokens, pages = len(given["slots"]), given["key_pages"]
    if not tokens or not setup.programs:
        return
    with on_device_of(pages):
        append_kernel[(tokens, setup.programs)](
            **_pointers(given),
            num_slots=pages.shape[0] * pages.shape[1],
            eps=eps,
            **_strides(given),
            setup=setup,
            num_warps=_warps_of(setup),
        )


def _with_heads(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a latent cache with a dimension for its one head."""
    found = dict(arrays)
    for name, place in (("key", 1), ("latent", 1), ("key_pages", 2)):
        if found.get(name) is not None and found[name].dim() == place + 1:
            found[name] = found[name].unsqueeze(place)
    return found


def _setup_of(given: Mapping[str, Any], interleaved: bool, spread: bool) -> AppendSetup:
    key, query, value, prefix = given["key"], given.get("query"), given.get("value"), given.get("latent")
    query_heads, query_dim = query.shape[1:] if query is not None else (0, 1)
    value_heads, value_dim = value.shape[1:] if value is not None else (0, 1)
    prefix_dim = prefix.shape[2] if prefix is not None else 0
    widest = max(query_dim, prefix_dim + key.shape[2], value_dim, 2)
    table = given.get("table")
    return AppendSetup(
        query_heads=query_heads,
        kv_heads=key.shape[1],
        value_heads=value_heads,
        query_dim=query_dim,
        key_dim=key.shape[2],
        prefix_dim=prefix_dim,
        value_dim=value_dim,
        rotary_dim=0 if table is None else table.shape[1],
        page=max(given["key_pages"].shape[1], 1),
        heads=min(_MOST_HEADS, triton.next_power_of_2(max(query_heads, key.shape[1], 1))),
        block=triton.next_power_of_2(widest),
        key_format=_CODES.get(given["key_pages"].dtype, ""),
        value_format=_CODES.get(given["value_pages"].dtype, "") if value is not None else "",
        key_scaling=_scaling_of(given["key_pages"], given.get("key_scales")),
        value_scaling=_scaling_of(given["value_pages"], given.get("value_scales")) if value is not None else "",
        query_normed=given.get("query_norm") is not None,
        key_normed=given.get("key_norm") is not None,
        interleaved=interleaved,
        query_spread=_halvings(query_dim) if spread else 0,
        key_spread=_halvings(key.shape[2]) if spread else 0,
    )


def _scaling_of(pages: torch.Tensor, scales: torch.Tensor | None) -> str:
    """Scales of one per page are the caller's; in pages of one token they are each token's own."""
    if scales is None:
        return ""
    return "own" if scales.shape[1] == pages.shape[1] else "given"


def _halvings(dim: int) -> int:
    """Of the largest power of two that divides dim."""
    return (dim & -dim).bit_length() - 1


def _warps_of(setup: AppendSetup) -> int:
    """Eight elements to a thread."""
    return min(max(setup.heads * setup.block // 256, 1), 8)


def _pointers(given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("query", "out", "key", "value", "key_pages", "value_pages", "key_scales", "value_scales", "slots", "table")
    found = {name: given.get(name) for name in (*names, "query_norm", "key_norm")}
    found |= {"prefix": given.get("latent"), "slots": given["slots"].contiguous()}
    for name in ("key_pages", "value_pages"):
        pages = found[name]
        if pages is not None and pages.dtype == torch.float8_e4m3fn:
            found[name] = pages.view(torch.uint8)
    return found


def _strides(given: Mapping[str, Any]) -> dict[str, int]:
    """In elements; 0 along dimensions of one, and of what is not there."""

    names = {
        "query_token query_head": "query",
        "out_token out_head": "out",
        "key_token key_head": "key",
        "prefix_token": "latent",
        "value_token value_head": "value",
        "key_page key_row key_page_head": "key_pages",
        "value_page value_row value_page_head": "value_pages",
        "key_scale_page key_scale_row key_scale_head": "key_scales",
        "value_scale_page value_scale_row value_scale_head": "value_scales",
        "table_token": "table",
    }
    return named_strides(given, names)


def variants() -> list[Variant]:
    """A model of 32 and 8 heads of 128, for each sort of pages, and a latent cache."""
    model = AppendSetup(32, 8, 8, 128, 128, 0, 128, 128, 16, 8, 128, interleaved=False)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "bf16": ("bf16", {}),
        "bf16 normed": ("bf16", {"query_normed": True, "key_normed": True}),
        "float8": ("u8", {"key_format": "float8", "value_format": "float8"}),
        "int8": ("i8", {f"{n}_{w}": v for n in ("key", "value") for w, v in (("format", "int8"), ("scaling", "own"))}),
        "int4 spread": (
            "u8",
            {f"{n}_{w}": v for n in ("key", "value") for w, v in (("format", "int4"), ("scaling", "own"))}
            | {"query_spread": 7, "key_spread": 7},
        ),
    }
    latent = AppendSetup(16, 1, 0, 64, 64, 512, 1, 64, 64, 8, 1024)
    found = [_variant(f"32/8 d128 {name}", stored, replace(model, **rest)) for name, (stored, rest) in kinds.items()]
    return [*found, _variant("latent 512 + 64", "bf16", latent)]


def _variant(name: str, stored: str, setup: AppendSetup) -> Variant:
    types = dict.fromkeys(append_kernel.arg_names, "i32") | {"eps": "fp32", "table": "*fp32", "slots": "*i32"}
    types |= dict.fromkeys(("query", "out", "key", "prefix", "value"), "*bf16")
    types |= dict.fromkeys(("key_pages", "value_pages"), f"*{stored}")
    types |= dict.fromkeys(("key_scales", "value_scales", "query_norm", "key_norm"), "*fp32")
    absent = {
        "value": not setup.value_heads,
        "value_pages": not setup.value_heads,
        "prefix": not setup.prefix_dim,
        "query_norm": not setup.query_normed,
        "key_norm": not setup.key_normed,
        "key_scales": not setup.key_scaling,
        "value_scales": not setup.value_scaling,
    }
    constants: dict[str, Any] = {"setup": setup, **{n: None for n, gone in absent.items() if gone}}
    strides = tuple(n for n in types if n.endswith(("_token", "_head", "_page", "_row")) and "scale" not in n)
    types = {n: kind for n, kind in types.items() if n not in constants}
    return Variant(name, append_kernel, types, constants, num_warps=_warps_of(setup), aligned=strides)
