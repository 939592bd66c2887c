"""Logprobs on a GPU: those of the formula, inside guarded memory, over one segment of a row and many."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.compare import assert_within_budget
from headrace.check.draws import row_of
from headrace.check.guards import Guarded, as_numpy
from headrace.ops import logprobs

torch = pytest.importorskip("torch")
triton_logprobs = pytest.importorskip("headrace.kernels.triton.logprobs")
triton_sampling = pytest.importorskip("headrace.kernels.triton.sampling")
CASES = {case.name: case for case in cases.SAMPLING}


def told(device, x, tokens, num_top):
    """What the kernel tells, from guarded memory."""
    guarded = Guarded(device)
    shape = (len(x), min(num_top, x.shape[1]))
    out = [guarded.tensor(np.full(len(x), np.nan, np.float32), "out")]
    out += [guarded.tensor(np.full(shape, kind(-7)), "out") for kind in (np.int32, np.float32)]
    triton_logprobs.run(guarded.tensor(x, "logits"), guarded.tensor(tokens), *out)
    guarded.assert_untouched()
    return logprobs.Logprobs(*map(as_numpy, out))


def assert_as_the_formula(device, x, tokens, num_top):
    got = told(device, x, tokens, num_top)
    exact, plain = (logprobs.reference(x, tokens, num_top, dtype) for dtype in (np.float64, np.float32))
    assert np.array_equal(got.top_ids, exact.top_ids)
    assert_within_budget(got.chosen, exact.chosen, plain.chosen, "float32")
    assert_within_budget(got.top, exact.top, plain.top, "float32")


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(triton_sampling, "SEGMENT", 32)


@pytest.mark.parametrize("num_top", [0, 5, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["one", "all_equal", "excluded", "equals"])
def test_logprobs_are_those_of_the_formula(device, short_segments, name, num_top):
    row = row_of(CASES[name])[:900]
    x = np.stack([row, row[::-1]])
    assert_as_the_formula(device, x, np.argmax(x > -np.inf, axis=1).astype(np.int32), num_top)


@pytest.mark.parametrize("name", ["peaked", pytest.param("large_vocabulary", marks=pytest.mark.slow)])
def test_long_rows_hold(device, name):
    x = row_of(CASES[name])[None]
    assert_as_the_formula(device, x, np.argmax(x > -np.inf, axis=1).astype(np.int32), 3)


def test_nobody_is_told_of_a_token_that_is_not_there(device):
    x = np.array([[0.0, 1.0, 5.0], [np.nan, 1.0, 0.0], [0.0, np.inf, 0.0], [-np.inf, 0.0, 0.0]], np.float32)
    got = told(device, x, np.array([3, 1, 0, 0], np.int32), 2)
    assert np.isnan(got.chosen[:3]).all() and np.isnan(got.top[1:3]).all()
    assert got.top_ids[0].tolist() == [2, 1] and got.top_ids[3].tolist() == [1, 2] and got.chosen[3] == -np.inf


def test_rows_may_lie_apart_and_the_op_finds_the_kernel(device):
    wide = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)).to(device)
    x, tokens = wide[:, :40], torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    got = logprobs.token_logprobs(x, tokens, 6, kernel="triton_logprobs")
    expected = x.double().log_softmax(1)
    assert got.chosen.device == x.device and got.top_ids.tolist() == expected.topk(6).indices.tolist()
    torch.testing.assert_close(got.top.double(), expected.topk(6).values)
