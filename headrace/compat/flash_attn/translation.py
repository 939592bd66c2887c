"""FlashAttention's words in those of headrace.ops: options, further keywords, float8 scales, requests, pages.

Its arrays are headrace's: dense [batch, tokens, heads, dim], ragged [tokens, heads, dim], pages [pages, page_size,
heads, dim]. What differs is told here; nothing is computed but what ops are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace import ops

FLOAT8 = torch.float8_e4m3fn

# Hints for a GPU's scheduler, and sizes that the arrays tell anyway: taken, and without effect.
INERT = {
    *("num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k"),
    *("seqlen_k_per_split", "disable_scheduler_metadata"),
}
_OWN_CODE = "a function of one's own would have to be compiled: write it as mask= of headrace.ops.attention"
REFUSED = {
    "gather_kv_indices": "headrace.ops.paged_attention takes indices=",
    "score_mod": _OWN_CODE,
    "score_mod_bwd": _OWN_CODE,
    "mask_mod": _OWN_CODE,
    "aux_tensors": _OWN_CODE,
    "aux_scalars": _OWN_CODE,
    "block_sparse_tensors": "pass mask= of headrace.ops.attention, or page_indices= of headrace.ops.paged_attention",
    "block_sparse_tensors_bwd": "pass mask= of headrace.ops.attention",
}
# What each function takes of `Further`.
_OF_ALL = ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "learnable_sink", "return_lse")


@dataclass(frozen=True)
class Further:
    """What FlashAttention 3 and 4 take beyond 2.

    qv [.., heads, value_dim]: a second query, for the values. descales: float32 [batch, kv_heads], what a float8 array
    is multiplied by; of other arrays they are not read. attention_chunk: a query sees keys of its own run of so many
    alone; 0: all. learnable_sink: [heads]. seqused: int32 [batch], the tokens of each sequence that count.
    rotary_seqlens: int32 [batch], the position that rotation begins with.
    """

    qv: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    attention_chunk: int | None = 0
    learnable_sink: Tensor | None = None
    return_lse: bool = False
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    page_table: Tensor | None = None
    num_heads_q: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    rotary_seqlens: Tensor | None = None

    @staticmethod
    def read(function: str, given: Mapping[str, Any], *also: str) -> Further:
        """From keywords. TypeError for one that no FlashAttention has, NotImplementedError for what headrace lacks."""
        taken = {*_OF_ALL, *also}
        refuse({name: given[name] for name in REFUSED if name in given})
        unknown = sorted(set(given) - taken - INERT - set(REFUSED))
        if unknown:
            raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
        return Further(**{name: given[name] for name in taken & set(given)})


def refuse(given: Mapping[str, Any]) -> None:
    """NotImplementedError for an argument of REFUSED, or dropout, that is neither None nor 0."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, (int, float)) and value == 0):
            got = value if isinstance(value, (int, float)) else type(value).__name__
            other = REFUSED.get(name, "headrace has no dropout; pass 0.0")
            raise NotImplementedError(f"{name}: not done here, got {got}; {other}")


def options_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float | None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> dict[str, Any]:
    """The options of an op. window_size: (left, right), None or below 0 for no bound; softcap: None or 0 for none."""
    left, right = (None if bound is None or bound < 0 else int(bound) for bound in window_size)
    one_order = {"deterministic": True} if deterministic else {}
    return one_order | {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": (left, right),
        "softcap": softcap if softcap and softcap > 0 else None,
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.float().contiguous(),
    }


def local(options: Mapping[str, Any], further: Further) -> bool:
    """Whether what a query sees depends on its place."""
    return options["causal"] or options["window"] != (None, None) or bool(further.attention_chunk)


class Attended(NamedTuple):
    """out [.., tokens, heads, value_dim]; lse [.., tokens, heads], the sink included."""

    out: Tensor
    lse: Tensor


def heads_first(lse: Tensor) -> Tensor:
    """lse as FlashAttention has it: [batch, heads, tokens], ragged [heads, tokens]."""
    return lse.transpose(-1, -2).contiguous()


# Calls


def attend(
    op: Callable[..., ops.AttentionResult],
    arrays: tuple[Tensor, Tensor, Tensor],
    options: Mapping[str, Any],
    further: Further,
    starts: Tensor | None = None,
) -> Attended:
    """What op makes of query, key and value. starts: int32 [batch + 1] of a ragged query."""
    query, key, value = arrays
    if further.qv is not None:
        query, key = torch.cat([query, further.qv], -1), torch.cat([key, value], -1)
    out_dtype, factor = torch.bfloat16 if query.dtype == FLOAT8 else query.dtype, None
    if FLOAT8 in (query.dtype, key.dtype, value.dtype):
        query, factor = _descaled(query, key, value, further=further, starts=starts)
    sinks = None if further.learnable_sink is None else further.learnable_sink.float()
    result = op(packed(query), packed(key), packed(value), sinks=sinks, **options)
    out = result.out if factor is None else result.out * factor
    lse = result.lse if sinks is None else torch.logaddexp(result.lse, sinks)
    return Attended(out.to(out_dtype), lse)


def packed(array: Tensor) -> Tensor:
    """The array, or a copy whose last dimension is contiguous."""
    return array if array.stride(-1) == 1 else array.contiguous()


def _descaled(
    query: Tensor, key: Tensor, value: Tensor, *, further: Further, starts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The query as numbers, times the scales of its own and of the keys' float8; and what to multiply results by."""
    group = query.shape[-2] // key.shape[-2]

    def factor(*scaled: tuple[Tensor, Tensor | None]) -> Tensor | None:
        scales = [scale.float() for array, scale in scaled if scale is not None and array.dtype == FLOAT8]
        if not scales:
            return None
        product = torch.stack(scales).prod(0).repeat_interleave(group, -1)
        return product[:, None, :, None] if starts is None else product[request_of_rows(starts, len(query))][..., None]

    of_scores = factor((query, further.q_descale), (key, further.k_descale))
    wide = query.to(torch.bfloat16) if query.dtype == FLOAT8 else query
    return wide if of_scores is None else wide.float() * of_scores, factor((value, further.v_descale))


def dense(arrays: tuple[Tensor, Tensor, Tensor], options: Mapping[str, Any], further: Further) -> Attended:
    """Attention of [batch, tokens, heads, dim]."""
    if further.attention_chunk:
        queries, keys = arrays[0].shape[1], arrays[1].shape[1]
        own = torch.arange(queries) + keys - queries
        options = {**options, "mask": _chunk_mask(own, torch.full_like(own, keys), further.attention_chunk)}
    return attend(ops.attention, arrays, options, further)


# Requests of a ragged batch


def rows_of(array: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """[tokens, heads, dim] and int32 starts [batch + 1], of such or, without starts, of [batch, tokens, heads, dim]."""
    if cu_seqlens is not None:
        return array, cu_seqlens.to(torch.int32)
    batch, length = array.shape[:2]
    return array.flatten(0, 1), torch.arange(batch + 1, dtype=torch.int32) * length


def request_of_rows(starts: Tensor, num_rows: int) -> Tensor:
    """Which sequence each row is of; rows behind the last are counted to it."""
    ends, rows = starts[1:].contiguous(), torch.arange(num_rows, dtype=torch.int32)
    return torch.searchsorted(ends, rows, right=True).clamp(max=max(len(ends) - 1, 0))


@dataclass(frozen=True)
class Keys:
    """Keys and values of the sequences of a batch: in pages by a table, or one run of rows each."""

    key: Tensor
    value: Tensor
    lens: Tensor  # int32 [batch]
    starts: Tensor | None = None  # int32 [batch]
    table: Tensor | None = None  # int32 [batch, pages]

    def beside_none(self) -> Keys:
        """For twice as many requests: behind each of these, one without keys."""
        lens = torch.stack([self.lens, torch.zeros_like(self.lens)], 1).flatten()
        return Keys(self.key, self.value, lens, _twice(self.starts), _twice(self.table))

    def op(self, query_starts: Tensor) -> Callable[..., ops.AttentionResult]:
        """Attention over them, as a function of query, key, value and options."""

        def over_pages(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> ops.AttentionResult:
            return ops.paged_attention(query, key, value, self.table, self.lens, query_starts=query_starts, **options)

        def over_rows(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> ops.AttentionResult:
            starts = {"query_starts": query_starts, "key_starts": self.starts, "key_lens": self.lens}
            return ops.attention(query, key, value, **starts, **options)

        return over_rows if self.table is None else over_pages


def _twice(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.repeat_interleave(2, 0)


def keys_of(key: Tensor, value: Tensor, cu_seqlens_k: Tensor | None, further: Further) -> Keys:
    """Of [tokens, heads, dim] with starts, of [batch, tokens, heads, dim], or of pages."""
    table, used = further.page_table, further.seqused_k
    if table is None:
        (key, starts), (value, _) = rows_of(key, cu_seqlens_k), rows_of(value, cu_seqlens_k)
        lens = starts.diff() if used is None else used.to(torch.int32)
        return Keys(key, value, lens, starts[:-1])
    if used is None and cu_seqlens_k is None:
        raise ValueError("seqused_k, cu_seqlens_k: expected one of them beside a page table, got None")
    lens = (cu_seqlens_k.diff() if used is None else used).to(torch.int32)  # type: ignore[union-attr]
    return Keys(key, value, lens, table=table.to(torch.int32).contiguous())


def ragged(
    query: Tensor, cu_seqlens_q: Tensor | None, keys: Keys, options: Mapping[str, Any], further: Further
) -> Attended:
    """Attention of [tokens, heads, dim] with starts, or of [batch, tokens, heads, dim].

    Rows of a sequence from seqused_q on, and rows behind the last sequence, see no key: requests of their own.
    """
    rows, starts = rows_of(query, cu_seqlens_q)
    qv = None if further.qv is None else rows_of(further.qv, cu_seqlens_q)[0]
    query_starts, of_all = starts, dict(options)
    if further.attention_chunk:
        own, lens = _own_keys(starts, keys.lens, further.seqused_q, len(rows))
        of_all["mask"] = _chunk_mask(own, lens, further.attention_chunk)
    if further.seqused_q is not None or _rows_are_left(starts, len(rows)):
        query_starts, keys = _with_idle_rows(starts, further.seqused_q, len(rows)), keys.beside_none()
        if options["alibi_slopes"] is not None and options["alibi_slopes"].dim() == 2:
            of_all["alibi_slopes"] = _twice(options["alibi_slopes"])
    found = attend(keys.op(query_starts), (rows, keys.key, keys.value), of_all, replace(further, qv=qv), starts)
    if cu_seqlens_q is not None:
        return found
    return Attended(*(array.unflatten(0, query.shape[:2]) for array in found))


def _rows_are_left(starts: Tensor, num_rows: int) -> bool:
    return not torch.compiler.is_compiling() and int(starts[-1]) < num_rows


def _with_idle_rows(starts: Tensor, used: Tensor | None, num_rows: int) -> Tensor:
    """Starts of twice as many requests: of each sequence the rows that are used, then those up to the next one."""
    counts = starts.diff() if used is None else used.to(torch.int32)
    both = torch.stack([starts[:-1], starts[:-1] + counts], 1).flatten()
    return torch.cat([both, both.new_tensor([num_rows])])


def _own_keys(starts: Tensor, key_lens: Tensor, used: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """The key each row stands at, and how many keys its sequence has."""
    request = request_of_rows(starts, num_rows)
    counts = starts.diff() if used is None else used
    own = torch.arange(num_rows) - starts[request] + (key_lens - counts)[request]
    return own, key_lens[request]


def _chunk_mask(own: Tensor, lens: Tensor, chunk: int) -> Tensor:
    """Whether a key is in the run of `chunk` of a row's own, bool [rows, columns]; the last key comes last."""
    columns = int(lens.max()) if len(lens) else 1
    keys, first = torch.arange(columns) - (columns - lens)[:, None], (own - own % chunk)[:, None]
    return (keys >= first) & (keys < first + chunk)
