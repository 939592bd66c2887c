"""From the arrays of a call of attention's gradients to the arguments of its kernels. Reads no array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton

from headrace.kernels.gpu_products import product_types
from headrace.kernels.triton.attention_call import (
    KernelCall,
    disguised,
    dot_precision,
    dtype_of,
    is_wide,
    masked_form,
    said_of,
    shared_arguments,
    strides_of,
)
from headrace.kernels.triton.attention_form import TYPES, Form, part_of
from headrace.kernels.triton.attention_tiles import KEY_GRADIENTS, QUERY_GRADIENTS, Tile, chip_of, tile_of

ROWS_AT_ONCE = 64  # of a program that looks at rows alone
PARTS_AT_ONCE = 1024  # of the sinks' sums


def backward_calls(
    arrays: Mapping[str, Any], options: Mapping[str, Any], chip: str = ""
) -> Iterator[tuple[str, KernelCall]]:
    """The launches, in their order: by the name of the kernel."""
    query = arrays["query"]
    dense, heads = query.dim() == 4, query.shape[-2]
    batch, tokens = query.shape[:2] if dense else (1, query.shape[0])
    totals = torch.empty((2, batch, heads, max(tokens, 1)), dtype=torch.float32, device=query.device)
    steps, chip = triton.cdiv(tokens, ROWS_AT_ONCE), chip or chip_of(query)
    forms = [_form(arrays, options, chip, table) for table in (KEY_GRADIENTS, QUERY_GRADIENTS)]
    rows = replace(forms[0][0], rows=ROWS_AT_ONCE)
    parts = None
    if "d_sinks" in arrays:
        parts = torch.empty((heads, batch * steps), dtype=torch.float32, device=query.device)
    if batch * steps:
        yield "rows", KernelCall(batch * steps * heads, _row_arguments(arrays, totals, parts, rows, dense), 4, 1)
    forms, masks = _with_masks(forms, arrays, dense)
    shared = {k: v for k, v in shared_arguments(arrays, options, dense).items() if k != "sinks"}
    shared |= masks | {"totals": totals[0], "deltas": totals[1], "d_out": arrays["d_out"]}
    shared["d_out_strides"] = strides_of(arrays["d_out"], dense)
    for name, (form, tile) in zip(("keys", "queries"), forms, strict=True):
        call = _walk(name, arrays, shared | {"form": form}, tile, dense)
        if call.num_programs:
            yield name, call
    if parts is not None:
        sums = {"d_sink_parts": parts, "d_sinks": arrays["d_sinks"], "num_parts": parts.shape[1]}
        yield "sinks", KernelCall(heads, sums | {"width": PARTS_AT_ONCE}, 4, 1)


def _row_arguments(
    arrays: Mapping[str, Any], totals: torch.Tensor, parts: torch.Tensor | None, form: Form, dense: bool
) -> dict[str, Any]:
    names = ("d_out", "out", "lse", "d_lse")
    found: dict[str, Any] = {name: arrays.get(name) for name in (*names, "sinks")}
    found |= {f"{name}_strides": strides_of(arrays.get(name), dense) for name in names[:2]}
    found |= {f"{name}_strides": disguised(*strides_of(arrays.get(name), dense)) for name in names[2:]}
    tokens, heads = arrays["query"].shape[-3:-1]
    sizes = disguised(tokens, heads, triton.cdiv(tokens, form.rows))
    return found | {"totals": totals[0], "deltas": totals[1], "d_sink_parts": parts, "sizes": sizes, "form": form}


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
    requests = query.shape[0] if dense else arrays["query_starts"].shape[0] - 1
    tokens, keys = (query.shape[1], key.shape[1]) if dense else (query.shape[0], key.shape[0])
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
