"""The machine: what is read from the system, and what becomes of roofs on disk and in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import machine
from headrace.machine import KernelSpeed, Machine, keep_calibration, keep_roofs, this_machine

CORES = machine.usable_cores()
CACHE_BYTES = machine.cache_sized(this_machine().caches)
MEMORY_BYTES = 64 * CACHE_BYTES
READS = {CORES: {CACHE_BYTES: 90e9, MEMORY_BYTES: 30e9}}
PRODUCTS = {unit: {CORES: rate} for unit, rate in (("fp32", 1e11), ("bf16", 2e11), ("int8", 4e11))}


def _forget() -> None:
    for known in (machine._kept_roofs, machine._kept_calibration, this_machine):
        known.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    _forget()
    yield tmp_path / "cache"
    _forget()


def test_unmeasured_machine_has_guesses_and_no_roof() -> None:
    found = this_machine()
    assert not found.measured
    assert found.roof_for(1 << 30) is None and found.product_roof("fp32") is None
    assert found.seconds(24 * 10**9, 0, "fp32")[0] > 0


def test_roofs_survive_the_process(cache: Path) -> None:
    kept = keep_roofs(READS, PRODUCTS)
    _forget()
    found = this_machine()
    assert found == kept and found.measured
    assert found.roofs == {"read": 30e9, "cache_read": 90e9, "fp32": 1e11, "bf16": 2e11, "int8": 4e11}
    assert [path.name for path in cache.iterdir()] == [machine._roofs_path().name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 99, "reads": {}, "products": {}}',
        '{"version": 1, "reads": 3}',
    ],
)
def test_a_file_that_is_not_ours_counts_as_none(cache: Path, text: str) -> None:
    cache.mkdir()
    machine._roofs_path().write_text(text)
    assert not this_machine().measured
    keep_roofs(READS, PRODUCTS)
    _forget()
    assert this_machine().measured


@pytest.mark.parametrize("rate", ["-1.0", "0", "NaN", "Infinity", '"fast"', "null"])
def test_a_rate_that_is_no_speed_is_not_believed(cache: Path, rate: str) -> None:
    keep_roofs(READS, PRODUCTS)
    path = machine._roofs_path()
    path.write_text(path.read_text().replace("30000000000.0", rate))
    json.loads(path.read_text())
    _forget()
    assert not this_machine().measured and this_machine().roof_for(MEMORY_BYTES) is None


def test_a_whole_measurement_without_the_cache_size_is_not_believed() -> None:
    keep_roofs({CORES: {MEMORY_BYTES: 30e9}}, {})
    text = machine._roofs_path().read_text()
    machine._roofs_path().write_text(text.replace('"products": {}', '"products": {"fp32": {"1": 1.0}}'))
    _forget()
    assert not this_machine().measured


def test_an_unwritable_cache_still_keeps_roofs_in_this_process(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert keep_roofs(READS, PRODUCTS).measured
    assert this_machine().measured
    _forget()
    assert not this_machine().measured


def test_one_point_serves_its_own_size_only() -> None:
    found = keep_roofs({CORES: {100 << 20: 40e9}})
    assert not found.measured
    assert found.roof_for(100 << 20) == found.roof_for(105 << 20) == 40e9
    assert found.roof_for(200 << 20) is None and found.roof_for(50 << 20) is None


def test_between_points_the_roof_is_between_and_falls_with_size() -> None:
    found = keep_roofs(READS, PRODUCTS)
    sizes = [CACHE_BYTES // 8, CACHE_BYTES, 2 * CACHE_BYTES, 8 * CACHE_BYTES, 32 * CACHE_BYTES, MEMORY_BYTES, 1 << 40]
    roofs = [found.roof_for(size) or math.nan for size in sizes]
    assert roofs == sorted(roofs, reverse=True)
    assert roofs[0] == 90e9 and roofs[-1] == 30e9
    assert roofs[3] == pytest.approx(math.sqrt(90e9 * 30e9))  # half way in log size


def test_of_two_measurements_of_a_size_the_higher_is_the_roof() -> None:
    for rate in (40e9, 50e9, 30e9):
        keep_roofs({CORES: {100 << 20: rate}})
    assert this_machine().roof_for(100 << 20) == 50e9


def test_a_new_measurement_replaces_the_points_of_the_old() -> None:
    keep_roofs({CORES: {3 * CACHE_BYTES: 1e9}})
    assert keep_roofs(READS, PRODUCTS).reads == READS


def test_threads_not_measured_take_the_next_lower_count() -> None:
    found = Machine({}, True, cores=8, reads={1: {10: 1.0}, 4: {10: 4.0}, 8: {10: 8.0}}, products={"fp32": {2: 2.0}})
    assert [found.roof_for(10, threads) for threads in (1, 3, 4, 7, 8, 99)] == [1.0, 1.0, 4.0, 4.0, 8.0, 8.0]
    assert found.roof_for(10) == 8.0
    assert found.product_roof("fp32", 1) == 2.0
    assert found.read_roof_at(10, 4) == 4.0 and found.read_roof_at(10, 3) is None


def test_flags_give_the_level_the_native_side_finds() -> None:
    from headrace.kernels.cpu import _native

    found = this_machine()
    native_flags = {flag.replace("avx512_vbmi", "avx512vbmi") for flag in _native.cpu_flags()}
    assert native_flags & set(machine.FLAGS) <= set(found.flags)
    assert found.isa == _native.best_isa() or (found.isa == "amx" and _native.best_isa() == "avx512_bf16")


def test_the_machine_describes_itself() -> None:
    found = this_machine()
    assert found.cores >= 1 and found.cpu_name.strip()
    assert all(cache.num_bytes > 0 and cache.shared_by >= 1 for cache in found.caches)
    assert found.last_cache_bytes == max((cache.num_bytes for cache in found.caches), default=0)
    assert machine._num_listed("0-3,8,10-11") == 7


SPEEDS = {"linear/cpu_avx2/int8": KernelSpeed(3e-6, 0.4), "norm/k/fp32": KernelSpeed(1e-6, 0.1, 1.5, 1e-9, 1e-7, 1e-6)}


def test_calibration_survives_the_process_and_replaces_the_last(cache: Path) -> None:
    assert this_machine().calibration == {}
    keep_calibration({"gone/k/fp32": KernelSpeed(1.0, 1.0)})
    assert keep_calibration(SPEEDS).calibration == SPEEDS
    keep_roofs(READS, PRODUCTS)
    _forget()
    found = this_machine()
    assert found.calibration == SPEEDS and found.measured
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["calibration", "machine"]


@pytest.mark.parametrize("value", ["-1.0", "0.0", "NaN", "Infinity", '"fast"', "null"])
def test_a_calibration_that_cannot_be_is_not_believed(value: str) -> None:
    keep_calibration({"linear/cpu_avx2/int8": KernelSpeed(3e-6, 0.40625)})
    path = machine._calibration_path()
    path.write_text(path.read_text().replace("0.40625", value))
    _forget()
    assert this_machine().calibration == {}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 99, "speeds": {}}', '{"version": 1, "speeds": {"a": {"b": 1}}}']
)
def test_a_calibration_file_that_is_not_ours_counts_as_none(cache: Path, text: str) -> None:
    cache.mkdir()
    machine._calibration_path().write_text(text)
    assert this_machine().calibration == {}
    keep_calibration(SPEEDS)
    _forget()
    assert this_machine().calibration == SPEEDS


def test_bytes_are_served_at_the_roof_of_their_size() -> None:
    guessed = this_machine()
    assert guessed.seconds(CACHE_BYTES, 0, "fp32")[0] == CACHE_BYTES / guessed.roofs["read"]
    found = keep_roofs(READS, PRODUCTS)
    for size, rate in READS[CORES].items():
        assert found.seconds(size, 0, "fp32")[0] == pytest.approx(size / rate, rel=0.05)
        assert found.seconds(size, 0, "fp32") == found.seconds(size, 0, "fp32")
    assert found.seconds(0, 0, "fp32") == (0.0, 0.0)


def test_double_precision_has_half_the_lanes() -> None:
    found = keep_roofs(READS, PRODUCTS)
    assert found.seconds(0, 100, "fp64")[1] == 2 * found.seconds(0, 100, "fp32")[1]
    assert found.product_roof("fp64") == 0.5 * PRODUCTS["fp32"][CORES]


def test_a_speed_is_the_longer_side_and_the_call() -> None:
    speed = KernelSpeed(1.0, arithmetic=0.5, read=0.25)
    assert speed.seconds(8.0, 4.0) == pytest.approx(1.0 + 32.0 + 0.008)
    assert speed.seconds(1.0, 4.0) == pytest.approx(1.0 + 8.0 + 0.008)
