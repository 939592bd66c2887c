"""Shared beginnings, computed once: requests whose page tables begin with the same pages.

    group g: requests whose first P_g pages are the same           rest: what lies behind them, per request

    shared part   one request per group: all its rows against P_g * page_size keys, all of which each row sees
    rest          every request against its other keys
    merge         the rows of groups, by log-sum-exp (merge_attention.py), where sinks take their weight

A system prompt in front of 32 conversations is then read once instead of 32 times. What it costs is two calls more and
the partial results, so a group is formed where the predicted time says that it pays.

Groups are found by sorting the rows of the page table: a common beginning is then one of neighbours. Longest
beginnings first, requests join groups; a group gives way to a larger one with a shorter beginning where that saves
more. One level: a request is in one group.

Wins where reading binds: with 8/8 heads of 128 in fp16, 16 requests x 16384 shared keys take 8.8 ms instead of 21.4
(AMD Zen 4, 2 cores, AVX-512; 2026-11-21). With 32/8 heads arithmetic binds there, and nothing is shared.

Juravsky et al. 2024, "Hydragen"; Ye et al. 2024, "Cascade Inference".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, Fixed, dtype_name, empty_like, is_torch
from headrace.machine import Machine, this_machine
from headrace.ops.attention_merge import merge
from headrace.ops.attention_options import AttentionResult
from headrace.ops.attention_request import WIDTHS, Call, kernels, launch
from headrace.ops.select import Request, Traffic

# Two more calls, and the tables that are made for them: what a group must save at least.
EXTRA_CALLS_SECONDS = 4e-4
_PARTIAL_MOVES = 4  # of a row's second result: written, read, and the first one too


@dataclass(frozen=True)
class Group:
    """Requests that begin with the same pages."""

    requests: tuple[int, ...]
    num_pages: int


@dataclass(frozen=True)
class Cascade:
    """The groups of a call, and what they save."""

    groups: tuple[Group, ...]
    page_size: int
    saved_keys: int  # that are not read again
    saved_bytes: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(g.requests)} requests x {g.num_pages * self.page_size} keys" for g in self.groups)
        return f"shared beginnings read once: {sizes}; {self.saved_bytes / 1e6:.1f} MB less"


@dataclass(frozen=True)
class Sharing:
    """What `groups_of` weighs: pages each request may share, its rows, and the seconds they take."""

    limits: np.ndarray  # [requests] pages that all its rows see in full
    rows: np.ndarray  # [requests] query rows
    page_s: float  # to read a page
    row_page_s: float  # to compute a row against a page
    row_s: float  # to write, read and merge a row's second part

    def may_save(self) -> bool:
        """Whether reading binds anywhere: arithmetic is the same, shared or not."""
        return bool(((self.limits > 0) & (self.rows * self.row_page_s < self.page_s)).any())

    def saved_s(self, group: Group) -> float:
        """What a group saves; below 0: it costs."""
        rows = int(self.rows[list(group.requests)].sum())
        return self.joining_s(group, group.num_pages) - group.num_pages * max(self.page_s, rows * self.row_page_s)

    def joining_s(self, group: Group, num_pages: int) -> float:
        """What is saved when these requests join others, whose rows read num_pages anyway."""
        rows = self.rows[list(group.requests)]
        apart = np.maximum(self.page_s, rows * self.row_page_s).sum()
        return float(num_pages * apart - rows.sum() * self.row_s)


def cascade_of(call: Call, wanted: bool | str) -> Cascade | None:
    """The groups of a paged call that pay ("auto"), or all there are (True); None where there are none.

    With True, options under which nothing can be shared are an ArgumentError.
    """
    if wanted is not True and wanted is not False and wanted != "auto":
        raise ArgumentError(f'cascade: expected True, False or "auto", got {wanted!r}')
    if wanted is False or (wanted == "auto" and call.extent.requests < 2):
        return None
    if reason := _why_not(call):
        if wanted is True:
            raise ArgumentError(f"cascade: expected False {reason}, got True")
        return None
    table, limits = np.asarray(call.arrays["page_table"]), page_limits(call)
    if limits is None or not _begins_alike(table, limits):
        return None
    sharing = _sharing(call, limits, this_machine()) if wanted == "auto" else _free(call, limits)
    if not sharing.may_save():
        return None
    groups = groups_of(table, sharing)
    page_size = call.arrays["key"].shape[1]
    saved = sum((len(group.requests) - 1) * group.num_pages for group in groups) * page_size
    least = EXTRA_CALLS_SECONDS if wanted == "auto" else 0.0
    if not groups or sum(sharing.saved_s(group) for group in groups) <= least:
        return None
    return Cascade(tuple(groups), page_size, saved, saved * _key_bytes(call))


def _why_not(call: Call) -> str:
    """Why nothing may be shared, or nothing."""
    options = call.options
    if call.place[0] != "cpu":
        return "on a GPU, whose tables are read when the kernel runs"
    if any(isinstance(array, Buffer) for array in call.arrays.values()):
        return "in a program, whose tables are not known yet"
    if options.deterministic:
        return "with deterministic=True: groups depend on neighbours"
    if options.left is not None:
        return "with a window, from which beginnings fall out"
    if options.right is not None and options.align != "bottom_right":
        return "with causality aligned at the top left: own keys are counted from the beginning"
    if "alibi_slopes" in call.arrays:
        return "with alibi_slopes: distances differ from request to request"
    return ""


def page_limits(call: Call) -> np.ndarray | None:
    """Pages at the beginning of each request that all its rows see in full, int64 [requests]; None: bad lengths."""
    page_size, max_pages = call.arrays["key"].shape[1], call.arrays["page_table"].shape[1]
    lens, starts = (np.asarray(call.arrays[name]).astype(np.int64) for name in ("key_lens", "query_starts"))
    rows = np.diff(starts)
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != call.extent.queries or (rows < 0).any():
        return None  # the kernel says what is wrong
    if (lens < 0).any() or (lens > max_pages * page_size).any():
        return None
    seen = lens if call.options.right is None else np.minimum(lens - rows + 1 + call.options.right, lens)
    if "mask" in call.arrays:
        seen = np.minimum(seen, lens - call.arrays["mask"].shape[-1])
    return np.where(rows > 0, np.maximum(seen, 0) // page_size, 0)


def _begins_alike(table: np.ndarray, limits: np.ndarray) -> bool:
    first = table[limits > 0, 0] if table.shape[1] else table[:0]
    return len(first) > 1 and len(np.unique(first)) < len(first)


def _key_bytes(call: Call) -> int:
    """Bytes of a key and its value, for all KV heads."""
    extent, arrays = call.extent, call.arrays
    width, dtype = WIDTHS[dtype_name(arrays["key"])], dtype_name(arrays["key"])
    dims = extent.head_dim + (0 if call.op == "mla_attention" else extent.value_dim)
    scales = 4 * ("key_scales" in arrays) + 4 * ("value_scales" in arrays)
    return extent.kv_heads * (dims * width // (2 if dtype == "uint8" else 1) + scales)


def _sharing(call: Call, limits: np.ndarray, machine: Machine) -> Sharing:
    """Read at the rate of one beginning, which is read over and over; computed as fast as the kernel that would run."""
    extent, page_size = call.extent, call.arrays["key"].shape[1]
    asked, rows = call.request(), _query_lens(call)
    page_bytes, most = page_size * _key_bytes(call), max(int(limits.max()), 1)
    page_s = machine.seconds(most * page_bytes, 0, asked.traffic.unit)[0] / most
    row_flops = 2 * page_size * extent.heads * (extent.head_dim + extent.value_dim)
    row_page_s = _compute_seconds(asked, row_flops * most, machine) / most
    query_bytes = extent.head_dim * WIDTHS[dtype_name(call.arrays["query"])]
    partial_bytes = extent.heads * (extent.value_dim * 4 * _PARTIAL_MOVES + 2 * query_bytes)
    return Sharing(limits, rows, page_s, row_page_s, machine.seconds(partial_bytes, 0, asked.traffic.unit)[0])


def _compute_seconds(asked: Request, flops: int, machine: Machine) -> float:
    """What that much arithmetic takes the cheapest kernel that can run the request."""
    much, nothing = (replace(asked, traffic=Traffic(0, n, asked.traffic.unit)) for n in (flops, 0))
    able = [kernel for kernel in kernels() if asked.device in kernel.devices and not kernel.why_not(asked)]
    return min((k.cost(much, machine) - k.cost(nothing, machine) for k in able), default=0.0)


def _query_lens(call: Call) -> np.ndarray:
    return np.diff(np.asarray(call.arrays["query_starts"]).astype(np.int64))


def _free(call: Call, limits: np.ndarray) -> Sharing:
    """Where every page not read again counts, and nothing else."""
    return Sharing(limits, _query_lens(call), 1.0, 0.0, 0.0)


def groups_of(table: np.ndarray, sharing: Sharing) -> list[Group]:
    """Groups of requests with the same first pages, by what they save; each request in one at most.

    Decided from the longest beginnings to the shortest, each time for the better: not always the best there is.
    """
    order, common = sorted_by_beginning(table, sharing.limits)
    forest: list[tuple[int, list[Group], list[int]]] = []  # pages in common with what follows, its groups, the others
    for request, shared in zip(order.tolist(), [*common.tolist(), 0], strict=False):
        groups: list[Group] = []
        loose = [request]
        # Neighbours to the left that have more in common with this one than it has with the next are complete.
        while forest and forest[-1][0] >= max(shared, 1):
            pages, earlier, others = forest.pop()
            groups, loose = _joined(sharing, earlier + groups, others + loose, pages)
        forest.append((shared, groups, loose))
    return sorted((group for _, groups, _ in forest for group in groups), key=lambda group: group.requests)


def _joined(sharing: Sharing, groups: list[Group], loose: list[int], num_pages: int) -> tuple[list[Group], list[int]]:
    """Requests with num_pages in common: those without a group, and groups that then save more, may become one."""
    leaving = [group for group in groups if sharing.joining_s(group, num_pages) >= sharing.saved_s(group)]
    everyone = Group(tuple(sorted([*loose, *(r for group in leaving for r in group.requests)])), num_pages)
    apart = Group(tuple(sorted(loose)), num_pages)
    alone = sum(sharing.saved_s(group) for group in leaving) + max(sharing.saved_s(apart), 0.0)
    if leaving and sharing.saved_s(everyone) > alone:
        return [*(group for group in groups if group not in leaving), everyone], []
    return ([*groups, apart], []) if sharing.saved_s(apart) > 0 else (groups, loose)


def sorted_by_beginning(table: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Requests in the order of their pages, and how many of the first pages each has in common with the next."""
    requests = np.flatnonzero(limits > 0)
    longest = min(int(limits[requests].max(initial=0)), table.shape[1])
    # Past its limit every request is unlike all others.
    pages = np.where(np.arange(longest) < limits[requests, None], table[requests, :longest], -1 - requests[:, None])
    order = np.lexsort(pages.T[::-1]) if longest else np.arange(len(requests))
    same = np.cumprod(pages[order][1:] == pages[order][:-1], axis=1)
    return requests[order], same.sum(axis=1)


# Running it


def launch_shared(
    call: Call,
    result: AttentionResult,
    *,
    cascade: bool | str,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> AttentionResult:
    """Fills the result, with shared beginnings computed once where there are some and `cascade` allows it."""
    found = cascade_of(call, cascade)
    if found is None:
        return launch(call, result, kernel=kernel, require=require)
    return run_cascade(call, found, result, kernel=kernel, require=require)


def run_cascade(
    call: Call, cascade: Cascade, result: AttentionResult, *, kernel: str | None = None, require: Sequence[str] = ()
) -> AttentionResult:
    """Fills the result: shared beginnings, the rest, and their merge."""
    rows, shared = shared_call(call, cascade)
    rest = rest_call(call, cascade)
    parts = [launch(part, _partial(part), kernel=kernel, require=require) for part in (shared, rest)]
    others = np.setdiff1d(np.arange(call.extent.queries), rows)
    for own, pieces in ((rows, [parts[0], _rows(parts[1], rows)]), (others, [_rows(parts[1], others)])):
        if len(own):
            _merge(pieces, result, own, call.arrays.get("sinks"))
    return result


def _merge(parts: list[AttentionResult], result: AttentionResult, rows: np.ndarray, sinks: Any) -> None:
    outs, lses = [part.out for part in parts], [part.lse for part in parts]
    if _neighbours(rows):
        merge(outs, lses, sinks=sinks, out=_rows(result, rows))
        return
    merged = merge(outs, lses, sinks=sinks, out_dtype=dtype_name(result.out))
    result.out[_places(result.out, rows)] = merged.out
    result.lse[_places(result.lse, rows)] = merged.lse


def shared_call(call: Call, cascade: Cascade) -> tuple[np.ndarray, Call]:
    """The rows that have a group, and the call of one request per group: they against its beginning."""
    starts, table = (np.asarray(call.arrays[name]) for name in ("query_starts", "page_table"))
    ranges = [[np.arange(starts[r], starts[r + 1]) for r in group.requests] for group in cascade.groups]
    rows = np.concatenate([rows for group in ranges for rows in group])
    counts = [sum(len(rows) for rows in group) for group in ranges]
    pages = np.array([group.num_pages for group in cascade.groups])
    first = [group.requests[0] for group in cascade.groups]
    lens = (pages * cascade.page_size).astype(np.int32)
    found = {
        "query": _take(_host(call.arrays["query"]), rows),
        "page_table": np.ascontiguousarray(table[first, : pages.max()]),
        "key_lens": lens,
        "query_starts": np.cumsum([0, *counts], dtype=np.int32),
    }
    arrays = {k: v for k, v in call.arrays.items() if k not in ("mask", "sinks")} | found
    extent = replace(call.extent, requests=len(first), queries=len(rows), keys=int(lens.sum()))
    return rows, replace(
        call, arrays=arrays, extent=extent, options=replace(call.options, causal=False, window=(None, None))
    )


def rest_call(call: Call, cascade: Cascade) -> Call:
    """The call of all requests, those of groups against what lies behind their beginning."""
    table, lens = np.asarray(call.arrays["page_table"]).copy(), np.asarray(call.arrays["key_lens"]).copy()
    for group in cascade.groups:
        members = list(group.requests)
        table[members, : table.shape[1] - group.num_pages] = table[members, group.num_pages :]
        lens[members] -= group.num_pages * cascade.page_size
    arrays = {k: v for k, v in call.arrays.items() if k != "sinks"} | {"page_table": table, "key_lens": lens}
    return replace(call, arrays=arrays, extent=replace(call.extent, keys=int(lens.sum())))


def _host(array: Any) -> Any:
    return array.numpy() if isinstance(array, Fixed) else array


def _take(array: Any, rows: np.ndarray) -> Any:
    """Rows of an array, a view where they are neighbours."""
    if _neighbours(rows):
        return array[int(rows[0]) : int(rows[-1]) + 1]
    return array[_places(array, rows)]


def _neighbours(rows: np.ndarray) -> bool:
    return len(rows) > 0 and bool((np.diff(rows) == 1).all())


def _places(array: Any, rows: np.ndarray) -> Any:
    if is_torch(array):
        import torch

        return torch.from_numpy(rows)
    return rows


def _rows(part: AttentionResult, rows: np.ndarray) -> AttentionResult:
    return AttentionResult(_take(part.out, rows), _take(part.lse, rows))


def _partial(call: Call) -> AttentionResult:
    """Where a part goes, not rounded to what the caller gets."""
    query, extent = call.arrays["query"], call.extent
    rows = (extent.queries, extent.heads)
    out = empty_like(query, (*rows, extent.value_dim), "float64" if dtype_name(query) == "float64" else "float32")
    return AttentionResult(out, empty_like(query, rows, dtype_name(out)))
