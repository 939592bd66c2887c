"""Padded batches to packed tokens and back, as programs import them beside FlashAttention.

from flash_attn.bert_padding import pad_input, unpad_input                   # before
from headrace.compat.flash_attn.bert_padding import pad_input, unpad_input   # after
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

Unpadded = tuple[Tensor, Tensor, Tensor, int]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input [rows, ...] at indices."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...]: values at indices, 0 elsewhere."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens [total, ...] of hidden_states [batch, tokens, ...] that the mask marks, and where they are.

    attention_mask [batch, tokens]: not 0 where a token counts; unused_mask: where one is kept, yet does not count.
    Behind the tokens: their indices [total] among all, int32 cu_seqlens [batch + 1], the largest length, and int32
    seqused [batch], how many count.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    found = _unpadded(hidden_states, kept.flatten().nonzero().flatten(), kept.sum(-1, dtype=torch.int32))
    return *found, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor) -> Unpadded:
    """The same for rows in which several sequences lie one after another.

    attention_mask_in_length [batch, tokens]: the lengths of a row's sequences, in any of its places, else 0.
    """
    row_lens = attention_mask_in_length.sum(-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[-1])
    indices = (places < row_lens).flatten().nonzero().flatten()
    lens = attention_mask_in_length[attention_mask_in_length != 0]
    return _unpadded(hidden_states, indices, lens)


def _unpadded(hidden_states: Tensor, indices: Tensor, lens: Tensor) -> Unpadded:
    starts = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, starts, int(lens.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """[batch, seqlen, ...]: tokens [total, ...] back at their indices, 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
