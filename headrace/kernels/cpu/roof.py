"""Measuring the roofs of this machine: read bandwidth by size, products by number type, each by number of threads.

A roof is the best of several passes: what else runs on the machine only ever makes a pass slower. Threads, memory and
page size are those the kernels use, so a kernel at 100 % has nothing left to gain from memory or arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from headrace.kernels.cpu import _native as native
from headrace.machine import Machine, cache_sized, keep_roofs, this_machine

Progress = Callable[[str, int, "int | None"], None]

# Names of the native probes for each number type, besides fp32, which can stand in for bf16.
_PROBES = {"fp32": ("fp32",), "bf16": ("bf16_amx", "bf16_avx512", "fp32"), "int8": ("int8_amx", "int8")}

_SAMPLE_S = 4e-3  # a sample shorter than this is mostly the start of the threads
_READ_BUDGET_S = 2.4
_MULTIPLY_BUDGET_S = 1.2
_QUICK_BUDGET_S = 0.1


def measure(progress: Progress | None = None) -> Machine:
    """The machine with all its roofs freshly measured and kept. Takes a few seconds and up to 1 GiB for a moment.

    `progress(message, done, total)` is called before each part.
    """
    cores = this_machine().cores
    counts = thread_counts(cores)
    report = progress or (lambda message, done, total: None)
    reads: dict[int, dict[int, float]] = {}
    products: dict[str, dict[int, float]] = {}
    for done, threads in enumerate(counts):
        report(f"measuring the machine with {threads} of {cores} threads", done, len(counts))
        pool = native.Pool(threads)
        reads[threads] = dict(_read_rates(pool, threads == cores, _READ_BUDGET_S / len(counts)))
        for unit, rate in _multiply_rates(pool, _MULTIPLY_BUDGET_S / len(counts)).items():
            products.setdefault(unit, {})[threads] = rate
    report("measured the machine", len(counts), len(counts))
    return keep_roofs(reads, products)


def measure_read(num_bytes: int, threads: int | None = None) -> float:
    """Read bandwidth in bytes/s for a working set of that size, measured in 0.1 s and kept; or an earlier, higher one.

    Sets far larger than the caches are measured on a smaller buffer, which memory serves just as slowly.
    """
    threads = threads or this_machine().cores
    buffer_bytes = max(4096, min(num_bytes, _memory_sized() // 2))
    pool = native.Pool(threads)
    rate = _read_rate(pool, _touched(pool, buffer_bytes), buffer_bytes, _QUICK_BUDGET_S)
    return keep_roofs({threads: {num_bytes: rate}}).reads[threads][num_bytes]


def plain_read(num_bytes: int, threads: int | None = None) -> Callable[[], float]:
    """What reads a buffer of that size once, with all threads, and returns the seconds it took."""
    pool = native.Pool(threads or this_machine().cores)
    memory, isa = _touched(pool, max(num_bytes, 4096)), native.best_isa()
    return lambda: native.read_seconds(pool, isa, memory, max(num_bytes, 4096), 1)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({1 << i for i in range(cores.bit_length()) if 1 << i < cores} | {cores})


def _memory_sized() -> int:
    """Bytes that no cache holds: 4 x the last level, 256 MiB to 1 GiB, at most an eighth of the memory."""
    machine = this_machine()
    wanted = max(256 << 20, min(4 * machine.last_cache_bytes, 1 << 30))
    with_memory = min(wanted, machine.memory_bytes // 8) if machine.memory_bytes else wanted
    return max(with_memory, 2 * cache_sized(machine.caches)) & ~4095


def _read_rates(pool: native.Pool, every_size: bool, budget_s: float) -> Iterator[tuple[int, float]]:
    """(size, bytes/s) for the cache and for memory; with `every_size` for sizes around and between, too."""
    ends = {cache_sized(this_machine().caches), _memory_sized()}
    between = {size for size in (4 << 20, 32 << 20, 64 << 20, 128 << 20) if size < max(ends)}
    sizes = sorted(ends | between if every_size else ends)
    memory = _touched(pool, max(sizes))
    for size in sizes:
        yield size, _read_rate(pool, memory, size, budget_s / len(sizes))


def _touched(pool: native.Pool, num_bytes: int) -> native.Tensor:
    memory = pool.buffer("uint8", "fixed", [num_bytes])
    native.touch_pages(pool, memory)
    return memory


def _read_rate(pool: native.Pool, memory: native.Tensor, num_bytes: int, budget_s: float) -> float:
    """The best of at least 3 passes."""
    isa = native.best_isa()
    first_s = native.read_seconds(pool, isa, memory, num_bytes, 1)
    passes = max(1, round(_SAMPLE_S / first_s))
    return num_bytes * passes / _best(lambda: native.read_seconds(pool, isa, memory, num_bytes, passes), budget_s)


def _best(sample: Callable[[], float], budget_s: float) -> float:
    """The shortest of the samples that fit into the budget, of 3 at least."""
    deadline = time.perf_counter() + budget_s
    shortest = min(sample() for _ in range(3))
    while time.perf_counter() < deadline:
        shortest = min(shortest, sample())
    return shortest


def _multiply_rates(pool: native.Pool, budget_s: float) -> dict[str, float]:
    """The best FLOP/s of each number type over the probes that run here."""
    probes = native.multiply_probes(native.best_isa())
    rates = {probe: _multiply_rate(pool, probe, budget_s / len(probes)) for probe in probes}
    return {unit: max(rates[name] for name in names if name in rates) for unit, names in _PROBES.items()}


def _multiply_rate(pool: native.Pool, probe: str, budget_s: float) -> float:
    isa, rounds = native.best_isa(), 1 << 10
    operations, seconds = native.multiply_seconds(pool, isa, probe, rounds)
    while seconds < _SAMPLE_S:
        rounds *= 2
        operations, seconds = native.multiply_seconds(pool, isa, probe, rounds)
    return operations / _best(lambda: native.multiply_seconds(pool, isa, probe, rounds)[1], budget_s)
