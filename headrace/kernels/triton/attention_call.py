"""From the arrays of an attention call to the arguments of its kernels: strides, sizes, form. Reads no array."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton

from headrace.kernels.gpu_products import FLOATS, product_types
from headrace.kernels.triton.attention_form import TYPES, Form, part_of
from headrace.kernels.triton.attention_mask import WORD, packed_mask
from headrace.kernels.triton.attention_tiles import CONVERTS_FLOAT8, FEW_ROWS, FORWARD, Tile, chip_of, tile_of

FARTHEST = 2**29  # a window beyond it is none
NOWHERE = (0, 0, 0, 0)


@dataclass(frozen=True)
class KernelCall:
    """A launch of so many programs. arguments: by the kernel's names."""

    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def dtype_of(tensor: torch.Tensor) -> str:
    return _name_of(tensor.dtype)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def disguised(*numbers: int) -> tuple[int, ...]:
    """Numbers that Triton compiles no kernels of their own for, as it does for 1 and for multiples of 16: odd ones."""
    return tuple(2 * number + 3 for number in numbers)


def strides_of(tensor: torch.Tensor | None, dense: bool) -> tuple[int, ...]:
    """Those of batch, token and head; ragged arrays have no batch."""
    if tensor is None:
        return NOWHERE[:3]
    return tuple(tensor.stride()[:3]) if dense else (0, *tensor.stride()[:2])


def packed_vector(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """With its numbers side by side."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def forward_call(arrays: Mapping[str, Any], options: Mapping[str, Any], chip: str = "") -> KernelCall:
    """The launch of `attention_kernel` for the arrays of a checked call. chip: whose tiles, by default its device's."""
    query, key = arrays["query"], arrays["key"]
    dense, heads, kv_heads = query.dim() == 4, query.shape[-2], key.shape[-2]
    few = _few_rows(arrays, options, heads // kv_heads)
    form, tile = forward_form(arrays, options, chip or chip_of(query), few)
    requests = query.shape[0] if dense else arrays["query_starts"].shape[0] - 1
    tokens = query.shape[1] if dense else query.shape[0]
    num_tiles = triton.cdiv(tokens * form.packed, tile.rows)
    if not dense:
        num_tiles = tokens * form.packed // tile.rows + requests
    blocks = heads // form.packed
    form, masks, columns, words = masked_form(form, arrays, tile.rows, tile.keys, dense)
    sizes = (requests, tokens, key.shape[1] if dense else key.shape[0], blocks, num_tiles, heads // kv_heads)
    arguments = shared_arguments(arrays, options, dense) | masks
    arguments |= {
        "out": arrays["out"],
        "lse": arrays["lse"],
        "out_strides": strides_of(arrays["out"], dense),
        "lse_strides": disguised(*strides_of(arrays["lse"], dense)),
        "key_scales": arrays.get("key_scales"),
        "value_scales": arrays.get("value_scales"),
        "key_scale_strides": strides_of(arrays.get("key_scales"), dense),
        "value_scale_strides": strides_of(arrays.get("value_scales"), dense),
        "sizes": disguised(*sizes, columns, words),
        "form": form,
    }
    arguments["key"], arguments["value"] = (as_stored(arrays[name], form.key_part.format) for name in ("key", "value"))
    programs = num_tiles * blocks * (requests if dense else 1) if requests and tokens else 0
    return KernelCall(programs, arguments, tile.num_warps, tile.num_stages)


def _few_rows(arrays: Mapping[str, Any], options: Mapping[str, Any], group: int) -> bool:
    """Whether all rows of a request's KV head, or of ragged ones on average, are one small tile.

    Not where bits must not depend on how many queries come together.
    """
    query = arrays["query"]
    requests = 1 if query.dim() == 4 else max(arrays["query_starts"].shape[0] - 1, 1)
    tokens = triton.cdiv(query.shape[-3], requests)
    return tokens * group <= FEW_ROWS and not options.get("batch_invariant")


def forward_form(arrays: Mapping[str, Any], options: Mapping[str, Any], chip: str, few: bool) -> tuple[Form, Tile]:
    """What is compiled, and its tile."""
    query, key, value, mask = (arrays.get(name) for name in ("query", "key", "value", "mask"))
    assert query is not None and key is not None and value is not None
    form, tile = _forward_form(
        (dtype_of(query), dtype_of(key), options.get("precision", "auto")),
        (query.shape[-1], key.shape[-1], value.shape[-1], arrays["out"].shape[-1]),
        said_of(arrays, options),
        few,
        query.shape[-2] // key.shape[-2] if few and (mask is None or mask.shape[-3] == 1) else 1,
        "value_scales" in arrays,
        chip,
    )
    return (replace(form, wide=True) if is_wide((key, value), tile.keys) else form), tile


@functools.lru_cache(maxsize=1024)
def _forward_form(
    types: tuple[str, str, str],
    dims: tuple[int, int, int, int],
    said: Said,
    few: bool,
    packed: int,
    scaled: bool,
    chip: str,
) -> tuple[Form, Tile]:
    """The same of what it follows from: types of query and key and the precision, sizes of heads as they are stored."""
    scores, values = product_types(*types)
    format = format_of(types[1], chip)
    layout, met = ("bytes", "turns") if format == "int4" else ("plain", "plain")
    query_part, out_part = part_of(dims[0], "", met), part_of(dims[3], "", met)
    bits = 32 if "float32" in (scores, values) else 16
    extra = said.extra or types[1] not in FLOATS
    tile = tile_of(FORWARD, chip, bits, max(query_part.width, out_part.width), few=few, extra=extra)
    form = Form(
        query_part=query_part,
        key_part=part_of(dims[1], format, layout),
        value_part=part_of(dims[2], format, layout),
        out_part=out_part,
        rows=tile.rows,
        keys=tile.keys,
        score_type=TYPES[scores],
        value_type=TYPES[values],
        loaded_value=TYPES["float32" if scaled else values],
        precision=dot_precision(chip),
        packed=packed,
        **said.fields(),
    )
    return form, tile


def dot_precision(chip: str) -> str:
    """How float32 is multiplied: in full on AMD, elsewhere in three products of tf32.

    Of few rows too: in full, without tensor cores, both factors would be in registers, which are then too few.
    """
    return "ieee" if chip == "gfx942" else "tf32x3"


def is_wide(tensors: tuple[torch.Tensor, ...], rows: int) -> bool:
    """Whether rows of a tile lie farther apart than 32 bits count."""
    return any(tensor.stride(-3) * rows >= 2**31 for tensor in tensors)


def format_of(name: str, chip: str) -> str:
    """How numbers of a type are stored: "" for floats, else the name of a code."""
    if name == "float8_e4m3fn":
        return "" if chip in CONVERTS_FLOAT8 else "float8_bits"
    return "" if name in FLOATS else {"int8": "int8", "uint8": "int4"}[name]


def as_stored(tensor: torch.Tensor, format: str) -> torch.Tensor:
    return tensor.view(torch.uint8) if format == "float8_bits" else tensor


class Said(NamedTuple):
    """What options say that is compiled. extra: something takes registers beside scores and sums."""

    top_left: bool
    has_left: bool
    has_right: bool
    capped: bool
    natural: bool
    extra: bool

    def fields(self) -> dict[str, Any]:
        """Those of a form."""
        return {name: value for name, value in self._asdict().items() if name != "extra"}


def said_of(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Said:
    mask, sloped, capped = arrays.get("mask"), arrays.get("alibi_slopes") is not None, options["softcap"] > 0
    return Said(
        bool(options["top_left"]),
        0 <= options["window_left"] < FARTHEST,
        0 <= options["window_right"] < FARTHEST,
        capped,
        capped or sloped or (mask is not None and mask.dtype != torch.bool),
        capped or sloped or mask is not None,
    )


def shared_arguments(arrays: Mapping[str, Any], options: Mapping[str, Any], dense: bool) -> dict[str, Any]:
    """What forward and backward kernels take alike."""
    slopes = arrays.get("alibi_slopes")
    names = ("query_starts", "key_starts", "key_lens", "first_keys", "last_keys", "sinks")
    found: dict[str, Any] = {name: packed_vector(arrays.get(name)) for name in names}
    found |= {name: arrays[name] for name in ("query", "key", "value")}
    found |= {f"{name}_strides": strides_of(arrays[name], dense) for name in ("query", "key", "value")}
    found["alibi_slopes"] = packed_vector(slopes)
    found["alibi_stride"] = 0 if slopes is None or slopes.shape[0] == 1 else found["alibi_slopes"].stride(0)
    found["window"] = disguised(*(min(max(options[f"window_{side}"], 0), FARTHEST) for side in ("left", "right")))
    return found | {"scale": float(options["scale"]), "softcap": float(options["softcap"])}


def masked_form(
    form: Form, arrays: Mapping[str, Any], rows: int, keys: int, dense: bool
) -> tuple[Form, dict[str, Any], int, int]:
    """The form with its mask, the mask's arguments, its columns, and words of a row of bits."""
    mask = arrays.get("mask")
    if mask is None or mask.shape[-1] == 0:
        none = {"mask": None, "mask_states": None, "mask_strides": NOWHERE, "state_strides": NOWHERE}
        return form, none, 0, 0
    mask = mask if dense else mask[None]
    columns = mask.shape[-1]
    if mask.dtype != torch.bool:
        taken = {"mask": mask, "mask_states": None, "mask_strides": spread(mask), "state_strides": NOWHERE}
        return replace(form, masked="float"), taken, columns, 0
    words, states = packed_mask(mask, rows, max(keys, WORD))
    taken = {"mask": words, "mask_states": states, "mask_strides": spread(words), "state_strides": spread(states)}
    form = replace(form, masked="bits", mask_rows=rows, mask_columns=max(keys, WORD))
    return form, taken, columns, words.shape[-1]


def spread(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of four dimensions; 0 where one holds for all."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
