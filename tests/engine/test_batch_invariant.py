"""batch_invariant: an answer is the same bit for bit alone and in any company, however it was cut, cached, guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.config import KV_DTYPES, EngineConfig
from headrace.engine.request import Request
from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.cpu import linear as linear_cpu
from headrace.machine import Machine
from headrace.ops import linear
from headrace.ops.select import Kernel
from headrace.ops.select import Request as Asked

CHANCE = np.random.default_rng(17)
LONG = [int(i) for i in CHANCE.integers(0, 300, 290)]  # more keys than one sum of a chunk has
PROMPTS = [
    *([int(i) for i in CHANCE.integers(0, 300, length)] for length in (1, 5, 33, 64, 17, 2, 9, 40)),
    *(LONG[:length] for length in (65, 130, 290, 20, 64, 3, 100, 11)),
]
PARAMS = [
    SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0, seed=seed, temperature=1.2 * (seed % 2))
    for seed in range(len(PROMPTS))
]
LEVELS = cpu.ISAS[: min(cpu.ISAS.index(cpu.best_isa()), 3) + 1]
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_K", "Q6_K")
SMALL: dict[str, Any] = {"dim": 128, "ffn_dim": 128, "context_len": 512}
MODELS = {
    "64": TinyModel(num_heads=3, num_kv_heads=1, head_dim=64, matrix_format="Q4_1", **{**SMALL, "dim": 192}),
    "128": TinyModel("qwen3", num_heads=4, num_kv_heads=2, head_dim=128, seed=1, **SMALL),
    "window": TinyModel(sliding_window=50, seed=2, context_len=512),
}
K_SIZES: dict[str, Any] = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128}

Open = Callable[..., LLM]
Said = list[tuple[list[int], str, list[float]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a tiny model by name: of MODELS, or of a format."""
    folder = tmp_path_factory.mktemp("tiny")

    def open_model(name: str, **options: Any) -> LLM:
        path = folder / f"{name}.gguf"
        if not path.exists():
            sizes = {"context_len": 512, "num_layers": 1} | (K_SIZES if name.endswith("_K") else {})
            write_tiny_model(path, MODELS.get(name) or TinyModel(matrix_format=name, **sizes))
        return LLM(path, **({"batch_invariant": True, "max_requests": 16} | options))

    return open_model


def said(requests: Sequence[Request]) -> Said:
    """Tokens, the hash of the last row of logits, and what every row makes of its token's probability."""
    return [(r.token_ids, r.logits_hash, [each.logprob for each in r.logprobs]) for r in requests]


def added(llm: LLM, speculate: int = 0) -> list[Request]:
    params = [replace(each, speculate=speculate) for each in PARAMS]
    requests = [llm.engine.request(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
    for request in requests:
        llm.engine.add(request)
    return requests


def finish(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()


def alone(llm: LLM) -> Said:
    """Each by itself, with nothing cached."""
    requests = [llm.engine.request(prompt, each) for prompt, each in zip(PROMPTS, PARAMS, strict=True)]
    for request in requests:
        llm.engine.clear()
        llm.engine.add(request)
        finish(llm)
    return said(requests)


def together(llm: LLM) -> Said:
    requests = added(llm)
    finish(llm)
    return said(requests)


def preempted(llm: LLM) -> Said:
    """All give their pages up twice; the second time nothing of them stays cached."""
    requests = added(llm)
    for steps, give_up in ((4, llm.engine.scheduler.preempt_all), (5, llm.engine.clear)):
        for _ in range(steps):
            llm.engine.step()
        give_up()
    finish(llm)
    assert llm.engine.scheduler.num_preemptions > 1
    return said(requests)


def known(llm: LLM) -> Said:
    """Found in the cache as far as it goes."""
    together(llm)
    requests = added(llm)
    finish(llm)
    assert all(request.reused_len >= len(request.prompt_ids) - 1 for request in requests)
    return said(requests)


class Guesses:
    """Guesses from known answers, every third of them wrong."""

    def __init__(self, answers: Said) -> None:
        self._answers = {(tuple(prompt), i): answers[i][0] for i, prompt in enumerate(PROMPTS)}

    def guess(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [self._one(request)[:most] for request in requests]

    def _one(self, request: Request) -> list[int]:
        first = len(request.token_ids)
        right = self._answers[tuple(request.prompt_ids), request.seed][first:]
        return [(token + 1) % 300 if (first + i) % 3 == 2 else token for i, token in enumerate(right)]


def guessed(llm: LLM, expected: Said) -> Said:
    llm.generate(PROMPTS[0], PARAMS[0])  # a step without guesses has been measured
    llm.engine.guesser._drafts = Guesses(expected)
    requests = added(llm, speculate=4)
    finish(llm)
    assert sum(request.num_guessed for request in requests) > 0
    return said(requests)


def promise_is_kept(opened: Callable[..., LLM]) -> None:
    expected = alone(opened())
    assert all(len(tokens) == 6 and digits for tokens, digits, _ in expected)
    assert together(opened()) == expected
    assert together(opened(chunk_len=7, max_requests=3)) == expected
    assert preempted(opened(chunk_len=64)) == expected
    assert known(opened(max_requests=5)) == expected
    assert guessed(opened(max_requests=4), expected) == expected
    assert together(opened(threads=3)) == expected


CACHES = [(LEVELS[-1], kv_dtype) for kv_dtype in KV_DTYPES]
CACHES += [(level, kv_dtype) for level in LEVELS[:-1] for kv_dtype in ("float16", "int8")]


@pytest.mark.costly
@pytest.mark.parametrize("level,kv_dtype", CACHES)
def test_every_cache_and_every_instruction_set(tiny: Open, level: str, kv_dtype: str) -> None:
    with cpu.limit_isa(level):
        promise_is_kept(partial(tiny, "64", kv_dtype=kv_dtype))


@pytest.mark.costly
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", ["128", "window"])
def test_wide_heads_and_windows(tiny: Open, name: str, kv_dtype: str) -> None:
    promise_is_kept(partial(tiny, name, kv_dtype=kv_dtype))


@pytest.mark.costly
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_weight_format_on_every_instruction_set(tiny: Open, format_name: str, level: str) -> None:
    with cpu.limit_isa(level):
        expected = alone(tiny(format_name))
        assert together(tiny(format_name)) == expected
        assert together(tiny(format_name, chunk_len=7, max_requests=3)) == expected


@pytest.mark.parametrize("name,kv_dtype", [("64", "int8"), ("128", "float16")])
def test_without_it_codes_and_long_heads_do_not_keep_it(tiny: Open, name: str, kv_dtype: str) -> None:
    free = partial(tiny, name, kv_dtype=kv_dtype, batch_invariant=False)
    assert together(free(chunk_len=7)) != alone(free())


def test_without_it_short_heads_keep_it_all_the_same(tiny: Open) -> None:
    with cpu.limit_isa("avx2"):  # tiles do not
        free = partial(tiny, "64", batch_invariant=False)
        assert together(free(chunk_len=7)) == alone(free()) == alone(tiny("64"))


def with_tiles(run: Callable[..., Any], vectors: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Kernels of which the cheapest is that of a processor with AMX, in plain loops."""

    def cost(asked: Asked, machine: Machine) -> float:
        return 0.0

    return Kernel("tiles", lambda asked: [], cost, partial(run, "amx_emulated")), *vectors


@pytest.mark.parametrize("format_name", ["F16", "Q8_0"])
def test_tiles_are_not_used_though_they_are_faster(
    tiny: Open, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tiny(format_name))
    tiles = {"kernels": linear_cpu.run, "gated_kernels": linear_cpu.run_gated}
    for name, run in tiles.items():
        kernels = with_tiles(run, getattr(linear, name)())
        monkeypatch.setattr(linear, name, lambda kernels=kernels: kernels)
    assert together(tiny(format_name)) == expected
    free = tiny(format_name, batch_invariant=False)
    assert together(free) != alone(free)


@pytest.fixture(scope="module")
def served(tiny: Open) -> tuple[LLM, Said]:
    """A model that has seen much, in a cache with room for few, and what it says to each alone."""
    options = {"kv_dtype": "int8", "chunk_len": 48, "max_requests": 6}
    num_bytes = 12 * 64 * tiny("64", kv_dtype="int8").kv_bytes_per_token
    return tiny("64", kv_cache_bytes=num_bytes, **options), alone(tiny("64", **options))


arrivals = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 4),  # steps before the next one comes
        st.sampled_from(["stay", "stay", "stay", "leave", "make room", "forget all"]),
        st.integers(1, 48),  # tokens of prompts in a step beside answers
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(arrivals)
def test_whoever_comes_and_goes(served: tuple[LLM, Said], arrivals: list[tuple[int, int, str, int]]) -> None:
    llm, expected = served
    requests = list[tuple[int, Request]]()
    for number, steps, event, prompt_tokens in arrivals:
        llm.engine._pace.prompt_tokens = lambda answers, most=prompt_tokens: most  # type: ignore[method-assign,misc]
        requests.append((number, llm.engine.request(PROMPTS[number], PARAMS[number])))
        llm.engine.add(requests[-1][1])
        for _ in range(steps):
            llm.engine.step()
        if event == "leave":
            llm.engine.cancel(requests[-1][1])
        elif event == "make room":
            llm.engine.scheduler.preempt_all()
        elif event == "forget all":
            llm.engine.clear()
    finish(llm)
    for number, request in requests:
        tokens, digits, logprobs = expected[number]
        if request.finish_reason == "length":
            assert said([request]) == [expected[number]]
        count = len(request.token_ids)
        assert request.token_ids == tokens[:count]
        assert [each.logprob for each in request.logprobs] == logprobs[:count]


def test_two_engines_on_the_same_weights_are_apart(tiny: Open) -> None:
    llm = tiny("64", kv_dtype="int8", batch_invariant=False)
    other = llm.engine.again(batch_invariant=True)
    first, second = (engine.request(PROMPTS[6], PARAMS[6]) for engine in (llm.engine, other))
    llm.engine.add(first)
    other.add(second)
    while llm.engine.has_work or other.has_work:
        llm.engine.step()
        other.step()
    assert said([second]) == [alone(tiny("64", kv_dtype="int8"))[6]]
    assert first.finish_reason == "length" and other.pool is not llm.engine.pool


def test_it_is_on_or_off(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="batch_invariant: expected True or False, got 'yes'"):
        EngineConfig(batch_invariant="yes")  # type: ignore[arg-type]
