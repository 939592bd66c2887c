"""A GPU that is not there: torch says its tensors lie on one, Triton compiles for it, launches are noted and not done.

What ahead-of-time compilation cannot show is shown here: that an op's own way to its kernels, as on a device, ends in
launches that Triton accepts, types, alignments and numbers of the very call included. Nothing is computed.

A process pretends one chip, from then on: what was compiled is remembered by Triton, and torch's answers by others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from headrace.check.compiled import nvidia_resources
from headrace.gpu_machine import gpu_of


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its blocks, and what it takes of a multiprocessor. Registers are a thread's."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    registers: int
    spilled: int


# What gives a tensor's numbers to the host.
_WAITING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within it whoever asks for a tensor's numbers gets a RuntimeError: on a GPU they would have to be waited for."""
    import torch

    own = {name: vars(torch.Tensor)[name] for name in _WAITING if name in vars(torch.Tensor)}
    for name in _WAITING:
        setattr(torch.Tensor, name, _waiting(name))
    try:
        yield
    finally:
        for name in _WAITING:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)


def _waiting(name: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"Tensor.{name}: waits for the GPU")

    return refused


def pretend(chip: str) -> list[Launch]:
    """From now on there is an NVIDIA GPU of that kind, "sm_90"; the list grows with every launch."""
    import torch
    import triton

    launches: list[Launch] = []
    driver = _Driver(chip, launches.append)
    triton.runtime.driver.set_active(driver)
    _pretend_in_torch(torch, chip)
    return launches


class _Driver:
    """What Triton asks of a driver to compile and launch."""

    def __init__(self, chip: str, note: Callable[[Launch], None]) -> None:
        from triton.backends.compiler import GPUTarget

        from headrace.kernels.triton.variants import CHIPS, SHARED_BYTES

        self._target, self._note = GPUTarget(*CHIPS[chip]), note
        self._binaries: list[tuple[int, int]] = []  # registers and spills by the number that stands for a function
        properties = {"max_shared_mem": SHARED_BYTES[chip], "multiprocessor_count": gpu_of(chip).multiprocessors}
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self._binaries.append(nvidia_resources(binary))
        registers, spilled = self._binaries[-1]
        most_threads = min(1024, 65536 // max(registers, 1) // 32 * 32)
        return "module", len(self._binaries) - 1, registers, spilled, most_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches a kernel: here it is noted."""

        def launcher(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            registers, spilled = self._binaries[function]
            found = Launch(metadata.name, (x, y, z), metadata.num_warps, metadata.shared, registers, spilled)
            self._note(found)

        return launcher


def _pretend_in_torch(torch: Any, chip: str) -> None:
    digits = chip.removeprefix("sm_")
    major, minor = int(digits[:-1]), int(digits[-1])
    gpu = gpu_of(chip)
    numbers = {"major": major, "minor": minor, "multi_processor_count": gpu.multiprocessors}
    properties = SimpleNamespace(name=gpu.name, total_memory=gpu.memory_bytes, **numbers)
    torch.Tensor.is_cuda, torch.Tensor.is_cpu = property(lambda self: True), property(lambda self: False)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    torch.cuda.get_device_name = lambda device=None: gpu.name
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    torch.cuda.is_current_stream_capturing = lambda: False
