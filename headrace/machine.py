"""What this machine is: instruction sets, cores, caches, and the roofs that were measured on it.

The roofs (read bandwidth, matrix throughput) are measured by `headrace.kernels.cpu.roof` and kept on disk, one small
file per kind of machine; `this_machine` reads them and never measures. Until then the kernel choice works with the
modest figures of `UNMEASURED`, which rank kernels well enough and are never printed as a roof.

Read bandwidth depends on the size of what is read over and over: a model of 97 MB may live at the edge of a cache. So
it is kept as points, size by size, and `Machine.roof_for` answers for a size.

What each kernel makes of the roofs is measured by `headrace bench ops --calibrate` and kept beside them, with a version
of its own (`Machine.calibration`); a kernel that was not measured goes by its defaults.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.errors import ArgumentError

PROBES_VERSION = 1  # of what is measured and how: roofs measured by another version are not used

CALIBRATION_VERSION = 1  # of what KernelSpeed means and how it is fitted

# Per thread, of a small modern core: bytes/s and FLOP/s.
UNMEASURED = {"read": 12e9, "cache_read": 24e9, "fp32": 60e9, "bf16": 60e9, "int8": 250e9}
DOUBLE_SHARE = 0.5  # of the fp32 roof that fp64 arithmetic has: half as many lanes

# Two working sets this close in size have one roof.
SAME_SIZE = 0.1

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni")

# What each level of kernels needs, highest first; isa.cpp decides, this describes.
_ISA_FLAGS = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
}
FLAGS = ("avx_vnni", "avx512_fp16", "amx_fp16", *sorted({flag for flags in _ISA_FLAGS.values() for flag in flags}))


@dataclass(frozen=True)
class Cache:
    """One level of cache, as core 0 sees it; `shared_by` cores have it in common."""

    level: int
    kind: str  # data, instruction or unified
    num_bytes: int
    shared_by: int


@dataclass(frozen=True)
class KernelSpeed:
    """What one kernel makes of the roofs: a call takes call_s and the longer of its bytes and its arithmetic at these
    shares of the roofs, and so much for each tile, segment and merge of its busiest worker."""

    call_s: float
    arithmetic: float  # share of the roof of the unit it computes in
    read: float = 1.0  # share of the read roof; above 1 where a cache serves what the roof counts as memory
    tile_s: float = 0.0
    segment_s: float = 0.0
    merge_s: float = 0.0

    def seconds(self, memory_s: float, compute_s: float) -> float:
        """A call's time, without its tiles. A little of the arithmetic always counts: it tells equals apart."""
        arithmetic_s = compute_s / self.arithmetic
        return max(memory_s / self.read, arithmetic_s) + arithmetic_s * 1e-3 + self.call_s


@dataclass(frozen=True)
class Machine:
    """What is known of this machine. `roofs` are with all its usable cores, in bytes/s and FLOP/s."""

    roofs: Mapping[str, float]  # read (memory), cache_read, fp32, bf16, int8
    measured: bool  # whether `roofs` are its own, or the guesses of UNMEASURED
    cpu_name: str = "unknown CPU"
    flags: tuple[str, ...] = ()  # those among FLAGS
    cores: int = 1  # that this process may use
    caches: tuple[Cache, ...] = ()
    memory_bytes: int = 0
    huge_pages: str = "unknown"  # always, madvise, never or unknown
    reads: Mapping[int, Mapping[int, float]] = field(
        default_factory=dict
    )  # threads -> bytes read over and over -> bytes/s
    products: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # unit -> threads -> FLOP/s
    calibration: Mapping[str, KernelSpeed] = field(default_factory=dict)  # "op/kernel/unit" -> its speed

    @property
    def isa(self) -> str:
        """The highest level of kernels the CPU has, by its flags; the system may still withhold AMX."""
        for isa, needed in _ISA_FLAGS.items():
            if set(needed) <= set(self.flags):
                return isa
        return "portable"

    @property
    def last_cache_bytes(self) -> int:
        """Size of the largest cache; 0 when the system does not tell."""
        return max((cache.num_bytes for cache in self.caches), default=0)

    def seconds(self, num_bytes: int, flops: int, unit: str) -> tuple[float, float]:
        """The least time for the bytes and for the arithmetic; the larger binds."""
        return num_bytes / self._read_rate(num_bytes), flops / self._arithmetic_roof(unit)

    def _read_rate(self, num_bytes: int) -> float:
        """The read roof for a size, remembered for sizes within 3 % of each other: each call of an op asks for it."""
        if not self.measured:
            return self.roofs["read"]
        mantissa, exponent = math.frexp(num_bytes)
        steps = int(mantissa * 32)
        rate = self._read_rates.get((steps, exponent))
        if rate is None:
            rate = self.roof_for(max(1, int(math.ldexp(steps / 32, exponent)))) or self.roofs["read"]
            self._read_rates[steps, exponent] = rate
        return rate

    @functools.cached_property
    def _read_rates(self) -> dict[tuple[int, int], float]:
        return {}

    def _arithmetic_roof(self, unit: str) -> float:
        return self.roofs["fp32"] * DOUBLE_SHARE if unit == "fp64" else self.roofs[unit]

    def read_roof_at(self, num_bytes: int, threads: int | None = None) -> float | None:
        """Read bandwidth in bytes/s, measured for about this size and this many threads; None if it was not."""
        points = self.reads.get(threads or self.cores, {})
        close = [size for size in points if abs(size - num_bytes) <= SAME_SIZE * num_bytes]
        return points[min(close, key=lambda size: abs(size - num_bytes))] if close else None

    def roof_for(self, num_bytes: int, threads: int | None = None) -> float | None:
        """Read bandwidth in bytes/s for a working set of that size; None on a machine that was never measured.

        A point measured at about this size is taken as it is; between two points the roof is interpolated over the
        logarithm of the size, beyond the outermost it is theirs.
        """
        at_size = self.read_roof_at(num_bytes, threads)
        if at_size is not None or not self.measured:
            return at_size
        return _interpolated(self.reads[_closest(self.reads, threads or self.cores)], num_bytes)

    def product_roof(self, unit: str, threads: int | None = None) -> float | None:
        """FLOP/s of fp64, fp32, bf16 or int8 products; None when it was never measured."""
        if unit == "fp64":
            single = self.product_roof("fp32", threads)
            return single and single * DOUBLE_SHARE
        points = self.products.get(unit, {})
        return points.get(_closest(points, threads or self.cores)) if self.measured else None


def _closest(measured: Mapping[int, Any], threads: int) -> int:
    """The largest measured number of threads that is not more than these, or the smallest measured at all."""
    fewer = [count for count in measured if count <= threads]
    return max(fewer, default=min(measured, default=0))


def _interpolated(points: Mapping[int, float], num_bytes: int) -> float:
    sizes = sorted(points)
    above = bisect_left(sizes, num_bytes)
    if above in (0, len(sizes)):
        return points[sizes[min(above, len(sizes) - 1)]]
    low, high = sizes[above - 1], sizes[above]
    share = math.log(num_bytes / low) / math.log(high / low)
    return points[low] * (points[high] / points[low]) ** share


@functools.cache
def this_machine() -> Machine:
    """The machine with its kept roofs, without measuring anything."""
    described = _describe()
    kept = _kept_roofs()
    reads, products, speeds = kept["reads"], kept["products"], dict(_kept_calibration())
    cores = described["cores"]
    points = reads.get(cores, {})
    if not (points and all(cores in products.get(unit, {}) for unit in ("fp32", "bf16", "int8"))):
        guesses = {name: rate * cores for name, rate in UNMEASURED.items()}
        return Machine(guesses, measured=False, reads=reads, calibration=speeds, **described)
    roofs = {unit: by_threads[cores] for unit, by_threads in products.items()}
    roofs |= {"read": points[max(points)], "cache_read": points[cache_sized(described["caches"])]}
    return Machine(roofs, measured=True, reads=reads, products=products, calibration=speeds, **described)


def cache_sized(caches: tuple[Cache, ...]) -> int:
    """Bytes that stay in the last-level cache: half of it and at most 64 MiB, for others may use it, too."""
    largest = max((cache.num_bytes for cache in caches), default=8 << 20)
    return max(1 << 20, min(largest // 2, 64 << 20))


def keep_roofs(
    reads: Mapping[int, Mapping[int, float]], products: Mapping[str, Mapping[int, float]] | None = None
) -> Machine:
    """The machine with these roofs added, from now on and, where the cache can be written, in later processes.

    Points of `reads` join those already kept, the higher of two for one size: others on the machine only ever make a
    measurement slower. `products`, when given, means a whole new measurement and replaces all.
    """
    kept = _kept_roofs()
    if products is not None:
        kept["reads"], kept["products"] = {}, {unit: dict(rates) for unit, rates in products.items()}
    for threads, points in reads.items():
        known = kept["reads"].setdefault(threads, {})
        known.update({size: max(rate, known.get(size, 0.0)) for size, rate in points.items()})
    with suppress(OSError):  # a read-only cache is no reason to fail
        write_whole(_roofs_path(), json.dumps({"version": PROBES_VERSION, **kept}))
    this_machine.cache_clear()
    return this_machine()


@functools.cache
def _kept_roofs() -> dict[str, dict[Any, dict[int, float]]]:
    """What is on disk, read once; `keep_roofs` changes it. A file that is not what we write counts as none."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(_roofs_path().read_text())
        if found["version"] == PROBES_VERSION:
            reads = {int(threads): _rates(points) for threads, points in found["reads"].items()}
            products = {str(unit): _rates(points) for unit, points in found["products"].items()}
            if not products or cache_sized(_caches()) in reads.get(usable_cores(), {}):
                return {"reads": reads, "products": products}
    return {"reads": {}, "products": {}}


def _rates(points: Mapping[str, Any]) -> dict[int, float]:
    rates = {int(key): float(rate) for key, rate in points.items()}
    if not all(key > 0 and math.isfinite(rate) and rate > 0 for key, rate in rates.items()):
        raise ValueError("a rate must be a positive number")
    return rates


def keep_calibration(speeds: Mapping[str, KernelSpeed]) -> Machine:
    """The machine with these kernels' speeds in place of all earlier ones, in later processes too where the cache can
    be written. Keys: "op/kernel/unit"."""
    with suppress(OSError):
        found = {key: asdict(speed) for key, speed in speeds.items()}
        write_whole(_calibration_path(), json.dumps({"version": CALIBRATION_VERSION, "speeds": found}))
    _kept_calibration().clear()
    _kept_calibration().update(speeds)
    this_machine.cache_clear()
    return this_machine()


@functools.cache
def _kept_calibration() -> dict[str, KernelSpeed]:
    """What is on disk, read once; `keep_calibration` changes it. A file that is not what we write counts as none."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(_calibration_path().read_text())
        if found["version"] == CALIBRATION_VERSION:
            return {str(key): kernel_speed(fields) for key, fields in found["speeds"].items()}
    return {}


def kernel_speed(fields: Mapping[str, float]) -> KernelSpeed:
    """The speed with these numbers out of a file; ValueError where they can be none."""
    speed = KernelSpeed(**{name: float(value) for name, value in fields.items()})
    values = asdict(speed)
    if not (all(math.isfinite(v) and v >= 0 for v in values.values()) and speed.arithmetic > 0 and speed.read > 0):
        raise ValueError("a speed must be made of numbers >= 0, its shares of numbers > 0")
    return speed


def _calibration_path() -> Path:
    return _roofs_path().with_name(_roofs_path().name.replace("machine-", "calibration-"))


def _roofs_path() -> Path:
    described = _describe()
    identity = [described["cpu_name"], described["flags"], described["cores"], cache_sized(described["caches"])]
    key = hashlib.sha256(repr([PROBES_VERSION, *identity]).encode()).hexdigest()[:16]
    return cache_dir() / f"machine-{key}.json"


def write_whole(path: Path, text: str) -> None:
    """Writes a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Where headrace keeps files: $HEADRACE_CACHE, or headrace in $XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("HEADRACE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by the control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota_cores()))


def limit_cores(count: int) -> Machine:
    """The machine with only the first `count` of the cores this process may use, and no more for it from now on.

    Threads that already run stay where they are: to be called first. Raises ArgumentError for more than there are.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if not 1 <= count <= min(len(cores), usable_cores()):
        raise ArgumentError(f"threads: expected 1 to {usable_cores()}, the cores of this process, got {count}")
    os.sched_setaffinity(0, cores[:count])
    for known in (_describe, _kept_roofs, _kept_calibration, this_machine):
        known.cache_clear()
    return this_machine()


def _quota_cores() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 1 << 20 if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return 1 << 20


@functools.cache
def _describe() -> dict[str, Any]:
    """The fields of Machine that nobody has to measure."""
    cpu = _first_processor()
    name = " ".join(cpu.get("model name", platform.processor() or platform.machine() or "unknown CPU").split())
    numbers = [f"{key} {cpu[key]}" for key in ("cpu family", "model", "stepping") if key in cpu]
    has = {flag.replace("avx512_vbmi", "avx512vbmi") for flag in cpu.get("flags", "").split()}
    return {
        "cpu_name": f"{name} ({', '.join(numbers)})" if numbers else name,
        "flags": tuple(flag for flag in FLAGS if flag in has),
        "cores": usable_cores(),
        "caches": _caches(),
        "memory_bytes": _memory_bytes(),
        "huge_pages": _huge_pages(),
    }


def _first_processor() -> dict[str, str]:
    """The first block of /proc/cpuinfo; empty where there is none."""
    found: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, colon, value = line.partition(":")
            if not colon:
                break
            found[key.strip()] = value.strip()
    return found


@functools.cache
def _caches() -> tuple[Cache, ...]:
    """The caches of core 0, smallest level first."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            kind, size, cores, level = (
                (folder / name).read_text().strip() for name in ("type", "size", "shared_cpu_list", "level")
            )
            found.append(Cache(int(level), kind.lower(), int(size.removesuffix("K")) << 10, _num_listed(cores)))
    return tuple(found)


def _num_listed(cores: str) -> int:
    """How many numbers a list such as 0-3,8 names."""
    ranges = [part.split("-") for part in cores.split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _memory_bytes() -> int:
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _huge_pages() -> str:
    with suppress(OSError, IndexError):
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    return "unknown"
