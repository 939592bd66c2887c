"""Mixture of experts on a GPU: both forms and the choice of experts, against the formula, inside guarded memory."""

import numpy as np
import pytest

from headrace import ops
from headrace.check import cases
from headrace.check.compare import assert_within_budget, poisoned
from headrace.check.guards import Guarded, as_numpy
from headrace.check.moe_arrays import (
    coded_experts,
    moe_arrays,
    moe_exact,
    moe_straightforward,
    routing_arrays,
    routing_options,
)
from headrace.ops import moe

torch = pytest.importorskip("torch")
routing = pytest.importorskip("headrace.kernels.triton.moe_routing")

QUICK = ("one", "one_token", "more_tokens", "nothing_here", "no_tokens", "mixtral", "groups_of_one")


def slow_unless(case, names):
    return pytest.param(case, id=case.name, marks=[] if case.name in names else [pytest.mark.slow])


def mixed(arrays, device, **options):
    guarded = Guarded(device)
    out = poisoned(arrays["x"].shape, options.pop("out_dtype", str(arrays["x"].dtype)))
    given = guarded.tensors(arrays | {"out": out})
    routes = ops.Routing(given.pop("experts"), given.pop("weights"))
    matrices = [given.pop(name) for name in ("x", "gate", "up", "down")]
    ops.mixture_of_experts(*matrices, routes, **given, **options, kernel="triton_moe")
    guarded.assert_untouched()
    return as_numpy(given["out"])


@pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [slow_unless(case, QUICK) for case in cases.MOE])
def test_kernel_is_within_budget(device, case, dtype):
    arrays = moe_arrays(case, dtype)
    assert_within_budget(mixed(arrays, device), moe_exact(arrays), moe_straightforward(arrays), dtype)


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
@pytest.mark.parametrize("case", [pytest.param(cases.MOE[2], marks=pytest.mark.slow), cases.MOE[3]])
def test_activations_residual_and_wider_outputs(device, case, activation):
    arrays = moe_arrays(case, "float16")
    arrays["residual"] = np.random.default_rng(1).standard_normal(arrays["x"].shape).astype(np.float32)
    got = mixed(arrays, device, activation=activation, out_dtype="float32")
    straightforward = moe_straightforward(arrays, activation, "float32")
    assert_within_budget(got, moe_exact(arrays, activation), straightforward, "float32")


@pytest.mark.parametrize("block", [(1, 0), pytest.param((128, 128), marks=pytest.mark.slow), (4, 128)])
@pytest.mark.parametrize("codes", moe.CODES)
@pytest.mark.parametrize("tokens", [3, 7])
def test_experts_in_codes_are_within_budget(device, tokens, codes, block):
    case = cases.MoeCase("coded", tokens, 256, 128, 5, 2)
    arrays = coded_experts(moe_arrays(case, "float16"), codes, block)
    assert_within_budget(mixed(arrays, device), moe_exact(arrays), moe_straightforward(arrays), "float16")


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_token_has_the_same_bits_in_any_company(device, tokens):
    case = cases.MoeCase("company", 40, 32, 24, 4, 2)
    arrays = moe_arrays(case, "float32")
    whole = mixed(arrays, device, deterministic=True, require="batch_invariant")
    some = {name: array[:tokens] if name in ("x", "experts", "weights") else array for name, array in arrays.items()}
    assert np.array_equal(mixed(some, device, deterministic=True, require="batch_invariant"), whole[:tokens])


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("skew", [False, True])
def test_tiles_hold_every_pair_once_with_its_expert(device, rows, skew):
    random = np.random.default_rng(rows + skew)
    experts = random.integers(-1, 9, (61, 3)).astype(np.int32)
    experts[:, 0] = 2 if skew else experts[:, 0]
    guarded = Guarded(device)
    order, tiles = routing.group_pairs(guarded.tensor(experts), 8, rows)
    order, tiles, flat = as_numpy(order), as_numpy(tiles), experts.reshape(-1)
    met = []
    for expert, first, end in tiles[tiles[:, 0] >= 0]:
        assert 0 < end - first <= rows and (flat[order[first:end]] == expert).all()
        met += order[first:end].tolist()
    assert sorted(met) == np.flatnonzero((flat >= 0) & (flat < 8)).tolist()
    guarded.assert_untouched()


@pytest.mark.parametrize("pairs,experts,rows", [(1, 1, 16), (7, 3, 16), (64, 8, 16), (200, 4, 64), (33, 60, 16)])
def test_tiles_suffice_however_tokens_fall(pairs, experts, rows):
    most = routing.num_tiles(pairs, experts, rows)
    assert most <= pairs
    busy = min(pairs, experts)
    worst = np.bincount(np.arange(busy), minlength=experts)  # one each, the rest to one, or evenly
    for rest in (np.zeros(pairs - busy, int), np.arange(pairs - busy) % experts):
        counts = worst + np.bincount(rest, minlength=experts)
        assert counts.sum() == pairs and np.ceil(counts / rows).sum() <= most


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [slow_unless(case, QUICK) for case in cases.ROUTE])
def test_routes_are_those_of_the_formula(device, case, dtype, levels):
    logits, bias = routing_arrays(case, dtype, levels)
    guarded = Guarded(device)
    given = None if bias is None else guarded.tensor(bias)
    got = ops.route(guarded.tensor(logits), case.top_k, bias=given, **routing_options(case), kernel="triton_route")
    options = moe.RoutingOptions(case.top_k, **routing_options(case))
    exact = moe.routing_reference(logits, options, bias)
    plain = moe.routing_reference(logits, options, bias, dtype=np.float32)
    assert np.array_equal(as_numpy(got.experts), exact.experts)
    assert_within_budget(as_numpy(got.weights), exact.weights, plain.weights, "float32")
    guarded.assert_untouched()
