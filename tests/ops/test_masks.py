"""Masks: each structure is recognised from its construction; what is recognised writes back that mask, no other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ArgumentError
from headrace.ops import masks
from headrace.ops.masks import Segment, expanded, recognise


def own_keys(queries, keys, align="bottom_right"):
    return np.arange(queries)[:, None] + (keys - queries if align == "bottom_right" else 0)


def causal(queries, keys, align="bottom_right"):
    return np.arange(keys) <= own_keys(queries, keys, align)


def window(queries, keys, left, right, align="bottom_right"):
    distance = np.arange(keys) - own_keys(queries, keys, align)
    return (distance >= (-np.inf if left is None else -left)) & (distance <= (np.inf if right is None else right))


def prefix(queries, keys, length):
    return causal(queries, keys) | (np.arange(keys) < length)


def documents(blocks, keys, is_causal):
    """blocks: (queries, keys before, keys) of each document, in the order of the keys."""
    rows, begin = [], 0
    for num_queries, gap, num_keys in blocks:
        begin += gap
        block = np.zeros((num_queries, keys), bool)
        inside = causal(num_queries, num_keys) if is_causal else True
        block[:, begin : begin + num_keys] = inside
        rows.append(block)
        begin += num_keys
    return np.concatenate(rows)


def tree(parents, past):
    seen = np.zeros((len(parents), past + len(parents)), bool)
    for i, parent in enumerate(parents):
        seen[i] = seen[parent] if parent >= 0 else np.arange(past + len(parents)) < past
        seen[i, past + i] = True
    return seen


@pytest.mark.parametrize(
    "mask,kind,options",
    [
        (np.ones((3, 7), bool), "all", {}),
        (np.ones((0, 7), bool), "all", {}),
        (np.ones((7, 0), bool), "all", {}),
        (np.ones((1, 9), bool), "all", {}),
        (causal(5, 5), "causal", {"causal": True, "align": "bottom_right"}),
        (causal(5, 12), "causal", {"causal": True, "align": "bottom_right"}),
        (causal(12, 5), "causal", {"causal": True, "align": "bottom_right"}),
        (causal(5, 12, "top_left"), "causal_top_left", {"causal": True, "align": "top_left"}),
        (causal(12, 5, "top_left"), "causal_top_left", {"causal": True, "align": "top_left"}),
        (window(9, 20, 3, 0), "window", {"causal": True, "align": "bottom_right", "window": (3, None)}),
        (window(9, 9, 0, 0), "window", {"causal": True, "align": "bottom_right", "window": (0, None)}),
        (window(9, 20, 3, 2), "window", {"causal": False, "align": "bottom_right", "window": (3, 2)}),
        (window(9, 20, None, 2), "window", {"causal": False, "align": "bottom_right", "window": (None, 2)}),
        (window(9, 9, 4, None), "window", {"causal": False, "align": "bottom_right", "window": (4, None)}),
        (window(9, 20, 3, 2, "top_left"), "window", {"causal": False, "align": "top_left", "window": (3, 2)}),
        (window(20, 9, 3, 2), "window", {"causal": False, "align": "bottom_right", "window": (3, 2)}),
        (prefix(9, 9, 4), "prefix", {"prefix_len": 4}),
        (prefix(9, 20, 15), "prefix", {"prefix_len": 15}),
        (tree([-1, 0, 0, 1, 1, 2], 11), "tree", None),
        (tree([-1, -1, 0], 0), "tree", None),
    ],
)
def test_each_structure_is_recognised(mask, kind, options):
    found = recognise(mask)
    assert found.kind == kind
    assert options is None or found.options == options
    assert np.array_equal(expanded(found), mask)
    assert str(mask.shape[0]) in found.text and str(mask.shape[1] if kind != "tree" else mask.shape[0]) in found.text


def test_packed_sequences_of_one_query_each_are_documents():
    mask = documents([(1, 0, 900), (1, 124, 300), (1, 24, 1), (1, 90, 512)], 2048, False)
    found = recognise(mask)
    assert found.kind == "document"
    begins = [(0, 900), (1024, 1324), (1348, 1349), (1439, 1951)]
    assert found.segments == [Segment(i, i + 1, *keys, False) for i, keys in enumerate(begins)]
    words = (
        "4 documents side by side, each full, of 1 query and 1 to 900 keys (4 queries, 2048 keys, 20.9% of the mask)"
    )
    assert found.text == words


def test_packed_prompts_are_causal_documents():
    mask = documents([(5, 0, 5), (1, 0, 1), (3, 0, 8)], 20, True)
    assert recognise(mask).segments == [
        Segment(0, 5, 0, 5, True),
        Segment(5, 6, 5, 6, True),
        Segment(6, 9, 6, 14, True),
    ]


def test_documents_may_lie_in_any_order_and_be_seen_by_nobody():
    mask = documents([(2, 0, 3), (2, 1, 4)], 12, False)[[2, 3, 0, 1]]
    mask = np.concatenate([mask, np.zeros((2, 12), bool)])
    segments = [Segment(0, 2, 4, 8, False), Segment(2, 4, 0, 3, False), Segment(4, 6, 0, 0, False)]
    assert recognise(mask).segments == segments


def test_documents_that_share_keys_are_intervals():
    mask = documents([(2, 0, 3), (2, 1, 4)], 12, False)
    mask[2:, 2] = mask[2:, 3] = True
    found = recognise(mask)
    assert found.kind == "intervals" and not found.segments
    assert found.first_keys.tolist() == [0, 0, 2, 2] and found.last_keys.tolist() == [2, 2, 7, 7]
    assert found.first_keys.dtype == found.last_keys.dtype == np.int32


def test_a_tree_names_its_parents_and_the_columns_that_matter():
    parents = [-1, 0, 0, 1, 2, 2, 4]
    found = recognise(tree(parents, 30))
    assert found.options["parents"].tolist() == parents and found.options["columns"] == 7
    assert found.text == "a tree of 7 queries (1 root, 4 deep) after a past of 30 keys"


def test_a_dense_mask_says_which_columns_matter():
    mask = np.ones((4, 30), bool)
    mask[0, 21] = mask[3, 25] = False
    found = recognise(mask)
    assert found.kind == "dense" and found.options["columns"] == 9
    with pytest.raises(ArgumentError, match="of which nothing is kept"):
        expanded(found)


STRUCTURES = st.sampled_from(["all", "causal", "window", "prefix", "documents", "tree", "ranges"])


@st.composite
def structured(draw):
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 24))
    kind, side = draw(STRUCTURES), st.none() | st.integers(0, 9)
    if kind == "causal":
        return causal(queries, keys, draw(st.sampled_from(["bottom_right", "top_left"])))
    if kind == "window":
        return window(queries, keys, draw(side), draw(side), draw(st.sampled_from(["bottom_right", "top_left"])))
    if kind == "prefix":
        return prefix(queries, keys, draw(st.integers(0, keys)))
    if kind == "documents":
        block = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 6))
        blocks = draw(st.lists(block, min_size=1, max_size=4))
        mask = documents(blocks, 40, draw(st.booleans()))
        return mask[draw(st.permutations(range(len(mask))))] if draw(st.booleans()) else mask
    if kind == "tree":
        return tree([draw(st.integers(-1, i - 1)) for i in range(queries)], draw(st.integers(0, 9)))
    if kind == "ranges":
        ends = np.array([sorted(draw(st.tuples(*[st.integers(0, keys)] * 2))) for _ in range(queries)])
        return (np.arange(keys) >= ends[:, :1]) & (np.arange(keys) < ends[:, 1:])
    return np.ones((queries, keys), bool)


@settings(max_examples=400, deadline=None)
@given(mask=structured(), flip=st.booleans(), data=st.data())
def test_what_is_recognised_writes_back_the_mask(mask, flip, data):
    mask = mask.copy()
    if flip and mask.size:
        place = data.draw(st.integers(0, mask.size - 1))
        mask.flat[place] = ~mask.flat[place]
    found = recognise(mask)
    if found.kind != "dense":
        assert np.array_equal(expanded(found), mask)
    else:
        assert not np.all(np.diff(mask.astype(int), axis=1).clip(0).sum(1) + mask[:, 0] <= 1)
        assert mask[:, : mask.shape[1] - found.options["columns"]].all()
        assert not mask[:, -found.options["columns"]].all()


@settings(max_examples=200, deadline=None)
@given(mask=structured())
def test_segments_cover_the_rows_and_share_no_key(mask):
    segments = recognise(mask).segments
    if segments:
        assert [s.row_begin for s in segments] == [0, *(s.row_end for s in segments[:-1])]
        assert segments[-1].row_end == len(mask) and len({s.causal for s in segments}) == 1
        keys = [key for s in segments for key in range(s.key_begin, s.key_end)]
        assert len(keys) == len(set(keys))


def test_masks_larger_than_a_block_and_of_any_strides():
    queries = 3 * masks.BLOCK_BYTES // 1000
    mask = window(queries, 1000, 7, 3, "top_left")
    assert recognise(mask).kind == "window"
    assert recognise(np.asfortranarray(mask)).options == recognise(mask).options
    assert recognise(np.broadcast_to(np.True_, (queries, 1000))).kind == "all"
    mask[-1, queries + 3] = True
    assert recognise(mask).kind == "intervals"


@pytest.mark.parametrize("mask", [np.ones((2, 2)), np.ones(4, bool), np.ones((1, 2, 2), bool), [[True]]])
def test_what_is_no_mask_is_said(mask):
    with pytest.raises(ArgumentError, match=r"mask: expected bool \[queries, keys\]"):
        recognise(mask)
