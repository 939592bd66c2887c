"""The tensor formats of GGUF files: their sizes, byte layouts and the numbers they stand for.

A quantized tensor is a run of *blocks*. A block holds a few hundred bits: small integers, and the scale
(sometimes also a minimum) that turns them back into real numbers. Two families exist:

    Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL    32 values, one fp16 scale; the *_1 formats add an fp16 minimum
    Q2_K .. Q6_K IQ4_XS                256 values in groups of 16 or 32, each group with its own small
                                       integer scale; one fp16 `scale` (and `min_scale`) for all of them

`BLOCK_LAYOUTS` describes the bytes of a block as a NumPy structured type, so that reading the code below is
reading the format. Packed integers come in *planes*: byte j holds element j in its lowest bits, element
j + plane_len in the next ones, and so on. `_planes` takes them apart.

`dequantize` is the definition that kernels and quantizers are tested against. It is vectorised, not fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.errors import ArgumentError, UnsupportedError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """One tensor format: every `block_len` consecutive values of a row take `block_bytes` bytes."""

    name: str
    gguf_id: int
    block_len: int
    block_bytes: int

    @property
    def bits_per_value(self) -> float:
        """Mean size of a value in bits, scales included."""
        return 8 * self.block_bytes / self.block_len

    def row_bytes(self, row_len: int) -> int:
        """Bytes of a row of `row_len` values; a row must be a whole number of blocks."""
        if row_len % self.block_len:
            raise ArgumentError(
                f"row_len: expected a multiple of {self.block_len} for {self.name}, got {row_len}",
                hint="formats of 32-value blocks (Q8_0, Q4_0, ...) fit more row lengths than the K formats",
            )
        return row_len // self.block_len * self.block_bytes


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("BF16", 30, 1, 2),
        Format("Q4_0", 2, 32, 18),
        Format("Q4_1", 3, 32, 20),
        Format("Q5_0", 6, 32, 22),
        Format("Q5_1", 7, 32, 24),
        Format("Q8_0", 8, 32, 34),
        Format("Q2_K", 10, 256, 84),
        Format("Q3_K", 11, 256, 110),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
        Format("IQ4_NL", 20, 32, 18),
        Format("IQ4_XS", 23, 256, 136),
    )
}
FORMAT_BY_ID: dict[int, Format] = {form.gguf_id: form for form in FORMATS.values()}

# Formats that exist but are not done here; the names are for error texts.
KNOWN_IDS: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

BLOCK_LAYOUTS: dict[str, np.dtype[np.void]] = {
    name: np.dtype(fields)
    for name, fields in {
        "Q4_0": [("scale", "<f2"), ("quants", "u1", (16,))],
        "Q4_1": [("scale", "<f2"), ("min", "<f2"), ("quants", "u1", (16,))],
        "Q5_0": [("scale", "<f2"), ("high_bits", "<u4"), ("quants", "u1", (16,))],
        "Q5_1": [("scale", "<f2"), ("min", "<f2"), ("high_bits", "<u4"), ("quants", "u1", (16,))],
        "Q8_0": [("scale", "<f2"), ("quants", "i1", (32,))],
        # group_scales: low nibble multiplies `scale`, high nibble multiplies `min_scale`
        "Q2_K": [("group_scales", "u1", (16,)), ("quants", "u1", (64,)), ("scale", "<f2"), ("min_scale", "<f2")],
        "Q3_K": [("high_bits", "u1", (32,)), ("quants", "u1", (64,)), ("group_scales", "u1", (12,)), ("scale", "<f2")],
        "Q4_K": [("scale", "<f2"), ("min_scale", "<f2"), ("group_scales", "u1", (12,)), ("quants", "u1", (128,))],
        "Q5_K": [("scale", "<f2"), ("min_scale", "<f2"), ("group_scales", "u1", (12,)), ("high_bits", "u1", (32,)),
                 ("quants", "u1", (128,))],
        "Q6_K": [("quants", "u1", (128,)), ("high_bits", "u1", (64,)), ("group_scales", "i1", (16,)), ("scale", "<f2")],
        "IQ4_NL": [("scale", "<f2"), ("quants", "u1", (16,))],
        "IQ4_XS": [("scale", "<f2"), ("scales_high", "<u2"), ("scales_low", "u1", (4,)), ("quants", "u1", (128,))],
    }.items()
}  # fmt: skip
assert all(FORMATS[name].block_bytes == layout.itemsize for name, layout in BLOCK_LAYOUTS.items())

# The sixteen values of the IQ4 formats: denser around zero, where weights are.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def get_format(name: str) -> Format:
    """The format called `name`; UnsupportedError with the list of names if there is none."""
    form = FORMATS.get(name)
    if form is None:
        raise UnsupportedError(f"format: {name!r} is not supported", hint=f"supported: {', '.join(FORMATS)}")
    return form


def dequantize(raw: Bytes, format_name: str) -> Floats:
    """The values, float32 [..., row_len], of the bytes `raw`, uint8 [..., row_bytes]."""
    form = get_format(format_name)
    if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % form.block_bytes:
        expected = f"uint8 with a last dimension that is a multiple of {form.block_bytes} ({form.name} blocks)"
        raise ArgumentError(f"raw: expected {expected}, got {raw.dtype} {raw.shape}")
    num_blocks = raw.size // form.block_bytes
    blocks = np.ascontiguousarray(raw).reshape(num_blocks, form.block_bytes)
    values = np.empty((num_blocks, form.block_len), np.float32)
    step = 2**18 // form.block_len  # keeps the temporaries inside the cache
    for start in range(0, num_blocks, step):
        values[start : start + step] = _dequantize_blocks(blocks[start : start + step], form.name)
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // form.block_bytes * form.block_len)


def _dequantize_blocks(blocks: Bytes, name: str) -> Floats:
    """uint8 [n, block_bytes] -> float32 [n, block_len]."""
    if name == "F32":
        return blocks.view("<f4")
    if name == "F16":
        return blocks.view("<f2").astype(np.float32)
    if name == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    fields = blocks.view(BLOCK_LAYOUTS[name])[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be inf or nan: so are its values then
        return _DEQUANTIZERS[name](fields).reshape(len(blocks), -1)


def _f32(array: npt.NDArray[np.generic]) -> Floats:
    return array.astype(np.float32)


def _planes(packed: Bytes, plane_len: int, bits: int) -> Bytes:
    """uint8 [n, bytes] -> [n, bytes * 8 // bits]: each run of `plane_len` bytes is 8 // bits planes of elements."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, plane_len)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def _fifth_bits(high_bits: npt.NDArray[np.uint32]) -> Bytes:
    """uint32 [n] -> [n, 32]: bit j, moved to the value 16, belongs to element j."""
    return (((high_bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1) << 4).astype(np.uint8)


def _q4_0(block: np.ndarray) -> Floats:
    return _f32(block["scale"])[:, None] * (_f32(_planes(block["quants"], 16, 4)) - 8)


def _q4_1(block: np.ndarray) -> Floats:
    quants = _f32(_planes(block["quants"], 16, 4))
    return _f32(block["scale"])[:, None] * quants + _f32(block["min"])[:, None]


def _q5_0(block: np.ndarray) -> Floats:
    quants = _planes(block["quants"], 16, 4) | _fifth_bits(block["high_bits"])
    return _f32(block["scale"])[:, None] * (_f32(quants) - 16)


def _q5_1(block: np.ndarray) -> Floats:
    quants = _planes(block["quants"], 16, 4) | _fifth_bits(block["high_bits"])
    return _f32(block["scale"])[:, None] * _f32(quants) + _f32(block["min"])[:, None]


def _q8_0(block: np.ndarray) -> Floats:
    return _f32(block["scale"])[:, None] * _f32(block["quants"])


def _iq4_nl(block: np.ndarray) -> Floats:
    return _f32(block["scale"])[:, None] * IQ4_VALUES[_planes(block["quants"], 16, 4)]


def _q2_k(block: np.ndarray) -> Floats:
    quants = _planes(block["quants"], 32, 2).reshape(-1, 16, 16)
    scales = _f32(block["scale"])[:, None] * _f32(block["group_scales"] & 15)
    mins = _f32(block["min_scale"])[:, None] * _f32(block["group_scales"] >> 4)
    return scales[..., None] * _f32(quants) - mins[..., None]


def _q3_k(block: np.ndarray) -> Floats:
    # The third bit is stored the other way round: where it is 0, four is taken away.
    quants = _f32(_planes(block["quants"], 32, 2)) + 4 * _f32(_planes(block["high_bits"], 32, 1)) - 4
    low = _planes(block["group_scales"][:, :8], 8, 4)
    high = _planes(block["group_scales"][:, 8:], 4, 2)
    scales = _f32(block["scale"])[:, None] * (_f32(low | high << 4) - 32)
    return scales[..., None] * quants.reshape(-1, 16, 16)


def unpack_group_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """uint8 [n, 12] -> the eight 6-bit scales and the eight 6-bit minima of Q4_K and Q5_K, each [n, 8].

    Bytes 0-3: scales 0-3; bytes 4-7: minima 0-3, each in the low six bits. Bytes 8-11: the low nibbles of scales 4-7
    (low half) and of minima 4-7 (high half); their two high bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    return scales, mins


def _scaled_groups(block: np.ndarray, quants: Bytes) -> Floats:
    """Q4_K, Q5_K: eight groups of 32 with scales and minima."""
    scales, mins = unpack_group_scales(block["group_scales"])
    scale = _f32(block["scale"])[:, None] * _f32(scales)
    minimum = _f32(block["min_scale"])[:, None] * _f32(mins)
    return scale[..., None] * _f32(quants).reshape(-1, 8, 32) - minimum[..., None]


def _q4_k(block: np.ndarray) -> Floats:
    return _scaled_groups(block, _planes(block["quants"], 32, 4))


def _q5_k(block: np.ndarray) -> Floats:
    return _scaled_groups(block, _planes(block["quants"], 32, 4) | (_planes(block["high_bits"], 32, 1) << np.uint8(4)))


def _q6_k(block: np.ndarray) -> Floats:
    quants = _planes(block["quants"], 64, 4) | _planes(block["high_bits"], 32, 2) << 4
    scales = _f32(block["scale"])[:, None] * _f32(block["group_scales"])
    return scales[..., None] * (_f32(quants) - 32).reshape(-1, 16, 16)


def _iq4_xs(block: np.ndarray) -> Floats:
    low = _planes(block["scales_low"], 1, 4)
    high = (block["scales_high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scales = _f32(block["scale"])[:, None] * (_f32(low | high << 4) - 32)
    return scales[..., None] * IQ4_VALUES[_planes(block["quants"], 16, 4)].reshape(-1, 8, 32)


_DEQUANTIZERS: dict[str, Callable[[np.ndarray], Floats]] = {
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
