"""The page pool: which pages of the KV cache are in use, and by how many. Integers only.

A page holds the keys and values of `page_size` consecutive tokens, in every layer. Requests with the same beginning
hold the same pages, so a page counts its owners and is free again when the last one lets go. One of its owners may be
its keeper, who holds it in case it is of use again and gives it up when asked: pages that nobody else holds are spare.
What a page contains, and who its owners are, is not known here.

Every operation costs the same per page whatever the size of the pool. Freed pages are handed out again first: they are
the ones whose memory is already there and in a cache. Absent on purpose: eviction, prefixes, memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.errors import ArgumentError, CapacityError


class PagePool:
    """Pages 0 .. num_pages - 1, each with its number of owners."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ArgumentError(f"num_pages: expected at least 1, got {num_pages}")
        self._owners = [0] * num_pages
        self._kept = bytearray(num_pages)  # 1: one of its owners is its keeper
        self.num_spare = 0  # pages that their keeper alone holds
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; page 0 is on top

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many hold this page; 0: it is free."""
        return self._owners[self._index(page)]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each, or CapacityError and nothing changed."""
        assert count >= 0, f"allocate({count})"
        if count > len(self._free):
            raise CapacityError(
                f"pages: expected {count} free, got {len(self._free)} of {len(self._owners)}",
                "fewer requests at once, shorter ones, or a cache with more pages",
            )
        first = len(self._free) - count
        pages = self._free[first:][::-1]
        del self._free[first:]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of these pages, all of them in use."""
        for page in pages:
            assert self._owners[self._index(page)] > 0, f"page {page} is shared but free"
            if self._kept[page] and self._owners[page] == 1:
                self.num_spare -= 1
            self._owners[page] += 1

    def keep(self, page: int) -> None:
        """A keeper for a page that has other owners; it lets go of it when it frees a spare page."""
        assert self._owners[self._index(page)] > 0, f"page {page} is kept but free"
        assert not self._kept[page], f"page {page} has a keeper"
        self._owners[page] += 1
        self._kept[page] = 1

    def free(self, pages: Iterable[int]) -> int:
        """One owner less for each of these pages. Returns how many had no other and are free now."""
        before = len(self._free)
        for page in pages:
            assert self._owners[self._index(page)] > 0, f"page {page} is freed but free"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self.num_spare -= self._kept[page]
                self._kept[page] = 0
                self._free.append(page)
            elif self._owners[page] == 1:
                self.num_spare += self._kept[page]
        return len(self._free) - before

    def _index(self, page: int) -> int:
        # NOTE: a negative number would index from the end and count owners of another page.
        assert 0 <= page < len(self._owners), f"page {page} is none of {len(self._owners)}"
        return page


def pages_needed(num_tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // page_size)
