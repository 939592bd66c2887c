"""What append_pages may have written: pages nobody wrote to, and codes held to an exact number and a float32 budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.check.compare import budget
from headrace.kernels.arrays import numpy_dtype
from headrace.ops.kv_formats import FORMATS, quantize, unpack_int4

# A format, and what shares a scale: a token's head ("token"), a page's ("page"), nothing ("").
Store = tuple[str, str]
SCALED: tuple[Store, ...] = tuple((n, share) for n in ("float8_e4m3fn", "int8", "int4") for share in ("token", "page"))
STORES: tuple[Store, ...] = (("float32", ""), ("float16", ""), ("bfloat16", ""), ("float8_e4m3fn", ""), *SCALED)


def untouched_value(dtype: str) -> float:
    """What fills an array of this type where nobody has written."""
    return {"int8": 99, "uint8": 0x5B}.get(dtype, np.nan)


def make_pages(shape: tuple[int, int, int], dim: int, store: Store) -> tuple[np.ndarray, np.ndarray | None]:
    """Untouched pages [*shape, dim], every dimension but the last strided, with what must stay around them; scales.

    shape: pages, page_size, heads. A page's scales are such that some of what is drawn from a normal saturates.
    """
    (name, share), (num_pages, page_size, heads) = store, shape
    kv_format = FORMATS[name]
    items = kv_format.num_bytes(dim) if name == "int4" else dim
    dtype = numpy_dtype(kv_format.dtype)
    wide = np.full((num_pages, heads, page_size, items + 3), untouched_value(kv_format.dtype), dtype)
    pages = wide[..., 1 : items + 1].transpose(0, 2, 1, 3)
    if not share:
        return pages, None
    if share == "token" or page_size == 1:
        wide_scales = np.full((heads, num_pages, 2 * page_size), np.nan, np.float32)
        return pages, wide_scales[:, :, ::2].transpose(1, 2, 0)
    scales = np.full((num_pages, 1, 2 * heads), 3 / kv_format.largest, np.float32)[:, :, ::2]
    scales *= np.linspace(0.5, 2, num_pages, dtype=np.float32)[:, None, None]
    return pages, scales


def written(
    pages: np.ndarray, scales: np.ndarray | None, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Codes and scales at the slots, in the tokens' order; whether the scales are those of pages."""
    page, place = np.divmod(slots, pages.shape[1])
    if scales is None:
        return pages[page, place], None, False
    per_page = scales.shape[1] != pages.shape[1]
    return pages[page, place], scales[page, 0 if per_page else place], per_page


def codes_of(stored: np.ndarray, name: str, dim: int) -> np.ndarray:
    """Codes as numbers, in their order."""
    return (unpack_int4(stored, dim) if name == "int4" else stored).astype(np.float64)


def assert_same(got: Any, expected: Any) -> None:
    """Bit for bit, but for which NaN it is."""
    if got is None or expected is None:
        assert got is expected
    else:
        assert got.dtype == expected.dtype
        assert np.array_equal(got.astype(np.float64), expected.astype(np.float64), equal_nan=True)


def assert_codes_may_be(
    stored: tuple[np.ndarray, np.ndarray | None, bool], name: str, exact: np.ndarray, straightforward: np.ndarray
) -> None:
    """Codes and scales are those of numbers that are, token by token, within the float32 budget of the exact ones."""
    codes, scales, given = stored
    if exact.size == 0:
        return
    errors = [budget(one, plain, "float32") for one, plain in zip(exact, straightforward, strict=True)]
    error = np.array(errors)[:, None, None]
    if scales is not None and not given:
        largest = np.max(np.abs(exact), axis=-1)
        allowed = (error[..., 0] + 2.0**-23 * largest) / FORMATS[name].largest
        assert (np.abs(scales - largest / FORMATS[name].largest) <= allowed).all()
    error = error + 2.0**-23 * np.abs(exact)  # of the quotient
    low, high = (quantize(exact + side, name, scales=scales, scaled=False)[0] for side in (-error, error))
    got = codes_of(codes, name, exact.shape[-1])
    assert (codes_of(low, name, exact.shape[-1]) <= got).all()
    assert (got <= codes_of(high, name, exact.shape[-1])).all()


def rotated_in_float32(x: np.ndarray, table: np.ndarray, interleaved: bool, weight: Any, eps: float) -> np.ndarray:
    """The straightforward computation: heads normalized when there is a weight, then rotated."""
    x = x.astype(np.float32)
    if weight is not None:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight
    pairs = table.shape[1] // 2
    c, s = table[:, None, :pairs], table[:, None, pairs:]
    step = 2 if interleaved else 1
    first, second = slice(0, step * pairs, step), slice(1 if interleaved else pairs, 2 * pairs, step)
    y = x.copy()
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y
