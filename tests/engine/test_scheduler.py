"""The scheduler with integers alone: nothing leaks, nothing is used twice, every request ends with its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import SamplingParams
from headrace.engine.request import Request
from headrace.engine.scheduler import Part, Scheduler
from headrace.errors import CapacityError
from headrace.kv_cache.pages import PagePool, pages_needed
from headrace.kv_cache.prefix import PrefixCache

SIZE = 4


def next_token(ids: list[int]) -> int:
    """A model: the next token depends on every token before."""
    return hash(tuple(ids)) % 3


@dataclass
class Model:
    """An engine without arrays: a slot of a page holds the text that its keys would have been computed from."""

    num_pages: int = 8
    step_tokens: int = 6
    step_requests: int = 3
    step_outputs: int = 0  # 0: as many as tokens
    slots: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most_outputs = self.step_outputs or self.step_tokens
        self.pool = PagePool(self.num_pages)
        self.prefixes = PrefixCache(self.pool, SIZE)
        self.scheduler = Scheduler(
            self.pool,
            self.prefixes,
            self.copy_page,
            page_size=SIZE,
            step_tokens=self.step_tokens,
            step_requests=self.step_requests,
            step_outputs=self.most_outputs,
        )

    def copy_page(self, source: int, target: int) -> None:
        self.slots[target] = list(self.slots[source])

    def step(self, prompt_tokens: int = 2, guess: Callable[[Request], list[int]] = lambda request: []) -> list[Part]:
        for each in self.scheduler.running:
            each.guesses = guess(each) if each.pending_len == 1 else []
        before = list(self.scheduler.running)
        parts = self.scheduler.plan(lambda _: prompt_tokens)
        self.check_fair(before, parts)
        assert sum(part.count for part in parts) <= self.step_tokens and len(parts) <= self.step_requests
        assert len({part.request for part in parts}) == len(parts)
        assert sum(part.num_outputs for part in parts) <= self.most_outputs
        for part in parts:
            self.compute(part)
            self.score(part)
        self.scheduler.commit(parts, [drawn(part) for part in parts])
        self.check()
        return parts

    def check_fair(self, before: list[Request], parts: list[Part]) -> None:
        """Only the newest make room, and the oldest gets on in every step."""
        kept = [each for each in before if each in self.scheduler.running]
        assert kept == before[: len(kept)] == self.scheduler.running[: len(kept)]
        if before:
            assert parts[0].request is before[0]
        elif self.scheduler.waiting:
            assert parts

    def compute(self, part: Part) -> None:
        sequence, ids = part.request.sequence, part.request.ids
        new_len = len(sequence.ids) + part.count
        ids = [*ids, *part.request.guesses]
        missing = pages_needed(new_len, SIZE) - len(sequence.pages)
        sequence.pages += self.pool.allocate(max(missing, 0))
        for i in range(len(sequence.ids), new_len):
            page = self.slots.setdefault(sequence.pages[i // SIZE], [()] * SIZE)
            page[i % SIZE] = tuple(ids[: i + 1])
        sequence.ids += ids[len(sequence.ids) : new_len]
        held = [self.slots[sequence.pages[i // SIZE]][i % SIZE] for i in range(new_len)]
        assert held == [tuple(ids[: i + 1]) for i in range(new_len)]

    def score(self, part: Part) -> None:
        """Notes the prompt tokens whose logits a part gives, as the engine does their logprobs."""
        request, end = part.request, len(part.request.sequence.ids)
        if request.scored_len < len(request.prompt_ids):
            request.prompt_logprobs += request.prompt_ids[end - part.num_outputs + 1 : end + 1]  # type: ignore[arg-type]
        else:
            assert part.num_outputs == part.num_draws

    def check(self) -> None:
        owners = [0] * self.num_pages
        for request in self.scheduler.running:
            for page in request.sequence.pages:
                owners[page] += 1
        for page in self.prefixes._holders:
            owners[page] += 1
        assert owners == [self.pool.owners(page) for page in range(self.num_pages)]


def drawn(part: Part) -> list[int]:
    """What the model draws after the text and after each guess that was right."""
    ids, tokens = list(part.request.ids), list[int]()
    for i in range(part.num_draws):
        tokens.append(next_token(ids))
        ids.append(tokens[-1])
        if i < len(part.request.guesses) and part.request.guesses[i] != tokens[-1]:
            break
    return tokens


def guesses(most: int) -> Callable[[Request], list[int]]:
    """Every text whose length is a multiple of three is guessed wrong."""

    def guess(request: Request) -> list[int]:
        ids = list(request.ids)
        for _ in range(min(most, request.most_tokens - len(ids) - 1)):
            ids.append((next_token(ids) + (len(ids) % 3 == 0)) % 3)
        return ids[len(request.ids) :]

    return guess


def request(prompt: list[int], max_tokens: int, *, scores: bool = False) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scores else None)
    return Request(prompt, params, most_tokens=8 * SIZE)


def answer(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
        st.integers(1, 10),  # tokens
        st.integers(0, 5),  # steps before the next one comes
        st.sampled_from(["stay", "stay", "stay", "leave"]),
        st.booleans(),  # whether every token of its prompt has to give logits
        st.integers(0, 2),  # more answers to the same prompt
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(arrivals, st.integers(8, 14), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_every_request_ends_with_its_own_tokens_and_no_page_is_lost(
    arrivals: list[tuple[list[int], int, int, str, bool, int]],
    num_pages: int,
    step_tokens: int,
    requests: int,
    ahead: int,
) -> None:
    model = Model(num_pages, max(step_tokens, requests * (1 + ahead)), requests, requests * (1 + ahead))
    added = list[Request]()
    for prompt, max_tokens, steps, fate, scores, more in arrivals:
        first = request(prompt, max_tokens, scores=scores)
        first.copies = [request(prompt, max_tokens) for _ in range(more)]
        added += [first, *first.copies]
        model.scheduler.add(first)
        for _ in range(steps):
            model.step(2, guesses(ahead))
        if fate == "leave":
            for each in (first, *first.copies):
                each.finish_reason = each.finish_reason or "cancelled"
            model.scheduler.remove(first)
            model.check()
    for _ in range(4000):
        if not model.step(2, guesses(ahead)):
            break
    assert not model.scheduler.waiting and not model.scheduler.running
    for each in added:
        assert each.finish_reason in ("length", "cancelled")
        assert each.token_ids == answer(each.prompt_ids, len(each.token_ids))
        if each.token_ids and each.params.prompt_logprobs is not None:
            assert each.prompt_logprobs == [None, *each.prompt_ids[1:]]
        if each.finish_reason == "length":
            assert len(each.token_ids) == min(each.params.max_tokens, 8 * SIZE - len(each.prompt_ids))
    model.prefixes.clear()
    assert model.pool.num_free == num_pages


def test_answers_go_on_while_a_prompt_enters() -> None:
    model = Model(num_pages=16, step_tokens=8)
    first, second = request([1, 2], 9), request([2] * 16, 2)
    model.scheduler.add(first)
    model.step()
    model.scheduler.add(second)
    for _ in range(8):
        counts = {part.request: part.count for part in model.step(prompt_tokens=2)}
        assert counts == {first: 1, second: 2}


def test_a_prompt_alone_takes_the_whole_step() -> None:
    model = Model(num_pages=16, step_tokens=8)
    model.scheduler.add(request([2] * 16, 2))
    assert [part.count for part in model.step(prompt_tokens=2)] == [8]


def test_a_known_beginning_is_not_computed_again() -> None:
    model = Model(num_pages=16)
    first = request([1, 2, 0] * 3, 3)
    model.scheduler.add(first)
    while model.step():
        pass
    rewritten = [*first.ids[:-2], 3, 3, 3]  # as a template that writes the end of its last answer otherwise
    second = request(rewritten, 1)
    model.scheduler.add(second)
    parts = model.step()
    assert second.reused_len == len(first.ids) - 2 and [part.count for part in parts] == [3]


def test_a_known_beginning_is_computed_again_where_its_logits_are_wanted() -> None:
    model = Model(num_pages=16, step_tokens=32, step_outputs=6)
    for _ in range(2):
        each = request([1, 2, 0] * 3, 2, scores=True)
        model.scheduler.add(each)
        parts = [model.step()[0] for _ in range(3)]
        assert [(part.count, part.num_outputs, part.num_draws) for part in parts] == [(6, 6, 0), (3, 3, 1), (1, 1, 1)]
        assert each.reused_len == 0 and each.finish_reason


def test_rows_of_logits_are_left_for_those_who_answer() -> None:
    model = Model(num_pages=32, step_tokens=32, step_requests=4, step_outputs=4)
    answering, scoring = [request([i], 20) for i in range(3)], request([1] * 9, 1, scores=True)
    for each in (*answering, scoring):
        model.scheduler.add(each)
    for _ in range(9):
        counts = {part.request: part.num_outputs for part in model.step(prompt_tokens=8)}
        assert counts == dict.fromkeys((*answering, scoring), 1)
    assert scoring.finish_reason


def test_two_of_the_same_share_their_pages_while_they_run() -> None:
    model = Model(num_pages=16, step_tokens=32)
    first, second = request([1] * 12, 4), request([1] * 12, 4)
    model.scheduler.add(first)
    model.scheduler.add(second)
    model.step()
    assert first.sequence.pages == second.sequence.pages and len(model.prefixes) == 3


def test_copies_begin_when_the_prompt_is_computed_and_write_on_pages_of_their_own() -> None:
    model = Model(num_pages=16)
    first = request([1, 2, 0, 0, 1, 2], 4)
    first.copies = copies = [request(first.prompt_ids, 4) for _ in range(2)]
    model.scheduler.add(first)
    model.step()
    model.step()
    assert {copy.reused_len for copy in copies} == {5}
    pages = [each.sequence.pages for each in (first, *copies)]
    assert len({each[0] for each in pages}) == 1 and len({each[1] for each in pages}) == 3


def test_the_newest_makes_room_and_comes_back() -> None:
    model = Model(num_pages=4, step_tokens=16)
    old, new = request([1] * 6, 9), request([2] * 6, 9)
    model.scheduler.add(old)
    model.scheduler.add(new)
    while not old.finish_reason:
        model.step()
    assert old.num_preemptions == 0 and new.num_preemptions == 1
    while model.step():
        pass
    assert new.token_ids == answer([2] * 6, 9)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match="prompt: 32 tokens need 9 pages of 4 tokens, the cache has 8"):
        Model(num_pages=8).scheduler.add(request([1] * 32, 1))


def test_a_request_that_leaves_takes_its_copies_along() -> None:
    model = Model()
    first = request([1] * 6, 2)
    first.copies = [request([1] * 6, 2)]
    model.scheduler.add(first)
    model.scheduler.remove(first)
    assert not model.step() and not model.scheduler.waiting
