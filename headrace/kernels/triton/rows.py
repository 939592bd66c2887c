"""Arrays as row-wise kernels take them: tensors whose last dimension is packed, or an error that names the array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headrace.errors import ArgumentError
from headrace.kernels.arrays import as_torch, dtype_name


def packed(array: Any, name: str, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> torch.Tensor:
    """The array as a tensor, without a copy; shape and dtype: what it must have."""
    tensor = as_torch(array, name)
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if dtype is not None and dtype_name(tensor) != dtype:
        raise ArgumentError(f"{name}: expected {dtype}, got {dtype_name(tensor)}")
    if tensor.dim() and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ArgumentError(f"{name}: expected contiguous inner dimensions, got strides {tensor.stride()}")
    return tensor


def sent(array: Any, device: torch.device) -> torch.Tensor:
    """The array on a device, in one piece. NumPy's travel through pinned memory: nobody waits for the device."""
    if not isinstance(array, np.ndarray):
        return as_torch(array, "array").to(device).contiguous()
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
