"""A row of `headrace bench gpu` as tensors: calls of one op by kernel name, what they cost at least, and their check.

Memory is cold: a call reads one of several sets of buffers, which together are several times the L2 cache, and calls
take them in turns. Numbers are random and normal; what must not be read is NaN; so are outputs before they are checked.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.ops.select import Kernel, Request

COLD = 4  # times the L2 cache that the sets of buffers take together

Call = Callable[[int], Any]  # with one set of buffers

# Which module builds what: build_<work>(sizes, device).
_HOMES = {
    "paged": "headrace.bench.gpu_decode",
    "latent": "headrace.bench.gpu_decode",
    "dense": "headrace.bench.gpu_prefill",
    "backward": "headrace.bench.gpu_prefill",
    "linear": "headrace.bench.gpu_linear",
    "norm": "headrace.bench.gpu_small",
    "rope": "headrace.bench.gpu_small",
    "rotate": "headrace.bench.gpu_small",
    "append": "headrace.bench.gpu_small",
    "merge": "headrace.bench.gpu_small",
    "sample": "headrace.bench.gpu_experts",
    "logprobs": "headrace.bench.gpu_experts",
    "moe": "headrace.bench.gpu_experts",
    "case": "headrace.bench.gpu_regret",
}


@dataclass(frozen=True)
class Margin:
    """The largest error of a result, the one that its budget allows, and the root of its mean square."""

    error: float
    allowed: float
    rms: float = 0.0

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed


@dataclass(frozen=True)
class GpuWork:
    """A call that is ready. call: by kernel name and set of buffers; check: of what that kernel makes of the first set.

    eager: whose calls no graph can hold. peers: others' calls, made when asked for, ImportError where they are not
    installed; peer_checks: of some of their results.
    """

    num_bytes: int
    flops: int
    unit: str
    kernels: tuple[Kernel, ...]
    request: Request
    call: Callable[[str, int], Any]
    sets: int = 1
    check: Callable[[str], Margin] | None = None
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    peer_checks: Mapping[str, Callable[[], Margin]] = field(default_factory=dict)
    eager: tuple[str, ...] = ()


def build(work: str, sizes: Mapping[str, Any], device: str) -> GpuWork:
    """The work of a row on a device: "cuda", or "cpu" where it is tested."""
    import torch

    module = importlib.import_module(_HOMES[work])
    with torch.no_grad():
        made: GpuWork = getattr(module, f"build_{work}")(_tuples(sizes), device)
    return made


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    if isinstance(value, Mapping):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value


def num_sets(set_bytes: int, device: str) -> int:
    """How many sets of buffers of that size keep each of them out of the L2 cache."""
    if device == "cpu":
        return 2
    import torch

    cache_bytes = torch.cuda.get_device_properties(torch.device(device)).L2_cache_size
    return max(1, math.ceil(COLD * cache_bytes / set_bytes))


def normal(shape: Sequence[int], dtype: str, device: str, seed: int = 0) -> Any:
    """Random normal numbers, made on the device."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), dtype=getattr(torch, dtype), device=device, generator=generator)


def integers(numbers: Sequence[int], device: str) -> Any:
    """int32 numbers."""
    import torch

    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def poisoned(shape: Sequence[int], dtype: str, device: str) -> Any:
    """An output full of NaN."""
    import torch

    return torch.full(tuple(shape), math.nan, dtype=getattr(torch, dtype), device=device)


def margin(got: Sequence[Any], exact: Sequence[Any], plain: Sequence[Any], dtype: str) -> Margin:
    """Of samples of a result, those exact for it, and those of a straightforward computation in float32."""
    import numpy as np
    import torch

    from headrace.check.compare import budget

    narrow = getattr(torch, dtype)
    ours, true, simple = (
        np.concatenate([each.double().reshape(-1).cpu().numpy() for each in samples])
        for samples in (got, exact, [each.to(narrow) for each in plain])
    )
    error = np.abs(ours - true)
    error = np.where(np.isnan(error), np.inf, error)
    return Margin(float(error.max(initial=0.0)), budget(true, simple, dtype), float(np.sqrt(np.mean(error**2))))
