"""Whether torch must see what is done with its tensors: gradients, compilation, tracing, transforms, autocast.

Such calls go through torch's operators (torch_*.py); all others go to the kernels directly, at a fraction of the price.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.arrays import is_torch


def needs_torch(*arrays: Any) -> bool:
    """Whether the first of these arrays is torch's, and torch must see what becomes of them.

    NOTE: torch.compile traces this function, as far as `is_compiling`: nothing before it may be beyond its tracer.
    """
    if not is_torch(arrays[0]):
        return False
    import torch

    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return True
    if torch.is_grad_enabled():
        for array in arrays:
            if array is not None and getattr(array, "requires_grad", False):
                return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    derived = torch.autograd.forward_ad._current_level >= 0
    return derived or type(arrays[0]).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def mark_changed(*arrays: Any) -> None:
    """Tells torch that its tensors among these were written to, so that a backward pass that kept one notices."""
    changed = [array for array in arrays if is_torch(array)]
    if changed:
        import torch

        torch.autograd.graph.increment_version(changed)
