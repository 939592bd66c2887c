"""The scheduler: which requests get how many tokens in the next step, and whose pages hold them. Integers only.

There is no prefill and no decode, only requests with tokens still to compute: one while it answers, many before. Those
that answer get their token in every step; what is left of the step goes to prompts, the oldest first, in pieces. A
request is admitted when the cache has room for its text. When answers outgrow the cache, the newest request gives its
pages up and waits in front of the others; what it had computed stays in the prefix cache as long as nobody needs the
pages, and is computed again otherwise. So the oldest request always gets on, and every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.engine.request import Request
from headrace.errors import CapacityError
from headrace.kv_cache.pages import PagePool, pages_needed
from headrace.kv_cache.prefix import Node, PrefixCache


@dataclass(slots=True)
class Part:
    """What a request gets in a step: its next `count` tokens, its guesses included.

    The last `num_draws` of them give its next ones: that of its text, and those of its guesses. The last `num_outputs`
    give logits: the same, and the tokens of a prompt whose logprobs are wanted.
    """

    request: Request
    count: int
    num_draws: int
    num_outputs: int


class Scheduler:
    """Requests that wait and requests that run, the oldest first, over the pages of one cache.

    step_tokens, step_requests, step_outputs: what a step has room for, at least one row of logits for each request.
    copy_page(source, target): copies a page's keys and values.
    """

    def __init__(
        self,
        pool: PagePool,
        prefixes: PrefixCache,
        copy_page: Callable[[int, int], None],
        *,
        page_size: int,
        step_tokens: int,
        step_requests: int,
        step_outputs: int,
    ) -> None:
        assert step_outputs >= step_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._pool, self._prefixes, self._copy_page = pool, prefixes, copy_page
        self._page_size, self._step_tokens, self._step_requests = page_size, step_tokens, step_requests
        self._step_outputs = step_outputs
        self._promised = 0  # pages that parts of the step being planned will take

    def add(self, request: Request) -> None:
        """Queues a request. Raises what `check_fits` raises."""
        self.check_fits(request)
        self.waiting.append(request)

    def check_fits(self, request: Request) -> None:
        """CapacityError when the whole cache could not hold its prompt and a token more."""
        needed = pages_needed(len(request.prompt_ids) + 1, self._page_size)
        if needed > self._pool.num_pages:
            raise CapacityError(
                f"prompt: {len(request.prompt_ids)} tokens need {needed} pages of {self._page_size} tokens, "
                f"the cache has {self._pool.num_pages}",
                "a shorter prompt, or more memory for the cache",
            )

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is; what it computed stays findable, and its copies go with it."""
        for copy in request.copies:
            self.remove(copy)
        if request in self.running:
            self.running.remove(request)
            self.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self, prompt_tokens: Callable[[int], int]) -> list[Part]:
        """The next step. While so many requests answer, prompts get at most `prompt_tokens(so many)` of it."""
        self._promised = 0
        running = [(request, request.pending_len == 1, 1 + len(request.guesses)) for request in self.running]
        answering = [count for _, answers, count in running if answers]
        budget = self._step_tokens - sum(answering)
        assert budget >= 0, f"{sum(answering)} tokens for a step of {self._step_tokens}"
        if answering and (self.waiting or len(answering) < len(running)):
            budget = min(budget, prompt_tokens(len(answering)))
        spare = self._step_outputs - sum(count for _, _, count in running)
        parts = list[Part]()
        for place, (request, answers, count) in enumerate(running):
            if not answers:
                count = _fitting(request, budget, 1 + spare)
            # The newest are preempted first, so who has lost its place is behind all that have theirs.
            if count and place < len(self.running) and self._make_room(request, count):
                parts.append(Part(request, count, count, count) if answers else _part(request, count))
                if not answers:
                    budget -= count
                    spare -= max(parts[-1].num_outputs - 1, 0)
        while budget > 0 and spare > 0 and self.waiting and len(self.running) < self._step_requests:
            if not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            count = _fitting(request, budget, spare)
            assert self._make_room(request, count), "admitted without room"
            budget -= count
            parts.append(_part(request, count))
            spare -= max(parts[-1].num_outputs, 1)
        return parts

    def commit(self, parts: Sequence[Part], tokens: Sequence[Sequence[int]]) -> None:
        """What a step came to: its parts are computed, and each has so many tokens more, none while in its prompt."""
        for part, drawn in zip(parts, tokens, strict=True):
            request = part.request
            for token in drawn:
                request.commit(token)
                if request.finish_reason:
                    break
            computed = len(request.sequence.ids)
            if drawn and computed >= len(request.ids):  # what was computed of wrong guesses is not of the text
                computed = len(request.ids) - 1
                request.sequence.forget(computed, self._pool, self._page_size)
            if computed >= (len(request.nodes) + 1) * self._page_size:
                self._publish(request)
            if request.scored_len < len(request.prompt_ids):
                request.scored_len = max(request.scored_len, min(computed + 1, len(request.prompt_ids)))
            if drawn and request.copies:
                self._start_copies(request)
            if request.finish_reason:
                self.running.remove(request)
                self.release(request)

    def preempt_all(self) -> None:
        """Every running request gives its pages up and waits."""
        while self.running:
            self._preempt()

    def hold(self, request: Request) -> None:
        """Gives a request that is not to run the pages of its beginning, and makes room for the rest of its text.

        If need be all that run give theirs up. `release` ends it. Raises what `check_fits` raises.
        """
        self.check_fits(request)
        self._promised = 0
        if not self._admit(request):
            self.preempt_all()
            admitted = self._admit(request)
            assert admitted, "a text that fits found no room"
        room = self.make_room(self._missing(request, request.pending_len))
        assert room, "admitted without room"

    def make_room(self, num_pages: int) -> bool:
        """Whether so many pages are free, or have been made so at the expense of the prefix cache."""
        short = num_pages - self._pool.num_free
        return short <= 0 or self._prefixes.evict(short) == short

    def _make_room(self, request: Request, count: int) -> bool:
        """Pages for the request's next tokens, if need be at the expense of newer ones. False: it was the newest."""
        missing = self._missing(request, count)
        while missing and not self.make_room(self._promised + missing):
            if self._preempt() is request:
                return False
        self._promised += missing
        return True

    def _preempt(self) -> Request:
        request = self.running.pop()
        self.release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _admit(self, request: Request) -> bool:
        """Gives the request the pages that hold its beginning, if there is room for all of its text."""
        match = self._prefixes.match(request.ids[: request.first_output])
        pages = [node.page for node in match.nodes]
        self._pool.share(pages)
        needed = pages_needed(len(request.ids) + 1, self._page_size) - len(pages)
        if self._promised + needed > self._pool.num_free + self._pool.num_spare:
            self._pool.free(pages)
            return False
        sequence = request.sequence
        sequence.pages, sequence.ids = pages, request.ids[: len(pages) * self._page_size]
        request.nodes = match.nodes
        if match.tail is not None:
            self._copy_tail(request, match.tail, match.tail_len)
        if not request.token_ids and not request.num_preemptions:
            request.reused_len = len(sequence.ids)
        return True

    def _copy_tail(self, request: Request, tail: int, tail_len: int) -> None:
        self._pool.share([tail])  # not to be evicted for its own copy
        if self.make_room(self._promised + 1):
            request.sequence.pages += self._pool.allocate(1)
            self._copy_page(tail, request.sequence.pages[-1])
            first = len(request.sequence.ids)
            request.sequence.ids += request.ids[first : first + tail_len]
        self._pool.free([tail])

    def _missing(self, request: Request, count: int) -> int:
        room = request.sequence.room(self._page_size)
        return pages_needed(count - room, self._page_size) if count > room else 0

    def _publish(self, request: Request) -> None:
        """The pages it has filled, for others to find. One that is there already is used instead of its own."""
        sequence, size = request.sequence, self._page_size
        for i in range(len(request.nodes), len(sequence.ids) // size):
            node = self._insert(request, i * size, (i + 1) * size)
            request.nodes.append(node)
            if node.page != sequence.pages[i]:
                self._pool.share([node.page])
                self._pool.free([sequence.pages[i]])
                sequence.pages[i] = node.page

    def _publish_end(self, request: Request) -> None:
        """The tokens on its last page, for others to copy."""
        first, end = len(request.nodes) * self._page_size, len(request.sequence.ids)
        if end > first:
            self._insert(request, first, end)

    def _insert(self, request: Request, first: int, end: int) -> Node:
        """The node of these of its tokens, which lie on one page."""
        sequence, parent = request.sequence, request.nodes[-1] if request.nodes else None
        return self._prefixes.insert(sequence.ids[first:end], sequence.pages[first // self._page_size], parent)

    def release(self, request: Request) -> None:
        """Takes a request's pages; what it computed stays findable until the room is needed."""
        self._publish(request)
        self._publish_end(request)
        request.sequence.forget(0, self._pool, self._page_size)
        request.nodes, request.guesses = [], []

    def _start_copies(self, request: Request) -> None:
        self._publish_end(request)
        self.waiting.extendleft(reversed(request.copies))
        request.copies = []


def _fitting(request: Request, tokens: int, outputs: int) -> int:
    """How many of its next tokens there is room for."""
    without_output = max(request.first_output - len(request.sequence.ids), 0)
    return min(request.pending_len, tokens, without_output + outputs)


def _part(request: Request, count: int) -> Part:
    end = len(request.sequence.ids) + count
    return Part(request, count, max(0, count - request.pending_len + 1), max(0, end - request.first_output))
