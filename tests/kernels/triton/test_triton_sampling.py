"""Sampling on a GPU: the draws are those of the formula and of the CPU's kernels, alone or in a batch."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.draws import assert_draws_follow, row_of
from headrace.check.guards import Guarded, as_numpy
from headrace.config import SamplingParams
from headrace.ops import sampling

torch = pytest.importorskip("torch")
triton_sampling = pytest.importorskip("headrace.kernels.triton.sampling")
CASES = {case.name: case for case in cases.SAMPLING}
PARAMS = [case.params for case in cases.SAMPLING_PARAMS]
FEW = [case.params for case in cases.SAMPLING_PARAMS if case.name in ("plain", "top_k", "top_p", "min_p", "everything")]


def drawn(device, x, params, seeds, steps, **seen):
    """Tokens of the kernel, from guarded memory."""
    guarded = Guarded(device)
    out = guarded.tensor(np.full(len(x), -7, np.int32), "out")
    settings = sampling.settings(params, seeds, steps)
    counts = sampling.token_counts(params, seen.get("prompt_ids"), seen.get("answer_ids"))
    tensors = [guarded.tensor(array) for array in settings]
    given = None if counts is None else [guarded.tensor(array) for array in counts]
    triton_sampling.run(guarded.tensor(x, "logits"), tensors, given, out)
    guarded.assert_untouched()
    return as_numpy(out)


def seen_by(vocab, rows):
    random = np.random.default_rng(1)
    prompt, answer = random.integers(0, vocab, 40).tolist(), random.integers(0, vocab, 30).tolist()
    return {"prompt_ids": [prompt] * rows, "answer_ids": [answer] * rows}


@pytest.fixture
def short_segments(monkeypatch):
    """A row of a thousand logits has 32 of them."""
    monkeypatch.setattr(triton_sampling, "SEGMENT", 32)
    monkeypatch.setattr(triton_sampling, "TILE", 256)


def assert_as_on_the_cpu(device, case, params):
    """Of each of the parameters a draw: as the formula has it, and token for token the CPU's."""
    x = row_of(case)
    rows, steps = np.broadcast_to(x, (len(params), len(x))).copy(), [0] * len(params)
    seen = seen_by(case.vocab, len(params))
    got = drawn(device, rows, params, [7] * len(params), steps, **seen)
    for token, each in zip(got, params, strict=True):
        exact, plain = (
            sampling.reference(x, each, seen["prompt_ids"][0], seen["answer_ids"][0], dtype=dtype)
            for dtype in (np.float64, np.float32)
        )
        assert_draws_follow([token], exact, plain)
    assert np.array_equal(got, sampling.sample(rows, params, seeds=[7] * len(params), steps=steps, **seen))


def test_draws_are_those_of_the_reference_and_of_the_cpu(device, short_segments):
    assert_as_on_the_cpu(device, CASES["equals"], FEW)


@pytest.mark.slow
def test_draws_with_all_parameters_over_many_segments(device, short_segments):
    assert_as_on_the_cpu(device, CASES["equals"], PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "all_equal", "excluded", "peaked", "over_block"])
def test_draws_of_other_cases(device, name, monkeypatch):
    monkeypatch.setattr(triton_sampling, "SEGMENT", 2048)
    monkeypatch.setattr(triton_sampling, "TILE", 2048)
    assert_as_on_the_cpu(device, CASES[name], FEW)


@pytest.mark.slow
@pytest.mark.slow
def test_draws_from_a_large_vocabulary(device, monkeypatch):
    monkeypatch.setattr(triton_sampling, "TILE", 16384)  # the interpreter looks at much in one go
    case = CASES["large_vocabulary"]
    params = [PARAMS[n] for n in (1, 7)]
    x = np.stack([row_of(case)] * len(params))
    settings = {"seeds": [3] * len(params), "steps": range(len(params))}
    assert drawn(device, x, params, **settings).tolist() == sampling.sample(x, params, **settings).tolist()


@pytest.mark.slow
def test_random_rows_and_parameters_draw_what_the_cpu_draws(device, short_segments):
    random = np.random.default_rng(11)
    for vocab in (5, 100, 900):
        rows = 10
        x = (random.standard_normal((rows, vocab)) * random.uniform(0.1, 8, (rows, 1))).astype(np.float32)
        x[::3] = np.round(x[::3] * 2) / 2
        x[random.random(x.shape) < 0.1] = -np.inf
        x[:, 0] = 0
        x[-1] = 0
        params = [random_params(random, vocab) for _ in range(rows)]
        settings = {
            "seeds": random.integers(0, 2**63, rows).tolist(),
            "steps": random.integers(0, 2**40, rows).tolist(),
        }
        assert np.array_equal(drawn(device, x, params, **settings), sampling.sample(x, params, **settings))


def random_params(random, vocab):
    return SamplingParams(
        temperature=float(random.choice([0.0, 0.3, 1.0, 2.5])),
        top_k=int(random.choice([0, 1, 3, vocab // 2, vocab])),
        top_p=float(random.choice([1.0, 0.99, 0.7, 0.2])),
        min_p=float(random.choice([0.0, 0.0, 0.01, 0.3])),
        typical_p=float(random.choice([1.0, 1.0, 0.9, 0.4])),
    )


def test_a_row_draws_the_same_alone_and_among_others(device):
    random = np.random.default_rng(3)
    some = [PARAMS[n] for n in (1, 7, 10, 14)]
    x = random.standard_normal((len(some), 999)).astype(np.float32)
    together = drawn(device, x, some, range(4), range(5, 9))
    for i in range(4):
        assert drawn(device, x[i : i + 1], some[i : i + 1], [i], [5 + i])[0] == together[i]


def test_greedy_takes_the_lowest_of_equals(device):
    x = np.full((3, 5000), -1.0, np.float32)
    x[0, [4999, 4000, 70]] = 5
    x[1, :] = -np.inf
    x[1, 4321] = -3e38
    x[2, [1024, 1023]] = [0.0, -0.0]
    assert drawn(device, x, [SamplingParams()] * 3, [0] * 3, [0] * 3).tolist() == [70, 4321, 1023]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_drawn_from_say_so(device, temperature):
    x = np.zeros((5, 4097), np.float32)
    x[0, 4096], x[1, 17], x[2, 0], x[3] = np.nan, np.inf, -np.nan, -np.inf
    got = drawn(device, x, [SamplingParams(temperature=temperature)] * 5, [0] * 5, [0] * 5)
    assert got[:4].tolist() == [sampling.NO_TOKEN] * 4 and 0 <= got[4] < 4097


def test_rows_that_nobody_wants_are_left_alone(device):
    x = np.zeros((2, 50), np.float32)
    got = drawn(device, x, [SamplingParams(temperature=1.0)] * 2, [0] * 2, [sampling.NOT_DRAWN, 4])
    assert got[0] == -7 and got[1] == int(50 * sampling.uniform(0, 4))


def test_random_numbers_are_those_of_the_cpu(device):
    x, params = np.zeros((1, 1000), np.float32), [SamplingParams(temperature=1.0)]
    pairs = [(seed, step) for seed in (0, 1, 2**32, 2**63 - 1) for step in (0, 1, 2**32, 2**62 + 5)]
    seeds, steps = zip(*pairs, strict=True)
    got = drawn(device, np.repeat(x, len(pairs), 0), params * len(pairs), seeds, steps)
    assert got.tolist() == [int(1000 * sampling.uniform(*pair)) for pair in pairs]


def test_the_op_takes_tensors(device):
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 77)).astype(np.float32)).to(device)
    call = {"seeds": [1, 2, 3], "steps": [0, 1, 2]}
    got = sampling.sample(x, PARAMS[:3], **call, kernel="triton_sampling")
    assert got.tolist() == sampling.sample(x.cpu().numpy(), PARAMS[:3], **call).tolist()
