"""What the pages of a KV cache may hold: plain numbers, or codes times a scale.

    float32, float16, bfloat16    the numbers themselves
    float8_e4m3fn                 code * scale, or the number itself where there is no scale; |code| up to 448
    int8                          code * scale, codes -128 .. 127
    int4                          code * scale, codes -8 .. 7 in two's complement, two in a byte of uint8 arrays:
                                  element 2i in the low half, 2i + 1 in the high one

A scale of a row's own is its largest number over the largest code (448, 127, 7), so that nothing saturates; a scale
given by the caller may be too small, and then codes do. Codes are x / scale in float32, rounded to nearest even.

A row of zeros has scale 0 and codes 0. A row in which a number is infinite or NaN has scale NaN and codes 0: it reads
as NaN. With a given scale infinity saturates, and NaN stays one in float8_e4m3fn; the integers have no code for it.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", for e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.kernels.arrays import numpy_dtype


@dataclass(frozen=True)
class KVFormat:
    """How elements are stored. `largest`: the code of a row's largest number; 0: numbers are stored as they are."""

    name: str
    dtype: str  # of the arrays
    bits: int
    lowest: int = 0
    largest: int = 0
    needs_scales: bool = False

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of a row of elements."""
        return -(-num_elements * self.bits // 8)

    def num_items(self, num_elements: int) -> int:
        """Items of an array that hold a row of elements: of int4, two are one item."""
        return self.num_bytes(num_elements) // numpy_dtype(self.dtype).itemsize


_FORMATS = (
    KVFormat("float32", "float32", 32),
    KVFormat("float16", "float16", 16),
    KVFormat("bfloat16", "bfloat16", 16),
    KVFormat("float8_e4m3fn", "float8_e4m3fn", 8, -448, 448),
    KVFormat("int8", "int8", 8, -128, 127, True),
    KVFormat("int4", "uint8", 4, -8, 7, True),
)
FORMATS = {kv_format.name: kv_format for kv_format in _FORMATS}
FORMAT_OF_DTYPE = {kv_format.dtype: kv_format for kv_format in _FORMATS}


def quantize(
    x: np.ndarray, name: str, *, scales: np.ndarray | None = None, scaled: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [..., dim], or bytes of two [..., ceil(dim / 2)], and float32 scales [...]; no scales for plain numbers.

    x: [..., dim], computed with in its own type: float32 gives the bits that the kernels write. scales: the caller's,
    [...] or broadcast to it, finite and above 0; each row's own when None. scaled=False: float8_e4m3fn without.
    """
    kv_format = FORMATS[name]
    if not kv_format.largest:
        return x.astype(numpy_dtype(name)), None
    if scales is None and not (scaled or kv_format.needs_scales):
        return _rounded(x, kv_format), None
    if scales is None:
        scales = own_scales(x, name)
    usable = scales > 0
    divisors = np.where(usable, scales, np.float32(1))[..., None]
    quotients = np.where(usable[..., None], x, x.dtype.type(0)) / divisors.astype(x.dtype)
    return _rounded(quotients, kv_format), scales


def own_scales(x: np.ndarray, name: str) -> np.ndarray:
    """Each row's largest number over the largest code, float32 [...]; NaN where not all numbers are finite."""
    largest = np.max(np.abs(x), axis=-1, initial=0) / x.dtype.type(FORMATS[name].largest)
    return np.where(np.isfinite(x).all(axis=-1), largest, x.dtype.type(np.nan)).astype(np.float32)


def dequantize(codes: np.ndarray, scales: np.ndarray | None, name: str, dim: int | None = None) -> np.ndarray:
    """The numbers that are meant, float64 [..., dim]. dim: of int4, when it is odd."""
    numbers = unpack_int4(codes, dim) if name == "int4" else codes
    numbers = numbers.astype(np.float64)
    return numbers if scales is None else numbers * scales.astype(np.float64)[..., None]


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, uint8 [..., ceil(dim / 2)]; an odd row ends with a code of 0."""
    nibbles = codes.astype(np.int8).view(np.uint8) & 15
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_int4(packed: np.ndarray, dim: int | None = None) -> np.ndarray:
    """The codes, int8 [..., dim]; dim: twice the bytes when None."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return ((nibbles ^ 8).astype(np.int8) - 8)[..., :dim]


def _rounded(x: np.ndarray, kv_format: KVFormat) -> np.ndarray:
    clipped = np.clip(x, kv_format.lowest, kv_format.largest)
    if kv_format.name == "float8_e4m3fn":
        return clipped.astype(numpy_dtype("float8_e4m3fn"))
    codes = np.rint(clipped).astype(np.int8)
    return pack_int4(codes) if kv_format.name == "int4" else codes
