"""What ops do with tensors of a GPU: nothing waits for it, tables are made there, mistakes are told with the table.

No GPU is needed: tensors of the CPU are taken for a GPU's, and to look at what is in one is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headrace import ops
from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import AttentionCase, dense, heads, paged, ragged
from headrace.check.attention_expected import assert_close
from headrace.check.guards import Guarded, as_numpy
from headrace.errors import ArgumentError, KernelError
from headrace.ops import (
    attention_dense,
    attention_gradients,
    attention_paged,
    attention_request,
    select,
    sparse,
    torch_gather,
    torch_sparse,
)
from headrace.ops.attention_options import AttentionResult

LOOKS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU count as those of an H200, and looking at what they hold fails, but in a kernel."""
    running: list[Any] = []

    def forbidden(look: Any) -> Any:
        def looked(*args: Any, **options: Any) -> Any:
            assert running, "to look at what a GPU holds is to wait for it"
            return look(*args, **options)

        return looked

    def run_kernel(chosen: Any, *args: Any) -> None:
        running.append(chosen)
        with pytest.MonkeyPatch.context() as inner:
            inner.setenv("TRITON_INTERPRET", "1")
            INTERPRETED(chosen, *args)
        running.pop()

    with pytest.MonkeyPatch.context() as patch:
        for module in (attention_dense, attention_request, select):
            for name, found in (("device_of", "cuda"), ("arch_of", "sm_90")):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda array, found=found: found)
        for name in LOOKS:
            patch.setattr(torch.Tensor, name, forbidden(getattr(torch.Tensor, name)))
        for module in (attention_gradients, attention_request):
            patch.setattr(module, "run_kernel", run_kernel)
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


INTERPRETED = attention_request.run_kernel


def test_looking_at_a_tensor_is_seen() -> None:
    tensor = torch.zeros(3, dtype=torch.int32)
    for look in (
        np.asarray,
        lambda array: array.tolist(),
        lambda array: int(array[0]),
        lambda array: bool(array.any()),
    ):
        with on_a_gpu(), pytest.raises(AssertionError, match="to wait"):
            look(tensor)


CASES = (
    dense("there_causal", 2, 17, 33),
    dense("there_mask", 2, 9, 20, causal=False, mask="causal"),  # would be recognised on the CPU
    dense("there_key_lens", 3, 9, 70, key_lens=(70, 33, 0), causal=False),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_is_chosen_for_and_run_without_a_look(case: AttentionCase) -> None:
    batch = attention_batch(case, "float64", "float64")
    tensors = Guarded("cpu").tensors(batch)
    ops.reset_choices()
    with on_a_gpu():
        got = ops.attention(**tensors)
    assert ops.choices() == {("attention", "torch_math"): 1}
    exact = reference(case, batch)
    result = AttentionResult(as_numpy(got.out), as_numpy(got.lse))
    assert_close(result, exact, straightforward(case, batch, exact, "fp64"))


THERE = (
    paged("there_paged", (1, 3), (37, 20), **heads(4, 2, 16)),
    paged("there_shared", (1, 1), (70, 70), **heads(2, 1, 16)),
    paged("there_latent", (1, 1), (33, 20), **heads(16, 1, 24, 16)),
)


@pytest.mark.parametrize("case", THERE, ids=lambda case: case.name)
def test_pages_are_chosen_for_and_read_without_a_look(case: AttentionCase) -> None:
    batch = attention_batch(case)
    tensors = Guarded("cpu").tensors(batch)
    ops.reset_choices()
    with on_a_gpu():
        got = ops.paged_attention(**tensors)
    assert ops.choices() == {("paged_attention", "triton_paged"): 1}
    exact = reference(case, batch)
    assert_close(AttentionResult(as_numpy(got.out), as_numpy(got.lse)), exact, straightforward(case, batch, exact))


RAGGED = (
    ragged("there_ragged", (7, 0, 3), (7, 0, 20), **heads(4, 2, 16)),
    ragged(
        "there_everything", (5, 1), (9, 20), softcap=9.0, sinks=True, alibi="requests", mask="bool", **heads(4, 2, 16)
    ),
    dense("there_mask", 2, 9, 20, causal=False, mask="causal", **heads(4, 2, 16)),
)


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.name)
def test_ragged_calls_and_masks_are_not_looked_at_either(case: AttentionCase) -> None:
    batch = attention_batch(case)
    tensors = Guarded("cpu").tensors(batch)
    ops.reset_choices()
    with on_a_gpu():
        got = ops.attention(**tensors)
    assert ops.choices() == {("attention", "triton_attention"): 1}
    exact = reference(case, batch)
    assert_close(AttentionResult(as_numpy(got.out), as_numpy(got.lse)), exact, straightforward(case, batch, exact))


def test_gradients_are_those_of_the_kernel_for_gpus() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 9, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = torch.autograd.grad(
        ops.attention(query, key, value, causal=True).out.square().sum(), (query, key, value)
    )
    ops.reset_choices()
    with on_a_gpu():
        out = ops.attention(query, key, value, causal=True).out
        found = torch.autograd.grad(out.square().sum(), (query, key, value))
    chosen = {("attention", "triton_attention"): 1, ("attention_backward", "triton_attention_backward"): 1}
    assert ops.choices() == chosen
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "case",
    [ragged("double_ragged", (5, 3), (9, 3)), paged("double_paged", (1, 3), (20, 9))],
    ids=lambda case: case.name,
)
def test_what_no_kernel_takes_is_an_error_with_the_table(case: AttentionCase) -> None:
    tensors = Guarded("cpu").tensors(attention_batch(case, "float64", "float64"))
    op = ops.paged_attention if case.layout == "paged" else ops.attention
    with on_a_gpu(), pytest.raises(KernelError, match=r"no kernel can run this[\s\S]*torch_math +layout"):
        op(**tensors)


def test_a_kernel_of_the_cpu_asked_for_by_name_says_where_the_arrays_are() -> None:
    tensors = Guarded("cpu").tensors(attention_batch(CASES[0], "float64", "float64"))
    with on_a_gpu(), pytest.raises(KernelError, match="cpu_float64.*device: needs cpu, got cuda"):
        ops.attention(**tensors, kernel="cpu_float64")


def test_shared_beginnings_are_not_looked_for() -> None:
    tensors = Guarded("cpu").tensors(attention_batch(paged("same", (1, 1), (70, 70))))
    with on_a_gpu(), pytest.raises(ArgumentError, match="cascade: expected False on a GPU"):
        ops.paged_attention(**tensors, cascade=True)


def test_the_choice_made_for_one_place_is_not_taken_for_another() -> None:
    tensors = Guarded("cpu").tensors(attention_batch(CASES[0], "float64", "float64"))
    ops.reset_choices()
    for _ in range(2):
        ops.attention(**tensors)
        with on_a_gpu():
            ops.attention(**tensors)
    assert ops.choices() == {("attention", "torch_math"): 2, ("attention", "cpu_float64"): 2}


# Keys chosen by lists

SPARSE = paged("sparse", (3, 1, 0, 5), (40, 7, 0, 5), **heads(4, 2, 16), page_size=4)
CAUSAL = {"causal": True}
WAYS = [
    pytest.param("indices", CAUSAL, id="keys"),
    pytest.param("indices", {"causal": False}, id="keys-all"),
    pytest.param("indices", {"window": (6, None)}, id="keys-window"),
    pytest.param("indices", {"align": "top_left"}, id="keys-top-left"),
    pytest.param("page_indices", CAUSAL, id="pages"),
    pytest.param("page_indices", {"causal": False}, id="pages-all"),
    pytest.param("page_indices", {"window": (6, None)}, id="pages-window"),
]


def listed(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """A call, and for each of its tokens a few keys or pages of its sequence, each once, some -1."""
    random = np.random.default_rng(0)
    batch = attention_batch(SPARSE) | options
    lens = np.repeat(batch["sequence_lens"], np.diff(batch["query_starts"]))
    lens = lens if name == "indices" else -(-lens // SPARSE.page_size)
    rows = np.full((len(lens), 6), -1, np.int32)
    for row, count in zip(rows, lens, strict=True):
        chosen = random.permutation(count)[:5]
        row[random.permutation(6)[: len(chosen)]] = chosen
    return batch, rows


def in_use(arrays: dict[str, Any]) -> list[list[int]]:
    """The pages of each token that its length makes count."""
    page_size = arrays["key"].shape[1]
    table, lens = (np.asarray(arrays[name]) for name in ("page_table", "key_lens"))
    return [row[: -(-count // page_size)].tolist() for row, count in zip(table, lens, strict=True)]


@pytest.mark.parametrize("name,options", WAYS)
def test_tables_made_on_a_gpu_are_those_made_on_the_host(name: str, options: dict[str, Any]) -> None:
    batch, rows = listed(name, options)
    call = attention_paged.prepared(**batch)
    expected = sparse.selected(call, *((rows, None) if name == "indices" else (None, rows))).arrays
    tensors = {key: torch.from_numpy(array) for key, array in call.arrays.items()}
    with on_a_gpu():
        got = torch_sparse.tables(tensors, call.options, len(rows), name=name, listed=torch.from_numpy(rows))
    assert in_use({**call.arrays, **got}) == in_use(dict(expected))
    for array in ("key_lens", "query_starts"):
        assert np.array_equal(got[array], expected[array])
        assert got[array].dtype == torch.int32


def test_what_lies_outside_the_sequence_or_the_table_is_left_out() -> None:
    batch, rows = listed("indices", CAUSAL)
    call = attention_paged.prepared(**batch)
    tensors = {key: torch.from_numpy(array) for key, array in call.arrays.items()}
    wild = np.concatenate([rows, np.full((len(rows), 2), [2**31 - 1, -7], np.int32)], axis=1)
    for name, given in (("indices", wild), ("page_indices", wild)):
        found = torch_sparse.tables(tensors, call.options, len(rows), name=name, listed=torch.from_numpy(given))
        num_pages = found.get("key", tensors["key"]).shape[0]
        assert all(0 <= page < num_pages for row in in_use({**tensors, **found}) for page in row)
    tables = [
        torch_sparse.tables(tensors, call.options, len(rows), name="indices", listed=torch.from_numpy(each))
        for each in (rows, wild)
    ]
    assert in_use({**tensors, **tables[0]}) == in_use({**tensors, **tables[1]})


def test_the_last_page_counts_once_however_often_it_is_listed() -> None:
    batch, _ = listed("page_indices", CAUSAL)
    call = attention_paged.prepared(**batch)
    tensors = {key: torch.from_numpy(array) for key, array in call.arrays.items()}
    last = torch.tensor([[9, 0, 9]] * 9, dtype=torch.int32)
    found = torch_sparse.tables(tensors, call.options, 9, name="page_indices", listed=last)
    assert found["key_lens"][:3].tolist() == [4 + 2, 4 + 3, 4 + 4 + 4]  # 38, 39 and 40 keys are seen


def test_a_sparse_call_on_a_gpu_has_a_request_for_each_token() -> None:
    batch, rows = listed("indices", CAUSAL)
    tensors = {key: torch.from_numpy(array) if isinstance(array, np.ndarray) else array for key, array in batch.items()}
    with on_a_gpu():
        call = attention_paged.prepared(**tensors, indices=torch.from_numpy(rows))
    assert (call.extent.requests, call.extent.keys) == (len(rows), rows.size) and not call.options.causal
    assert replace(call, options=None).arrays["page_table"].shape == rows.shape


# Gradients of pages


def test_rows_of_whole_tables_are_the_same_keys_and_their_gradients_add_up_alike() -> None:
    random = np.random.default_rng(0)
    table = torch.from_numpy(random.integers(0, 7, (3, 4)).astype(np.int32))
    lens, pages = torch.tensor([13, 0, 8], dtype=torch.int32), torch.from_numpy(random.standard_normal((7, 4, 2, 3)))
    with on_a_gpu():
        whole = torch_gather.whole_rows(table, lens, pages)
        rows = whole.rows(pages)
        marks = torch.arange(len(rows), dtype=torch.float64)[:, None, None].expand_as(rows)
        sums = whole.into_pages(marks, pages)
    packed = torch_gather.packed_rows(table, lens, 4)
    kept = torch.cat(
        [torch.arange(start, start + count) for start, count in zip(whole.key_starts, whole.key_lens, strict=True)]
    )
    assert torch.equal(rows[kept], packed.rows(pages)) and torch.equal(kept, whole.used.nonzero()[:, 0])
    assert torch.equal(sums, packed.into_pages(marks[kept], pages))


def test_tables_that_point_outside_the_pages_do_not() -> None:
    table = torch.tensor([[5, -3, 2**31 - 1]], dtype=torch.int32)
    found = torch_gather.whole_rows(table, torch.tensor([99], dtype=torch.int32), torch.zeros(4, 2, 1, 1))
    assert ((found.slots >= 0) & (found.slots < 8)).all() and found.key_lens.tolist() == [6]
