"""What a GPU is to the choice of a kernel: its roofs, from its data sheet until they are measured, and kernels' speeds.

`headrace bench gpu` measures a GPU and keeps what it found, one small file per product (`keep_gpu`); `gpu_of` reads it
and never measures. Nothing here needs a GPU: a request for "sm_90" is priced as on the product that stands for that
generation, so that `explain` tells on any machine what would be chosen on another.

Guesses: of the arithmetic of a data sheet (dense, float32 sums) 0.8, of its bandwidth 0.9 can be had; an H200 has
790 of 989 TFLOP/s in bfloat16 and copies at 4.3 of 4.8 TB/s.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.machine import KernelSpeed, cache_dir, kernel_speed, write_whole

GPU_VERSION = 1  # of what is kept and how: files of another version count as none
LAUNCH_SECONDS = 4e-6  # from the end of one small kernel to that of the next

UNITS = ("bf16", "fp16", "tf32", "fp32", "fp64", "fp8", "int8")
# Arithmetic made of several products in a narrower type: how many.
# int16: with codes of 8 bits, two products in an instruction of which half as many are issued as of float32's.
_SPLIT = {"tf32x3": ("tf32", 3), "bf16x3": ("bf16", 3), "int16": ("fp32", 1)}
_BANDWIDTH_SHARE, _ARITHMETIC_SHARE = 0.9, 0.8


@dataclass(frozen=True)
class Gpu:
    """What is known of one kind of GPU. `roofs`: "copy" in bytes/s, read and written together; UNITS in FLOP/s."""

    name: str
    arch: str  # "sm_90", "gfx942"
    roofs: Mapping[str, float]
    multiprocessors: int
    launch_s: float = LAUNCH_SECONDS
    memory_bytes: int = 0
    measured: bool = False  # whether its roofs were measured
    calibration: Mapping[str, KernelSpeed] = field(default_factory=dict)  # "op/kernel/unit" -> its speed

    @property
    def cores(self) -> int:
        """What work is shared out to."""
        return self.multiprocessors

    def seconds(self, num_bytes: int, flops: int, unit: str) -> tuple[float, float]:
        """The least time for the bytes and for the arithmetic; the larger binds."""
        return num_bytes / self.roofs["copy"], flops / self.arithmetic_roof(unit)

    def arithmetic_roof(self, unit: str) -> float:
        """FLOP/s of products in that type, or made of several in a narrower one."""
        narrow, times = _SPLIT.get(unit, (unit, 1))
        return self.roofs[narrow] / times


# Data sheets: generation, multiprocessors, bytes of memory, bytes/s, TFLOP/s in the order of UNITS (0: what the product
# does not have, which is then done in bfloat16). The first of a generation stands for it.
_SHEETS: Mapping[str, tuple[str, int, float, float, tuple[float, ...]]] = {
    "NVIDIA H200": ("sm_90", 132, 141e9, 4.8e12, (989, 989, 495, 67, 34, 1979, 1979)),
    "NVIDIA H100 80GB HBM3": ("sm_90", 132, 80e9, 3.35e12, (989, 989, 495, 67, 34, 1979, 1979)),
    "NVIDIA H100 PCIe": ("sm_90", 114, 80e9, 2.0e12, (756, 756, 378, 51, 26, 1513, 1513)),
    "NVIDIA H20": ("sm_90", 78, 96e9, 4.0e12, (148, 148, 74, 44, 1, 296, 296)),
    "NVIDIA GH200 480GB": ("sm_90", 132, 96e9, 4.0e12, (989, 989, 495, 67, 34, 1979, 1979)),
    "NVIDIA A100-SXM4-80GB": ("sm_80", 108, 80e9, 2.04e12, (312, 312, 156, 19.5, 9.7, 0, 624)),
    "NVIDIA A100-SXM4-40GB": ("sm_80", 108, 40e9, 1.56e12, (312, 312, 156, 19.5, 9.7, 0, 624)),
    "NVIDIA A10": ("sm_86", 72, 24e9, 0.6e12, (125, 125, 62, 31, 0.5, 0, 250)),
    "NVIDIA GeForce RTX 3090": ("sm_86", 82, 24e9, 0.936e12, (71, 71, 35.6, 35.6, 0.6, 0, 284)),
    "NVIDIA L40S": ("sm_89", 142, 48e9, 0.864e12, (362, 362, 183, 91.6, 1.4, 733, 733)),
    "NVIDIA L4": ("sm_89", 58, 24e9, 0.3e12, (121, 121, 60, 30, 0.5, 242, 242)),
    "NVIDIA GeForce RTX 4090": ("sm_89", 128, 24e9, 1.008e12, (165, 165, 82.6, 82.6, 1.3, 330, 660)),
    "NVIDIA B200": ("sm_100", 148, 180e9, 7.7e12, (2250, 2250, 1125, 75, 37, 4500, 4500)),
    "NVIDIA GeForce RTX 5090": ("sm_120", 170, 32e9, 1.79e12, (209, 209, 105, 105, 1.6, 419, 838)),
    "AMD Instinct MI300X": ("gfx942", 304, 192e9, 5.3e12, (1307, 1307, 653, 163, 81, 2615, 2615)),
    "AMD Instinct MI250X": ("gfx90a", 110, 64e9, 1.6e12, (191, 191, 48, 48, 24, 0, 191)),
    "AMD Instinct MI355X": ("gfx950", 256, 288e9, 8.0e12, (2500, 2500, 157, 157, 78, 5000, 5000)),
}
# Whose figures are taken where neither product nor generation is known.
_MODEST = "NVIDIA A100-SXM4-80GB"
USUAL_ARCH = {"cuda": "sm_90", "hip": "gfx942"}


def gpu_of(arch: str) -> Gpu:
    """The GPU of that generation which this process uses, or else the product that stands for it."""
    return _gpu_of(arch, _in_use())


def arch_in_use(device: str) -> str:
    """The generation of the GPU that this process uses; where it uses none, what is usual for "cuda" or "hip"."""
    return (_in_use() and _properties()[1]) or USUAL_ARCH.get(device, "")


@functools.cache
def _gpu_of(arch: str, in_use: bool) -> Gpu:
    name, own_arch = _properties() if in_use else ("", "")
    return known_gpu(name if name and own_arch == arch else _standing_for(arch), arch)


def _in_use() -> bool:
    """Whether this process uses a GPU already: asking its name would be the first use, and forbid forks."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _properties() -> tuple[str, str]:
    """Product and generation of torch's current GPU."""
    import torch

    index = torch.cuda.current_device()
    return str(torch.cuda.get_device_name(index)), arch_of_gpu(index)


@functools.cache
def arch_of_gpu(index: int) -> str:
    """The generation of torch's GPU of that number: "sm_90", "gfx942"."""
    import torch

    found = torch.cuda.get_device_properties(index)
    return str(found.gcnArchName).partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


@functools.cache
def known_gpu(name: str, arch: str = "") -> Gpu:
    """The GPU of that product name: what was kept of it, and of its data sheet, or one like it, what was not."""
    generation, multiprocessors, memory_bytes, bandwidth, rates = _SHEETS[
        name if name in _SHEETS else _standing_for(arch)
    ]
    roofs = {unit: _ARITHMETIC_SHARE * 1e12 * (rate or rates[0]) for unit, rate in zip(UNITS, rates, strict=True)}
    roofs["copy"] = _BANDWIDTH_SHARE * bandwidth
    guessed = Gpu(name, arch or generation, roofs, multiprocessors, memory_bytes=int(memory_bytes))
    measured, speeds = _kept(name)
    return replace(guessed, **{**measured, "roofs": roofs | measured.get("roofs", {}), "calibration": speeds})


def _standing_for(arch: str) -> str:
    return next((name for name, sheet in _SHEETS.items() if sheet[0] == arch), _MODEST)


# What is kept


def keep_gpu(gpu: Gpu) -> Gpu:
    """The GPU of that name with these measured roofs, from now on and in later processes where the cache can be
    written. Roofs that are not given stay the data sheet's; its kernels' speeds stay as they are."""
    fields = {name: getattr(gpu, name) for name in _KEPT} | {"roofs": dict(gpu.roofs), "measured": True}
    return _keep(gpu.name, gpu.arch, fields, _kept(gpu.name)[1])


def keep_gpu_speeds(name: str, speeds: Mapping[str, KernelSpeed]) -> Gpu:
    """The GPU with these kernels' speeds in place of all earlier ones. Keys: "op/kernel/unit"."""
    measured = _kept(name)[0]
    return _keep(name, measured.get("arch", known_gpu(name).arch), measured, speeds)


_KEPT = ("arch", "multiprocessors", "launch_s", "memory_bytes")


def _keep(name: str, arch: str, measured: Mapping[str, Any], speeds: Mapping[str, KernelSpeed]) -> Gpu:
    _in_process[name] = (dict(measured), dict(speeds))
    found = {key: asdict(speed) for key, speed in speeds.items()}
    with suppress(OSError):  # a read-only cache is no reason to fail
        write_whole(_path(name), json.dumps({"version": GPU_VERSION, "measured": dict(measured), "speeds": found}))
    known_gpu.cache_clear()
    _gpu_of.cache_clear()
    return known_gpu(name, arch)


_in_process: dict[str, tuple[dict[str, Any], dict[str, KernelSpeed]]] = {}


def _kept(name: str) -> tuple[dict[str, Any], dict[str, KernelSpeed]]:
    """Measured fields and speeds, as kept in this process or on disk; a file that is not what we write counts as
    none."""
    if name in _in_process:
        return _in_process[name]
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(_path(name).read_text())
        if found["version"] == GPU_VERSION:
            speeds = {str(key): kernel_speed(fields) for key, fields in found["speeds"].items()}
            return (_checked(found["measured"]) if found["measured"] else {}), speeds
    return {}, {}


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields out of a file; ValueError where they can be no GPU's."""
    roofs = {str(unit): float(rate) for unit, rate in fields["roofs"].items()}
    kept = {name: fields[name] for name in _KEPT}
    numbers = [*roofs.values(), kept["multiprocessors"], kept["launch_s"]]
    if not (set(roofs) <= {"copy", *UNITS} and all(math.isfinite(number) and number > 0 for number in numbers)):
        raise ValueError("roofs must be positive numbers of known units")
    return {**kept, "roofs": roofs, "measured": True}


def _path(name: str) -> Path:
    return cache_dir() / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
