"""From the arrays of a call of attention's gradients to the arguments of its kernels. Reads no array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.gpu_products import product_types
from headrace.kernels.triton.attention_call import (
    KernelCall,
    disguised,
    dot_precision,
    dtype_of,
    is_wide,
    masked_form,
    packed_vector,
    said_of,
    shared_arguments,
    strides_of,
)
from headrace.kernels.triton.attention_form import TYPES, Form, part_of
from headrace.kernels.triton.attention_tiles import (
    KEY_GRADIENTS,
    QUERY_GRADIENTS,
    SUMMED_GRADIENTS,
    Tile,
    chip_of,
    tile_of,
)

ROWS_AT_ONCE = 64  # of a program that looks at rows alone
PARTS_AT_ONCE = 1024  # of the sinks' sums
_IN_ORDER = (KEY_GRADIENTS, QUERY_GRADIENTS)


def backward_calls(
    arrays: Mapping[str, Any], options: Mapping[str, Any], chip: str = "", *, atomic: bool = False
) -> Iterator[tuple[str, KernelCall]]:
    """The launches, in their order: by the name of the kernel. atomic: queries' gradients are added up in memory."""
    query = arrays["query"]
    dense, chip = query.dim() == 4, chip or chip_of(query)
    forms = [_form(arrays, options, chip, table) for table in ((SUMMED_GRADIENTS,) if atomic else _IN_ORDER)]
    padded = max(ROWS_AT_ONCE * (not atomic), *(tile.rows for _, tile in forms))
    forms = [(replace(form, padded=padded), tile) for form, tile in forms]
    requests, tokens = _extent(arrays, dense)
    batch, heads = requests if dense else 1, query.shape[-2]
    tiles = triton.cdiv(tokens, padded) if dense else tokens // padded + requests
    steps = batch * tiles if requests and tokens else 0
    totals = torch.empty((2, batch * heads * max(tiles, 1) * padded), dtype=torch.float32, device=query.device)
    parts = None
    if "d_sinks" in arrays:
        parts = torch.empty((heads, steps), dtype=torch.float32, device=query.device)
    if steps:
        rows = replace(forms[0][0], rows=padded)
        yield "rows", KernelCall(steps * heads, _row_arguments(arrays, totals, parts, rows, tiles, dense), 4, 1)
    forms, masks = _with_masks(forms, arrays, dense)
    shared = {k: v for k, v in shared_arguments(arrays, options, dense).items() if k != "sinks"}
    shared |= masks | {"totals": totals[0], "deltas": totals[1], "d_out": arrays["d_out"]}
    shared["d_out_strides"] = strides_of(arrays["d_out"], dense)
    sums = _sums(forms[0][0], steps * heads, query) if atomic else (None, None)
    for name, (form, tile) in zip(("keys", "queries"), forms, strict=False):
        call = _walk(name, arrays, shared | {"form": form}, tile, dense)
        if name == "keys":
            part = form.key_part
            widths = {"d_query_0": part.width_0, "d_query_1": part.width_1}
            taken = {n: _described(each, w) for (n, w), each in zip(widths.items(), sums, strict=True)}
            call.arguments.update(taken)
        if call.num_programs:
            yield name, call
    if atomic and steps:
        yield (
            "round",
            KernelCall(steps * heads, _round_arguments(arrays, options, sums, forms[0][0], tiles, dense), 4, 1),
        )
    if parts is not None:
        sinks = {"d_sink_parts": parts, "d_sinks": arrays["d_sinks"], "num_parts": parts.shape[1]}
        yield "sinks", KernelCall(heads, sinks | {"width": PARTS_AT_ONCE}, 4, 1)


def _extent(arrays: Mapping[str, Any], dense: bool) -> tuple[int, int]:
    """Requests, and tokens of each or of all ragged ones."""
    query = arrays["query"]
    return (query.shape[0], query.shape[1]) if dense else (arrays["query_starts"].shape[0] - 1, query.shape[0])


def _sums(form: Form, tiles: int, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Zeros for the sums of all tiles of rows, in the two parts of a head, each [tiles x width, rows]."""
    widths = (form.key_part.width_0, form.key_part.width_1)
    made = [torch.zeros((tiles * width, form.rows), dtype=torch.float32, device=query.device) for width in widths]
    return (made[0], made[1] if form.key_part.two else None) if tiles else (None, None)


def _described(sums: torch.Tensor | None, width: int) -> TensorDescriptor | None:
    """The sums as what adds to them takes them: on Hopper and later the copy engine does, a tile at a time."""
    return None if sums is None else TensorDescriptor.from_tensor(sums, [width, sums.shape[1]])


def _row_arguments(
    arrays: Mapping[str, Any],
    totals: torch.Tensor,
    parts: torch.Tensor | None,
    form: Form,
    tiles: int,
    dense: bool,
) -> dict[str, Any]:
    names = ("d_out", "out", "lse", "d_lse")
    found: dict[str, Any] = {name: arrays.get(name) for name in (*names, "sinks")}
    found |= {f"{name}_strides": strides_of(arrays.get(name), dense) for name in names[:2]}
    found |= {f"{name}_strides": disguised(*strides_of(arrays.get(name), dense)) for name in names[2:]}
    found |= {"totals": totals[0], "deltas": totals[1], "d_sink_parts": parts, "form": form}
    return found | {"query_starts": packed_vector(arrays.get("query_starts")), "sizes": _sizes(arrays, tiles, dense)}


def _round_arguments(
    arrays: Mapping[str, Any], options: Mapping[str, Any], sums: Any, form: Form, tiles: int, dense: bool
) -> dict[str, Any]:
    found = {"d_query_0": sums[0], "d_query_1": sums[1], "d_query": arrays["d_query"], "form": form}
    found |= {"d_query_strides": strides_of(arrays["d_query"], dense), "scale": float(options["scale"])}
    return found | {"query_starts": packed_vector(arrays.get("query_starts")), "sizes": _sizes(arrays, tiles, dense)}


def _sizes(arrays: Mapping[str, Any], tiles: int, dense: bool) -> tuple[int, ...]:
    """Those that `sizes_of` reads, of a kernel with a program for each tile of rows of each head."""
    keys, heads = arrays["key"].shape[-3], arrays["query"].shape[-2]
    return disguised(*_extent(arrays, dense), keys, heads, tiles, 1, 0, 0)


def _form(arrays: Mapping[str, Any], options: Mapping[str, Any], chip: str, table: Any) -> tuple[Form, Tile]:
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    scores, values = product_types(dtype_of(query), dtype_of(key), options.get("precision", "auto"))
    part, value_part = part_of(query.shape[-1]), part_of(value.shape[-1])
    bits = 32 if "float32" in (scores, values) else 16
    said = said_of(arrays, options)
    tile = tile_of(table, chip, bits, max(part.width, value_part.width), extra=said.extra)
    tensors = (query, key, value, arrays["d_out"])
    form = Form(
        query_part=part,
        key_part=part,
        value_part=value_part,
        out_part=value_part,
        rows=tile.rows,
        keys=tile.keys,
        score_type=TYPES[scores],
        value_type=TYPES[values],
        loaded_value=TYPES[values],
        precision=dot_precision(chip),
        wide=is_wide(tensors, max(tile.rows, tile.keys)),
        **said.fields(),
    )
    return form, tile


def _with_masks(
    forms: list[tuple[Form, Tile]], arrays: Mapping[str, Any], dense: bool
) -> tuple[list[tuple[Form, Tile]], dict[str, Any]]:
    """Both forms with one packed mask, whose tiles hold those of both, and its arguments."""
    rows, keys = max(tile.rows for _, tile in forms), max(tile.keys for _, tile in forms)
    masked, arguments, columns, words = masked_form(forms[0][0], arrays, rows, keys, dense)
    taken = {name: getattr(masked, name) for name in ("masked", "mask_rows", "mask_columns")}
    return [(replace(form, **taken), tile) for form, tile in forms], arguments | {"mask_size": (columns, words)}


def _walk(name: str, arrays: Mapping[str, Any], shared: dict[str, Any], tile: Tile, dense: bool) -> KernelCall:
    """The launch of the kernel that walks rows for keys, or keys for rows."""
    query, key = arrays["query"], arrays["key"]
    heads, kv_heads = query.shape[-2], key.shape[-2]
    (requests, tokens), keys = _extent(arrays, dense), key.shape[-3]
    if name == "keys":
        results = ["d_key", "d_value"]
        blocks, tiles = kv_heads, triton.cdiv(keys, tile.keys)
        programs = tiles * blocks * (requests if dense else 1)
    else:
        blocks, results = heads, ["d_query"]
        tiles = triton.cdiv(tokens, tile.rows) if dense else tokens // tile.rows + requests
        programs = tiles * blocks * (requests if dense else 1) if tokens else 0
    sizes = disguised(requests, tokens, keys, blocks, tiles, heads // kv_heads, *shared["mask_size"])
    arguments = {k: v for k, v in shared.items() if k != "mask_size"} | {"sizes": sizes}
    for result in results:
        arguments |= {result: arrays[result], f"{result}_strides": strides_of(arrays[result], dense)}
    return KernelCall(programs, arguments, tile.num_warps, tile.num_stages)
