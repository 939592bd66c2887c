"""Hidden states: the head makes the logits of them, each depends on what came before alone, and no page is kept."""

from __future__ import annotations

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, tensors_of, write_tiny_model
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
