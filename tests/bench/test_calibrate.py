"""Calibration: a speed is found again from the times it predicts, disturbed or not, and what is unknown stays."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from headrace.bench import calibrate
from headrace.bench.calibrate import Sample, error_of, fit, measure
from headrace.bench.subjects import Subject
from headrace.machine import KernelSpeed, Machine
from headrace.ops.select import Kernel, Plan, Reason, Request, Traffic

DEFAULT = KernelSpeed(2e-6, 0.4)
MACHINE = Machine({"read": 1e10, "fp32": 1e11, "bf16": 1e11, "int8": 1e11}, measured=False, cores=2)


def samples_of(speed: KernelSpeed, counts: tuple[float, ...] = (0,)) -> list[Sample]:
    """Cases of all sizes, bound by either side, with the times that speed predicts."""
    sides = itertools.product((1e-7, 1e-5, 1e-3), (1e-7, 1e-5, 1e-3), counts)
    blank = [Sample(memory_s, compute_s, 1.0, tiles=count) for memory_s, compute_s, count in sides]
    return [replace(sample, seconds=sample.predicted(speed)) for sample in blank]


@pytest.mark.parametrize(
    "speed", [KernelSpeed(2e-5, 0.7, 0.9), KernelSpeed(5e-6, 0.05, 0.3), KernelSpeed(1e-4, 2.0, 1.4)]
)
def test_a_speed_is_found_again(speed: KernelSpeed) -> None:
    found = fit(samples_of(speed), DEFAULT)
    assert found.call_s == pytest.approx(speed.call_s, rel=0.1)
    assert found.arithmetic == pytest.approx(speed.arithmetic, rel=0.1)
    assert found.read == pytest.approx(speed.read, rel=0.1)


def test_a_disturbed_sample_changes_little() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9)
    samples = samples_of(speed)
    samples[-1] = replace(samples[-1], seconds=20 * samples[-1].seconds)
    assert fit(samples, DEFAULT).arithmetic == pytest.approx(speed.arithmetic, rel=0.15)


def test_tiles_have_a_price_where_plans_count_them() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9, tile_s=4e-6)
    found = fit(samples_of(speed, (0, 10, 1000)), DEFAULT)
    assert found.tile_s == pytest.approx(speed.tile_s, rel=0.15)
    assert fit(samples_of(replace(speed, tile_s=0.0)), DEFAULT).tile_s == 0.0


def test_what_no_sample_tells_stays_as_it_was() -> None:
    small = [Sample(1e-9, 1e-9, 3e-5), Sample(2e-9, 1e-9, 3.1e-5)]
    found = fit(small, DEFAULT)
    assert (found.arithmetic, found.read) == (DEFAULT.arithmetic, DEFAULT.read)
    assert found.call_s == pytest.approx(3e-5, rel=0.1)


def test_fitting_never_predicts_worse_than_the_default() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        memory_s, compute_s, seconds = 10.0 ** random.uniform(-7, -2, (3, 8))
        samples = [Sample(*map(float, numbers)) for numbers in zip(memory_s, compute_s, seconds, strict=True)]
        begin = replace(DEFAULT, call_s=min(sample.seconds for sample in samples))
        assert error_of(samples, fit(samples, DEFAULT)) <= error_of(samples, begin)


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
    assert found == {"toy/able/bf16": [Sample(1e-7, 2e-8, 1e-3, tiles=3)]} and ran == ["able"] * 3


def test_the_table_says_how_far_predictions_are_off() -> None:
    speed = KernelSpeed(2e-5, 0.7, 0.9)
    samples = {"toy/cpu_avx2/fp32": [replace(sample, seconds=2 * sample.seconds) for sample in samples_of(speed)]}
    [row] = calibrate.rows(samples, {"toy/cpu_avx2/fp32": speed})
    assert row == ["toy/cpu_avx2/fp32", "9", "20.0", "70%", "90%", "2.00 x"] and len(row) == len(calibrate.HEADS)
    fitted = calibrate.fitted(samples)
    assert calibrate.data(samples, fitted)["toy/cpu_avx2/fp32"]["cases"] == 9
