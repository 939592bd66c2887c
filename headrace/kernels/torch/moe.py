"""Mixture of experts through torch's grouped products: tokens sorted by expert, three products, rows added up.

Wins where torch's grouped product is faster than ours: large dims and many tokens on its best chips. On a GPU bfloat16
alone: other types would wait for the host. Schedule: pairs are sorted by expert (torch.sort), rows of x are copied in
that order, the products take where each expert ends from the device; the rows go back and are added place by place.
Rows of experts elsewhere lie behind the last expert's end, where nothing is computed: they are left out. On the CPU, a
product per expert.
Error: sums in float32, every step's result in x's own type.
Speed: not measured yet (`headrace bench gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.arrays import as_torch

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The mixture in arrays["out"]; arrays and options as ops/moe.py names them."""
    arrays = {name: as_torch(array, name) for name, array in arrays.items()}
    x, experts = arrays["x"], arrays["experts"]
    if not arrays["out"].numel():
        return
    num_experts = len(arrays["gate"])
    ids = experts.flatten().long()
    here = (ids >= 0) & (ids < num_experts)
    ids = torch.where(here, ids, num_experts)
    order = torch.sort(ids, stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
    ends = torch.cumsum(counts[:num_experts], 0, dtype=torch.int32)
    weight_type = arrays["gate"].dtype if x.is_cuda else x.dtype
    rows = x[order // experts.shape[1]].to(weight_type)
    act = _ACTIVATIONS[options["activation"]]
    hidden = act(_products(rows, arrays["gate"], ends)) * _products(rows, arrays["up"], ends)
    y = torch.empty((len(ids), x.shape[1]), dtype=hidden.dtype, device=x.device)
    y[order] = _products(hidden, arrays["down"], ends)
    weighted = torch.where(here[:, None], y * arrays["weights"].flatten()[:, None], 0.0)
    total = weighted.view(*experts.shape, -1).sum(dim=1)
    if "residual" in arrays:
        total = total + arrays["residual"]
    arrays["out"].copy_(total)


def _products(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times its matrix, transposed."""
    if rows.is_cuda:
        grouped = getattr(functional, "grouped_mm", None) or torch._grouped_mm
        return grouped(rows, matrices.transpose(1, 2), offs=ends)
    parts, first = [], 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        parts.append(rows[first:end] @ matrix.to(rows.dtype).T)
        first = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - first, matrices.shape[1])])
