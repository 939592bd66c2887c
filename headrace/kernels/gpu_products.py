"""The types that a GPU multiplies in: for scores and for values, by the types of a call and its precision.

    both 16 bits and alike: that type           codes: the query's type, in which every code is exact
    anything float32, or two 16-bit types, or "exact": float32, of operands that are kept whole
    "fast": bfloat16, but float16 where both are that

Scores of "exact" are still multiplied in 16 bits where query and keys are alike: such products are exact in float32.
"""

from __future__ import annotations

FLOATS = ("float32", "float16", "bfloat16")
ARITHMETIC = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def product_types(query: str, key: str, precision: str) -> tuple[str, str]:
    """The types, by name, that scores and that weighted values are multiplied in."""
    alike = query != "float32" and (query == key or key not in FLOATS)
    if precision == "fast":
        fast = "float16" if alike and query == "float16" else "bfloat16"
        return fast, fast
    if precision == "exact" or not alike:
        return (query if alike else "float32"), "float32"
    return query, query


def arithmetic_of(query: str, key: str, precision: str) -> str:
    """What the products of a call are: fp32, fp16 or bf16."""
    return ARITHMETIC[product_types(query, key, precision)[1]]
