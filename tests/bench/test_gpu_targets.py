"""Targets of `bench gpu`: what passes, what misses, what is our failure and what merely cannot be judged."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.bench.gpu_targets import FAILED, MISS, OPEN, PASS, Target, judged

ROOFS = {"copy": 4e12}


def row(**changes: Any) -> dict[str, Any]:
    seconds = {"triton_x": 1e-3, "gluon_x": 5e-4, "torch SDPA": 2e-3, "torch SDPA more": 1.5e-3}
    by = {name: {"median_s": each, "rms_error": each} for name, each in seconds.items()}
    found = {"num_bytes": 3_600_000_000, "flops": 500_000_000_000, "chosen": "triton_x", "by": by}
    return {**found, "failed": {}, "cannot": {}, **changes}


@pytest.mark.parametrize(
    "target,reached,kernel",
    [
        (Target("copy", 0.9), 0.9, "triton_x"),
        (Target("copy", 0.9, by="gluon"), 1.8, "gluon_x"),
        (Target("tflops", 400.0), 500.0, "triton_x"),
        (Target("tflops", 400.0, by="gluon_x"), 1000.0, "gluon_x"),
        (Target("times", 1.0, than="torch SDPA"), 1.5, "triton_x"),
        (Target("error", 1.0, than="torch SDPA"), 1 / 1.5, "triton_x"),
    ],
    ids=str,
)
def test_a_number_is_reached_by_a_kernel(target: Target, reached: float, kernel: str) -> None:
    found = judged("r", target, row(), ROOFS)
    assert (found.status, found.kernel) == (PASS, kernel) and found.reached == pytest.approx(reached)


@pytest.mark.parametrize(
    "target",
    [
        Target("copy", 0.91),
        Target("tflops", 501.0),
        Target("times", 1.6, than="torch SDPA"),
        Target("error", 0.5, than="torch SDPA"),
    ],
    ids=str,
)
def test_a_number_too_far_is_a_miss(target: Target) -> None:
    assert judged("r", target, row(), ROOFS).status == MISS


def test_less_is_more_of_seconds_and_regret() -> None:
    for kind, key, bound in (("seconds", "first_s", 0.1), ("regret", "regret", 1.05)):
        given = {key: bound, "chosen": "k"}
        assert judged("r", Target(kind, bound), given, ROOFS).status == PASS
        assert judged("r", Target(kind, bound), {**given, key: 1.1 * bound}, ROOFS).status == MISS


@pytest.mark.parametrize(
    "target,changes,status,why",
    [
        (Target("copy", 0.9), {"chosen": ""}, OPEN, "no kernel can run it"),
        (Target("copy", 0.9), {"by": {}, "failed": {"triton_x": "wrong"}}, FAILED, "triton_x: wrong"),
        (Target("copy", 0.9), {"by": {}, "failed": {"triton_x": "out of time"}}, OPEN, "out of time"),
        (Target("copy", 0.9), {"error": "CUDA error"}, FAILED, "CUDA error"),
        (Target("copy", 0.9), {"error": "out of time after x failed"}, OPEN, "out of time"),
        (Target("tflops", 1.0, by="gluon_y"), {"cannot": {"gluon_y": "needs sm_90"}}, OPEN, "gluon_y: needs sm_90"),
        (Target("tflops", 1.0, by="gluon_y"), {"failed": {"gluon_y": "no answer"}}, FAILED, "gluon_y: no answer"),
        (Target("tflops", 1.0, by="gluon_y"), {}, OPEN, "there is no gluon_y"),
        (Target("times", 1.0, than="flashinfer"), {"failed": {"flashinfer": "not installed"}}, OPEN, "not installed"),
        (Target("seconds", 0.1), {}, OPEN, "it was not measured"),
        (Target("seconds", 0.1), {"error": "it ended"}, FAILED, "it ended"),
    ],
)
def test_what_cannot_be_judged_says_why(target: Target, changes: dict[str, Any], status: str, why: str) -> None:
    found = judged("r", target, row(**changes), ROOFS)
    assert (found.status, found.reached) == (status, None) and why in found.why
    assert why in found.cells()[3] and found.data()["status"] == status


def test_without_a_copy_bandwidth_nothing_is_a_share_of_it() -> None:
    assert judged("r", Target("copy", 0.9), row(), {}).why == "the copy bandwidth was not measured"


def test_numbers_are_printed_in_their_units() -> None:
    texts = [
        (Target("copy", 0.9), 0.876, "87.6%"),
        (Target("tflops", 1.0), 432.1, "432 TFLOP/s"),
        (Target("seconds", 0.1), 0.0424, "42 ms"),
        (Target("times", 1.0), 1.234, "1.23"),
    ]
    assert [target.reached_text(number) for target, number, _ in texts] == [text for *_, text in texts]
