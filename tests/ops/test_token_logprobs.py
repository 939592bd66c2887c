"""token_logprobs on the CPU: within its budget, ties by id, the engine's numbers, mistakes named."""

import numpy as np
import pytest

from headrace import ops
from headrace.check import cases
from headrace.check.compare import assert_within_budget
from headrace.check.draws import row_of
from headrace.engine.logprobs import token_logprobs
from headrace.errors import ArgumentError
from headrace.ops import logprobs


def rows_of(case, count=3):
    """Rows of a case, each turned a little further, and a token of each that is not excluded."""
    x = np.stack([np.roll(row_of(case), n) for n in range(count)])
    return x, np.argmax(x > -np.inf, axis=1).astype(np.int32)


@pytest.mark.parametrize("num_top", [0, 1, 7, 3000])
@pytest.mark.parametrize("case", cases.SAMPLING, ids=lambda case: case.name)
def test_logprobs_are_within_budget(case, num_top):
    x, tokens = rows_of(case)
    got = ops.token_logprobs(x, tokens, num_top)
    exact, plain = (logprobs.reference(x, tokens, num_top, dtype) for dtype in (np.float64, np.float32))
    assert got.top_ids.dtype == np.int32 and np.array_equal(got.top_ids, exact.top_ids)
    assert_within_budget(got.chosen, exact.chosen, plain.chosen, "float32")
    assert_within_budget(got.top, exact.top, plain.top, "float32")


def test_the_engine_tells_the_same():
    x, tokens = rows_of(cases.SAMPLING[-1])
    got = ops.token_logprobs(x, tokens, 4)
    for row in range(len(x)):
        told = token_logprobs(x[row], int(tokens[row]), 4)
        assert np.float32(told.logprob) == got.chosen[row]
        assert [(i, np.float32(p)) for i, p in told.top] == list(zip(got.top_ids[row], got.top[row], strict=True))


def test_probabilities_of_a_whole_vocabulary_sum_to_one_and_tied_ones_rise():
    x = np.array([[0, 2, 2, -np.inf, 1]], np.float32)
    got = ops.token_logprobs(x, np.array([3], np.int32), 9)
    assert got.top_ids.tolist() == [[1, 2, 4, 0, 3]] and got.chosen[0] == -np.inf
    assert np.isclose(np.exp(got.top.astype(np.float64)).sum(), 1, rtol=1e-6)


def test_nobody_is_told_of_a_token_that_is_not_there():
    x = np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, np.inf]], np.float32)
    got = ops.token_logprobs(x, np.array([-1, 1, 0], np.int32), 1)
    assert np.isnan(got.chosen).all() and np.isnan(got.top[1:]).all() and np.isfinite(got.top[0]).all()


@pytest.mark.parametrize(
    "logits,tokens,num_top,text",
    [
        (np.zeros(5, np.float32), np.zeros(1, np.int32), 0, "logits: expected float32"),
        (np.zeros((1, 5)), np.zeros(1, np.int32), 0, "got float64"),
        (np.zeros((2, 5), np.float32), np.zeros(1, np.int32), 0, r"tokens: expected int32 \[2\]"),
        (np.zeros((1, 5), np.float32), np.zeros(1, np.int64), 0, "got int64"),
        (np.zeros((1, 5), np.float32), np.zeros(1, np.int32), -1, "num_top"),
    ],
)
def test_mistakes_are_named(logits, tokens, num_top, text):
    with pytest.raises(ArgumentError, match=text):
        ops.token_logprobs(logits, tokens, num_top)


def test_the_choice_is_explained():
    told = str(ops.explain("token_logprobs", (4, 32000), (4,), num_top=200, device="cuda", arch="sm_90"))
    assert "triton_logprobs" in told and "at most 128" in told
    assert "numpy_logprobs" in str(ops.explain("token_logprobs", (4, 32000), (4,)))
