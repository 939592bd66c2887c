"""Hidden states: the head makes the logits of them, each depends on what came before alone, and no page is kept."""

from __future__ import annotations

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, tensors_of, write_tiny_model
from headrace.engine.embedding import Turns
from headrace.errors import ArgumentError

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 300, 40)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return LLM(path, kv_dtype="float32", chunk_len=16)


def test_the_head_makes_the_likeliest_tokens_of_them(llm: LLM) -> None:
    head = tensors_of(TinyModel())["output.weight"][2].view(np.float32).reshape(300, 64)
    expected = llm.logits(IDS).argmax(axis=1)
    found = [int((head @ llm.engine.embed(IDS[: i + 1], "last")).argmax()) for i in range(len(IDS))]
    assert found == expected.tolist()


def test_the_mean_is_that_of_every_beginning(llm: LLM) -> None:
    rows = np.stack([llm.engine.embed(IDS[: i + 1], "last") for i in range(len(IDS))])
    assert np.array_equal(llm.engine.embed(IDS), rows.mean(axis=0, dtype=np.float64).astype(np.float32))


def test_what_runs_meanwhile_is_not_disturbed_and_no_page_is_kept(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    alone = llm.generate(IDS, params).token_ids
    stream = llm.stream(IDS, params)
    tokens = [piece.token_id for piece in stream if llm.engine.embed(IDS).any()]
    assert tokens == alone
    llm.engine.prefixes.clear()
    assert llm.engine.pool.num_free == llm.engine.pool.num_pages


def test_another_pooling_is_refused(llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="pooling: expected mean or last"):
        llm.engine.embed(IDS, "max")


def test_pieces_take_no_longer_than_the_steps_between_them(llm: LLM) -> None:
    class Answers:
        busy_s = 0.0

        def step_s(self) -> float | None:
            return 0.01 if self.busy_s < 5 else None

    answers = Answers()
    turns = Turns(answers, 512)
    lengths = []
    for _ in range(40):
        assert turns.due
        lengths.append(turns.next_len)
        seconds = 0.004 + 0.0005 * lengths[-1]
        turns.took(lengths[-1], seconds)
        started = answers.busy_s
        while not turns.due:
            answers.busy_s += answers.step_s()
        assert answers.busy_s - started >= seconds
    assert set(lengths[-5:]) <= {11, 12} and 0.004 + 0.0005 * 12 <= 0.01
    answers.busy_s = 5.0
    assert turns.due and turns.next_len == 512


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pieces_between_steps_change_neither_vector_nor_answer(llm: LLM, pooling: str) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    alone, expected = llm.generate(IDS, params).token_ids, llm.engine.embed(IDS, pooling)
    request = llm.engine.request(IDS, params)
    llm.engine.add(request)
    pieces, vectors = llm.engine.embedding(IDS, pooling), list[np.ndarray]()
    while llm.engine.has_work or not vectors:
        llm.engine.step()
        try:
            if not vectors:
                next(pieces)
        except StopIteration as end:
            vectors.append(end.value)
    assert request.token_ids == alone and np.array_equal(vectors[0], expected)
    llm.engine.prefixes.clear()
    assert llm.engine.pool.num_free == llm.engine.pool.num_pages


def test_pieces_that_nobody_waits_for_give_their_pages_back(llm: LLM) -> None:
    llm.engine.prefixes.clear()
    pieces = llm.engine.embedding(IDS)
    next(pieces)
    assert llm.engine.pool.num_free < llm.engine.pool.num_pages
    pieces.close()
    assert llm.engine.pool.num_free == llm.engine.pool.num_pages
