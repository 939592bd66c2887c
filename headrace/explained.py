"""`headrace explain`: an op's request built from a few numbers, and what `choose` would do with it."""

from __future__ import annotations

from headrace.errors import ArgumentError
from headrace.ops.explanation import Explanation, explain_request

OPS = ("linear", "rms_norm")


def explain_op(op: str, *, tokens: int, dim: int, rows: int, weight: str) -> Explanation:
    """The kernels of an op for float32 activations [tokens, dim]; linear: times a weight [rows, dim] in a format."""
    for name, number in (("--tokens", tokens), ("--dim", dim), ("--rows", rows)):
        if number < 1:
            raise ArgumentError(f"{name}: expected a whole number >= 1, got {number}")
    if op == "rms_norm":
        from headrace.ops import norm

        return explain_request(norm.kernels(), norm.request((tokens, dim)))
    if op == "linear":
        from headrace.ops import linear
        from headrace.ops.formats import get_format

        return explain_request(linear.kernels(), linear.request(tokens, [(get_format(weight).name, rows, dim)]))
    raise ArgumentError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
