"""What `bench serving` sends: one seed, one load, of the lengths and at the times that were asked for."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median
from typing import Any

import pytest

from headrace.bench.serving_load import ServingOptions, body_of, load_of
from headrace.errors import ArgumentError


def load(**given: Any) -> list[Any]:
    return load_of(ServingOptions(**given))


def lens(sent: list[Any]) -> tuple[list[int], list[int]]:
    return [len(each.prompt.split()) for each in sent], [each.answer_len for each in sent]


def test_one_seed_is_one_load_and_another_is_another() -> None:
    assert load(rate=3.0, seed=1, lengths="uniform") == load(rate=3.0, seed=1, lengths="uniform")
    assert load(seed=1) != load(seed=2)
    assert len({each.prompt for each in load(requests=200)}) == 200


def test_fixed_lengths_are_those_asked_for() -> None:
    prompts, answers = lens(load(prompt_len=9, answer_len=5, requests=20))
    assert prompts == [9] * 20 and answers == [5] * 20


def test_uniform_lengths_have_the_mean_and_lognormal_ones_the_median() -> None:
    prompts, _ = lens(load(prompt_len=40, lengths="uniform", requests=4000))
    assert min(prompts) == 1 and max(prompts) == 79 and abs(fmean(prompts) - 40) < 79 / 4000**0.5 * 3
    prompts, answers = lens(load(prompt_len=40, lengths="lognormal", requests=4000))
    assert min(prompts) >= 1 and max(prompts) <= 320 and prompts != answers
    assert sorted(prompts)[1800] <= 40 <= sorted(prompts)[2200] and median(prompts) < fmean(prompts)


def test_arrivals_have_the_rate_and_their_gaps_are_exponential() -> None:
    dues = [each.due_s for each in load(rate=5.0, requests=4000)]
    gaps = [later - earlier for earlier, later in pairwise(dues)]
    assert dues[0] == 0 and min(gaps) >= 0
    assert abs(fmean(gaps) * 5 - 1) < 5 / 4000**0.5
    assert abs(sum(gap > 0.2 for gap in gaps) / len(gaps) - 0.368) < 0.04  # 1/e are longer than the mean
    assert {each.due_s for each in load()} == {None}


def test_a_body_has_what_the_endpoint_knows() -> None:
    [sent] = load(requests=1, prompt_len=2)
    plain = body_of(sent, "m", ServingOptions(plain=True))
    assert plain["prompt"] == sent.prompt and plain["stream"] and "ignore_eos" not in plain
    chat = body_of(sent, "m", ServingOptions(chat=True))
    assert chat["messages"] == [{"role": "user", "content": sent.prompt}] and chat["ignore_eos"] is True


@pytest.mark.parametrize(
    "given",
    [{"requests": 0}, {"rate": 0.0}, {"rate": float("inf")}, {"lengths": "long"}, {"slo_ttft_ms": -1.0}, {"repeat": 0}],
)
def test_numbers_that_mean_nothing_are_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(given))}: expected"):
        ServingOptions(**given)
