"""Top-k sparse attention: what is listed is what is seen, in any format, by keys or by pages; and lists that lie."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import AttentionCase, heads, paged
from headrace.check.attention_expected import assert_close
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, Fixed
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.ops import sparse
from headrace.ops.attention_formula import visible
from headrace.ops.attention_latent import mla_attention
from headrace.ops.attention_options import checked_options
from headrace.ops.attention_paged import gather, paged_attention

DECODE = paged("decode", (1, 1, 3), (90, 20, 33), **heads(6, 2, 40), page_size=16)


def as_ragged(case, batch, indices):
    """Each token as a request whose keys are those it lists and sees, one after the other."""
    request = np.repeat(np.arange(len(case.query_lens)), case.query_lens)
    found = {"key": [], "value": []}
    counts = []
    for token, r in enumerate(request):
        place, num_keys = token - sum(case.query_lens[:r]), case.key_lens[r]
        seen = visible(case.query_lens[r], num_keys, checked_options(1, **case.options))[place]
        keys = [key for key in indices[token] if key >= 0 and seen[key]]
        counts.append(len(keys))
        for name, arrays in found.items():
            pages, scales = batch[f"{name}_pages"], batch.get(f"{name}_scales")
            arrays.append(gather(pages, batch["page_table"][r], num_keys, scales)[keys])
    ragged = dataclasses.replace(case, layout="ragged", query_lens=(1,) * len(request), key_lens=tuple(counts))
    none = {"key": np.zeros((0, case.kv_heads, case.head_dim)), "value": np.zeros((0, case.kv_heads, case.value_dim))}
    arrays = {name: np.concatenate(parts or [none[name]]) for name, parts in found.items()}
    arrays |= {
        name: np.cumsum([0, *lens]) for name, lens in (("key_starts", counts), ("query_starts", [1] * len(counts)))
    }
    kept = {name: batch[name] for name in ("query", "sinks", "softcap", "scale") if batch.get(name) is not None}
    return ragged, kept | arrays


def keys_of_pages(case, page_indices):
    """Pages as the keys in them, those past a sequence's end left out."""
    request = np.repeat(np.arange(len(case.query_lens)), case.query_lens)
    lens = np.array(case.key_lens)[request][:, None, None]
    keys = page_indices[:, :, None] * case.page_size + np.arange(case.page_size)
    keys = np.where((page_indices[:, :, None] >= 0) & (keys < lens), keys, -1)
    return keys.reshape(len(request), page_indices.shape[1] * case.page_size)


def assert_listed(case, batch, indices, got):
    """`got` is attention over what is listed."""
    ragged, arrays = as_ragged(case, batch, indices)
    exact = reference(ragged, arrays)
    assert_close(got, exact, straightforward(ragged, arrays, exact))


def listed(case, k, limit, random, twice=False):
    """k numbers below limit(request) for each token, in any order, some -1; twice: the same one more than once."""
    rows = []
    for request, count in enumerate(case.query_lens):
        for _ in range(count):
            most = limit(request)
            row = random.integers(0, most, k) if twice and most else random.permutation(most)[:k]
            row = np.concatenate([row, np.full(k - len(row), -1)])
            row[random.random(k) < 0.2] = -1
            rows.append(random.permutation(row))
    return np.array(rows, np.int32).reshape(sum(case.query_lens), k)


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4]))
    requests = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=4))
    some = st.sampled_from([None, None, 0, 7])
    return AttentionCase(
        "drawn",
        "paged",
        tuple(queries for queries, _ in requests),
        tuple(keys for _, keys in requests),
        **heads(kv_heads * group, kv_heads, 16, 10),
        page_size=draw(st.integers(1, 20)),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=(draw(some), draw(some)),
        softcap=draw(st.none() | st.floats(1, 60)),
        sinks=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases(), k=st.integers(1, 30), seed=st.integers(0, 2**31), twice=st.booleans(), whole=st.booleans())
def test_what_is_listed_is_what_is_seen(case, k, seed, twice, whole):
    batch, random = attention_batch(case, seed=seed), np.random.default_rng(seed)
    if whole:
        pages = listed(case, k, lambda r: -(-case.key_lens[r] // case.page_size), random, twice)
        indices, got = keys_of_pages(case, pages), paged_attention(**batch, page_indices=pages)
    else:
        indices = listed(case, k, lambda r: case.key_lens[r], random, twice)
        got = paged_attention(**batch, indices=indices)
    assert_listed(case, batch, indices, got)


FORMATS = [("float8_e4m3fn", ""), ("float8_e4m3fn", "token"), ("int8", "token"), ("int8", "page"), ("uint8", "token")]


@pytest.mark.parametrize("kv_format,scales", FORMATS)
@pytest.mark.parametrize("layout", ["apart", "stacked"])
def test_quantized_and_strided_pages_are_listed_too(kv_format, scales, layout):
    case = dataclasses.replace(DECODE, kv_format=kv_format, scales=scales)
    batch, random = attention_batch(case), np.random.default_rng(0)
    indices = listed(case, 9, lambda r: case.key_lens[r], random)
    expected = paged_attention(**batch, indices=indices)
    assert_listed(case, batch, indices, expected)
    if layout == "stacked":
        both = np.stack([batch["key_pages"], batch["value_pages"]], axis=1)
        batch |= {"key_pages": both[:, 0], "value_pages": both[:, 1]}
        assert np.array_equal(paged_attention(**batch, indices=indices).out, expected.out)


def test_everything_listed_is_everything_seen_and_nothing_is_nothing():
    batch = attention_batch(DECODE)
    whole = np.tile(np.arange(90, dtype=np.int32), (5, 1))
    whole[whole >= np.repeat(DECODE.key_lens, DECODE.query_lens)[:, None]] = -1
    assert_listed(DECODE, batch, whole, paged_attention(**batch, indices=whole))
    nothing = paged_attention(**batch, indices=np.full((5, 4), -1, np.int32))
    assert not nothing.out.any() and np.isneginf(nothing.lse).all()
    assert np.isneginf(paged_attention(**batch, indices=np.zeros((5, 0), np.int32)).lse).all()


def test_latents_are_listed_too():
    case = paged("latent", (1, 2), (60, 33), **heads(5, 1, 40, 32), page_size=16)
    batch, random = attention_batch(case), np.random.default_rng(0)
    latents, indices = batch["key_pages"], listed(case, 7, lambda r: case.key_lens[r], random)
    batch |= {"value_pages": latents[..., :32], "scale": 0.3}
    names = ("query", "page_table", "sequence_lens", "query_starts")
    given = {name: batch[name] for name in names} | {"latent_pages": latents[:, :, 0], "value_dim": 32, "scale": 0.3}
    assert_listed(case, batch, indices, mla_attention(**given, indices=indices))
    pages = listed(case, 2, lambda r: -(-case.key_lens[r] // 16), random)
    assert_listed(case, batch, keys_of_pages(case, pages), mla_attention(**given, page_indices=pages))


def test_memory_of_torch_and_of_the_runtime_is_listed_too():
    torch = pytest.importorskip("torch")
    batch, indices = attention_batch(DECODE), np.full((5, 3), 2, np.int32)
    expected = paged_attention(**batch, indices=indices).out
    arrays = {name: torch.from_numpy(array) for name, array in batch.items() if isinstance(array, np.ndarray)}
    assert np.array_equal(paged_attention(**(batch | arrays), indices=torch.from_numpy(indices)).out.numpy(), expected)
    fixed = {name: Fixed(as_tensor(batch[name], name)) for name in ("key_pages", "value_pages")}
    assert np.array_equal(paged_attention(**(batch | fixed), indices=indices).out, expected)


def test_nothing_is_copied():
    pages = attention_batch(DECODE)["key_pages"]
    flat, stride = sparse.flattened(pages, "key_pages")
    assert np.shares_memory(flat, pages) and stride == 16 and flat.shape == (len(pages) * 16, 1, 2, 40)
    every_third = np.zeros((5, 48, 2, 40), np.float32)[:, :16]
    flat, stride = sparse.flattened(every_third, "key_pages")
    assert stride == 48 and flat.shape == (4 * 48 + 16, 1, 2, 40)


def test_a_list_is_for_calls_that_run_now():
    batch = attention_batch(DECODE)
    program = native.Program(native.Pool(1), native.Sizes(5, 3, 1))
    batch["sequence_lens"] = Buffer(as_tensor(batch["sequence_lens"], "lens").follow("requests"), program)
    with pytest.raises(ArgumentError, match="indices: expected None in a program"):
        paged_attention(**batch, indices=np.zeros((5, 1), np.int32))


def row(*numbers, token=1):
    made = np.zeros((5, len(numbers)), np.int32)
    made[token] = numbers
    return made


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"indices": row(3, 20)}, r"indices: expected -1 to 19, within the token's sequence, got 20 at \[1, 1\]"),
        ({"indices": row(-2)}, r"indices: expected -1 to 19.*got -2 at \[1, 0\]"),
        (
            {"page_indices": row(0, 2)},
            r"page_indices: expected -1 to 1, within the token's sequence, got 2 at \[1, 1\]",
        ),
        ({"indices": row(1), "page_indices": row(1)}, "indices, page_indices: expected one of them, got both"),
        ({"indices": row(1).astype(np.int64)}, "indices: expected int32"),
        ({"indices": row(1)[:4]}, r"indices: expected \[5, k\]"),
        ({"indices": [[1]] * 5}, "indices: expected an array"),
        ({"indices": row(1), "mask": np.ones((5, 3), bool)}, "mask: expected None with indices"),
        ({"indices": row(1), "alibi_slopes": np.ones(6, np.float32)}, "alibi_slopes: expected None with indices"),
        ({"indices": row(1), "query_starts": np.array([0, 1, 9, 5], np.int32)}, "query_starts: expected numbers"),
        ({"indices": row(1), "page_table": np.full((3, 8), 99, np.int32)}, "page_table: expected 0 to"),
        ({"indices": row(18), "sequence_lens": np.array([9, 999, 3], np.int32)}, None),
        (
            {"indices": row(998), "sequence_lens": np.array([9, 999, 3], np.int32)},
            "sequence_lens: expected at most what",
        ),
    ],
)
def test_lists_that_lie_are_named(changes, text):
    batch = attention_batch(DECODE) | changes
    if text is None:
        assert np.isfinite(paged_attention(**batch).lse[1]).all()
        return
    with pytest.raises(ArgumentError, match=text):
        paged_attention(**batch)


def test_pages_an_odd_number_of_elements_apart_cannot_be_seen_as_keys():
    batch = attention_batch(DECODE)
    keys = batch["key_pages"]
    wide = np.zeros((len(keys), keys[0].size + 1), np.float32)
    strides = (wide.strides[0], *keys.strides[1:])
    odd = np.lib.stride_tricks.as_strided(wide, keys.shape, strides)
    odd[...] = keys
    indices = row(1)
    with pytest.raises(ArgumentError, match="key_pages: with indices, expected pages a whole number of keys apart"):
        paged_attention(**(batch | {"key_pages": odd}), indices=indices)
    with pytest.raises(ArgumentError, match="expected pages equally far apart, got 16 and 32 keys"):
        values = np.repeat(batch["value_pages"], 2, axis=1)[:, :16]
        paged_attention(**(batch | {"value_pages": values}), indices=indices)
