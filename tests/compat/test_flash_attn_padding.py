"""What programs import beside FlashAttention: packing of padded batches, and the rotary embedding."""

import pytest
import torch
from plain_attention import random

from headrace.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from headrace.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from headrace.compat.flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func, apply_rotary_emb_torch

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()])
def test_a_batch_is_packed_and_padded_again(mask):
    x = random(3, 4, 2, 5)
    packed, indices, starts, longest, used = unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 2, 9, 11]
    assert (starts.tolist(), starts.dtype, longest, used.tolist()) == ([0, 3, 3, 5], torch.int32, 3, [3, 0, 2])
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert torch.equal(pad_input(packed, indices, 3, 4), x * MASK[..., None, None])


def test_tokens_that_are_kept_and_do_not_count():
    x, unused = random(3, 4, 2), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    packed, indices, starts, longest, used = unpad_input(x, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 8, 9, 11]
    assert (starts.tolist(), longest, used.tolist()) == ([0, 4, 4, 7], 4, [3, 0, 2])
    assert torch.equal(packed, x.flatten(0, 1)[indices])


def test_rows_that_hold_several_sequences():
    x = random(3, 6, 2)
    lens = torch.tensor([[2, 3, 0, 0, 0, 0], [0, 3, 2, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, starts, longest = unpad_input_for_concatenated_sequences(x, lens)
    assert starts.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(packed, x.flatten(0, 1)[indices])


def test_gradients_go_back_to_their_places():
    x = random(3, 4, 2).requires_grad_()
    packed, indices, *_ = unpad_input(x, MASK)
    (found,) = torch.autograd.grad(pad_input(2 * packed, indices, 3, 4).sum(), x)
    assert torch.equal(found, 2.0 * MASK[..., None].expand(3, 4, 2))
    rows = random(5, 2).requires_grad_()
    chosen = index_first_axis(rows, torch.tensor([4, 0, 4]))
    assert torch.equal(torch.autograd.grad(chosen.sum(), rows)[0][:, 0], torch.tensor([1.0, 0, 0, 0, 2]))
    (found,) = torch.autograd.grad(index_put_first_axis(rows, torch.arange(0, 10, 2), 10)[:4].sum(), rows)
    assert torch.equal(found[:, 0], torch.tensor([1.0, 1, 0, 0, 0]))


def test_a_padded_program():
    q, k, v = (random(3, 4, 2, 8, seed=i) for i in range(3))
    (packed_q, indices, starts, longest, _), (packed_k, *_), (packed_v, *_) = (unpad_input(x, MASK) for x in (q, k, v))
    out = flash_attn_varlen_func(packed_q, packed_k, packed_v, starts, starts, longest, longest, causal=True)
    padded = pad_input(out, indices, 3, 4)
    torch.testing.assert_close(padded[:1, :3], flash_attn_func(q[:1, :3], k[:1, :3], v[:1, :3], causal=True))
    assert (padded[1] == 0).all()


# Rotation


def by_hand(x, cos, sin, interleaved):
    """One pair after the other; x [tokens, heads, dim], cos and sin [tokens, pairs], float64."""
    rotated, pairs = x.clone(), cos.shape[1]
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        c, s = cos[:, i, None], sin[:, i, None]
        rotated[..., a] = x[..., a] * c - x[..., b] * s
        rotated[..., b] = x[..., b] * c + x[..., a] * s
    return rotated


ANGLES = random(40, 6, dtype=torch.float64)
COS, SIN = ANGLES.cos(), ANGLES.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([0, 7, 30], dtype=torch.int32)])
def test_rotation_of_a_batch(interleaved, offsets):
    x = random(3, 9, 2, 16, dtype=torch.float64)
    found = apply_rotary_emb(x, COS, SIN, interleaved=interleaved, seqlen_offsets=offsets)
    for row, mine, first in zip(x, found, torch.as_tensor(offsets).expand(3), strict=True):
        places = torch.arange(9) + first
        assert torch.equal(mine, by_hand(row, COS[places], SIN[places], interleaved))


@pytest.mark.parametrize("offsets", [0, torch.tensor([5, 1, 0])])
def test_rotation_of_sequences_one_after_another(offsets):
    x, starts = random(11, 2, 16, dtype=torch.float64), torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    found = apply_rotary_emb(x, COS, SIN, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=7)
    firsts = torch.as_tensor(offsets).expand(3)
    places = torch.cat([torch.arange(4) + firsts[0], torch.arange(7) + firsts[2]])
    assert torch.equal(found, by_hand(x, COS[places], SIN[places], False))


def test_rotation_in_place_and_in_low_precision():
    x = random(3, 9, 2, 16, dtype=torch.bfloat16)
    expected = apply_rotary_emb(x.float(), COS.float(), SIN.float()).bfloat16()
    assert torch.equal(apply_rotary_emb(x, COS.float(), SIN.float()), expected)
    assert apply_rotary_emb(x, COS.float(), SIN.float(), inplace=True) is x and torch.equal(x, expected)


def test_other_names_of_rotation():
    x = random(3, 9, 2, 16)
    assert apply_rotary_emb_func is apply_rotary_emb
    found = apply_rotary_emb_torch(x, COS[:9].float(), SIN[:9].float(), True)
    assert torch.equal(found, apply_rotary_emb(x, COS.float(), SIN.float(), True))


def test_the_gradient_of_rotation_is_the_rotation_back():
    x = random(3, 9, 2, 16, dtype=torch.float64).requires_grad_()
    d_out = random(3, 9, 2, 16, dtype=torch.float64, seed=1)
    (found,) = torch.autograd.grad(apply_rotary_emb(x, COS, SIN), x, d_out)
    torch.testing.assert_close(found, apply_rotary_emb(d_out, COS, -SIN))
