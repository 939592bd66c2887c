"""flash_attn_with_kvcache by headrace: appended in place, rotated, padded, paged; elsewhere a cache is full of NaN."""

import pytest
import torch
from flash_attn_cases import SLOPES, plus_inf, starts_of
from plain_attention import hold, plain, random

from headrace.compat import flash_attn_interface
from headrace.compat.flash_attn import flash_attn_with_kvcache

LENS, PADS, ROOM = (0, 7, 24, 33), (0, 2, 11, 30), 48
WHOSE = (4, 1, 5, 0)  # whose cache each sequence has, of six


class Scene:
    """Four sequences in a cache of 6 rows, or in pages; `parts`: its keys and values, NaN where nothing is."""

    def __init__(self, dtype=torch.bfloat16, page_size=None, batch_idx=False, leftpad=False, dim=32):
        self.page_size, self.dtype = page_size, dtype
        self.rows = WHOSE if batch_idx else range(4)
        self.pads = PADS if leftpad else (0, 0, 0, 0)
        self.table = None if page_size is None else self._table()
        size = (6, ROOM) if page_size is None else (int(self.table.max()) + 1, page_size)
        self.parts = [torch.full((*size, 2, dim), torch.nan, dtype=dtype) for _ in range(2)]
        for which, r in ((which, r) for which in (0, 1) for r in range(4)):
            tokens = random(LENS[r] - self.pads[r], 2, dim, dtype=dtype, seed=10 * which + r)
            self.parts[which][self.at(r, torch.arange(self.pads[r], LENS[r]))] = tokens
        lens = {"cache_seqlens": torch.tensor(LENS, dtype=torch.int32)}
        idx = {"cache_batch_idx": torch.tensor(WHOSE, dtype=torch.int32)} if batch_idx else {}
        pads = {"cache_leftpad": torch.tensor(PADS, dtype=torch.int32)} if leftpad else {}
        self.arguments = lens | idx | pads
        if page_size is not None:
            given = self.table.clone()
            for r, row in enumerate(self.rows):
                given[row, -(-(LENS[r] + 9) // page_size) :] = 10**6
            self.arguments["block_table"] = given if batch_idx else given[:4]

    def _table(self):
        count = 6 * (ROOM // self.page_size)
        order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(0))[:count]
        return order.to(torch.int32).view(6, -1)

    def at(self, r, places):
        """Where tokens `places` of sequence r are."""
        row = self.rows[r]
        if self.table is None:
            return torch.full_like(places, row), places
        return self.table[row, places // self.page_size].long(), places % self.page_size

    def tokens(self, which, r, count):
        """What is in the cache of sequence r from its beginning on, up to token `count`."""
        return self.parts[which][self.at(r, torch.arange(self.pads[r], count))]

    def written(self, which, new):
        """The whole part as it must be after new [batch, tokens, kv_heads, dim]."""
        expected = self.parts[which].clone()
        for r, rows in enumerate(new):
            expected[self.at(r, LENS[r] + torch.arange(len(rows)))] = rows.to(expected.dtype)
        return expected


def bits(array):
    return array.contiguous().view(torch.uint8)


def by_formula(scene, q, counts, **options):
    """out and lse over what the cache holds, counts[r] tokens of each sequence."""

    def compute(*, dtype, order=None):
        found = []
        for r, count in enumerate(counts):
            keys, values = (scene.tokens(which, r, count)[None] for which in (0, 1))
            query = q(dtype)[r : r + 1] if callable(q) else q[r : r + 1]
            found.append(plain(query, keys, values, dtype=dtype, order=order, **options))
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs), plus_inf(torch.cat(lses))

    return compute


MASKS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (9, 2)}, {"window": (9, 2)}),
    "chunks": ({"attention_chunk": 8, "causal": True}, {"chunk": 8, "causal": True}),
    "all": (
        {"causal": True, "window_size": (20, -1), "softcap": 3.0, "alibi_slopes": SLOPES, "softmax_scale": 0.3},
        {"causal": True, "window": (20, -1), "softcap": 3.0, "slopes": SLOPES, "scale": 0.3},
    ),
}


@pytest.mark.parametrize("page_size", [None, 1, 6, 16])
@pytest.mark.parametrize("batch_idx,leftpad,new", [(0, 0, None), (1, 0, 5), (0, 1, 5), (1, 1, 3)])
@pytest.mark.parametrize("mask", MASKS)
def test_caches(page_size, batch_idx, leftpad, new, mask):
    theirs, ours = MASKS[mask]
    scene = Scene(page_size=page_size, batch_idx=batch_idx, leftpad=leftpad)
    q = random(4, 5, 6, 32, dtype=torch.bfloat16, seed=40)
    k, v = (None if new is None else random(4, new, 2, 32, dtype=torch.bfloat16, seed=41 + i) for i in range(2))
    expected = [
        scene.parts[which].clone() if new is None else scene.written(which, each) for which, each in enumerate((k, v))
    ]
    out, lse = flash_attn_with_kvcache(q, *scene.parts, k, v, return_softmax_lse=True, **scene.arguments, **theirs)
    for part, wanted in zip(scene.parts, expected, strict=True):
        assert torch.equal(bits(part), bits(wanted))
    counts = [length + (new or 0) for length in LENS]
    assert lse.shape == (4, 6, 5) and out.dtype == torch.bfloat16
    hold([out, lse], by_formula(scene, q, counts, **ours), torch.bfloat16, logarithms=[1])


def turned(x, cos, sin, interleaved):
    """x [tokens, heads, dim] rotated as complex numbers, in float64; cos, sin [tokens, pairs]."""
    pairs, x = cos.shape[-1], x.double()
    a, b = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    z = torch.complex(x[..., a], x[..., b]) * torch.complex(cos.double(), sin.double())[:, None]
    rotated = x.clone()
    rotated[..., a], rotated[..., b] = z.real, z.imag
    return rotated


def tables(dtype, pairs):
    angles = random(ROOM, pairs, seed=50).double()
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [None, 6])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 16])
@pytest.mark.parametrize("mask", ["plain", "causal", "window"])
def test_rotation(dtype, page_size, interleaved, pairs, mask):
    theirs, ours = MASKS[mask]
    scene = Scene(dtype, page_size=page_size, leftpad=page_size is None)
    cos, sin = tables(dtype, pairs)
    q, k, v = (random(4, 5, heads, 32, dtype=dtype, seed=40 + i) for i, heads in enumerate((6, 2, 2)))
    places = [torch.arange(5) + length for length in LENS]
    new_keys = [turned(row, cos[at], sin[at], interleaved) for row, at in zip(k, places, strict=True)]
    expected = [scene.written(0, new_keys), scene.written(1, v)]
    out, lse = flash_attn_with_kvcache(
        *(q, *scene.parts, k, v, cos, sin),
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **scene.arguments,
        **theirs,
    )
    torch.testing.assert_close(scene.parts[0], expected[0], equal_nan=True)
    assert torch.equal(bits(scene.parts[1]), bits(expected[1]))

    def rotated_query(as_dtype):
        at_once = mask == "plain"  # without causality or window all stand at the first place
        at = [place[:1].expand(5) if at_once else place for place in places]
        rows = [turned(row, cos[a], sin[a], interleaved) for row, a in zip(q, at, strict=True)]
        return torch.stack(rows).to(as_dtype)

    compute = by_formula(scene, rotated_query, [length + 5 for length in LENS], **ours)
    hold([out, lse], compute, dtype, logarithms=[1])


@pytest.mark.parametrize("page_size", [None, 16])
def test_one_token_at_a_time_is_all_at_once(page_size):
    scene = Scene(torch.float32, page_size=page_size)
    cos, sin = tables(torch.float32, 16)
    q, k, v = (random(4, 5, heads, 32, seed=40 + i) for i, heads in enumerate((6, 2, 2)))
    other = [part.clone() for part in scene.parts]
    rest = {name: value for name, value in scene.arguments.items() if name != "cache_seqlens"}
    lens = scene.arguments["cache_seqlens"]
    whole = flash_attn_with_kvcache(q, *scene.parts, k, v, cos, sin, lens, causal=True, **rest)
    steps = [
        flash_attn_with_kvcache(q[:, i : i + 1], *other, k[:, i : i + 1], v[:, i : i + 1], cos, sin, lens + i, **rest)
        for i in range(5)
    ]
    for mine, theirs in zip(other, scene.parts, strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_lengths_as_one_number_and_as_none():
    caches = [random(4, ROOM, 2, 32, dtype=torch.bfloat16, seed=i) for i in range(2)]
    q = random(4, 5, 6, 32, dtype=torch.bfloat16, seed=40)
    each = torch.full((4,), 20, dtype=torch.int32)
    expected = flash_attn_with_kvcache(q, *caches, cache_seqlens=each)
    assert torch.equal(flash_attn_with_kvcache(q, *caches, cache_seqlens=20), expected)
    whole = flash_attn_with_kvcache(q, *caches, cache_seqlens=torch.full((4,), ROOM, dtype=torch.int32))
    assert torch.equal(flash_attn_with_kvcache(q, *caches), whole)


def test_the_defaults_leave_all_as_it_is():
    caches = [random(4, ROOM, 2, 32, dtype=torch.bfloat16, seed=i) for i in range(2)]
    q, before = random(4, 5, 6, 32, dtype=torch.bfloat16, seed=40), [cache.clone() for cache in caches]
    out, lse = flash_attn_with_kvcache(q, *caches, return_softmax_lse=True)
    hold([out, lse], lambda **how: plain(q, *caches, **how), torch.bfloat16, logarithms=[1])
    assert all(torch.equal(one, other) for one, other in zip(caches, before, strict=True))


def test_a_cache_that_is_a_view():
    both = torch.full((4, ROOM, 2, 2, 32), torch.nan, dtype=torch.bfloat16)
    heads_first = torch.full((2, 4, 2, ROOM, 32), torch.nan, dtype=torch.bfloat16)
    q, k, v = (random(4, 5, heads, 32, dtype=torch.bfloat16, seed=40 + i) for i, heads in enumerate((6, 2, 2)))
    scene = Scene()
    expected = flash_attn_with_kvcache(q, *(part[:4].clone() for part in scene.parts), k, v, **scene.arguments)
    for views in (both.unbind(2), heads_first.transpose(2, 3).unbind(0)):
        for view, part in zip(views, scene.parts, strict=True):
            view.copy_(part[:4])
        assert torch.equal(flash_attn_with_kvcache(q, *views, k, v, **scene.arguments), expected)
        for r, length in enumerate(LENS):
            assert torch.equal(views[0][r, length : length + 5], k[r])


def test_a_sequence_without_a_token():
    scene = Scene()
    q = random(4, 1, 6, 32, dtype=torch.bfloat16)
    out, lse = flash_attn_with_kvcache(q, *scene.parts, return_softmax_lse=True, **scene.arguments)
    assert (out[0] == 0).all() and (lse[0] == torch.inf).all() and lse[1:].isfinite().all()


def test_splits_have_no_effect():
    scene, q = Scene(), random(4, 1, 6, 32, dtype=torch.bfloat16)
    expected = flash_attn_with_kvcache(q, *scene.parts, **scene.arguments)
    assert torch.equal(flash_attn_with_kvcache(q, *scene.parts, num_splits=7, **scene.arguments), expected)


def test_what_requires_a_gradient_is_taken_without_one():
    scene = Scene()
    q, k, v = (random(4, 5, heads, 32, dtype=torch.bfloat16).requires_grad_() for heads in (6, 2, 2))
    assert not flash_attn_with_kvcache(q, *scene.parts, k, v, **scene.arguments).requires_grad


@pytest.mark.parametrize("page_size", [None, 16])
def test_float8_caches(page_size):
    wide = Scene(torch.float32, page_size=page_size)
    narrow = [part.nan_to_num(0.0).to(torch.float8_e4m3fn) for part in wide.parts]
    q, k, v = (random(4, 1, heads, 32).to(torch.float8_e4m3fn) for heads in (6, 2, 2))
    scale = torch.full((4, 2), 0.5)
    out = flash_attn_with_kvcache(q, *narrow, k, v, k_descale=scale, v_descale=scale, **wide.arguments)
    assert out.dtype == torch.bfloat16
    floats = [part.float() for part in narrow]
    expected = flash_attn_with_kvcache(q.float(), *(0.5 * part for part in floats), **_longer(wide.arguments))
    torch.testing.assert_close(out, expected.bfloat16())
    for part, row in zip(narrow, (k, v), strict=True):
        assert torch.equal(bits(part[wide.at(1, torch.tensor([7]))]), bits(row[1]))


def test_float8_is_rotated_as_the_numbers_it_holds():
    scene, (cos, sin) = Scene(torch.float32), tables(torch.float32, 16)
    narrow = [part.nan_to_num(0.0).to(torch.float8_e4m3fn) for part in scene.parts]
    q, k, v = (random(4, 1, heads, 32).to(torch.float8_e4m3fn) for heads in (6, 2, 2))
    flash_attn_with_kvcache(q, *narrow, k, v, cos, sin, **scene.arguments)
    at = torch.tensor(LENS)
    expected = torch.stack([turned(row, cos[i : i + 1], sin[i : i + 1], True) for row, i in zip(k, at, strict=True)])
    assert torch.equal(bits(narrow[0][torch.arange(4), at]), bits(expected[:, 0].to(torch.float8_e4m3fn)))


def _longer(arguments):
    return arguments | {"cache_seqlens": arguments["cache_seqlens"] + 1}


# What version 3 adds


@pytest.mark.parametrize("page_size", [None, 16])
def test_queries_and_new_tokens_of_many_lengths(page_size):
    scene, other = Scene(page_size=page_size), Scene(page_size=page_size)
    cos, sin = tables(torch.bfloat16, 16)
    query_lens, new_lens = (3, 5, 1, 4), (3, 0, 1, 5)
    q, k, v = (random(4, 5, heads, 32, dtype=torch.bfloat16, seed=40 + i) for i, heads in enumerate((6, 2, 2)))
    rows = [
        torch.cat([row[:count] for row, count in zip(array, lens, strict=True)])
        for array, lens in ((q, query_lens), (k, new_lens), (v, new_lens))
    ]
    rest = {name: value for name, value in scene.arguments.items() if name != "block_table"}
    places = torch.tensor([4, 2, 0, 1], dtype=torch.int32)
    out, lse = flash_attn_interface.flash_attn_with_kvcache(
        *(rows[0], *scene.parts, *rows[1:]),
        rotary_cos=cos,
        rotary_sin=sin,
        page_table=scene.arguments.get("block_table"),
        cu_seqlens_q=starts_of(query_lens),
        cu_seqlens_k_new=starts_of(new_lens),
        rotary_seqlens=places,
        causal=True,
        return_softmax_lse=True,
        **rest,
    )
    assert lse.shape == (6, 13)
    outs = []
    for r in range(4):
        alone = {name: value if name == "page_table" else value[r : r + 1] for name, value in rest.items()}
        table = None if page_size is None else other.arguments["block_table"][r : r + 1]
        parts = other.parts if page_size else [part[r : r + 1] for part in other.parts]
        new = [array[r : r + 1, : new_lens[r]] for array in (k, v)]
        outs.append(
            flash_attn_with_kvcache(
                *(q[r : r + 1, : query_lens[r]], *parts, *new, cos, sin),
                rotary_seqlens=places[r : r + 1],
                block_table=table,
                causal=True,
                **alone,
            )[0]
        )
    for mine, theirs in zip(scene.parts, other.parts, strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    torch.testing.assert_close(out, torch.cat(outs))


def test_version_3_says_minus_inf_of_nothing():
    scene, q = Scene(), random(4, 1, 6, 32, dtype=torch.bfloat16)
    _, lse = flash_attn_interface.flash_attn_with_kvcache(q, *scene.parts, return_softmax_lse=True, **scene.arguments)
    assert (lse[0] == -torch.inf).all()


# Mistakes


def test_arguments_that_need_each_other():
    scene = Scene()
    q, k, v = (random(4, 5, heads, 32, dtype=torch.bfloat16) for heads in (6, 2, 2))
    cos, sin = tables(torch.bfloat16, 16)
    with pytest.raises(ValueError, match="k, v: expected both or neither, got k alone"):
        flash_attn_with_kvcache(q, *scene.parts, k, **scene.arguments)
    with pytest.raises(ValueError, match="cache_seqlens: expected"):
        flash_attn_with_kvcache(q, *scene.parts, k, v)
    with pytest.raises(ValueError, match="rotary_cos, rotary_sin: expected both or neither, got sin"):
        flash_attn_with_kvcache(q, *scene.parts, k, v, rotary_sin=sin, **scene.arguments)
    with pytest.raises(ValueError, match="rotary_cos, rotary_sin: expected k and v"):
        flash_attn_with_kvcache(q, *scene.parts, rotary_cos=cos, rotary_sin=sin, **scene.arguments)


@pytest.mark.parametrize("page_size,name", [(None, "k_cache"), (16, "block_table")])
def test_sequences_longer_than_their_place(page_size, name):
    scene, more = Scene(page_size=page_size), torch.full((4,), ROOM, dtype=torch.int32)
    before = [part.clone() for part in scene.parts]
    q, k, v = (random(4, 1, heads, 32, dtype=torch.bfloat16) for heads in (6, 2, 2))
    with pytest.raises(RuntimeError, match=f"{name}: has room for 48 tokens of a sequence, .* ask for 49"):
        flash_attn_with_kvcache(q, *scene.parts, k, v, **(scene.arguments | {"cache_seqlens": more}))
    with pytest.raises(RuntimeError, match=f"{name}: .* 49"):
        flash_attn_with_kvcache(q, *scene.parts, **(scene.arguments | {"cache_seqlens": more + 1}))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(scene.parts, before, strict=True))


def test_unknown_and_refused_keywords():
    scene, q = Scene(), random(4, 1, 6, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"flash_attn_with_kvcache\(\) got an unexpected keyword argument 'dropout_p'"):
        flash_attn_with_kvcache(q, *scene.parts, dropout_p=0.0)
    with pytest.raises(NotImplementedError, match="score_mod"):
        flash_attn_with_kvcache(q, *scene.parts, score_mod=max)
