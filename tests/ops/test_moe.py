"""mixture_of_experts and route: kernels of the CPU against the formula, mistakes named, the choice explained."""

import numpy as np
import pytest

from headrace import ops
from headrace.check import cases
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.moe_arrays import (
    coded_experts,
    moe_arrays,
    moe_exact,
    moe_straightforward,
    routing_arrays,
    routing_options,
)
from headrace.errors import ArgumentError, KernelError
from headrace.ops import moe
from headrace.ops.call_request import explain
from headrace.ops.explanation import explain_request
from headrace.ops.select import reset_choices

NAMES = ("x", "gate", "up", "down")


def mixed(arrays, **options):
    """The op on the arrays of a case."""
    routing = ops.Routing(arrays["experts"], arrays["weights"])
    rest = {name: array for name, array in arrays.items() if name not in (*NAMES, "experts", "weights")}
    return ops.mixture_of_experts(*(arrays[name] for name in NAMES), routing, **rest, **options)


@pytest.mark.parametrize("dtype", moe.DTYPES)
@pytest.mark.parametrize("case", cases.MOE, ids=lambda case: case.name)
def test_numpy_is_within_budget(case, dtype):
    arrays = moe_arrays(case, dtype)
    got = mixed(arrays | {"out": poisoned(arrays["x"].shape, dtype)}, kernel="numpy_moe")
    assert_within_budget(got, moe_exact(arrays), moe_straightforward(arrays), dtype)


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_activations_residual_and_wider_outputs(activation):
    arrays = moe_arrays(cases.MOE[3], "float16")
    arrays["residual"] = rounded(np.random.default_rng(1).standard_normal(arrays["x"].shape), "bfloat16")
    got = mixed(arrays, activation=activation, out_dtype="float32")
    straightforward = moe_straightforward(arrays, activation, "float32")
    assert_within_budget(got, moe_exact(arrays, activation), straightforward, "float32")


def test_the_formula_is_what_it_says():
    x, one = np.array([[2.0, -1.0]]), np.eye(2)[None]
    gate, up, down = 0 * one, one, np.concatenate([one, 10 * one])
    routing = ops.Routing(np.array([[1, 0]]), np.array([[0.25, 0.5]]))
    # silu(0) = 0; by hand: silu(2) = 2 / (1 + e^-2), silu(-1) = -1 / (1 + e)
    assert not moe.reference(x, np.repeat(gate, 2, 0), np.repeat(up, 2, 0), down, routing).any()
    silu = np.array([2 / (1 + np.exp(-2.0)), -1 / (1 + np.exp(1.0))])
    got = moe.reference(x, np.repeat(one, 2, 0), np.repeat(up, 2, 0), down, routing)
    assert np.allclose(got, [(0.25 * 10 + 0.5) * silu * x[0]], rtol=1e-15)


def test_slices_of_one_tensor_do_and_torch_comes_back_as_torch():
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(array) for name, array in moe_arrays(cases.MOE[3], "float32").items()}
    both = torch.cat([arrays["gate"], arrays["up"]], dim=1)
    half = both.shape[1] // 2
    got = mixed(arrays | {"gate": both[:, :half], "up": both[:, half:]})
    assert isinstance(got, torch.Tensor) and torch.equal(got, mixed(arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.MOE, ids=lambda case: case.name)
def test_torch_is_within_budget(case, dtype):
    pytest.importorskip("torch")
    arrays = moe_arrays(case, dtype)
    got = mixed(arrays | {"out": poisoned(arrays["x"].shape, dtype)}, kernel="torch_moe")
    assert_within_budget(got, moe_exact(arrays), moe_straightforward(arrays), dtype)


CODED = cases.MoeCase("coded", 7, 256, 128, 5, 2)


@pytest.mark.parametrize("block", [(1, 0), (0, 0), (128, 128), (4, 128)])
@pytest.mark.parametrize("codes", moe.CODES)
def test_experts_in_codes_are_within_budget(codes, block):
    arrays = coded_experts(moe_arrays(CODED, "float16"), codes, block)
    assert_within_budget(mixed(arrays), moe_exact(arrays), moe_straightforward(arrays), "float16")


# route


@pytest.mark.parametrize("dtype", moe.DTYPES)
@pytest.mark.parametrize("case", cases.ROUTE, ids=lambda case: case.name)
def test_routes_are_those_of_the_formula(case, dtype):
    logits, bias = routing_arrays(case, dtype)
    got = ops.route(logits, case.top_k, bias=bias, **routing_options(case), kernel="numpy_route")
    options = moe.RoutingOptions(case.top_k, **routing_options(case))
    exact = moe.routing_reference(logits, options, bias)
    plain = moe.routing_reference(logits, options, bias, dtype=np.float32)
    assert got.experts.dtype == np.int32 and np.array_equal(got.experts, exact.experts)
    assert_within_budget(got.weights, exact.weights, plain.weights, "float32")


def test_of_equal_experts_the_lowest_are_taken():
    got = ops.route(np.zeros((2, 6), np.float32), 3)
    assert got.experts.tolist() == [[0, 1, 2]] * 2
    assert np.allclose(got.weights, 1 / 3, rtol=1e-6)


def test_a_bias_chooses_and_does_not_weigh():
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    got = ops.route(logits, 1, scores="sigmoid", bias=np.array([9, 0, 0], np.float32), normalize=False)
    assert got.experts.tolist() == [[0]] and got.weights.tolist() == [[0.5]]


# Mistakes and choices

SMALL = moe_arrays(cases.MOE[3], "float32")
CODES = {name: SMALL[name].astype(np.int8) for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"x": np.zeros(70, np.float32)}, "x: expected [tokens, dim]"),
        ({"gate": np.zeros((6, 48), np.float32)}, "gate: expected [experts, ffn_dim, dim]"),
        ({"up": np.zeros((6, 47, 70), np.float32)}, "up: expected [6, 48, 70]"),
        ({"down": np.zeros((6, 48, 70), np.float32)}, "down: expected [6, 70, 48]"),
        ({"gate": np.zeros((6, 48, 70), np.int16)}, "gate: expected float32 or float16 or bfloat16 or int8"),
        ({"x": np.zeros((5, 70), np.float16)}, "gate: expected float16"),
        ({"experts": np.zeros((4, 2), np.int32)}, "routing.experts: expected [5, 2]"),
        ({"experts": np.zeros((5, 2), np.int64)}, "routing.experts: expected int32"),
        ({"weights": np.zeros((5, 3), np.float32)}, "routing.weights: expected [5, 2]"),
        ({"out": np.zeros((5, 71), np.float32)}, "out: expected [5, 70]"),
        ({"gate": np.zeros((6, 48, 70), np.int8), "up": np.zeros((6, 48, 70), np.int8)}, "down: expected int8, as"),
        ({"gate_scales": np.zeros((6, 48, 1), np.float32)}, "gate_scales: expected none for float32 experts"),
        (CODES, "gate_scales: expected some for int8 experts"),
        (
            CODES | {"gate_scales": np.zeros((6, 48, 2), np.float32)},
            "gate_scales: expected [6, 48 / rows, 70 / columns",
        ),
        (CODES | {"gate_scales": np.zeros((6, 5, 1), np.float32)}, "gate_scales: expected [6, 48 / rows"),
        (CODES | {"gate_scales": np.zeros((6, 48, 1))}, "gate_scales: expected float32"),
        ({"activation": "swish"}, "activation: expected one of silu"),
        ({"precision": "high"}, "precision: expected one of auto"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    options = {name: changes[name] for name in ("activation", "precision") if name in changes}
    arrays = {name: array for name, array in changes.items() if name not in options}
    with pytest.raises(ArgumentError) as caught:
        mixed(SMALL | arrays, **options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"logits": np.zeros(8, np.float32)}, "logits: expected [tokens, experts]"),
        ({"logits": np.zeros((2, 8))}, "logits: expected a dtype"),
        ({"top_k": 9}, "top_k: expected 1 to 8"),
        ({"top_k": 5, "num_groups": 4, "top_groups": 2}, "top_k: expected 1 to 4"),
        ({"num_groups": 3}, "num_groups: expected a divisor of 8"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups: expected 1 to 4"),
        ({"scores": "tanh"}, "scores: expected one of softmax"),
        ({"bias": np.zeros(7, np.float32)}, "bias: expected [8]"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
    ],
)
def test_bad_routes_are_named(changes, text):
    call = {"logits": np.zeros((2, 8), np.float32), "top_k": 2} | changes
    with pytest.raises(ArgumentError) as caught:
        ops.route(call.pop("logits"), call.pop("top_k"), **call)
    assert text in str(caught.value)


def test_the_choice_is_explained_and_counted():
    reset_choices()
    mixed(SMALL)
    ops.route(np.zeros((1, 4), np.float32), 2)
    assert ops.choices()["mixture_of_experts", "numpy_moe"] == 1 and ops.choices()["route", "numpy_route"] == 1
    with pytest.raises(KernelError, match="none named 'cuda_moe'"):
        mixed(SMALL, kernel="cuda_moe")
    with pytest.raises(KernelError, match="batch_invariant"):
        mixed(SMALL, kernel="numpy_moe", require="batch_invariant")


@pytest.mark.parametrize("tokens,invariant", [(1, False), (1, True), (512, False), (512, True)])
def test_a_gpu_is_priced_without_one(tokens, invariant):
    shapes = {"x": (tokens, 2048), "gate": (128, 768, 2048), "up": (128, 768, 2048), "down": (128, 2048, 768)}
    shapes |= {"experts": (tokens, 8), "weights": (tokens, 8)}
    dtypes = dict.fromkeys(("x", "gate", "up", "down", "out"), "bfloat16") | {"experts": "int32", "weights": "float32"}
    asked = moe.request(shapes, dtypes, {"deterministic": invariant})
    on_gpu = type(asked)(**{**vars(asked), "device": "cuda", "arch": "sm_90"})
    told = explain_request(moe.kernels(), on_gpu, require=("batch_invariant",) if invariant else ())
    assert told.chosen.kernel == "triton_moe" and told.chosen.batch_invariant == invariant
    assert {rejected.kernel for rejected in told.rejected} == {"numpy_moe"} | ({"torch_moe"} if invariant else set())
    given = [*shapes.values()][:5]
    options = {"dtype": "bfloat16", "device": "cuda", "arch": "sm_90", "deterministic": invariant}
    assert explain("mixture_of_experts", *given, **options).chosen == told.chosen
    # One token meets 8 of 128 experts: 75 MB; 512 tokens meet all.
    read = 3 * 768 * 2048 * 2 * (8 if tokens == 1 else 128)
    assert read <= asked.traffic.num_bytes <= 1.05 * read
