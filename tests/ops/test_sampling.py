"""sample: the draws are the reference's, alone or in a batch, on every instruction set."""

import itertools
from collections import Counter

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.draws import assert_draws_follow, row_of
from headrace.config import SamplingParams
from headrace.errors import ArgumentError, HeadraceError
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.ops import sampling

CPU_KERNELS = [kernel.name for kernel in sampling.kernels() if "cpu" in kernel.devices]
KERNELS = pytest.mark.parametrize("kernel", CPU_KERNELS)
DRAWS = 64


def draws(logits, params, *, count=DRAWS, seed=7, prompt=(), answer=(), kernel=None):
    """`count` tokens of the same row of logits, from steps 0, 1, 2..."""
    rows = np.broadcast_to(logits, (count, len(logits))).copy()
    seen = {"prompt_ids": [prompt] * count, "answer_ids": [answer] * count}
    return sampling.sample(rows, [params] * count, seeds=[seed] * count, steps=range(count), kernel=kernel, **seen)


@pytest.mark.parametrize("params", cases.SAMPLING_PARAMS, ids=lambda case: case.name)
@pytest.mark.parametrize("case", cases.SAMPLING, ids=lambda case: case.name)
@KERNELS
def test_draws_are_those_of_the_reference(kernel, case, params):
    x, random = row_of(case), np.random.default_rng(1)
    prompt, answer = random.integers(0, case.vocab, 40).tolist(), random.integers(0, case.vocab, 30).tolist()
    skip_unless_able(kernel, x)
    count = 8 if case.vocab > 10_000 else DRAWS
    got = draws(x, params.params, count=count, prompt=prompt, answer=answer, kernel=kernel)
    exact = sampling.reference(x, params.params, prompt, answer)
    assert_draws_follow(got, exact, sampling.reference(x, params.params, prompt, answer, dtype=np.float32))


def skip_unless_able(kernel, x):
    [found] = [k for k in sampling.kernels() if k.name == kernel]
    if reasons := found.why_not(sampling.request((1, len(x)))):
        pytest.skip("; ".join(map(str, reasons)))


def test_a_wrong_distribution_does_not_pass():
    x = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    wrong = np.array([0.52, 0.28, 0.2])
    with pytest.raises(AssertionError):
        assert_draws_follow(draws(x, SamplingParams(temperature=1.0), count=400), wrong, wrong)


def chi_square(tokens, expected):
    observed = np.bincount(tokens, minlength=len(expected))
    kept = expected > 0
    assert not observed[~kept].any()
    return np.sum((observed - expected)[kept] ** 2 / expected[kept]), kept.sum() - 1


@KERNELS
def test_frequencies_are_those_of_the_reference(kernel):
    x, count = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -1.0, -2.0, -np.inf], np.float32), 20_000
    params = SamplingParams(temperature=0.9, min_p=0.05)
    skip_unless_able(kernel, x)
    statistic, freedom = chi_square(draws(x, params, count=count, kernel=kernel), count * sampling.reference(x, params))
    # Its mean is `freedom`, its variance twice that. A distribution that is off by 2 % of one token is far outside.
    limit = freedom + 4 * np.sqrt(2 * freedom)
    off = sampling.reference(x, params) + np.array([0.02, -0.02, 0, 0, 0, 0, 0, 0])
    assert statistic < limit < chi_square(draws(x, params, count=count), count * off)[0]


@KERNELS
def test_greedy_takes_the_lowest_of_equals(kernel):
    x = np.full((3, 5000), -1.0, np.float32)
    x[0, [4999, 4000, 70]] = 5
    x[1, :] = -np.inf
    x[1, 4321] = -3e38
    x[2, [1024, 1023]] = [0.0, -0.0]
    skip_unless_able(kernel, x[0])
    got = sampling.sample(x, [SamplingParams()] * 3, seeds=[0] * 3, steps=[0] * 3, kernel=kernel)
    assert got.tolist() == [70, 4321, 1023]


@pytest.mark.parametrize("top_k,kept", [(1, {3}), (2, {1, 3}), (3, {1, 3, 4}), (4, {1, 2, 3, 4})])
def test_top_k_keeps_exactly_k_and_the_lowest_of_equals(top_k, kept):
    x = np.array([0, 2, 1, 3, 2], np.float32)
    assert set(draws(x, SamplingParams(temperature=5.0, top_k=top_k), count=400)) == kept


@pytest.mark.parametrize("top_p,kept", [(0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_equals_by_rising_id(top_p, kept):
    assert set(draws(np.zeros(4, np.float32), SamplingParams(temperature=1.0, top_p=top_p), count=400)) == kept


def test_top_p_is_of_what_top_k_left():
    x = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert set(draws(x, SamplingParams(temperature=1.0, top_p=0.5), count=400)) == {0, 1}
    assert set(draws(x, SamplingParams(temperature=1.0, top_p=0.5, top_k=2), count=400)) == {0}


def test_a_row_draws_the_same_alone_and_among_others():
    random = np.random.default_rng(3)
    x = random.standard_normal((17, 999)).astype(np.float32)
    params = list(itertools.islice(itertools.cycle(case.params for case in cases.SAMPLING_PARAMS), 17))
    prompts = [random.integers(0, 999, n).tolist() for n in range(17)]
    seen = {"prompt_ids": prompts, "answer_ids": prompts[::-1]}
    together = sampling.sample(x, params, seeds=range(17), steps=range(5, 22), **seen)
    for i in range(17):
        mine = {name: [ids[i]] for name, ids in seen.items()}
        assert sampling.sample(x[i : i + 1], [params[i]], seeds=[i], steps=[5 + i], **mine) == together[i]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    x = np.random.default_rng(4).standard_normal((9, 3000)).astype(np.float32)
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 9
    out = np.full(9, -1, np.int32)
    settings = [as_tensor(a, "settings") for a in sampling.settings(params, range(9), range(9))]
    pool = native.Pool(threads)
    native.sample(pool, "portable", settings, as_tensor(x, "x"), as_tensor(out, "out"), None, None, None)
    assert np.array_equal(out, sampling.sample(x, params, seeds=range(9), steps=range(9), kernel="cpu_portable"))


def test_seeds_and_steps_change_the_draw():
    x, params = np.zeros((1, 1000), np.float32), [SamplingParams(temperature=1.0)]
    pairs = [(seed, step) for seed in (0, 1, 2**32, 2**63 - 1) for step in (0, 1, 2**32)]
    got = [int(sampling.sample(x, params, seeds=[seed], steps=[step])[0]) for seed, step in pairs]
    assert got == [int(1000 * sampling.uniform(seed, step)) for seed, step in pairs]
    assert max(Counter(got).values()) == 1


def test_random_numbers_are_philox():
    # The known answers published with Random123.
    assert sampling.philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert sampling.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert sampling.philox(*digits) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    for seed, step in itertools.product((0, 1, 2**40 + 3, 2**63 - 1), repeat=2):
        assert native.uniform(seed, step) == sampling.uniform(seed, step)


@pytest.mark.parametrize("place", [0, 17, 1023, 1024, 4095, 4096])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@KERNELS
def test_improper_logits_are_refused(kernel, temperature, bad, place):
    x = np.zeros((2, 4097), np.float32)
    x[1, place] = bad
    skip_unless_able(kernel, x[0])
    params = [SamplingParams(temperature=temperature)] * 2
    with pytest.raises(
        HeadraceError, match=f"logits: expected finite numbers or -inf, got .* at token {place} in row 1"
    ):
        sampling.sample(x, params, seeds=[0] * 2, steps=[0] * 2, kernel=kernel)


def test_nothing_to_draw_is_refused():
    x = np.full((1, 40), -np.inf, np.float32)
    with pytest.raises(HeadraceError, match="a token that is not -inf, got none in row 0"):
        sampling.sample(x, [SamplingParams()], seeds=[0], steps=[0])


def test_penalties_that_overflow_are_refused():
    x = np.full((1, 4), 1e38, np.float32)
    params = [SamplingParams(presence_penalty=-3.4e38)]
    with pytest.raises(HeadraceError, match="got inf at token 2 in row 0"):
        sampling.sample(x, params, seeds=[0], steps=[0], answer_ids=[[2]])


CALL = {"logits": np.zeros((2, 8), np.float32), "params": [SamplingParams()] * 2, "seeds": [0, 1], "steps": [0, 0]}
PENALIZED = [SamplingParams(presence_penalty=1.0)] * 2


@pytest.mark.parametrize(
    "change,text",
    [
        ({"logits": np.zeros(8, np.float32)}, "logits: expected [rows, vocab]"),
        ({"logits": np.zeros((2, 0), np.float32)}, "logits: expected [rows, vocab]"),
        ({"logits": np.zeros((2, 8), np.float16)}, "logits: expected float32, got float16"),
        ({"logits": np.zeros((2, 16), np.float32)[:, ::2]}, "contiguous inner dimensions"),
        ({"params": [SamplingParams()]}, "params: expected 2, one per row of logits, got 1"),
        ({"seeds": [0, -1]}, "seeds: expected whole numbers"),
        ({"steps": [0, 2**63]}, "steps: expected whole numbers"),
        ({"prompt_ids": [[]]}, "prompt_ids: expected 2"),
        ({"params": PENALIZED, "prompt_ids": [[1], [8]]}, "counts.ids: expected rising, 0 to 7, got 8 in row 1"),
        ({"params": PENALIZED, "answer_ids": [[-1], []]}, "ids"),
        ({"params": [SamplingParams(temperature=1e300)] * 2}, "temperature: expected 0 to 3e38"),
    ],
)
def test_bad_arguments_are_named(change, text):
    call = CALL | change
    with pytest.raises(ArgumentError) as caught:
        sampling.sample(call.pop("logits"), call.pop("params"), **call)
    assert text in str(caught.value)


def test_no_rows_give_no_tokens():
    assert sampling.sample(np.zeros((0, 8), np.float32), [], seeds=[], steps=[]).tolist() == []


def test_logits_hash_tells_one_bit_apart():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    y = x.copy()
    y.view(np.uint32)[500] ^= 1
    assert sampling.logits_hash(x) == sampling.logits_hash(x.reshape(10, 100)) != sampling.logits_hash(y)
    assert len(sampling.logits_hash(x)) == 16
