"""The probes behind the roofs: on every instruction set they do the work they count, and refuse what they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import machine
from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu import roof

LEVELS = cpu.ISAS[: cpu.ISAS.index(cpu.best_isa()) + 1]
PROBES = [(level, probe) for level in LEVELS for probe in native.multiply_probes(level)]
MOST_PER_CYCLE = {"fp32": 64, "int8": 256, "bf16_avx512": 128, "bf16_amx": 1024, "int8_amx": 2048}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()
    yield
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()


@pytest.mark.parametrize(("level", "probe"), PROBES)
def test_operations_are_counted_per_round_and_thread(level: str, probe: str) -> None:
    one, two = native.Pool(1), native.Pool(2)
    operations, seconds = native.multiply_seconds(one, level, probe, 8)
    assert operations > 0 and seconds > 0
    assert native.multiply_seconds(one, level, probe, 24)[0] == 3 * operations
    assert native.multiply_seconds(two, level, probe, 8)[0] == 2 * operations


@pytest.mark.parametrize(("level", "probe"), PROBES)
def test_no_product_is_left_out(level: str, probe: str) -> None:
    """A loop the compiler emptied would be faster than two units of any CPU at 6 GHz."""
    operations, seconds = native.multiply_seconds(native.Pool(1), level, probe, 1 << 14)
    assert operations / seconds < 6e9 * MOST_PER_CYCLE[probe]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("num_bytes", [1, 255, 256, 4096, 12345, 1 << 20])
def test_any_size_can_be_read(level: str, num_bytes: int) -> None:
    for threads in (1, 2, 3):
        pool = native.Pool(threads)
        memory = pool.buffer("uint8", "fixed", [1 << 20])
        native.touch_pages(pool, memory)
        assert native.read_seconds(pool, level, memory, num_bytes, 2) > 0


def test_more_passes_take_longer() -> None:
    pool = native.Pool(1)
    memory = pool.buffer("uint8", "fixed", [1 << 20])
    native.touch_pages(pool, memory)
    seconds = [
        min(native.read_seconds(pool, cpu.best_isa(), memory, 1 << 20, passes) for _ in range(5)) for passes in (1, 50)
    ]
    assert seconds[1] > 5 * seconds[0]


def test_what_cannot_be_measured_is_refused() -> None:
    pool = native.Pool(1)
    memory = pool.buffer("uint8", "fixed", [4096])
    for num_bytes, passes in ((0, 1), (4097, 1), (-1, 1), (4096, 0)):
        with pytest.raises(ArgumentError, match="expected"):
            native.read_seconds(pool, "portable", memory, num_bytes, passes)
    with pytest.raises(ArgumentError, match="rounds"):
        native.multiply_seconds(pool, "portable", "fp32", 0)
    with pytest.raises(ArgumentError, match="probe"):
        native.multiply_seconds(pool, "portable", "bf16_amx", 1)


def test_a_size_measured_by_itself_is_kept() -> None:
    rate = roof.measure_read(1 << 20, threads=1)
    assert rate > 0
    assert machine.this_machine().reads[1] == {1 << 20: rate}
    assert not machine.this_machine().measured


def test_the_whole_measurement_gives_every_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "_READ_BUDGET_S", 0.01)
    monkeypatch.setattr(roof, "_MULTIPLY_BUDGET_S", 0.01)
    told: list[tuple[int, int]] = []
    found = roof.measure(lambda message, done, total: told.append((done, total)))
    counts = roof.thread_counts(found.cores)
    assert found.measured and found == machine.this_machine()
    assert sorted(found.reads) == counts and all(sorted(rates) == counts for rates in found.products.values())
    assert set(found.roofs) == set(machine.UNMEASURED)
    assert found.products["bf16"][1] >= found.products["fp32"][1]
    assert told == [(done, len(counts)) for done in range(len(counts) + 1)]


def test_thread_counts_double_and_end_with_all() -> None:
    assert [roof.thread_counts(cores) for cores in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]
