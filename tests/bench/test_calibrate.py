"""Calibration: a speed is found again from the times it predicts, disturbed or not, and what is unknown stays."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from headrace.bench import calibrate
from headrace.bench.calibrate import Sample, competing, error_of, fit, fitted, measure
from headrace.bench.subjects import Subject
from headrace.machine import KernelSpeed, Machine
from headrace.ops.select import Kernel, Plan, Reason, Request, Traffic

DEFAULT = KernelSpeed(2e-6, 0.4)
MACHINE = Machine({"read": 1e10, "fp32": 1e11, "bf16": 1e11, "int8": 1e11}, measured=False, cores=2)


def samples_of(speed: KernelSpeed, counts: tuple[float, ...] = (0,)) -> list[Sample]:
    """Cases of all sizes, bound by either side, with the times that speed predicts."""
    sides = itertools.product((1e-7, 1e-5, 1e-3), (1e-7, 1e-5, 1e-3), counts)
    blank = [Sample(str(sides), *sides[:2], 1.0, tiles=sides[2]) for sides in sides]
    return [replace(sample, seconds=sample.predicted(speed)) for sample in blank]


@pytest.mark.parametrize(
    "speed", [KernelSpeed(2e-5, 0.7, 0.9), KernelSpeed(5e-6, 0.05, 0.3), KernelSpeed(1e-4, 2.0, 1.4)]
)
def test_a_speed_is_found_again(speed: KernelSpeed) -> None:
    found = fitted({"toy/cpu_avx2/fp32": samples_of(speed)})["toy/cpu_avx2/fp32"]
    assert found.call_s == pytest.approx(speed.call_s, rel=0.1)
    assert found.arithmetic == pytest.approx(speed.arithmetic, rel=0.1)
    assert found.read == pytest.approx(speed.read, rel=0.1)


def test_a_disturbed_sample_changes_little() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9)
    samples = samples_of(speed)
    samples[-1] = replace(samples[-1], seconds=20 * samples[-1].seconds)
    assert fit(samples, replace(DEFAULT, call_s=2e-5)).arithmetic == pytest.approx(speed.arithmetic, rel=0.15)


def test_tiles_have_a_price_where_plans_count_them() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9, tile_s=4e-6)
    default = replace(DEFAULT, call_s=speed.call_s)
    assert fit(samples_of(speed, (0, 10, 1000)), default).tile_s == pytest.approx(speed.tile_s, rel=0.15)
    assert fit(samples_of(replace(speed, tile_s=0.0)), default).tile_s == 0.0


def test_what_no_sample_tells_stays_as_it_was() -> None:
    small = [Sample("a", 1e-9, 1e-9, 3e-5), Sample("b", 2e-9, 1e-9, 3.1e-5)]
    found = fit(small, replace(DEFAULT, call_s=3e-5))
    assert (found.arithmetic, found.read) == (DEFAULT.arithmetic, DEFAULT.read)


def renamed(samples: list[Sample], subject: str) -> list[Sample]:
    return [replace(sample, subject=subject) for sample in samples]


def test_a_call_costs_competing_kernels_the_same() -> None:
    quick, slow = samples_of(KernelSpeed(2e-5, 0.7)), samples_of(KernelSpeed(2e-5, 0.1))
    others = renamed(samples_of(KernelSpeed(9e-5, 0.1)), "elsewhere")
    found = fitted({"toy/cpu_avx2/fp32": quick, "toy/cpu_portable/fp32": slow, "toy/cpu_avx2/int8": others})
    assert found["toy/cpu_avx2/fp32"].call_s == found["toy/cpu_portable/fp32"].call_s == pytest.approx(2e-5, rel=0.1)
    assert found["toy/cpu_avx2/int8"].call_s == pytest.approx(9e-5, rel=0.1)


def test_those_compete_that_share_a_subject_with_one_that_does() -> None:
    one = samples_of(DEFAULT)[:1]
    a, b, c = (renamed(one, name) for name in "abc")
    groups = competing({"1": a, "2": b, "3": a + b, "4": c})
    assert [sorted(keys) for keys in groups] == [["1", "2", "3"], ["4"]]


def test_fitting_never_predicts_worse_than_the_default() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        memory_s, compute_s, seconds = 10.0 ** random.uniform(-7, -2, (3, 8))
        samples = [Sample("", *map(float, numbers)) for numbers in zip(memory_s, compute_s, seconds, strict=True)]
        assert error_of(samples, fit(samples, DEFAULT)) <= error_of(samples, DEFAULT)


def test_every_kernel_is_measured_on_what_it_can_run_in_the_unit_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "call_seconds", lambda call: call() or 1e-3)
    ran: list[str] = []
    request = Request("toy", {}, {}, Traffic(1000, 2000))
    no, plan = Reason("a", "b", "c"), Plan(arithmetic="bf16", tiles=3)
    kernels = (
        Kernel("able", lambda request: [], lambda *_: 1e-6, print, lambda *_: plan),
        Kernel("slow", lambda request: [], lambda *_: 1.0, print),
        Kernel("unable", lambda request: [no], lambda *_: 1e-6, print),
    )
    found = measure([Subject("toy/one", request, kernels, ran.append)], MACHINE, 3)
    assert found == {"toy/able/bf16": [Sample("toy/one", 1e-7, 2e-8, 1e-3, tiles=3)]} and ran == ["able"] * 3


def test_the_table_says_how_far_predictions_are_off() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9)
    samples = {"toy/cpu_avx2/fp32": [replace(sample, seconds=2 * sample.seconds) for sample in samples_of(speed)]}
    [row] = calibrate.rows(samples, {"toy/cpu_avx2/fp32": speed})
    assert row == ["toy/cpu_avx2/fp32", "9", "20.0", "70%", "90%", "2.00 x"] and len(row) == len(calibrate.HEADS)
    assert calibrate.data(samples, fitted(samples))["toy/cpu_avx2/fp32"]["cases"] == 9
