"""Quantizing: from float32 values to the blocks that `ops.formats.dequantize` reads.

A quantizer picks, per group of values, the scale (and minimum) with which small integers come closest.

    Q4_0 .. Q8_0     the scale puts the largest value on the end of the range; bit for bit what others write
    Q2_K Q4_K Q5_K   value = scale * q - minimum: start from the range, then fit both by least squares, twice
    Q3_K Q6_K IQ4_*  value = scale * q: try a few scales around the obvious one and keep the best fit

The K formats and IQ4_XS then round the scales of their groups to small integers, and choose the integers of the
values again for the scales as they are stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.errors import ArgumentError
from headrace.ops.formats import BLOCK_LAYOUTS, IQ4_VALUES, Bytes, Floats, dequantize, get_format
from headrace.weights.gguf import GGUFFile, TensorInfo, open_gguf
from headrace.weights.gguf_writer import Tensor, write_gguf
from headrace.weights.recipes import choose_formats, get_recipe
from headrace.weights.wheel import Progress

_CHUNK_LEN = 2**17  # values at a time: the temporaries stay in the cache
# The index of the nearest of the sixteen values, for every half step from -128: the borders are multiples of 0.5.
_NEAREST_IQ4: Bytes = np.searchsorted(
    (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / 2, np.arange(-128, 128, 0.5), side="right"
).astype(np.uint8)


def quantize(values: Floats, format_name: str) -> Bytes:
    """uint8 [..., row_bytes]: the float32 values [..., row_len] in a format; a row must be whole blocks."""
    form = get_format(format_name)
    if values.dtype != np.float32 or values.ndim == 0:
        raise ArgumentError(f"values: expected float32 with at least one dimension, got {values.dtype} {values.shape}")
    row_bytes = form.row_bytes(values.shape[-1])
    num_blocks = values.size // form.block_len
    blocks = np.ascontiguousarray(values).reshape(num_blocks, form.block_len)
    raw = np.empty((num_blocks, form.block_bytes), np.uint8)
    step = _CHUNK_LEN // form.block_len
    for start in range(0, num_blocks, step):
        raw[start : start + step] = _quantize_blocks(blocks[start : start + step], form.name)
    return raw.reshape(*values.shape[:-1], row_bytes)


def quantize_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], recipe: str, progress: Progress | None = None
) -> None:
    """Write the model `source` to `target` in the formats of a recipe (recipes.RECIPES), a few rows at a time.

    Metadata is copied; `general.file_type` tells the recipe. Values of an already quantized source lose again.
    """
    chosen = get_recipe(recipe)
    with open_gguf(source) as file:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        formats = choose_formats(chosen, shapes, _query_group(file))
        metadata = file.metadata | {"general.file_type": chosen.file_type, "general.quantization_version": 2}
        kinds = {key: kind for key, kind in file.kinds.items() if metadata[key] is file.metadata[key]}
        tensors = _convert(file, formats, progress or (lambda message, done_bytes, total_bytes: None))
        write_gguf(Path(target), metadata, tensors, kinds=kinds)


def _query_group(file: GGUFFile) -> int:
    """Query heads per key head; 1 where the file does not say it in one number."""
    prefix = f"{file.metadata.get('general.architecture')}.attention"
    heads, kv_heads = file.metadata.get(f"{prefix}.head_count"), file.metadata.get(f"{prefix}.head_count_kv")
    return heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0 else 1


def _convert(file: GGUFFile, formats: dict[str, str], progress: Progress) -> list[Tensor]:
    """The tensors for the writer; each is converted while it is written."""
    done_bytes = 0
    tensors: list[Tensor] = []
    for info in file.tensors.values():
        done_bytes += info.num_bytes
        pieces = _pieces(file, info, formats[info.name], done_bytes, progress)
        tensors.append((info.name, formats[info.name], info.shape, pieces))
    return tensors


def _pieces(file: GGUFFile, info: TensorInfo, format_name: str, done_bytes: int, progress: Progress) -> Iterator[Bytes]:
    """The tensor's bytes in the new format, some rows at a time; its pages are given back at the end."""
    data = file.data(info.name)
    if info.format == format_name:
        yield data
    else:
        row_len = info.shape[-1] if info.shape else 1
        rows = data.reshape(prod(info.shape[:-1]), -1)
        step = max(1, 8 * _CHUNK_LEN // row_len)
        for start in range(0, len(rows), step):
            yield quantize(dequantize(rows[start : start + step], info.format), format_name)
    file.release(info.name)
    progress(f"quantizing {info.name}", done_bytes, file.tensor_bytes)


def _quantize_blocks(values: Floats, name: str) -> Bytes:
    """float32 [n, block_len] -> uint8 [n, block_bytes]."""
    if name == "F32":
        return values.view(np.uint8)
    if name == "BF16":
        return _bfloat16(values)
    if not np.isfinite(values).all():
        raise ArgumentError(f"values: expected finite numbers for {name}, got inf or nan")
    if name == "F16":
        return _half(values).view(np.uint8)
    blocks = np.zeros(len(values), BLOCK_LAYOUTS[name])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        _QUANTIZERS[name](values, blocks)
    return blocks.view(np.uint8).reshape(len(values), -1)


def _half(values: Floats) -> np.ndarray:
    """fp16, refused where it would become infinite."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if np.isinf(halves).any():
        raise ArgumentError("values: too large for fp16 numbers", hint="keep this tensor in BF16 or F32")
    return halves


def _bfloat16(values: Floats) -> Bytes:
    """Round to the nearest, ties to even; a nan stays a nan."""
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype("<u2").view(np.uint8)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for a scale of 0: the values there are all equal."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _pack_planes(quants: npt.NDArray[np.integer[Any]], plane_len: int, bits: int) -> Bytes:
    """uint8 [n, elements] -> [n, elements * bits // 8], the inverse of how the formats are read."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = quants.reshape(len(quants), -1, 8 // bits, plane_len) << shifts
    return np.bitwise_or.reduce(planes, axis=2).reshape(len(quants), -1)


def _pack_fifth_bits(quants: Bytes) -> np.ndarray:
    return np.packbits(quants >> 4, axis=1, bitorder="little").view("<u4")[:, 0]


def _from_end(values: Floats, half: int) -> tuple[Floats, Bytes]:
    """Scale [n, 1] that puts the value of largest size on -half, and integers 0 .. 2*half - 1."""
    position = np.abs(values).argmax(axis=1)[:, None]
    scale = np.take_along_axis(values, position, axis=1) / np.float32(-half)
    quants = values * _inverse(scale) + np.float32(half + 0.5)
    return scale, np.clip(quants.astype(np.int32), 0, 2 * half - 1).astype(np.uint8)


def _from_range(values: Floats, levels: int) -> tuple[Floats, Floats, Bytes]:
    """Scale and minimum [n, 1] that put the range on 0 .. levels, and the integers."""
    minimum = values.min(axis=1, keepdims=True)
    scale = (values.max(axis=1, keepdims=True) - minimum) / np.float32(levels)
    quants = (values - minimum) * _inverse(scale) + np.float32(0.5)
    return scale, minimum, np.clip(quants.astype(np.int32), 0, levels).astype(np.uint8)


def _q4_0(values: Floats, blocks: np.ndarray) -> None:
    scale, quants = _from_end(values, 8)
    blocks["scale"] = _half(scale)[:, 0]
    blocks["quants"] = _pack_planes(quants, 16, 4)


def _q5_0(values: Floats, blocks: np.ndarray) -> None:
    scale, quants = _from_end(values, 16)
    blocks["scale"] = _half(scale)[:, 0]
    blocks["high_bits"] = _pack_fifth_bits(quants)
    blocks["quants"] = _pack_planes(quants & 15, 16, 4)


def _q4_1(values: Floats, blocks: np.ndarray) -> None:
    scale, minimum, quants = _from_range(values, 15)
    blocks["scale"], blocks["min"] = _half(scale)[:, 0], _half(minimum)[:, 0]
    blocks["quants"] = _pack_planes(quants, 16, 4)


def _q5_1(values: Floats, blocks: np.ndarray) -> None:
    scale, minimum, quants = _from_range(values, 31)
    blocks["scale"], blocks["min"] = _half(scale)[:, 0], _half(minimum)[:, 0]
    blocks["high_bits"] = _pack_fifth_bits(quants)
    blocks["quants"] = _pack_planes(quants & 15, 16, 4)


def _q8_0(values: Floats, blocks: np.ndarray) -> None:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(scale)
    blocks["scale"] = _half(scale)[:, 0]
    blocks["quants"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)


def _fit_range(groups: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and minimum, both >= 0, [..., 1] each, of value = scale * q - minimum with q in 0 .. levels."""
    minimum = np.maximum(-groups.min(axis=-1, keepdims=True), 0)
    scale = (np.maximum(groups.max(axis=-1, keepdims=True), 0) + minimum) / np.float32(levels)
    best = _range_error(groups, scale, minimum, levels)
    for _ in range(2):
        new_scale, new_minimum = _least_squares(groups, _range_quants(groups, scale, minimum, levels))
        error = _range_error(groups, new_scale, new_minimum, levels)
        better = (error < best) & (new_scale > 0)
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
        best = np.where(better, error, best)
    return scale, minimum


def _range_quants(groups: Floats, scale: Floats, minimum: Floats, levels: int) -> Floats:
    return np.clip(np.rint((groups + minimum) * _inverse(scale)), 0, levels)


def _range_error(groups: Floats, scale: Floats, minimum: Floats, levels: int) -> Floats:
    difference = scale * _range_quants(groups, scale, minimum, levels) - minimum - groups
    return (difference * difference).sum(axis=-1, keepdims=True)


def _least_squares(groups: Floats, quants: Floats) -> tuple[Floats, Floats]:
    """The scale and the minimum (>= 0) that fit these integers best."""
    mean_quant, mean_value = quants.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    centred = quants - mean_quant
    scale = (centred * groups).sum(axis=-1, keepdims=True) / (centred * centred).sum(axis=-1, keepdims=True)
    minimum = scale * mean_quant - mean_value
    through_zero = (quants * groups).sum(axis=-1, keepdims=True) / (quants * quants).sum(axis=-1, keepdims=True)
    return np.where(minimum < 0, through_zero, scale), np.maximum(minimum, 0)


def _quantize_range(groups: Floats, levels: int, scale_levels: int, blocks: np.ndarray) -> tuple[Bytes, Bytes, Bytes]:
    """Fill in `scale` and `min_scale`; return the scales and minima of the groups [n, g] and the integers [n, 256]."""
    scales, mins = _fit_range(groups, levels)
    stored = []
    for field, wanted in (("scale", scales), ("min_scale", mins)):
        blocks[field] = _half(wanted.max(axis=1)[:, 0] / np.float32(scale_levels))
        unit = blocks[field].astype(np.float32)[:, None, None]
        steps = np.clip(np.rint(wanted * _inverse(unit)), 0, scale_levels)
        stored.append((steps, unit * steps))
    (scale_steps, scales), (min_steps, mins) = stored
    quants = _range_quants(groups, scales, mins, levels).astype(np.uint8)
    return scale_steps[..., 0].astype(np.uint8), min_steps[..., 0].astype(np.uint8), quants.reshape(len(groups), -1)


def _q2_k(values: Floats, blocks: np.ndarray) -> None:
    scales, mins, quants = _quantize_range(values.reshape(-1, 16, 16), 3, 15, blocks)
    blocks["group_scales"] = scales | mins << 4
    blocks["quants"] = _pack_planes(quants, 32, 2)


def _pack_group_scales(scales: Bytes, mins: Bytes) -> Bytes:
    """The inverse of formats.unpack_group_scales."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | mins[:, 4:] << 4], axis=1)


def _q4_k(values: Floats, blocks: np.ndarray) -> None:
    scales, mins, quants = _quantize_range(values.reshape(-1, 8, 32), 15, 63, blocks)
    blocks["group_scales"] = _pack_group_scales(scales, mins)
    blocks["quants"] = _pack_planes(quants, 32, 4)


def _q5_k(values: Floats, blocks: np.ndarray) -> None:
    scales, mins, quants = _quantize_range(values.reshape(-1, 8, 32), 31, 63, blocks)
    blocks["group_scales"] = _pack_group_scales(scales, mins)
    blocks["high_bits"] = _pack_planes(quants >> 4, 32, 1)
    blocks["quants"] = _pack_planes(quants & 15, 32, 4)


Rounding = Callable[[Floats], Floats]  # to the nearest of the values that the format has


def _round_to(half: int) -> Rounding:
    return lambda scaled: np.clip(np.rint(scaled), -half, half - 1)


def _iq4_index(scaled: Floats) -> Bytes:
    half_steps = np.clip(np.floor(2 * scaled), -256, 255).astype(np.int16)
    index: Bytes = _NEAREST_IQ4[half_steps + 256]
    return index


def _round_to_iq4(scaled: Floats) -> Floats:
    return IQ4_VALUES[_iq4_index(scaled)]


def _fit_scale(groups: Floats, ends: tuple[float, ...], rounding: Rounding) -> Floats:
    """The scale [..., 1] of value = scale * q: of those that put the largest value near an end, the best fit."""
    position = np.abs(groups).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(groups, position, axis=-1)
    scale, gain = np.zeros_like(largest), np.zeros_like(largest)
    for end in ends:
        quants = rounding(groups * _inverse(largest / np.float32(end)))
        along = (quants * groups).sum(axis=-1, keepdims=True)
        size = (quants * quants).sum(axis=-1, keepdims=True)
        # With the fitted scale along / size the squared error is sum(value^2) - along^2 / size.
        better = along * along > gain * size
        scale = np.where(better, along * _inverse(size), scale)
        gain = np.where(better, along * along * _inverse(size), gain)
    return scale


def _quantize_scales(groups: Floats, scales: Floats, half: int, blocks: np.ndarray) -> tuple[np.ndarray, Floats]:
    """Fill in `scale`; return the scales of the groups as integers [n, g] and the values in units of them."""
    position = np.abs(scales).argmax(axis=1)[:, None]
    unit = np.take_along_axis(scales, position, axis=1)[:, 0, 0] / np.float32(-half)
    blocks["scale"] = _half(unit)
    unit = blocks["scale"].astype(np.float32)[:, None, None]
    steps = np.clip(np.rint(scales * _inverse(unit)), -half, half - 1)
    return steps[..., 0].astype(np.int8), groups * _inverse(unit * steps)


def _q3_k(values: Floats, blocks: np.ndarray) -> None:
    groups = values.reshape(-1, 16, 16)
    rounding = _round_to(4)
    scales, scaled = _quantize_scales(groups, _fit_scale(groups, (-4.4, -4, -3.6, -3.3, -3), rounding), 32, blocks)
    quants = (rounding(scaled) + 4).astype(np.uint8).reshape(len(values), -1)
    stored = (scales + 32).astype(np.uint8)
    low, high = _pack_planes(stored & 15, 8, 4), _pack_planes(stored >> 4, 4, 2)
    blocks["group_scales"] = np.concatenate([low, high], axis=1)
    blocks["high_bits"] = _pack_planes(quants >> 2, 32, 1)
    blocks["quants"] = _pack_planes(quants & 3, 32, 2)


def _q6_k(values: Floats, blocks: np.ndarray) -> None:
    groups = values.reshape(-1, 16, 16)
    rounding = _round_to(32)
    scales, scaled = _quantize_scales(groups, _fit_scale(groups, (-32, -31, -30), rounding), 128, blocks)
    quants = (rounding(scaled) + 32).astype(np.uint8).reshape(len(values), -1)
    blocks["group_scales"] = scales
    blocks["high_bits"] = _pack_planes(quants >> 4, 32, 2)
    blocks["quants"] = _pack_planes(quants & 15, 64, 4)


_IQ4_ENDS = (-136.0, -127.0, -118.0, -109.0, 104.0, 113.0, 122.0)


def _iq4_nl(values: Floats, blocks: np.ndarray) -> None:
    blocks["scale"] = _half(_fit_scale(values, _IQ4_ENDS, _round_to_iq4))[:, 0]
    scaled = values * _inverse(blocks["scale"].astype(np.float32))[:, None]
    blocks["quants"] = _pack_planes(_iq4_index(scaled), 16, 4)


def _iq4_xs(values: Floats, blocks: np.ndarray) -> None:
    groups = values.reshape(-1, 8, 32)
    scales, scaled = _quantize_scales(groups, _fit_scale(groups, _IQ4_ENDS, _round_to_iq4), 32, blocks)
    stored = (scales + 32).astype(np.uint8)
    high = (stored >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    blocks["scales_low"] = _pack_planes(stored & 15, 1, 4)
    blocks["scales_high"] = np.bitwise_or.reduce(high, axis=1)
    blocks["quants"] = _pack_planes(_iq4_index(scaled).reshape(len(values), -1), 16, 4)


_QUANTIZERS: dict[str, Callable[[Floats, np.ndarray], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
