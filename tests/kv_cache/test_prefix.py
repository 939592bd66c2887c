"""The prefix cache with integers alone: what is found was put there, what is needed is not given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.kv_cache.pages import PagePool
from headrace.kv_cache.prefix import Node, PrefixCache, common_len

SIZE = 4


def hold(pool: PagePool, cache: PrefixCache, ids: list[int]) -> list[Node]:
    """Puts a text on pages of its own into the cache, which is their only owner afterwards."""
    nodes = list[Node]()
    for first in range(0, len(ids), SIZE):
        [page] = pool.allocate(1)
        nodes.append(cache.insert(ids[first : first + SIZE], page, nodes[-1] if nodes else None))
        pool.free([page])
    return nodes


def test_whole_pages_are_shared_and_the_page_where_texts_part_is_named() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    nodes = hold(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    match = cache.match([1, 2, 3, 4, 5, 6, 9, 9, 9])
    assert (match.nodes, match.tail, match.tail_len) == (nodes[:1], nodes[1].page, 2)
    match = cache.match([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert (match.nodes, match.tail, match.tail_len) == (nodes[:2], nodes[2].page, 2)
    match = cache.match([2, 2, 3, 4])
    assert (match.nodes, match.tail, match.tail_len) == ([], None, 0)


def test_a_page_that_fills_up_is_the_same_node() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool, SIZE)
    [page] = pool.allocate(1)
    first = cache.insert([1, 2], page, None)
    assert cache.insert([1, 2, 3, 4], page, None) is first and pool.owners(page) == 2 and len(cache) == 1
    assert cache.match([1, 2, 3, 4, 5]).nodes == [first]


def test_tokens_that_are_there_already_keep_their_page() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    [node] = hold(pool, cache, [1, 2, 3, 4])
    for ids in ([1, 2, 3, 4], [1, 2]):
        [other] = pool.allocate(1)
        assert cache.insert(ids, other, None) is node and pool.owners(other) == 1


def test_what_was_unused_for_longest_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    old, new = hold(pool, cache, [1] * 8), hold(pool, cache, [2] * 8)
    cache.match([1] * 8)
    assert cache.evict(3) == 3
    assert cache.match([2] * 8).nodes == [] and cache.match([1] * 8).nodes == old[:1]
    assert all(pool.owners(node.page) == 0 for node in (*new, old[1]))


def test_pages_of_others_stay() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    nodes = hold(pool, cache, [1] * 12)
    pool.share([node.page for node in nodes[:2]])
    assert pool.num_spare == 1 and cache.evict(3) == 1 and len(cache) == 2


def test_a_lookup_among_thousands_of_ends_looks_at_few() -> None:
    pool = PagePool(3000)
    cache = PrefixCache(pool, SIZE)
    for i in range(3000):
        hold(pool, cache, [7, i])
    match = cache.match([7, 2999, 5])
    assert match.tail_len == 2 and cache.match([7, 0, 5]).tail_len == 1


texts = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(st.lists(st.tuples(texts, st.integers(0, 3)), max_size=30))
def test_a_match_is_as_long_as_any_held_text_allows(steps: list[tuple[list[int], int]]) -> None:
    pool = PagePool(200)
    cache, held = PrefixCache(pool, SIZE), list[list[int]]()
    for ids, evicted in steps:
        match = cache.match(ids)
        found = [token for node in match.nodes for token in node.ids]
        length = len(found) + match.tail_len
        assert found == ids[: len(found)] and length <= max([common_len(ids, text) for text in held], default=0)
        if not any(count for _, count in steps):
            assert length == max([common_len(ids, text) for text in held], default=0)
        hold(pool, cache, ids)
        held.append(ids)
        cache.evict(evicted)
        assert pool.num_free + len(cache) == 200 and pool.num_spare == len(cache)
    cache.clear()
    assert pool.num_free == 200 and not cache.root.children
