"""torch's own kernels as candidates: each on every dense case it says it takes, inside the budget, and its reasons."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import ops
from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import DENSE, PAGED, RAGGED, dense, heads
from headrace.check.attention_expected import assert_kernel_holds, prepared
from headrace.check.guards import Guarded
from headrace.errors import KernelError
from headrace.ops.attention_request import kernels
from headrace.ops.call_request import requests_of
from headrace.ops.gpu_torch import kernels as torch_kernels

NAMES = [kernel.name for kernel in torch_kernels()]
CASES = (
    *(case for case in DENSE if case.name != "dense_mask_documents"),  # which becomes ragged
    dense("fused_self", 2, 70, 70, **heads(4, 4, 64)),
    dense("fused_cross", 1, 20, 77, causal=False, **heads(3, 3, 32)),
    dense("fused_decode", 2, 1, 90, **heads(5, 5, 64)),
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
# torch makes another program of it for each set of shapes and options, which takes seconds.
FLEX = ("dense_self", "dense_cross", "dense_top_left_tall", "dense_both_sides", "dense_softcap", "fused_decode")
COMPUTED = [
    pytest.param(name, case, dtype, id=f"{name}-{case.name}-{dtype}")
    for name in NAMES
    for case in CASES
    for dtype in DTYPES
    if name != "torch_flex" or (case.name in FLEX and dtype == ("bfloat16" if case.softcap else "float32"))
]
SHAPES = ((2, 256, 8, 64), (2, 256, 8, 64), (2, 256, 8, 64))


def named(name: str) -> Any:
    return next(kernel for kernel in kernels() if kernel.name == name)


@pytest.mark.parametrize("name,case,dtype", COMPUTED)
@pytest.mark.slow
def test_what_it_says_it_takes_it_computes(name: str, case: Any, dtype: str, device: str) -> None:
    if dtype == "float64" and case.kv_format:
        pytest.skip("float64: of all arrays or none")
    batch = Guarded(device).tensors(attention_batch(case, dtype, dtype))
    if reasons := named(name).why_not(prepared(batch).request(dtype)):
        pytest.skip("; ".join(map(str, reasons)))
    assert_kernel_holds(case, name, dtype, dtype, out_dtype=dtype, device=device)


@pytest.mark.parametrize("name", ["torch_flash", "torch_math"])
def test_a_prompt_is_computed_by_either(name: str, device: str) -> None:
    dtype = "float32" if device == "cpu" else "bfloat16"
    assert_kernel_holds(CASES[-3], name, dtype, dtype, out_dtype=dtype, device=device)


@pytest.mark.parametrize("name,least", [("torch_math", 28), ("torch_flash", 4), ("torch_flex", 8)])
def test_each_takes_the_cases_it_is_there_for(name: str, least: int) -> None:
    """Else the test above would skip them all."""
    taken = [case.name for case in CASES if not named(name).why_not(on_cpu(case))]
    assert len(taken) >= least, taken


def on_cpu(case: Any) -> Any:
    return prepared(attention_batch(case)).request()


@pytest.mark.parametrize("case", [PAGED[1], RAGGED[1]], ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_are_refused(name: str, case: Any) -> None:
    [reason] = named(name).why_not(on_cpu(case))
    assert reason.predicate == "layout"


def reasons_on_gpu(name: str, *shapes: Any, dtype: Any = "bfloat16", arch: str = "sm_90", **options: Any) -> list[str]:
    device = "hip" if arch.startswith("gfx") else "cuda"
    [asked] = requests_of("attention", *shapes or SHAPES, dtype=dtype, device=device, arch=arch, **options)
    return [reason.predicate for reason in named(name).why_not(asked)]


@pytest.mark.parametrize("name", NAMES)
def test_all_take_a_plain_prompt_on_a_gpu(name: str) -> None:
    assert reasons_on_gpu(name, causal=True) == reasons_on_gpu(name) == []
    assert reasons_on_gpu(name, deterministic=True) == ["deterministic"]


@pytest.mark.parametrize(
    "name,options,predicate",
    [
        ("torch_flash", {"dtype": "float32"}, "dtype of query"),
        ("torch_flash", {"softcap": 5.0}, "softcap"),
        ("torch_flash", {"window": (9, None)}, "window"),
        ("torch_flash", {"sinks": (8,)}, "sinks"),
        ("torch_flash", {"mask": (256, 256)}, "mask"),
        ("torch_flash", {"key_lens": (2,)}, "key_lens"),
        ("torch_flash", {"out_dtype": "float32"}, "dtype of out"),
        ("torch_flash", {"precision": "exact"}, "precision"),
        ("torch_cudnn", {"arch": "gfx942"}, "device"),
        ("torch_efficient", {"alibi_slopes": (8,)}, "alibi_slopes"),
        ("torch_flex", {"dtype": "float32"}, "precision"),
        ("torch_flex", {"mask": (256, 256)}, "mask"),
        ("torch_math", {"mask": (256, 256), "key_lens": (2,)}, "mask"),
    ],
)
def test_each_reason_is_said(name: str, options: dict[str, Any], predicate: str) -> None:
    assert reasons_on_gpu(name, **options) == [predicate]


@pytest.mark.parametrize(
    "name,shapes,options,predicate",
    [
        ("torch_flash", ((1, 7, 8, 64), *[(1, 90, 8, 64)] * 2), {"causal": True}, "causal"),
        ("torch_flash", ((1, 1, 8, 64), *[(1, 90, 8, 64)] * 2), {"causal": True, "align": "top_left"}, "causal"),
        ("torch_flash", [(1, 9, 8, 264)] * 3, {}, "head_dim"),
        ("torch_flash", [(1, 9, 8, 63)] * 3, {}, "head_dim"),
        ("torch_flash", ((1, 9, 8, 64), (1, 9, 8, 64), (1, 9, 8, 32)), {}, "value_dim"),
        ("torch_flash", ((1, 9, 8, 64), (1, 0, 8, 64), (1, 0, 8, 64)), {}, "shape"),
        ("torch_cudnn", [(1, 1, 8, 64)] * 3, {}, "keys"),
        ("torch_cudnn", [(1, 9, 8, 192)] * 3, {}, "head_dim"),
        ("torch_efficient", ((1, 9, 8, 64), *[(1, 9, 2, 64)] * 2), {}, "heads"),
        ("torch_flex", ((1, 1, 8, 64), *[(1, 90, 8, 64)] * 2), {}, "queries"),
        ("torch_flex", [(1, 256, 8, 8)] * 3, {}, "head_dim"),
        ("torch_math", [(64, 8192, 32, 128)] * 3, {}, "scores"),
    ],
)
def test_each_shape_that_torch_does_not_take_is_refused(name, shapes, options, predicate) -> None:
    assert reasons_on_gpu(name, *shapes, **options) == [predicate]


def test_one_query_at_the_end_is_causal_for_anybody() -> None:
    assert reasons_on_gpu("torch_flash", (1, 1, 8, 64), *[(1, 90, 8, 64)] * 2, causal=True) == []


def test_quantized_keys_are_refused_by_all() -> None:
    scales = {"key_scales": (2, 256, 8), "value_scales": (2, 256, 8)}
    types = {"query": "bfloat16", "key": "int8", "value": "int8"}
    assert {tuple(reasons_on_gpu(name, dtype=types, **scales)) for name in NAMES} == {("dtype of key",)}


def test_what_is_not_taken_is_an_error_with_the_table() -> None:
    batch = Guarded("cpu").tensors(attention_batch(CASES[1]))
    with pytest.raises(KernelError, match="kernel 'torch_cudnn' cannot run this attention: device"):
        ops.attention(**batch, kernel="torch_cudnn")


def test_the_whole_matrix_is_dear_where_it_is_large() -> None:
    """Else it would be chosen: it multiplies at the speed of torch's matmul."""
    told = ops.explain("attention", *[(4, 4096, 16, 128)] * 3, dtype="bfloat16", device="cuda", arch="sm_90")
    seconds = {found.kernel: found.predicted_s for found in (told.chosen, *told.able)}
    assert seconds["torch_math"] > 3 * seconds["torch_flash"] > 3 * seconds["torch_cudnn"] / 2
    assert not told.chosen.kernel.startswith("torch_math")


def test_float64_on_a_gpu_is_torch_maths_and_nobody_elses_of_these() -> None:
    told = ops.explain("attention", *SHAPES, dtype="float64", device="cuda", arch="sm_90")
    able = [found.kernel for found in (told.chosen, *told.able) if found.kernel in NAMES]
    assert able == ["torch_math"] and told.chosen.arithmetic == "fp64"
