"""The named cases of headrace.check on a GPU, as work to be timed: what the choice among kernels is judged by.

Their results are checked by the tests (`pytest -m gpu`), here only their speed counts. Cases large enough for a GPU
come first, then every second of the others: compiling for one of them takes longer than measuring it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.bench.gpu_work import GpuWork
from headrace.check.attention_batch import attention_batch, op_of
from headrace.check.attention_cases import ATTENTION, AttentionCase, dense, heads, paged
from headrace.ops.call_request import kernels_of, requests_of

DTYPES = ("bfloat16", "float32")
_EIGHT_B = heads(32, 8, 128)
LARGE = (
    dense("large_prefill", 1, 4096, 4096, **_EIGHT_B),
    dense("large_append", 1, 128, 8192, **_EIGHT_B),
    dense("large_decode", 4, 1, 16384, **_EIGHT_B),
    dense("large_cross", 2, 1024, 512, causal=False, **_EIGHT_B),
    dense("large_window", 1, 4096, 4096, window=(511, 0), **_EIGHT_B),
    paged("large_paged_prefill", (2048,), (4096,), page_size=64, **_EIGHT_B),
    paged("large_paged_decode", (1,) * 16, (2048,) * 16, page_size=64, **_EIGHT_B),
    paged("large_paged_mixture", (1,) * 7 + (512,), (3000,) * 7 + (512,), page_size=16, **_EIGHT_B),
    paged("large_verify", (4,) * 8, (2048,) * 8, page_size=64, **_EIGHT_B),
)


def cases() -> dict[str, tuple[AttentionCase, str]]:
    """Cases and types by name."""
    small = [
        case for case in ATTENTION[::2] if case.query_lens and max(case.key_lens, default=0) > 64 and not case.mask
    ]
    return {f"regret_{case.name}_{dtype}": (case, dtype) for case in (*LARGE, *small) for dtype in DTYPES}


def case_names() -> list[str]:
    """In the order in which they are measured."""
    return list(cases())


def build_case(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """name: of a case."""
    case, dtype = cases()[sizes["name"]]
    op, arguments = op_of(case), on_device(attention_batch(case, dtype, dtype), device)
    name = op.__name__
    requests = requests_of(name, **arguments)
    request = max(requests, key=lambda each: each.traffic.flops)
    traffic = request.traffic

    def call(kernel: str, number: int) -> Any:
        return op(**arguments, kernel=kernel)

    return GpuWork(traffic.num_bytes, traffic.flops, traffic.unit, kernels_of(name), request, call)


def on_device(arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A call's arrays as tensors with the same strides, its other arguments as they are."""
    import numpy as np

    return {name: _tensor(one, device) if isinstance(one, np.ndarray) else one for name, one in arguments.items()}


def _tensor(array: Any, device: str) -> Any:
    from headrace.check.guards import Guarded

    return Guarded(device).tensor(array)
