"""Batches over pages for the tests on a GPU: filled anew in place, computed by any kernel, held to the formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace import ops
from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import AttentionCase, heads, paged
from headrace.check.attention_expected import assert_close
from headrace.check.guards import Guarded, as_numpy
from headrace.ops.attention_options import AttentionResult
from headrace.ops.call_request import kernels_of, requests_of
from headrace.ops.select import machine_of

# Lengths that take as many pages of 16 (and of 64) in all, and as many of the longest: arrays of the same shapes.
LENGTHS = ((300, 17, 64, 129), (129, 20, 290, 50), (18, 140, 60, 304), (140, 304, 17, 49))
GQA = paged("gqa", (1,) * 4, LENGTHS[0], **heads(8, 2, 128))
LATENT = paged("latent", (1,) * 4, LENGTHS[0], page_size=64, **heads(16, 1, 576, 512))
CASES = {"paged": GQA, "latent": LATENT}


@dataclass(frozen=True)
class Decode:
    """A case's arrays, as NumPy has them. kind "latent": values are the beginning of the keys."""

    kind: str
    case: AttentionCase
    arrays: Mapping[str, Any]

    def tensors(self, device: str) -> dict[str, Any]:
        """The arrays on a device, in guarded memory of their own."""
        return Guarded(device).tensors(self.arrays)


def decode(kind: str, key_lens: Sequence[int], dtype: str = "bfloat16", seed: int = 0) -> Decode:
    """A batch with these lengths; everything that must not be read is NaN."""
    case = replace(CASES[kind], key_lens=tuple(key_lens), query_lens=(1,) * len(key_lens))
    arrays = attention_batch(case, dtype, dtype, seed)
    if kind == "latent":
        arrays["value_pages"] = arrays["key_pages"][..., : case.value_dim]
    return Decode(kind, case, arrays)


def call_of(kind: str, tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The op that a batch is for, and its arguments."""
    if kind == "paged":
        return "paged_attention", dict(tensors)
    rest = {name: one for name, one in tensors.items() if name not in ("key_pages", "value_pages", "scale")}
    dims = {"value_dim": LATENT.value_dim, "scale": LATENT.head_dim**-0.5}
    return "mla_attention", {**rest, "latent_pages": tensors["key_pages"][:, :, 0], **dims}


def attend(batch: Decode, tensors: Mapping[str, Any], **options: Any) -> AttentionResult:
    """What the op makes of the tensors."""
    op, given = call_of(batch.kind, tensors)
    result: AttentionResult = getattr(ops, op)(**given, **options)
    return result


def refill(tensors: Mapping[str, Any], other: Decode) -> None:
    """Other numbers, lengths and pages into the same memory."""
    for name, tensor in other.tensors(str(tensors["query"].device)).items():
        if hasattr(tensor, "copy_") and name != "value_pages":
            tensors[name].copy_(tensor)
    if other.kind == "paged":
        tensors["value_pages"].copy_(other.tensors(str(tensors["query"].device))["value_pages"])


def gpu_kernels(kind: str, tensors: Mapping[str, Any]) -> dict[str, str]:
    """The kernels of GPUs, each with the reason why it cannot take this batch; empty: it can."""
    op, given = call_of(kind, tensors)
    [request] = requests_of(op, **given)
    ours = [kernel for kernel in kernels_of(op) if {"cuda", "hip"} & set(kernel.devices)]
    return {kernel.name: "; ".join(map(str, kernel.why_not(request))) for kernel in ours}


def assert_right(batch: Decode, found: AttentionResult, kernel: str, tensors: Mapping[str, Any]) -> None:
    """AssertionError where the result is outside its budget."""
    op, given = call_of(batch.kind, tensors)
    [request] = requests_of(op, **given)
    [of_name] = [each for each in kernels_of(op) if each.name == kernel]
    exact = reference(batch.case, dict(batch.arrays))
    arithmetic = of_name.planned(request, machine_of(request)).arithmetic
    plain = straightforward(batch.case, dict(batch.arrays), exact, arithmetic)
    assert_close(AttentionResult(as_numpy(found.out), as_numpy(found.lse)), exact, plain)


def bits(result: AttentionResult) -> tuple[np.ndarray, np.ndarray]:
    """Out and lse as integers, to be compared bit by bit."""
    import torch

    out, lse = result.out, result.lse
    return as_numpy(out.view(torch.int16 if out.element_size() == 2 else torch.int32)), as_numpy(lse.view(torch.int32))
