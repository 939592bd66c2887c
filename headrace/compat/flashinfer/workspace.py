"""What all wrappers share: a workspace that nothing is kept in, a life of plan and run, arguments that change nothing.

Schedules are made natively, call by call, so no scratch memory of the caller's is used, no buffer has to stay where it
is for a CUDA graph, and any backend named is the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.layout import checked_layout


class Workspace:
    """A wrapper's constructor arguments and the methods that go with them."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False) -> None:
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer: Tensor | None = None
        self._kv_layout = checked_layout(kv_layout)
        self._use_cuda_graph = use_cuda_graph
        self._buffers: dict[str, Tensor | None] = {}  # of a CUDA graph, by the names of their arguments
        self.device = float_workspace_buffer.device

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None) -> None:
        """Takes other buffers, of any size."""
        self._float_workspace_buffer, self._int_workspace_buffer = float_workspace_buffer, int_workspace_buffer

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Bytes needed of the two buffers, with the arguments of plan: none."""
        return 0, 0

    def end_forward(self) -> None:
        """Does nothing, as in the library."""

    def _fill(self, *values: Tensor) -> None:
        """Copies a plan's arrays to where a CUDA graph looks for them."""
        if self.is_cuda_graph_enabled:
            for (name, buffer), given in zip(self._buffers.items(), values, strict=True):
                fill(buffer, given, name.removesuffix("_buffer").removesuffix("_buf"))


def planned(plan: Any, what: str = "run") -> Any:
    """The plan. RuntimeError where there is none yet."""
    if plan is None:
        raise RuntimeError(f"{what}: expected plan() (or begin_forward()) before it, got none")
    return plan


def refuse(**given: Any) -> None:
    """NotImplementedError for what is not None and that headrace does not do, with what to do instead."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name}: {ALTERNATIVES[name]}")


ALTERNATIVES = {
    "jit_args": "no kernels are compiled here; pass custom_mask, sinks, logits_soft_cap or ALIBI as arguments",
    "kv_cache_sf": "NVFP4 caches are not read; use float8_e4m3fn with k_scale and v_scale",
    "prefix_len_ptr": "no multi-item scoring; pass its mask as custom_mask",
    "token_pos_in_items_ptr": "no multi-item scoring; pass its mask as custom_mask",
    "max_item_len_ptr": "no multi-item scoring; pass its mask as custom_mask",
    "skip_softmax_threshold_scale_factor": "softmax is never skipped; leave it None",
    "profiler_buffer": "there is no in-kernel profile; `headrace explain` says what a call does",
    "v_indptr": "keys and values lie at the same places; pass kv_indptr",
    "o_indptr": "results lie where their queries do; pass qo_indptr",
    "o_scale": "results are not quantized; divide and convert the result, or pass out in a float8 type",
    "args": "there are no custom kernels that would take further arguments; pass sinks and masks by name",
}


def check_value_dim(head_dim_vo: int | None) -> None:
    """TypeError for a mask where older versions had theirs in this place."""
    if isinstance(head_dim_vo, Tensor):
        raise TypeError("head_dim_vo: expected a whole number, got a tensor; pass custom_mask by its name")


def buffers_of(use_cuda_graph: bool, **buffers: Tensor | None) -> dict[str, Tensor | None]:
    """The buffers of CUDA-graph mode. ValueError, as the library has it, where one is missing."""
    for name, buffer in buffers.items():
        if use_cuda_graph and not torch.is_tensor(buffer):
            raise ValueError(f"{name}: expected a torch.Tensor with use_cuda_graph=True, got {type(buffer).__name__}")
    return buffers


def fill(buffer: Tensor | None, values: Tensor, name: str) -> None:
    """Copies a plan's array into a buffer of CUDA-graph mode, where programs look for it."""
    if buffer is None:
        return
    if len(values) > len(buffer):
        raise ValueError(f"{name}: expected up to {len(buffer)} numbers, the size of its buffer, got {len(values)}")
    buffer[: len(values)].copy_(values)


def float8_scales(q: Tensor, args: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The further arguments of run: with a float8 q its scales and those of keys and values; else there are none."""
    if q.element_size() != 1:
        refuse(args=args or None)
    query, keys, values = (*args, None, None, None)[:3]
    return query, keys, values
