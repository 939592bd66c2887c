"""Whether a kernel holds its error budget on a named case of attention: out and lse, against the float64 formula."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

from headrace.check.attention_batch import attention_batch, op_of, reference, straightforward
from headrace.check.attention_cases import AttentionCase
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.kernels.arrays import Buffer, dtype_name, empty_like
from headrace.ops import attention_dense, attention_paged, attention_request
from headrace.ops.attention_options import AttentionResult
from headrace.ops.attention_request import Call, kernels
from headrace.ops.select import Reason, machine_of


def prepared(batch: dict[str, Any]) -> Call:
    """The call with these arguments."""
    paged = "page_table" in batch
    return attention_paged.prepared(**batch) if paged else attention_dense.prepared(**batch)


def why_not(kernel: str, batch: dict[str, Any]) -> list[Reason]:
    """Why that kernel cannot run with these arguments."""
    [found] = [each for each in kernels() if each.name == kernel]
    return found.why_not(prepared(batch).request())


def computed(case: AttentionCase, batch: dict[str, Any], out_dtype: str = "float32", **options: Any) -> AttentionResult:
    """The op with these arguments, written over NaN."""
    out = poisoned(case.out_shape, out_dtype)
    result = op_of(case)(**{**batch, **options}, out=out)
    assert result.out is out
    return result


def computed_on(
    device: str, case: AttentionCase, batch: dict[str, Any], out_dtype: str = "float32", **options: Any
) -> AttentionResult:
    """The same of tensors on that device, each in guarded memory, results over NaN; AssertionError where anything
    beside an array was written to."""
    guarded = Guarded(device)
    tensors = guarded.tensors(batch)
    out = guarded.tensor(poisoned(case.out_shape, out_dtype), "out")

    def guarded_like(array: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return guarded.tensor(poisoned(shape, dtype), "lse")

    with mock.patch.object(attention_request, "empty_like", guarded_like):
        result = op_of(case)(**{**tensors, **options}, out=out)
    guarded.assert_untouched()
    return AttentionResult(as_numpy(result.out), as_numpy(result.lse))


@functools.lru_cache(maxsize=8)
def expected(
    case: AttentionCase, dtype: str, query_dtype: str, seed: int
) -> tuple[dict[str, Any], AttentionResult, dict[str, AttentionResult]]:
    """A batch, what is exact for it, and what is straightforward for it, by arithmetic: filled when asked."""
    batch = attention_batch(case, dtype, query_dtype, seed)
    return batch, reference(case, batch), {}


def assert_kernel_holds(
    case: AttentionCase,
    kernel: str,
    dtype: str = "float32",
    query_dtype: str = "float32",
    *,
    out_dtype: str = "float32",
    precision: str = "auto",
    seed: int = 0,
    device: str | None = None,
    **options: Any,
) -> None:
    """Raises AssertionError where the kernel's out or lse is outside its budget.

    device: "cpu" or "cuda", of kernels that take tensors; then also where they write beside their arrays.
    """
    batch, exact, plain = expected(case, dtype, query_dtype, seed)
    [found] = [each for each in kernels() if each.name == kernel]
    given = batch if device is None else Guarded(device).tensors(batch)
    asked = prepared(given | {"precision": precision}).request()
    arithmetic = found.planned(asked, machine_of(asked)).arithmetic
    if arithmetic not in plain:
        plain[arithmetic] = straightforward(case, batch, exact, arithmetic)
    compute = computed if device is None else functools.partial(computed_on, device)
    got = compute(case, batch, out_dtype, kernel=kernel, precision=precision, **options)
    assert_close(got, exact, plain[arithmetic])


def assert_close(got: AttentionResult, exact: AttentionResult, plain: AttentionResult) -> None:
    """Raises AssertionError where out or lse is farther from the exact than the straightforward computation allows."""
    for name in ("out", "lse"):
        got_part, exact_part, plain_part = (getattr(result, name) for result in (got, exact, plain))
        dtype = dtype_name(got_part)
        assert_within_budget(got_part, exact_part, rounded(plain_part, dtype), dtype, logarithms=name == "lse")


def poisoned_like(array: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """`empty_like` of the array border, with NaN in it."""
    made = empty_like(array, shape, dtype)
    if not isinstance(array, Buffer):
        made[...] = float("nan")
    return made
