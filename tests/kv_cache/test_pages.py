"""The page pool: no leak, no double use, whatever the order of calls. Integers only."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.errors import ArgumentError, CapacityError
from headrace.kv_cache.pages import PagePool, pages_needed


class Owners(RuleBasedStateMachine):
    """Holders that allocate, share and free, and a keeper; the model is the plain list of who holds what."""

    @initialize(num_pages=st.integers(1, 24))
    def start(self, num_pages):
        self.pool, self.num_pages = PagePool(num_pages), num_pages
        self.held, self.kept = [], set()

    @rule(count=st.integers(0, 26))
    def allocate(self, count):
        free = self.num_pages - len(self.in_use())
        if count > free:
            with pytest.raises(CapacityError, match=f"expected {count} free, got {free} of {self.num_pages}"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and not self.in_use() & set(pages)
        self.held.append(pages)

    @rule(data=st.data())
    def share_a_beginning(self, data):
        if self.held:
            pages = data.draw(st.sampled_from(self.held))
            beginning = pages[: data.draw(st.integers(0, len(pages)))]
            self.pool.share(beginning)
            self.held.append(list(beginning))

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            before = self.in_use() | set(pages)
            assert self.pool.free(pages) == len(before - self.in_use())

    @rule(data=st.data())
    def keep(self, data):
        if pages := sorted(self.held_now() - self.kept):
            page = data.draw(st.sampled_from(pages))
            self.pool.keep(page)
            self.kept.add(page)

    @rule(data=st.data())
    def the_keeper_gives_up(self, data):
        if spare := sorted(self.kept - self.held_now()):
            page = data.draw(st.sampled_from(spare))
            self.kept.remove(page)
            assert self.pool.free([page]) == 1

    @invariant()
    def every_page_is_free_or_counted(self):
        if not hasattr(self, "pool"):
            return
        expected = Counter(page for pages in self.held for page in pages) + Counter(self.kept)
        assert [self.pool.owners(page) for page in range(self.num_pages)] == [
            expected[p] for p in range(self.num_pages)
        ]
        assert self.pool.num_free == self.num_pages - len(expected)
        assert self.pool.num_spare == len(self.kept - self.held_now())

    def held_now(self):
        return {page for pages in self.held for page in pages}

    def in_use(self):
        return self.held_now() | self.kept

    def teardown(self):
        for pages in getattr(self, "held", []):
            self.pool.free(pages)
        if hasattr(self, "pool"):
            self.pool.free(self.kept)
            assert self.pool.num_spare == 0 and self.pool.num_free == self.num_pages
            assert sorted(self.pool.allocate(self.num_pages)) == list(range(self.num_pages))


TestOwners = Owners.TestCase
TestOwners.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_pages_come_in_order_and_the_last_freed_comes_first():
    pool = PagePool(5)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.free([1]) == 1
    assert pool.allocate(2) == [1, 3]


def test_out_of_pages_says_the_numbers_and_takes_nothing():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(CapacityError, match="expected 2 free, got 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1


@pytest.mark.parametrize("misuse", [lambda p: p.free([3]), lambda p: p.share([3]), lambda p: p.free([-1])])
def test_our_own_mistakes_are_caught(misuse):
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError):
        misuse(pool)


def test_a_pool_has_pages():
    with pytest.raises(ArgumentError, match="num_pages: expected at least 1, got 0"):
        PagePool(0)


@pytest.mark.parametrize("tokens,pages", [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_pages_needed(tokens, pages):
    assert pages_needed(tokens, 64) == pages
