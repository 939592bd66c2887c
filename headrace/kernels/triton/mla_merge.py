"""Partial results of latent attention, joined in the order of the keys.

Computes   ops/attention_merge.py over the parts of an item that mla_attention.py left in its workspace.
Wins       over joining by the last who arrives: a part of 64 rows is 131 KB, which takes one multiprocessor more than a
           microsecond to read, and with few requests an item has dozens of parts; here all multiprocessors read.
Schedule   a program takes 4 rows: the largest score of all parts at once, then sums four parts at a time, in order.
           Items that are whole cost a look at two numbers.
Source     Dao 2023, "Flash-Decoding".
Error      float32 sums of float32.
Measured   not measured yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import HIDDEN
from headrace.kernels.triton.paged_parts import write_rows
from headrace.kernels.triton.schedule import extent_of

MERGED_ROWS = 4
_AT_ONCE = tl.constexpr(4)


@triton.jit
def slot_of(first, part, shared_out: tl.constexpr):
    """Of a part of an item: a worker has two slots, the first of them for what continues an item."""
    place = first + part
    if shared_out:
        place += part - (part > 0).to(tl.int32)
    return place


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "most_keys", "left", "right", "halvings"])
def mla_merge_kernel(
    key_lens,
    query_starts,
    sinks,
    out,
    lse,
    partial_out,
    partial_sums,
    parts,
    num_requests,
    num_tokens,
    most_keys,
    left,
    right,
    halvings,
    out_token,
    out_head,
    lse_token,
    lse_head,
    setup: tl.constexpr,
    line: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    TAKEN: tl.constexpr,
):
    """Program (member of an item, which TAKEN of its rows)."""
    item = tl.program_id(0) // setup.members
    member = tl.program_id(0) % setup.members
    batch = (query_starts, key_lens, num_requests, num_tokens, most_keys, left, right, halvings)
    _, first_token, tokens, _, item_row, _, _, _, _ = extent_of(item, batch, line)
    first_row = item_row + member * setup.rows
    in_tile = tl.program_id(1) * TAKEN + tl.arange(0, TAKEN)
    live = first_row + in_tile < tokens * setup.heads
    number = item * 0
    if first_row + tl.program_id(1) * TAKEN < tokens * setup.heads:
        number = tl.load(parts + 2 * item + 1)
    if number > 1:
        first = tl.load(parts + 2 * item)
        every = tl.arange(0, MOST_PARTS)
        slot = (slot_of(first, every, setup.shared_out) * setup.members + member).to(tl.int64)
        tops = partial_sums + slot[:, None] * (2 * setup.rows) + in_tile[None, :]
        top = tl.max(tl.load(tops, mask=(every < number)[:, None] & live[None, :], other=HIDDEN), 0)
        base = tl.where(top == HIDDEN, 0.0, top)
        column = tl.arange(0, setup.values)
        total = tl.full([TAKEN], 0.0, tl.float32)
        sums = tl.full([TAKEN, setup.values], 0.0, tl.float32)
        for some in range(0, number, _AT_ONCE):
            part = some + tl.arange(0, _AT_ONCE)
            slots = (slot_of(first, part, setup.shared_out) * setup.members + member).to(tl.int64)
            there = (part < number)[:, None] & live[None, :]
            places = partial_sums + slots[:, None] * (2 * setup.rows) + in_tile[None, :]
            shares = tl.exp2(tl.load(places, mask=there, other=HIDDEN) - base[None, :])
            total += tl.sum(shares * tl.load(places + setup.rows, mask=there, other=0.0), 0)
            sources = partial_out + (slots[:, None] * setup.rows + in_tile[None, :])[:, :, None] * setup.values
            found = tl.load(sources + column[None, None, :], mask=there[:, :, None], other=0.0)
            sums += tl.sum(found * shares[:, :, None], 0)
        row = first_row + in_tile
        strides = (out_token, out_head, lse_token, lse_head)
        token = first_token + row // setup.heads
        write_rows(out, lse, sinks, token, row % setup.heads, live, top, total, sums, strides, setup)
