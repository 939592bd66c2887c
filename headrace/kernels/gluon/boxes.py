"""Tensors as TMA addresses them: boxes of up to five dimensions, from memory whose strides are whole 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.errors import ArgumentError

_ALIGNED = 16  # bytes


def boxes(name: str, tensor: torch.Tensor, block_shape: Sequence[int], layout: Any) -> TensorDescriptor:
    """The tensor, to be copied in boxes of that shape. ArgumentError where TMA cannot address its memory."""
    if told := why_not_boxes(tensor):
        raise ArgumentError(f"{name}: the kernel for Hopper needs {told}", "Triton's kernels take any memory")
    return TensorDescriptor(tensor, list(tensor.shape), _strides(tensor), list(block_shape), layout)


def _strides(tensor: torch.Tensor) -> list[int]:
    """In elements. A dimension of 1 is never stepped along and its stride may be anything, which it must not for TMA:
    it gets that of an array without gaps, in whole 16 bytes."""
    found = [1]
    for size, own, inner in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1], tensor.shape[:0:-1], strict=True):
        room = -(-found[0] * inner // _elements(tensor)) * _elements(tensor)
        found.insert(0, own if size > 1 else room)
    return found


def why_not_boxes(tensor: torch.Tensor) -> str:
    """What TMA lacks about a tensor's memory; empty: nothing."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return f"contiguous rows, got a stride of {tensor.stride(-1)}"
    if tensor.data_ptr() % _ALIGNED:
        return f"an address that is a multiple of {_ALIGNED}"
    stepped = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1][:-1]
    if any(stride % _elements(tensor) for stride in stepped):
        return f"strides of whole {_ALIGNED} bytes, got {list(tensor.stride())} elements"
    return ""


def _elements(tensor: torch.Tensor) -> int:
    """How many fill what TMA steps by."""
    return _ALIGNED // tensor.element_size()
