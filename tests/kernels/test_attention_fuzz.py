"""native.attention with arguments nobody would pass: refused by name or done, never a crash, never a byte outside.

Run under the sanitizers too (make sanitize), where a read outside an array is seen as well.
"""

import ml_dtypes
import numpy as np
import pytest

from headrace.errors import ArgumentError, KernelError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor

HUGE = (2**31 - 1, -(2**31), 10**6, -1)
KINDS = ("dense", "ragged", "paged")
CACHED = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8)
GUARD = 12345.0
WAYS = [
    *((level, "fp32") for level in cpu.ISAS[: min(3, cpu.ISAS.index(cpu.best_isa()) + 1)]),
    *((level, "bf16") for level in cpu.ISAS[3 : cpu.ISAS.index(cpu.best_isa()) + 1]),
    ("amx_emulated", "bf16"),
]


class Draw:
    """Small random numbers and arrays; now and then something that does not fit."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.odd = self.random.random() < 0.5  # whether this call may be wrong

    def size(self, low=0, high=5):
        return int(self.random.integers(low, high + 1))

    def wrong(self, chance=0.06):
        return self.odd and self.random.random() < chance

    def array(self, shape, dtype, values=None):
        """Strided in every dimension but the last; sometimes of another rank, size or type, then without `values`."""
        shape = list(shape)
        if shape and self.wrong():
            shape[self.size(0, len(shape) - 1)] = self.size(0, 9)
        if self.wrong(0.02):
            shape = shape[:-1] if len(shape) > 1 else [*shape, 1]
        if self.wrong(0.03):
            dtype = self.random.choice([np.float64, np.int32, np.int64, np.float32])
        padded = [n + self.size(0, 2) for n in shape]
        numbers = 20 * self.random.standard_normal(padded)
        whole = numbers.astype(np.int8 if dtype == np.uint8 else dtype).astype(dtype)
        array = whole[tuple(slice(n) for n in shape)]
        if values is not None and array.shape == values.shape:
            array[...] = values
        return array

    def integers(self, values):
        values = np.array(values, np.int64).reshape(np.shape(values))
        flat = values.reshape(-1)
        for i in range(flat.size):
            if self.wrong(0.03):
                flat[i] = self.random.choice([*HUGE, int(flat[i]) + 1, int(flat[i]) - 1])
        return self.array(values.shape, np.int32, values)


def layout(draw, kind):
    """query_lens, key_lens, and the arrays that describe them."""
    requests = draw.size(0, 4)
    queries = [draw.size(0, 20) if kind != "dense" else 0 for _ in range(requests)]
    keys = [draw.size(0, 150) for _ in range(requests)]
    if kind == "dense":
        return requests, draw.size(0, 20), keys, {}
    arrays = {"query_starts": draw.integers(np.cumsum([0, *queries])), "key_lens": draw.integers(keys)}
    if kind == "ragged":
        arrays["key_starts"] = draw.integers(np.cumsum([0, *keys])[:-1])
    return requests, sum(queries), keys, arrays


def call(draw, kinds=KINDS, cached=CACHED):
    """The keyword arguments of one call."""
    kind = kinds[draw.size(0, len(kinds) - 1)]
    requests, tokens, keys, arrays = layout(draw, kind)
    kv_heads, group, head_dim, value_dim = draw.size(1, 3), draw.size(1, 4), draw.size(1, 40), draw.size(1, 40)
    dtype = cached[draw.size(0, len(cached) - 1)]
    if kind == "paged":
        page_size = draw.size(1, 20)
        most = max([-(-n // page_size) for n in keys], default=0) + draw.size(0, 2)
        pages = draw.size(1, 6)
        arrays["page_table"] = draw.integers(draw.random.integers(0, pages, (requests, most)))
        before = (pages, page_size, kv_heads)
    elif kind == "dense":
        before = (requests, max(keys, default=0), kv_heads)
    else:
        before = (sum(keys), kv_heads)
    stored = (lambda n: (n + 1) // 2) if dtype == np.uint8 else (lambda n: n)
    rows = (requests, tokens) if kind == "dense" else (tokens,)
    arrays["query"] = draw.array((*rows, kv_heads * group, head_dim), (np.float32, np.float16)[draw.size(0, 1)])
    arrays["key"] = draw.array((*before, stored(head_dim)), dtype)
    arrays["value"] = draw.array((*before, stored(value_dim)), dtype)
    if dtype in (np.int8, np.uint8) and not draw.wrong():
        arrays["key_scales"] = draw.array(before, np.float32)
        arrays["value_scales"] = draw.array((before[0], 1, kv_heads) if kind == "paged" else before, np.float32)
    arrays |= extras(draw, kind, rows, kv_heads * group, requests)
    options = {
        "top_left": draw.size(0, 1) == 1,
        "window_left": int(draw.random.choice([-1, 0, 3, 100, 2**40])),
        "window_right": int(draw.random.choice([-1, 0, 0, 5, 2**40])),
        "scale": 0.3,
        "softcap": float(draw.random.choice([0.0, 0.0, 4.0])),
        "batch_invariant": draw.size(0, 1) == 1,
    }
    return arrays, options, (*rows, kv_heads * group, value_dim)


def extras(draw, kind, rows, heads, requests):
    arrays = {}
    if draw.size(0, 3) == 0:
        arrays["sinks"] = draw.array((heads,), np.float32)
    if draw.size(0, 3) == 0:
        arrays["alibi_slopes"] = draw.array((draw.random.choice([1, requests]), heads), np.float32)
    if draw.size(0, 3) == 0:
        sizes = [rows[0], heads, rows[1]] if kind == "dense" else [heads, rows[0]]
        shape = [n if draw.size(0, 1) else 1 for n in sizes]
        mask = draw.array((*shape, draw.size(0, 160)), np.float32)
        arrays["mask"] = mask if draw.size(0, 1) else (mask > 0).view(np.uint8)
    if draw.size(0, 4) == 0:
        tokens = int(np.prod(rows))
        first = draw.random.integers(-5, 150, tokens)
        arrays["first_keys"] = draw.integers(first)
        arrays["last_keys"] = draw.integers(first + draw.random.integers(-5, 60, tokens))
    return arrays


def guarded(shape, margin=64):
    """An array in the middle of a guarded one."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * margin, GUARD, np.float32)
    inner = whole[margin : margin + size]
    inner[...] = np.nan
    return whole, inner.reshape(shape)


@pytest.mark.costly
@pytest.mark.parametrize("block", range(8))
def test_any_call_is_refused_by_name_or_done(block):
    pools = [native.Pool(1), native.Pool(3)]
    done = 0
    for seed in range(block * 150, block * 150 + 150):
        draw = Draw(seed)
        arrays, options, shape = call(draw)
        whole, out = guarded(shape)
        edge, lse = guarded(shape[:-1])
        try:
            tensors = {name: as_tensor(array, name) for name, array in (arrays | {"out": out, "lse": lse}).items()}
            level, arithmetic = WAYS[seed % len(WAYS)]
            native.attention(pools[seed % 2], level, **tensors, **options, arithmetic=arithmetic)
        except (ArgumentError, KernelError) as error:
            assert draw.odd, f"seed {seed}: {error}"
            assert "expected" in str(error), f"seed {seed}: {error}"
            continue
        finally:
            for array in (whole, edge):
                assert (array[:64] == GUARD).all() and (array[-64:] == GUARD).all(), f"seed {seed}"
        done += 1
        assert not np.isnan(lse).any(), f"seed {seed}"
    assert done > 60


@pytest.mark.costly
@pytest.mark.parametrize("block", range(4))
def test_any_backward_is_refused_by_name_or_done(block):
    pools = [native.Pool(1), native.Pool(3)]
    done = 0
    for seed in range(block * 150, block * 150 + 150):
        draw = Draw(seed)
        arrays, options, shape = call(draw, KINDS[:2], CACHED[:3])
        del options["batch_invariant"]
        arrays |= {"out": draw.array(shape, np.float32), "lse": draw.array(shape[:-1], np.float32)}
        arrays["d_out"] = draw.array(shape, np.float16)
        if draw.size(0, 1):
            arrays["d_lse"] = draw.array(shape[:-1], np.float32)
        places = {
            f"d_{name}": guarded_like(arrays[name]) for name in ("query", "key", "value", "sinks") if name in arrays
        }
        try:
            tensors = {name: as_tensor(array, name) for name, array in arrays.items()}
            tensors |= {name: as_tensor(inner, name) for name, (_, inner) in places.items()}
            level, arithmetic = WAYS[seed % len(WAYS)]
            native.attention_backward(pools[seed % 2], level, **tensors, **options, arithmetic=arithmetic)
        except (ArgumentError, KernelError) as error:
            assert draw.odd, f"seed {seed}: {error}"
            assert "expected" in str(error), f"seed {seed}: {error}"
            continue
        finally:
            for whole, _ in places.values():
                assert (whole[:64] == whole.dtype.type(GUARD)).all() and (whole[-64:] == whole.dtype.type(GUARD)).all()
        done += 1
    assert done > 60


def guarded_like(array, margin=64):
    whole = np.full(array.size + 2 * margin, GUARD, array.dtype)
    return whole, whole[margin : margin + array.size].reshape(array.shape)
