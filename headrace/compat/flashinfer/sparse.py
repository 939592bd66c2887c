"""Attention over blocks: rows of queries in blocks, each over the blocks of keys that are listed for it.

A block row is a request and a block of keys a page, so that only listed keys are read. With blocks of different sizes,
each KV head with its own, pages are single keys and a block row of a head is a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import Place, Scale, Scales, Variant, attend, copied
from headrace.compat.flashinfer.batch import Batch, int32, listed_pages
from headrace.compat.flashinfer.layout import Dtype, dtype_of
from headrace.compat.flashinfer.plan import Plan
from headrace.compat.flashinfer.workspace import Workspace, planned


@dataclass(frozen=True)
class _Plan(Plan):
    num_columns: int = 1
    kv_heads: int = 1


def convert_bsr_mask_layout(mask: Tensor, indptr: Tensor) -> Tensor:
    """Masks of blocks [blocks, rows, columns] as those of block rows, [rows, their blocks * columns] each, flat."""
    bounds = indptr.tolist()
    rows = [mask[begin:end].transpose(0, 1).reshape(-1) for begin, end in pairwise(bounds)]
    return torch.cat(rows) if rows else mask.reshape(-1)


class BlockSparseAttentionWrapper(Workspace):
    """Attention of q [M, heads, head_dim] over k and v [N, kv_heads, head_dim] in blocks of R queries and C keys."""

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer)
        self._plan: _Plan | None = None

    def plan(
        self,
        indptr: Tensor | None,
        indices: Tensor | None,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Tensor | None = None,
        packed_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = "float16",
        non_blocking: bool = True,
        block_mask: Tensor | None = None,
    ) -> None:
        """What the next runs have in common.

        Block row i sees the blocks indices[indptr[i] : indptr[i + 1]]. mask bool [blocks, R, C]: of each of them;
        causal, without one, is among the keys a block row sees, aligned at the bottom right.
        """
        if block_mask is not None or indptr is None or indices is None:
            raise NotImplementedError(
                "block_mask: pass indptr and indices; VariableBlockSparseAttentionWrapper has a mask for each head"
            )
        blocks = int32(indptr)
        rows = torch.arange(len(blocks), dtype=torch.int32) * R
        starts, lens = rows.clamp(max=M), blocks.diff() * C
        flat = None if mask is None or packed_mask is not None else convert_bsr_mask_layout(mask, blocks)
        batch = Batch(starts, lens, page_table=listed_pages(blocks, indices)).masked(flat, packed_mask)
        variant = Variant(
            causal=causal and mask is None and packed_mask is None,
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        self._plan = _Plan(batch, variant, dtype_of(o_data_type), num_columns=C)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """out [M, heads, head_dim] in o_data_type, with return_lse also the base-2 log-sum-exp [M, heads]."""
        plan: _Plan = planned(self._plan)
        pages = tuple(array.unflatten(0, (-1, plan.num_columns)) for array in (k, v))
        scales, place = Scales(scale_q, scale_k, scale_v), Place(out, lse, plan.out_dtype)
        results = attend(q, (pages[0], pages[1]), plan.batch, plan.variant, scales=scales, place=place)
        return results if return_lse else results[0]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """run with options given here, which replace those of the plan."""
        plan: _Plan = planned(self._plan, "forward")
        self._plan = plan.with_options(
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        found: Tensor = self.run(q, k, v, scale_q, scale_k, scale_v)
        return found


def _seen_keys(seen: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """How many keys each block row of each head sees, and which, in a row of all heads' keys."""
    counts, keys, first = [], [], 0
    for head, sizes in zip(seen, columns, strict=True):
        by_key = head[:, torch.repeat_interleave(torch.arange(len(sizes)), sizes)]
        counts.append(by_key.sum(1))
        keys.append(by_key.nonzero()[:, 1] + first)
        first += int(sizes.sum())
    return torch.cat(counts), torch.cat(keys)


class VariableBlockSparseAttentionWrapper(Workspace):
    """Attention of q [heads, queries, head_dim] over k and v [kv_heads, keys, head_dim] in blocks of any sizes."""

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer)
        self._plan: _Plan | None = None

    def plan(
        self,
        block_mask_map: Tensor,
        block_row_sz: Tensor,
        block_col_sz: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
    ) -> None:
        """What the next runs have in common.

        block_mask_map bool [kv_heads, block rows, block columns]: what each sees; block_row_sz [kv_heads, block rows]
        and block_col_sz [kv_heads, block columns]: their queries and keys. Causal is as in BlockSparseAttentionWrapper.
        """
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), block_row_sz.long().flatten().cumsum(0)])
        lens, keys = _seen_keys(block_mask_map.bool(), block_col_sz.long())
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
        table = listed_pages(ends, keys)
        variant = Variant(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        self._plan = _Plan(Batch(int32(starts), int32(lens), page_table=table), variant, kv_heads=num_kv_heads)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """out [heads, queries, head_dim] in q's type, with return_lse also the base-2 log-sum-exp [heads, queries]."""
        plan: _Plan = planned(self._plan)
        group, queries = q.shape[0] // plan.kv_heads, q.shape[1]
        tokens = q.unflatten(0, (plan.kv_heads, group)).transpose(1, 2).flatten(0, 1)
        pages = tuple(array.flatten(0, 1)[:, None, None] for array in (k, v))
        found, sums = attend(tokens, (pages[0], pages[1]), plan.batch, plan.variant)
        result = found.unflatten(0, (plan.kv_heads, queries)).transpose(1, 2).flatten(0, 1)
        by_head = sums.unflatten(0, (plan.kv_heads, queries)).transpose(1, 2).flatten(0, 1)
        result = result if out is None else copied(result, out, "out")
        by_head = by_head if lse is None else copied(by_head, lse, "lse")
        return (result, by_head) if return_lse else result

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """run with options given here, which replace those of the plan."""
        plan: _Plan = planned(self._plan, "forward")
        self._plan = plan.with_options(
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        found: Tensor = self.run(q, k, v)
        return found
