"""The engine on tiny models: it says what a naive loop says, however the prompt is cut, however many threads run."""

import dataclasses

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import NaiveDecoder, TinyModel, write_tiny_model
from headrace.errors import ArgumentError, PromptTooLongError
from headrace.kernels import cpu

PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 300, 37)]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
MODELS = {
    "llama": TinyModel(),
    "tied": TinyModel(tied_head=True, seed=1),
    "qwen2": TinyModel("qwen2", seed=2),
    "qwen3": TinyModel("qwen3", seed=3),
    "window": TinyModel(sliding_window=11, seed=4),
    "odd": TinyModel(dim=60, num_heads=5, num_kv_heads=1, head_dim=12, ffn_dim=70, seed=5),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Opens a tiny model by name."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, model in MODELS.items():
        write_tiny_model(folder / f"{name}.gguf", model)

    def open_model(name, **options):
        return LLM(folder / f"{name}.gguf", kv_dtype=options.pop("kv_dtype", "float32"), **options)

    return open_model


@pytest.mark.costly
@pytest.mark.parametrize("level", cpu.ISAS[:3])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_naive_loop(tiny, name, level):
    if cpu.ISAS.index(level) > cpu.ISAS.index(cpu.best_isa()):
        pytest.skip(f"this CPU has {cpu.best_isa()}")
    with cpu.limit_isa(level):
        answer = tiny(name).generate(PROMPT, GREEDY)
    assert answer.token_ids == NaiveDecoder(MODELS[name]).greedy(PROMPT, GREEDY.max_tokens)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_naive_ones(tiny, name):
    got, exact = tiny(name).logits(PROMPT), NaiveDecoder(MODELS[name]).logits(PROMPT)
    assert got.shape == exact.shape and got.dtype == np.float32
    assert np.max(np.abs(got - exact)) <= 1e-3


@pytest.mark.parametrize("chunk_len", [1, 2, 7, 16, 36, 37, 64])
def test_any_chunking_gives_the_same_tokens(tiny, chunk_len):
    assert tiny("llama", chunk_len=chunk_len).generate(PROMPT, GREEDY).token_ids == (
        tiny("llama").generate(PROMPT, GREEDY).token_ids
    )


def test_threads_give_the_same_tokens(tiny):
    answers = [tiny("llama", threads=threads).generate(PROMPT, GREEDY) for threads in (1, 2, 3)]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert answers[0].logits_hash == answers[1].logits_hash == answers[2].logits_hash


def test_a_cached_beginning_is_a_computed_one(tiny):
    llm, fresh = tiny("llama"), tiny("llama")
    first = llm.generate(PROMPT, GREEDY)
    longer = PROMPT + first.token_ids + PROMPT[:9]
    again = llm.stream(longer, GREEDY)
    tokens = [piece.token_id for piece in again]
    assert again._request.reused_len >= len(PROMPT) + len(first.token_ids) - 1
    assert tokens == fresh.generate(longer, GREEDY).token_ids
    other = [5, *PROMPT[1:]]
    assert llm.generate(other, GREEDY).token_ids == fresh.generate(other, GREEDY).token_ids
    assert llm.generate(PROMPT, GREEDY).token_ids == first.token_ids


def test_stopping_midway_leaves_a_sound_cache(tiny):
    llm = tiny("llama")
    for _ in zip(range(3), llm.stream(PROMPT, GREEDY), strict=False):
        pass
    assert llm.generate(PROMPT, GREEDY).token_ids == tiny("llama").generate(PROMPT, GREEDY).token_ids


def test_two_models_in_one_process_do_not_meet(tiny):
    one, two = tiny("llama"), tiny("qwen3")
    both = list(zip(one.stream(PROMPT, GREEDY), two.stream(PROMPT, GREEDY), strict=True))
    assert [a.token_id for a, _ in both] == tiny("llama").generate(PROMPT, GREEDY).token_ids
    assert [b.token_id for _, b in both] == tiny("qwen3").generate(PROMPT, GREEDY).token_ids


def test_two_answers_of_one_model_do_not_meet(tiny):
    llm, alone = tiny("llama"), tiny("llama")
    prompts = [PROMPT, [5, *PROMPT[1:]], PROMPT[:20]]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    together = list(zip(*streams, strict=True))
    for stream, prompt, pieces in zip(streams, prompts, zip(*together, strict=True), strict=True):
        expected = alone.generate(prompt, GREEDY)
        assert [piece.token_id for piece in pieces] == expected.token_ids
        assert stream.completion.prompt_token_ids == prompt and stream.completion.logits_hash


def test_logits_between_two_tokens_do_no_harm(tiny):
    llm = tiny("llama")
    tokens = []
    for piece in llm.stream(PROMPT, GREEDY):
        tokens.append(piece.token_id)
        llm.logits([7, 8, 9])
    assert tokens == tiny("llama").generate(PROMPT, GREEDY).token_ids


def test_context_ends_the_answer(tiny):
    answer = tiny("llama", context_len=48).generate(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
    assert answer.finish_reason == "length" and len(answer.prompt_token_ids) + len(answer.token_ids) == 48


def test_an_end_token_stops_the_answer(tiny):
    llm = tiny("llama")
    tokens = llm.generate(PROMPT, GREEDY).token_ids
    llm.tokenizer = _EndsWith(llm.tokenizer, tokens[4])
    answer = llm.generate(PROMPT, dataclasses.replace(GREEDY, ignore_eos=False))
    assert answer.finish_reason == "stop" and answer.token_ids == tokens[: tokens.index(tokens[4]) + 1]


class _EndsWith:
    """A tokenizer for which another token ends the text."""

    def __init__(self, tokenizer, end_id):
        self._tokenizer = tokenizer
        self.end_ids = frozenset([end_id])

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_one_seed_one_text(tiny):
    llm = tiny("llama")
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=7, ignore_eos=True)
    first = llm.generate(PROMPT, params).token_ids
    assert llm.generate(PROMPT, params).token_ids == first
    assert llm.generate(PROMPT, dataclasses.replace(params, seed=8)).token_ids != first


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_sixteen_bit_caches_stay_close(tiny, kv_dtype):
    got, exact = tiny("llama", kv_dtype=kv_dtype).logits(PROMPT), NaiveDecoder(MODELS["llama"]).logits(PROMPT)
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[kv_dtype]
    assert np.max(np.abs(got - exact)) <= 8 * rounding * np.max(np.abs(exact))


@pytest.mark.parametrize(
    "prompt,error,text",
    [
        ([], ArgumentError, "at least one token"),
        ("", ArgumentError, "at least one token"),
        ([300], ArgumentError, "token ids in 0..299, got 300"),
        ([-1], ArgumentError, "got -1"),
        ([0.5], ArgumentError, "whole numbers"),
        ([[1], [[2, 3]]], ArgumentError, "at least one token"),
        ([2**70], ArgumentError, "whole numbers"),
        ([True], ArgumentError, "whole numbers"),
        (None, ArgumentError, "prompt"),
        ([1] * 256, PromptTooLongError, "fewer than 256 tokens, got 256"),
    ],
)
def test_bad_prompts_are_refused(tiny, prompt, error, text):
    with pytest.raises(error, match=text):
        tiny("llama").generate(prompt)


def test_bad_options_are_refused(tiny):
    for options, text in [
        ({"context_len": 257}, "context_len: expected at most 256"),
        ({"threads": 0}, "threads"),
        ({"kv_dtype": "int3"}, "kv_dtype"),
        ({"chunk_len": 0}, "chunk_len"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            tiny("llama", **options)
