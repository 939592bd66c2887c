"""The prefix cache: which pages hold the keys and values of which beginnings. Integers only.

A tree of pages: a node is a page's tokens behind those of its parent, so the path from the root spells a text from its
first token. Full pages are found by their tokens, one lookup per page. The page where two texts part can be copied up
to there: `Match.tail`. The cache is the keeper of each of its pages; the page pool counts the other owners, and only
pages without others are ever given up, the ones unused for longest first, ends before beginnings.

A page in the tree may still be written by the request that fills it, but only behind the tokens its node has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from headrace.kv_cache.pages import PagePool

_MOST_LOOKED_AT = 32  # texts that part on one page: the newest of them, so that a lookup costs the same among thousands


@dataclass(eq=False)
class Node:
    """The tokens of one page behind those of `parent`; fewer than a page's only at the end of a text."""

    ids: tuple[int, ...] = ()
    page: int = -1
    parent: Node | None = None
    # by first token, then by all tokens: texts that part inside a page are found without looking at all of them
    children: dict[int, dict[tuple[int, ...], Node]] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """Nodes of full pages that hold the beginning of a text, and a page whose first `tail_len` tokens come next.

    The nodes' pages can be shared; the tail belongs to another text and is to be copied.
    """

    nodes: list[Node]
    tail: int | None = None
    tail_len: int = 0


class PrefixCache:
    """Beginnings of texts that were computed once, in pages of a pool."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.root = Node()
        self._pool = pool
        self._page_size = page_size
        self._by_use: dict[Node, None] = {}  # the one unused for longest first; a parent after all its children
        self._holders: dict[int, Node] = {}  # by page

    def __len__(self) -> int:
        return len(self._by_use)

    def match(self, ids: Sequence[int]) -> Match:
        """The longest beginning of `ids` that is held. Share its pages before anything is evicted."""
        node, nodes = self.root, list[Node]()
        for first in range(0, len(ids) - self._page_size + 1, self._page_size):
            child = node.children.get(ids[first], {}).get(tuple(ids[first : first + self._page_size]))
            if child is None:
                break
            node = child
            nodes.append(child)
        matched_len = len(nodes) * self._page_size
        tail, tail_len = _nearest(node, ids[matched_len : matched_len + self._page_size])
        self._touch(tail or node)
        return Match(nodes, tail.page if tail else None, tail_len)

    def insert(self, ids: Sequence[int], page: int, parent: Node | None) -> Node:
        """The node of these tokens, behind `parent`'s; None: at the beginning of a text.

        The cache becomes an owner of their page, unless it has the tokens on another one: then it keeps that.
        """
        key = tuple(ids)
        assert 0 < len(key) <= self._page_size, f"{len(key)} tokens on a page of {self._page_size}"
        parent = parent or self.root
        siblings = parent.children.setdefault(key[0], {})
        node = siblings.get(key) or _beginning_with(key, siblings)
        if node is None and page in self._holders:  # the page held fewer tokens until now
            node = self._holders[page]
            assert node.parent is parent and key[: len(node.ids)] == node.ids, f"page {page} holds another text"
            del siblings[node.ids]
            node.ids = key
            siblings[key] = node
        elif node is None:
            self._pool.keep(page)
            node = siblings[key] = self._holders[page] = Node(key, page, parent)
        self._touch(node)
        return node

    def evict(self, count: int) -> int:
        """Gives up to `count` pages back to the pool, and says how many."""
        victims = list[Node]()
        for node in self._by_use:
            if len(victims) >= count:
                break
            if not node.children and self._pool.owners(node.page) == 1:
                _detach(node)
                victims.append(node)
        for node in victims:
            del self._by_use[node], self._holders[node.page]
        return self._pool.free([node.page for node in victims])

    def clear(self) -> None:
        """Gives up every page that nobody else holds."""
        self.evict(len(self))

    def _touch(self, node: Node | None) -> None:
        while node is not None and node is not self.root:
            self._by_use.pop(node, None)
            self._by_use[node] = None
            node = node.parent


def _detach(node: Node) -> None:
    assert node.parent is not None
    siblings = node.parent.children[node.ids[0]]
    del siblings[node.ids]
    if not siblings:
        del node.parent.children[node.ids[0]]


def _recent(siblings: dict[tuple[int, ...], Node]) -> Iterator[Node]:
    return islice(reversed(siblings.values()), _MOST_LOOKED_AT)


def _beginning_with(key: tuple[int, ...], siblings: dict[tuple[int, ...], Node]) -> Node | None:
    return next((node for node in _recent(siblings) if node.ids[: len(key)] == key), None)


def _nearest(node: Node, ids: Sequence[int]) -> tuple[Node | None, int]:
    """The child that shares most of its first tokens with `ids`, and how many."""
    best, best_len = None, 0
    for child in _recent(node.children.get(ids[0], {})) if ids else ():
        shared_len = common_len(child.ids, ids)
        if shared_len > best_len:
            best, best_len = child, shared_len
    return best, best_len


def common_len(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
