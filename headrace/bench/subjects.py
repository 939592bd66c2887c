"""Named cases of headrace.check as things to time: a request, the kernels that may serve it, a call by kernel name.

Arrays are made when a subject is built, one subject at a time. Quantized weights come in the formats of FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.check import cases
from headrace.check.attention_cases import ATTENTION, AttentionCase, dense, heads
from headrace.check.attention_gradients import GRADIENTS, gradient_batch
from headrace.ops.call_request import kernels_of, requests_of
from headrace.ops.select import Kernel, Request

ATTENTION_DTYPES = ("float32", "bfloat16")
FORMATS = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_K")

# Large enough for the roofs to show: what the shapes of the tests are too small for.
LARGE_LINEAR = (
    cases.LinearCase("large_decode", 1, 4096, 4096),
    cases.LinearCase("large_prefill", 128, 1024, 2048),
)
LARGE_NORM = (cases.NormCase("large_prefill", 2048, 2048),)
LARGE_ATTENTION = (
    dense("large_decode", 1, 1, 16384, **heads(32, 8, 128)),
    dense("large_decode_one_head", 1, 1, 4096, **heads(8, 8, 128)),
    dense("large_prefill", 1, 512, 512, **heads(8, 2, 128)),
    dense("large_append", 1, 64, 4096, **heads(8, 2, 128)),
)


@dataclass(frozen=True)
class Subject:
    """One request and how to serve it with a kernel of a given name."""

    name: str
    request: Request
    kernels: tuple[Kernel, ...]
    run: Callable[[str], Any]

    def able(self) -> list[str]:
        """The kernels that can run it where its arrays are."""
        here = [kernel for kernel in self.kernels if self.request.device in kernel.devices]
        return [kernel.name for kernel in here if not kernel.why_not(self.request)]


def subjects(large: bool = False) -> Iterator[Subject]:
    """Every case, one after the other; with `large`, larger ones too."""
    yield from norm_subjects(cases.NORM + LARGE_NORM * large)
    yield from linear_subjects(cases.LINEAR + LARGE_LINEAR * large)
    yield from attention_subjects(ATTENTION + LARGE_ATTENTION * large)
    yield from backward_subjects(GRADIENTS[::3] + LARGE_ATTENTION[2:] * large)


def norm_subjects(found: Sequence[cases.NormCase]) -> Iterator[Subject]:
    """rms_norm in float32."""
    from headrace.ops import norm

    for case in found:
        x = np.ones((case.tokens, case.dim), np.float32)
        weight, out = np.ones(case.dim, np.float32), np.empty_like(x)

        def run(kernel: str, x: Any = x, weight: Any = weight, out: Any = out) -> Any:
            return norm.rms_norm(x, weight, out=out, kernel=kernel)

        yield Subject(f"rms_norm/{case.name}", norm.request(x.shape), norm.kernels(), run)


def linear_subjects(found: Sequence[cases.LinearCase]) -> Iterator[Subject]:
    """linear with float32 activations and weights of each format."""
    from headrace.ops import linear

    for format_name in FORMATS:
        for case in found:
            x, weight = linear_arrays(case, format_name)
            request = linear.request(case.tokens, [(format_name, *weight.shape)])

            def run(kernel: str, x: Any = x, weight: Any = weight) -> Any:
                return linear.linear(x, weight, kernel=kernel)

            yield Subject(f"linear/{case.name}/{format_name}", request, linear.kernels(), run)


def linear_arrays(case: cases.LinearCase, format_name: str) -> tuple[np.ndarray, Any]:
    """Activations and a packed weight; columns rounded up to the format's block."""
    from headrace.check.blocks import random_matrix
    from headrace.ops import linear
    from headrace.ops.formats import FORMATS as KNOWN

    block = KNOWN[format_name].block_len
    cols = -(-case.cols // block) * block
    random = np.random.default_rng(0)
    raw = random_matrix(format_name, case.rows, cols, random)
    x = random.standard_normal((case.tokens, cols)).astype(np.float32)
    return x, linear.pack(raw, format_name, (case.rows, cols))


def attention_subjects(found: Sequence[AttentionCase]) -> Iterator[Subject]:
    """Dense, ragged and paged attention, with everything in float32 and everything in bfloat16."""
    from headrace.check.attention_batch import attention_batch, op_of

    for case in found:
        for dtype in ATTENTION_DTYPES:
            op, arguments = op_of(case), attention_batch(case, dtype, dtype)
            name = op.__name__
            [request, *others] = requests_of(name, **arguments)
            if others:  # a mask that makes it several launches: each is a case of its own elsewhere
                continue

            def run(kernel: str, op: Callable[..., Any] = op, arguments: Any = arguments) -> Any:
                return op(**arguments, kernel=kernel)

            yield Subject(f"{name}/{case.name}/{dtype}", request, kernels_of(name), run)


def backward_subjects(found: Sequence[AttentionCase]) -> Iterator[Subject]:
    """Gradients of attention, with everything in float32 and everything in bfloat16."""
    from headrace.ops.attention_gradients import attention_backward

    for case in found:
        for dtype in ATTENTION_DTYPES:
            arguments = gradient_batch(case, dtype, dtype)
            [request] = requests_of("attention_backward", **arguments)

            def run(kernel: str, arguments: Any = arguments) -> Any:
                return attention_backward(**arguments, kernel=kernel)

            yield Subject(f"attention_backward/{case.name}/{dtype}", request, kernels_of("attention_backward"), run)
