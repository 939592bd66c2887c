"""token_logprobs(logits [rows, vocab], tokens [rows]) -> Logprobs: of tokens that were drawn, and of the likeliest

    logprob(token) = x[token] - log sum_i e^x[i],  x the row's logits: the model's own distribution, at temperature 1
    top: the num_top tokens of largest logits, falling, equal ones by rising id

Penalties, biases and filters are not in it unless they are in the logits. A GPU is not waited for: tokens are read, and
logprobs written, where the draw left them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, empty_like, shape_of
from headrace.ops import gpu_rows
from headrace.ops.per_numpy import numpy_kernel
from headrace.ops.select import Kernel, Request, Traffic, choose, placed

FLOPS_PER_LOGIT = 20  # the exponential's


@dataclass(frozen=True)
class Logprobs:
    """chosen: float32 [rows], of each row's token; top: float32 [rows, num_top] of top_ids, int32 [rows, num_top]."""

    chosen: Any
    top_ids: Any
    top: Any


def token_logprobs(logits: Any, tokens: Any, num_top: int = 0, *, kernel: str | None = None) -> Logprobs:
    """The natural logarithms of the probabilities of each row's token, and of its num_top likeliest tokens.

    logits: [rows, vocab] float32, -inf excludes a token; tokens: [rows] int32. A vocabulary of fewer than num_top
    tokens is told whole. NaN for a token outside the vocabulary, and for all of a row that holds NaN or +inf. Raises
    ArgumentError for what does not fit.
    """
    shape, rows = shape_of(logits, "logits"), shape_of(tokens, "tokens")
    asked = placed(request(shape, num_top, dtype_name(logits)), logits)
    if rows != shape[:1] or dtype_name(tokens) != "int32":
        raise ArgumentError(f"tokens: expected int32 [{shape[0]}], got {dtype_name(tokens)} {list(rows)}")
    check_same_device({"logits": logits, "tokens": tokens})
    chosen, told = choose(kernels(), asked, kernel), asked.shapes["top"]
    out = Logprobs(*(empty_like(logits, *each) for each in ((rows, "float32"), (told, "int32"), (told, "float32"))))
    chosen.run(logits, tokens, out.chosen, out.top_ids, out.top)
    return out


def request(shape: tuple[int, ...], num_top: int, dtype: str = "float32") -> Request:
    """The request of a call: every logit is read once."""
    if len(shape) != 2 or shape[1] < 1 or dtype != "float32":
        expected = "float32 [rows, vocab] with vocab >= 1"
        raise ArgumentError(f"logits: expected {expected}, got {dtype} {list(shape)}", "logits[None].float()")
    if num_top < 0:
        raise ArgumentError(f"num_top: expected a number of tokens, got {num_top}")
    elements = math.prod(shape)
    shapes = {"logits": shape, "top": (shape[0], min(num_top, shape[1]))}
    traffic = Traffic(4 * elements, FLOPS_PER_LOGIT * elements)
    return Request("token_logprobs", shapes, {"logits": dtype}, traffic)


def reference(logits: np.ndarray, tokens: np.ndarray, num_top: int, dtype: Any = np.float64) -> Logprobs:
    """The formula by sorting, in float64 or `dtype`."""
    x = logits.astype(dtype)
    x -= x.max(axis=1, keepdims=True)
    logs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :num_top].astype(np.int32)
    chosen = np.take_along_axis(logs, tokens[:, None], axis=1)[:, 0]
    return Logprobs(chosen, order, np.take_along_axis(logs, order, axis=1))


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    return *gpu_rows.logprob_kernels(), numpy_kernel("numpy_logprobs", "headrace.kernels.numpy.logprobs")
