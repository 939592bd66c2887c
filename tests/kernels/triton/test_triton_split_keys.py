"""Dense attention over its keys seen as pages: within the budget of every option, where they lie as pages can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace import ops
from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import AttentionCase, dense, heads
from headrace.check.attention_expected import assert_close, assert_kernel_holds, prepared
from headrace.check.guards import Guarded, as_numpy
from headrace.kernels.dense_pages import as_pages, page_len_of, pages_apart
from headrace.kernels.triton import split_keys
from headrace.ops.attention_options import AttentionResult
from headrace.ops.attention_request import kernels

NAME = "triton_split_keys"
SMALL = heads(4, 2, 16)
CASES = (
    dense("decode", 2, 1, 64, **SMALL),
    dense("decode_one", 1, 1, 37, **SMALL),  # with room for a whole last page: the guard behind it
    dense("decode_odd_batch", 3, 1, 48, **heads(3, 3, 24, 17)),
    dense("verify", 2, 5, 80, **SMALL),
    dense("verify_top_left", 2, 5, 32, align="top_left", **SMALL),
    dense("decode_key_lens", 3, 2, 64, key_lens=(64, 9, 0), **SMALL),
    dense("decode_heads_first", 2, 1, 48, layout="heads_first", **heads(4, 2, 32)),
    dense("verify_heads_first", 2, 3, 32, layout="heads_first", **SMALL),
    dense("decode_window", 2, 2, 96, window=(30, None), **SMALL),
    dense("decode_all", 2, 3, 64, causal=False, sinks=True, alibi="requests", softcap=9.0, **SMALL),
)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_within_budget(case: AttentionCase, dtype: str, device: str) -> None:
    assert_kernel_holds(case, NAME, dtype, dtype, out_dtype=dtype, device=device)


def test_a_part_of_a_larger_cache_is_read_where_it_lies(device: str) -> None:
    """As of a static cache, of which 37 of 64 keys are written: the others are NaN."""
    case = dense("static", 2, 1, 37, **SMALL)
    batch = attention_batch(case)
    for name in ("key", "value"):
        cache = np.full((2, 64, *batch[name].shape[2:]), np.nan, np.float32)
        cache[:, :37] = batch[name]
        batch[name] = cache[:, :37]
    tensors = Guarded(device).tensors(batch)
    tensors |= {name: torch.as_tensor(batch[name].base).to(device)[:, :37] for name in ("key", "value")}
    got = ops.attention(**tensors, kernel=NAME)
    exact = reference(case, batch)
    assert_close(AttentionResult(as_numpy(got.out), as_numpy(got.lse)), exact, straightforward(case, batch, exact))


def reasons(key: torch.Tensor, value: torch.Tensor, queries: int = 1, **options: Any) -> list[str]:
    [found] = [kernel for kernel in kernels() if kernel.name == NAME]
    query = torch.zeros(key.shape[0], queries, 2 * key.shape[2], key.shape[3])
    asked = prepared({"query": query, "key": key, "value": value, **options}).request()
    return [reason.predicate for reason in found.why_not(asked)]


def test_keys_that_are_no_pages_are_refused() -> None:
    whole, odd = torch.zeros(2, 64, 2, 8), torch.zeros(2, 50, 2, 8)
    assert reasons(whole, whole) == []
    assert reasons(odd, odd) == ["keys in memory"]  # 50 keys from one of the batch to the next
    assert reasons(odd[:1], odd[:1]) == []  # behind the first lie those of the second
    assert reasons(odd[1:], odd[1:]) == ["keys in memory"]  # behind the last lies nothing
    assert reasons(whole[:, :50], whole[:, :50]) == []
    assert reasons(whole[:, 15:], whole[:, 15:]) == ["keys in memory"]  # 49 keys, and nothing behind the last
    assert reasons(whole[:, :50], torch.zeros(2, 128, 2, 8)[:, :50]) == ["keys in memory"]  # other pages apart
    assert reasons(whole, whole, queries=33) == ["query rows"]
    assert reasons(whole, whole, mask=torch.rand(1, 64) < 0.5) == ["mask"]


@pytest.mark.parametrize("page_len", [16, 32])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_pages_are_the_same_memory(page_len: int, axes: tuple[int, ...]) -> None:
    shape = tuple((3, 96, 2, 5)[axis] for axis in axes)
    array = torch.arange(3 * 96 * 2 * 5).reshape(shape).permute(*axes)[:, :70]
    pages, apart = as_pages(array, page_len), pages_apart(array, page_len)
    for r in range(3):
        rows = pages[r * apart : r * apart + -(-70 // page_len)].flatten(0, 1)[:70]
        assert torch.equal(rows, array[r]) and pages.data_ptr() == array.data_ptr()


def test_the_largest_pages_are_taken() -> None:
    for keys, expected in ((256, 128), (192, 64), (96, 16), (48, 16), (40, 8), (36, 0)):
        array = torch.zeros(2, keys, 1, 4)
        assert page_len_of(array, array) == expected == page_len_of(array.numpy(), array.numpy())


def test_a_graph_reads_the_tables_that_calls_before_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(split_keys, "_made", lambda sizes, device: tuple(torch.zeros(3) for _ in range(3)))
    monkeypatch.setattr(split_keys, "_kept", {})
    monkeypatch.setattr(split_keys, "_of_graphs", {})
    device = torch.device("cuda")
    sizes = [(2, 1, keys, 16, 4) for keys in range(100)]
    before = split_keys._tables(sizes[0], device)
    now["capturing"] = True
    assert split_keys._tables(sizes[0], device) is before
    unknown = split_keys._tables(sizes[1], device)
    now["capturing"] = False
    assert split_keys._tables(sizes[1], device) is not unknown  # that graph's own
    for size in sizes[1:]:
        split_keys._tables(size, device)
    assert len(split_keys._kept) == 64 and (device, *sizes[0]) not in split_keys._kept
    now["capturing"] = True
    assert split_keys._tables(sizes[0], device) is before  # other calls have not taken it from the graph
