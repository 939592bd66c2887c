"""Weights on a device: made once from a file's blocks or from tensors, and turned back into the numbers they stand for.

The layout, and why it is so, is told in kernels/device_weight.py. Packing runs on the device that will hold the weight,
a few rows at a time; `dequantize` gives bit for bit what the format defines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from headrace.errors import ArgumentError
from headrace.kernels.device_weight import SUPER_LEN, DeviceWeight, WeightLayout, words_of_span
from headrace.kernels.triton.weight_blocks import BLOCKS, FLOATS, Parts, parts_of

# low and high bits, offset, group, scales, minimums
_LAYOUTS: dict[str, tuple[str, int, int, int, int, str, str]] = {
    "Q4_0": ("integer", 4, 0, 8, 32, "group", "none"),
    "Q4_1": ("integer", 4, 0, 0, 32, "group", "added"),
    "Q5_0": ("integer", 4, 1, 16, 32, "group", "none"),
    "Q5_1": ("integer", 4, 1, 0, 32, "group", "added"),
    "Q8_0": ("integer", 8, 0, 128, 32, "group", "none"),
    "Q2_K": ("integer", 2, 0, 0, 16, "nibbles", "group"),
    "Q3_K": ("integer", 2, 1, 4, 16, "six", "none"),
    "Q4_K": ("integer", 4, 0, 0, 32, "six_pair", "group"),
    "Q5_K": ("integer", 4, 1, 0, 32, "six_pair", "group"),
    "Q6_K": ("integer", 4, 2, 32, 16, "byte", "none"),
    "IQ4_NL": ("iq4", 4, 0, 0, 32, "group", "none"),
    "IQ4_XS": ("iq4", 4, 0, 0, 32, "six", "none"),
}
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_STEP = 1 << 24  # codes that are rearranged at a time
_HIGH_TYPES = {8: torch.uint8, 16: torch.int16}
_FLOAT_CHUNK_BYTES = 16
_E4M3_NAN = 0x7F


def layout_of(name: str, cols: int) -> WeightLayout:
    """The layout of a format of files."""
    if name in FLOATS:
        return WeightLayout("float")
    values, low, high, offset, group_len, scales, minimums = _LAYOUTS[name]
    return WeightLayout(values, low, high, words_of_span(group_len, low, cols), offset, group_len, scales, minimums)


def from_blocks(raw: Any, name: str, shape: tuple[int, int], device: Any) -> DeviceWeight:
    """The matrix on a device, from the bytes a file holds: uint8, rows in order, blocks as the format has them."""
    rows, cols = shape
    raw = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(_writable(np.asarray(raw)))
    raw = raw.reshape(-1).view(torch.uint8)
    block_len, block_bytes = BLOCKS.get(name) or (1, FLOATS[name].itemsize)
    if rows < 1 or cols < 1 or cols % block_len:
        raise ArgumentError(f"shape: expected rows of a multiple of {block_len} columns, got {list(shape)}")
    row_bytes = cols // block_len * block_bytes
    if raw.numel() != rows * row_bytes:
        raise ArgumentError(f"raw: expected {rows} rows of {row_bytes} bytes, got {raw.numel()} bytes")
    raw = raw.reshape(rows, row_bytes)
    if name in FLOATS:
        return from_floats(raw.to(device).view(FLOATS[name]), name)
    layout = layout_of(name, cols)
    made = [_packed_rows(piece.to(device), name, layout) for piece in raw.split(max(1, _STEP // cols))]
    fields = [None if parts[0] is None else torch.cat(parts) for parts in zip(*made, strict=True)]
    return DeviceWeight(name, (rows, cols), layout, *fields)


def _writable(raw: np.ndarray) -> np.ndarray:
    """torch warns of memory that nobody may write to, such as a file's; what is read only once may be copied."""
    raw = np.ascontiguousarray(raw)
    return raw if raw.flags.writeable else raw.copy()


def _packed_rows(raw: torch.Tensor, name: str, layout: WeightLayout) -> tuple[Any, ...]:
    """The fields of DeviceWeight from `codes` on, of a few rows."""
    rows = len(raw)
    blocks = raw.reshape(-1, BLOCKS[name][1])
    parts: Parts = parts_of(blocks, name)
    codes, high = words_of(parts.codes.reshape(rows, -1), layout)
    scales = parts.scales.reshape(rows, -1)
    padding = codes.shape[1] * layout.parts // layout.group_len - scales.shape[1] if layout.scales == "group" else 0
    others = (None if each is None else each.reshape(rows, -1) for each in (parts.groups, parts.groups_high))
    minimums = None if parts.minimums is None else _padded(parts.minimums.reshape(rows, -1), padding)
    return codes, high, _padded(scales, padding), minimums, *others


def _padded(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, columns)).contiguous()


def words_of(codes: torch.Tensor, layout: WeightLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes uint8 [rows, cols] as words int32 [rows, padded cols / parts], and the numbers of their upper bits."""
    rows, cols = codes.shape
    fill = 128 if layout.bits == 8 and layout.offset else 0
    padded = torch.nn.functional.pad(codes, (0, -cols % layout.span), value=fill)
    spans = padded.reshape(rows, -1, layout.parts, layout.words)
    low = _gathered(spans & (2**layout.low_bits - 1), 32, layout.low_bit).to(torch.int32)
    if not layout.high_bits:
        return low.reshape(rows, -1), None
    most = layout.parts * layout.high_bits
    high = _gathered(spans >> layout.low_bits, most, layout.high_bit)
    return low.reshape(rows, -1), high.to(_HIGH_TYPES[most]).reshape(rows, -1)


def _gathered(parts: torch.Tensor, most: int, place: Callable[[int], int]) -> torch.Tensor:
    """[rows, spans, parts, words] -> [rows, spans, words]: part p from bit place(p) on, of `most` bits."""
    gathered = torch.zeros((*parts.shape[:2], parts.shape[3]), dtype=torch.int64, device=parts.device)
    for part in range(parts.shape[2]):
        gathered |= parts[:, :, part].to(torch.int64) << place(part)
    # As a signed number of so many bits, where a cast would have to wrap.
    return torch.where(gathered >= 2 ** (most - 1), gathered - 2**most, gathered) if most > 8 else gathered


def from_floats(values: torch.Tensor, name: str = "") -> DeviceWeight:
    """float32, float16 or bfloat16 [rows, cols] where they lie, if their rows are whole chunks of 16 bytes."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    if values.ndim != 2 or values.dtype not in names:
        raise ArgumentError(f"weight: expected float32, float16 or bfloat16 [rows, cols], got {_told(values)}")
    chunk = _FLOAT_CHUNK_BYTES // values.element_size()
    rows, cols = values.shape
    aligned = cols % chunk == 0 and values.data_ptr() % _FLOAT_CHUNK_BYTES == 0
    codes = values.contiguous() if aligned else _padded(values, -cols % chunk).clone()
    return DeviceWeight(name or names[values.dtype], (rows, cols), WeightLayout("float"), codes)


def from_fp8(values: torch.Tensor, scale: torch.Tensor | float = 1.0, block: tuple[int, int] = (1, 0)) -> DeviceWeight:
    """float8_e4m3fn [rows, cols] times a scale: one number, one per row, or one per block of [rows, cols] columns.

    block: rows and columns that share a scale, which is then [ceil(rows / block rows), ceil(cols / block cols)].
    """
    if values.ndim != 2 or values.dtype != torch.float8_e4m3fn:
        raise ArgumentError(f"weight: expected float8_e4m3fn [rows, cols], got {_told(values)}")
    codes = values.view(torch.uint8)
    if bool(((codes & _E4M3_NAN) == _E4M3_NAN).any()):
        raise ArgumentError("weight: expected numbers, got NaN")
    return _of_codes("fp8", codes, scale, None, ("fp8", 8, 0), block)


def from_int8(values: torch.Tensor, scale: torch.Tensor | float, group_len: int = 0) -> DeviceWeight:
    """int8 [rows, cols] times a scale: one number, one per row, or [rows, cols / group_len]."""
    if values.ndim != 2 or values.dtype != torch.int8:
        raise ArgumentError(f"weight: expected int8 [rows, cols], got {_told(values)}")
    return _of_codes("int8", values.view(torch.uint8) ^ 128, scale, None, ("integer", 8, 128), (1, group_len))


def from_int4(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, group_len: int
) -> DeviceWeight:
    """(code - zero) * scale, codes 0 to 15; zero: 8 unless given.

    codes: uint8 [rows, cols], or [rows, cols / 2] with the first of two in the lower bits; scale: a float type, and
    zero: uint8 or a float type, both [rows, cols / group_len]; group_len: 32, 64, 128 or 256.
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8 or group_len not in (32, 64, 128, 256):
        raise ArgumentError(f"codes: expected uint8 [rows, cols] and groups of 32 to 256, got {_told(codes)}")
    cols = scale.shape[-1] * group_len
    if 2 * codes.shape[1] == cols:
        codes = torch.stack([codes & 15, codes >> 4], 2).reshape(len(codes), cols)
    offset = 8 if zero is None else 0
    return _of_codes("int4", codes, scale, zero, ("integer", 4, offset), (1, group_len))


def _of_codes(
    name: str, codes: torch.Tensor, scale: Any, zero: Any, values: tuple[str, int, int], block: tuple[int, int]
) -> DeviceWeight:
    """values: what codes mean, their bits, their offset; block: rows and columns to a scale, no columns: all."""
    (rows, cols), (scale_rows, group_len) = codes.shape, block
    scales, expected = torch.as_tensor(scale, device=codes.device), [rows]
    if not group_len:
        scales = scales.to(torch.float32).reshape(-1).expand(rows) if scales.numel() == 1 else scales.to(torch.float32)
    else:
        expected = [-(-rows // scale_rows), -(-cols // group_len)]
    if list(scales.shape) != expected:
        raise ArgumentError(f"scale: expected {expected}, got {list(scales.shape)}")
    if group_len and (group_len < 16 or group_len & (group_len - 1)):
        raise ArgumentError(f"group_len: expected a power of two, 16 or more columns, got {group_len}")
    if zero is not None and list(zero.shape) != expected:
        raise ArgumentError(f"zero: expected {expected}, got {list(zero.shape)}")
    kind, bits, offset = values
    words = words_of_span(group_len, bits, cols)
    kinds = ("group" if group_len else "row", "none" if zero is None else "zero")
    layout = WeightLayout(kind, bits, 0, words, offset, group_len, *kinds, scale_rows)
    packed = [words_of(piece, layout)[0] for piece in codes.split(max(1, _STEP // cols))]
    made = torch.cat(packed)
    padding = -(-made.shape[1] * layout.parts // group_len) - scales.shape[1] if group_len else 0
    minimums = None if zero is None else _padded(zero, padding)
    return DeviceWeight(name, (rows, cols), layout, made, None, _padded(scales, padding), minimums)


def _told(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


# And back.


def dequantize(weight: DeviceWeight, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """The numbers, float32 [rows, cols]: of all rows, of a slice of them, or of those whose numbers are given."""
    layout, cols = weight.layout, weight.shape[1]
    if layout.values == "float":
        return weight.codes[rows][:, :cols].to(torch.float32)
    values = _numbers(layout, weight.codes[rows], None if weight.high is None else weight.high[rows])
    scales, minimums = _scales(weight, rows)
    if minimums is None:
        return (scales * values)[:, :cols]
    values = scales * (values - minimums) if layout.minimums == "zero" else scales * values + minimums
    return values[:, :cols]


def _numbers(layout: WeightLayout, words: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
    """What codes are before scales: float32 [rows, padded cols]."""
    codes = _spread(words, layout, layout.low_bits, layout.low_bit)
    if high is not None:
        codes = codes | (_spread(high.to(torch.int32), layout, layout.high_bits, layout.high_bit) << layout.low_bits)
    if layout.values == "iq4":
        return _iq4_table(words.device)[codes]
    if layout.values == "fp8":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return (codes - layout.offset).to(torch.float32)


def _spread(words: torch.Tensor, layout: WeightLayout, bits: int, place: Callable[[int], int]) -> torch.Tensor:
    places = [place(part) for part in range(layout.parts)]
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device)[:, None]
    spans = words.reshape(len(words), -1, 1, layout.words)
    return ((spans >> shifts) & (2**bits - 1)).reshape(len(words), -1)


def _scales(weight: DeviceWeight, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of every column: what codes are multiplied by, and what is then added (zero points: subtracted before)."""
    layout = weight.layout
    if layout.scales == "row":
        return weight.scales[rows][:, None], None
    if layout.scales != "group":
        return _super_scales(weight, rows)
    if layout.scale_rows > 1:
        rows = torch.arange(weight.shape[0], device=weight.codes.device)[rows] // layout.scale_rows
    scales, minimums = (
        None if each is None else _of_columns(each[rows].to(torch.float32), layout.group_len)
        for each in (weight.scales, weight.minimums)
    )
    padded = weight.codes.shape[1] * layout.parts
    assert scales is not None
    return scales[:, :padded], None if minimums is None else minimums[:, :padded]


def _of_columns(values: torch.Tensor, times: int) -> torch.Tensor:
    return values.repeat_interleave(times, dim=1)


def _super_scales(weight: DeviceWeight, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    scales, minimums = group_integers(weight, rows)
    groups = SUPER_LEN // weight.layout.group_len
    whole = _of_columns(weight.scales[rows].to(torch.float32), groups) * scales
    spread = _of_columns(whole, weight.layout.group_len)
    if minimums is None:
        return spread, None
    taken = _of_columns(weight.minimums[rows].to(torch.float32), groups) * minimums
    return spread, _of_columns(-taken, weight.layout.group_len)


def group_integers(weight: DeviceWeight, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The small integers of groups, float32 [rows, groups]: of scales, and of minimums where there are some."""
    kind, low = weight.layout.scales, weight.groups[rows]
    if kind == "byte":
        return low.view(torch.int8).to(torch.float32), None
    if kind == "nibbles":
        return (low & 15).to(torch.float32), (low >> 4).to(torch.float32)
    high = weight.groups_high[rows]
    if kind == "six":
        return (_unpaired(low, 4) | (_unpaired(high, 2) << 4)).to(torch.float32) - 32, None
    pairs = _unpaired(high, 4)
    scales, minimums = (low & 15) | ((pairs & 3) << 4), (low >> 4) | (pairs >> 2 << 4)
    return scales.to(torch.float32), minimums.to(torch.float32)


def _unpaired(packed: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


@functools.cache
def _iq4_table(device: torch.device) -> torch.Tensor:
    """The sixteen numbers of the iq4 formats, float32 on a device."""
    return torch.tensor(IQ4_TABLE, dtype=torch.float32, device=device)


def in_rows(weight: DeviceWeight, most: int, use: Callable[[slice, torch.Tensor], None]) -> None:
    """Calls use(rows, numbers) for slices of so many numbers."""
    rows, step = weight.shape[0], max(1, most // weight.shape[1])
    for start in range(0, rows, step):
        piece = slice(start, min(rows, start + step))
        use(piece, dequantize(weight, piece))
