"""The choice of a kernel: the cheapest that can run, what was asked for by name or property, and why not the others."""

from __future__ import annotations

import json
import math
import threading

import pytest

from headrace.errors import ArgumentError, KernelError
from headrace.kernels import cpu
from headrace.machine import KernelSpeed, Machine
from headrace.ops import linear, norm
from headrace.ops.explanation import explain_request
from headrace.ops.per_isa import INSTRUCTION_SET, per_isa, predicted_seconds
from headrace.ops.select import (
    REQUIREMENTS,
    Kernel,
    Plan,
    Reason,
    Request,
    Traffic,
    choices,
    choose,
    reset_choices,
)

MACHINE = Machine({"read": 1e9, "fp32": 1e9, "bf16": 4e9, "int8": 4e9}, measured=False, cores=3)
REQUEST = Request("toy", {"x": (2, 3)}, {"x": "float32"}, Traffic(1_000_000, 500_000), {"causal": True, "f": min})
NO_FAST = Reason("dtype of x", "float32", "bfloat16", "convert it")


def kernel(name: str, seconds: float = 1.0, reasons: tuple[Reason, ...] = (), plan: Plan | None = None) -> Kernel:
    planned = (lambda request, machine: plan) if plan else None
    return Kernel(name, lambda request: list(reasons), lambda *_: seconds, print, planned, "any")


FAST, SLOW, UNABLE = kernel("fast", 1e-3), kernel("slow", 4e-3), kernel("unable", 1e-9, (NO_FAST,))


def test_the_cheapest_that_can_run_is_chosen() -> None:
    assert choose((SLOW, UNABLE, FAST), REQUEST).name == "fast"
    assert choose((SLOW, UNABLE), REQUEST).name == "slow"


def test_the_explanation_names_what_choose_takes_and_sorts_the_rest() -> None:
    told = explain_request((SLOW, UNABLE, FAST), REQUEST, MACHINE)
    assert told.chosen and told.chosen.kernel == "fast"
    assert [(other.kernel, other.predicted_s) for other in told.able] == [("slow", 4e-3)]
    [rejected] = told.rejected
    assert (rejected.kernel, rejected.predicate, rejected.observed) == ("unable", "dtype of x", "float32")
    assert (rejected.required, rejected.fix) == ("bfloat16", "convert it")


def test_the_expected_share_is_that_of_the_roof_that_binds() -> None:
    chosen = explain_request((FAST,), REQUEST, MACHINE).chosen
    assert chosen and chosen.bound == "memory" and chosen.roof_fraction == pytest.approx(1e-3 / 1e-3)
    heavy = Request("toy", {}, {}, Traffic(1, 2_000_000))
    chosen = explain_request((SLOW,), heavy, MACHINE).chosen
    assert chosen and chosen.bound == "compute" and chosen.roof_fraction == pytest.approx(2e-3 / 4e-3)
    fast_arithmetic = kernel("bf16", 4e-3, plan=Plan(arithmetic="bf16"))
    chosen = explain_request((fast_arithmetic,), heavy, MACHINE).chosen
    assert chosen and chosen.roof_fraction == pytest.approx(0.5e-3 / 4e-3) and chosen.arithmetic == "bf16"


def test_a_plan_shows_in_the_explanation() -> None:
    plan = Plan(7, 5, 12_345, True, True, notes=("mask recognised as document blocks (4)",))
    told = explain_request((kernel("planned", plan=plan), FAST), REQUEST, MACHINE, require=("batch_invariant",))
    assert told.chosen
    found = told.chosen
    assert (found.splits, found.workers, found.workspace_bytes, found.batch_invariant) == (7, 5, 12_345, True)
    assert "note: mask recognised as document blocks (4)" in str(told) and "12.3 kB" in str(told)
    assert [rejected.predicate for rejected in told.rejected] == ["require batch_invariant"]


def test_the_dictionary_survives_json_and_holds_everything() -> None:
    told = explain_request((SLOW, UNABLE, FAST), REQUEST, MACHINE)
    found = json.loads(json.dumps(told.as_dict(), allow_nan=False))
    assert found["chosen"]["kernel"] == "fast" and found["able"][0]["kernel"] == "slow"
    assert found["rejected"] == [
        {
            "kernel": "unable",
            "predicate": "dtype of x",
            "observed": "float32",
            "required": "bfloat16",
            "fix": "convert it",
        }
    ]
    assert found["request"]["shapes"] == {"x": [2, 3]} and found["request"]["options"]["causal"] is True
    assert found["roof"] == {"memory_s": 1e-3, "compute_s": 5e-4, "measured": False, "gpu": ""}
    assert json.loads(json.dumps(explain_request((UNABLE,), REQUEST, MACHINE).as_dict()))["chosen"] is None


def test_the_table_has_one_line_per_kernel_in_columns() -> None:
    lines = str(explain_request((SLOW, UNABLE, FAST), REQUEST, MACHINE)).splitlines()
    assert lines[0] == "toy: x float32 [2, 3]" and "guessed roofs; `headrace doctor` measures them" in lines[1]
    chosen, able, cannot = (
        next(line for line in lines if line.split()[0] == mark) for mark in ("chosen", "able", "cannot")
    )
    assert chosen.split()[1] == "fast" and able.split()[1] == "slow" and cannot.split()[1] == "unable"
    assert chosen.index("fast") == able.index("slow") and "1.00 ms" in chosen
    assert cannot.endswith("float32   bfloat16  convert it")


def test_nothing_that_can_run_raises_with_the_table() -> None:
    with pytest.raises(KernelError) as caught:
        choose((UNABLE,), REQUEST)
    assert "no kernel can run this toy" in str(caught.value) and "dtype of x" in str(caught.value)
    assert "convert it" in str(caught.value)


def test_a_kernel_by_name_is_taken_or_raises_with_its_reasons() -> None:
    assert choose((FAST, SLOW), REQUEST, "slow").name == "slow"
    with pytest.raises(
        KernelError, match="'unable' cannot run this toy: dtype of x: needs bfloat16, got float32"
    ) as caught:
        choose((FAST, UNABLE), REQUEST, "unable")
    assert "chosen" in str(caught.value)
    with pytest.raises(KernelError, match="toy has none named 'other'") as caught:
        choose((FAST, SLOW), REQUEST, "other")
    assert "fast, slow" in str(caught.value)


LACKING = {
    "batch_invariant": Plan(batch_invariant=False),
    "deterministic": Plan(deterministic=False),
    "exact": Plan(arithmetic="bf16"),
    "no_copy": Plan(copies=True),
}
HAVING = Plan(batch_invariant=True, deterministic=True, arithmetic="fp64", copies=False)


@pytest.mark.parametrize("name", LACKING)
def test_a_requirement_turns_down_plans_that_lack_it(name: str) -> None:
    lacking, having = kernel("lacking", 1e-6, plan=LACKING[name]), kernel("having", 1.0, plan=HAVING)
    assert choose((lacking, having), REQUEST).name == "lacking"
    assert choose((lacking, having), REQUEST, require=(name,)).name == "having"
    with pytest.raises(KernelError, match=f"require {name}"):
        choose((lacking,), REQUEST, require=(name,))
    with pytest.raises(KernelError, match=f"'lacking' cannot run this toy with require.*require {name}"):
        choose((lacking, having), REQUEST, "lacking", (name,))


def test_vectorised_turns_down_the_portable_kernel() -> None:
    with cpu.limit_isa("portable"), pytest.raises(KernelError, match="require vectorised"):
        choose(norm.kernels(), norm.request((4, 64)), require=("vectorised",))
    assert set(REQUIREMENTS) == {*LACKING, "vectorised"}


def test_requirements_are_names_that_exist() -> None:
    with pytest.raises(ArgumentError, match="require: expected names among batch_invariant, .* got 'speedy'"):
        choose((FAST,), REQUEST, require=("speedy",))
    with pytest.raises(KernelError, match="require exact"):
        choose((kernel("bf16", plan=LACKING["exact"]),), REQUEST, require="exact")


def test_quantized_products_are_not_exact_unless_asked() -> None:
    weights = [("Q4_0", 64, 64)]
    with pytest.raises(KernelError, match="int8 arithmetic"):
        choose(linear.kernels(), linear.request(1, weights), require=("exact",))
    assert choose(linear.kernels(), linear.request(1, weights, precision="exact"), require=("exact",))


def test_choices_are_counted_from_every_thread() -> None:
    reset_choices()
    threads = [threading.Thread(target=lambda: [choose((FAST, SLOW), REQUEST) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    choose((FAST, SLOW), REQUEST, "slow")
    counted = choices()
    assert counted == {("toy", "fast"): 800, ("toy", "slow"): 1}
    reset_choices()
    assert choices() == {} and counted["toy", "fast"] == 800


def test_asking_counts_nothing_and_neither_does_a_failure() -> None:
    reset_choices()
    explain_request((FAST, SLOW), REQUEST, MACHINE)
    with pytest.raises(KernelError):
        choose((UNABLE,), REQUEST)
    assert choices() == {}


def test_a_missing_instruction_set_says_which_and_why() -> None:
    kernels = {found.name: found for found in per_isa(print)}
    with cpu.limit_isa("portable"):
        [reason] = kernels["cpu_avx2"].why_not(REQUEST)
        assert kernels["cpu_portable"].why_not(REQUEST) == []
    assert (reason.predicate, reason.required) == (INSTRUCTION_SET, "avx2") and "portable" in reason.observed
    assert kernels["cpu_avx2"].isa == "avx2"


def test_a_kernels_own_conditions_come_with_every_instruction_set() -> None:
    for found in per_isa(print, why_not=lambda request: [NO_FAST]):
        assert NO_FAST in found.why_not(REQUEST)


def test_calibrated_speeds_are_those_of_the_unit_the_plan_computes_in() -> None:
    default, measured = KernelSpeed(0.0, 1.0), KernelSpeed(1e-5, 0.5, 0.25, 1e-6, 1e-5, 1e-4)
    machine = Machine(MACHINE.roofs, measured=False, calibration={"toy/k/fp32": measured})
    seconds = predicted_seconds(REQUEST, machine, "k", default)
    assert seconds == pytest.approx(1e-3 / 0.25 + 1e-3 * 5e-4 / 0.5 + 1e-5)
    planned = predicted_seconds(REQUEST, machine, "k", default, Plan(tiles=3, segments=2, merges=1))
    assert planned == pytest.approx(seconds + 3e-6 + 2e-5 + 1e-4)
    other_unit = predicted_seconds(REQUEST, machine, "k", default, Plan(arithmetic="bf16"))
    assert other_unit == pytest.approx(default.seconds(1e-3, 500_000 / 4e9))


def test_calibration_decides_between_kernels() -> None:
    kernels = per_isa(print)
    speeds = {f"toy/{found.name}/fp32": KernelSpeed(1.0 + index, 1.0) for index, found in enumerate(reversed(kernels))}
    machine = Machine(MACHINE.roofs, measured=False, calibration=speeds)
    told = explain_request(kernels, REQUEST, machine)
    assert told.chosen and told.chosen.kernel == "cpu_portable"
    assert math.isclose(told.chosen.predicted_s, 1.001, rel_tol=0.01)
