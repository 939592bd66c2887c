"""FlashInfer's rotary positions outside attention, and its bits packed into bytes."""

import math

import numpy as np
import pytest
import torch
from paged_oracle import indptr, near, normal

import headrace.compat.flashinfer as flashinfer

LENS, OFFSETS = [3, 0, 5], torch.tensor([2, 9, 100], dtype=torch.int32)
POSITIONS = torch.tensor([2, 3, 4, 100, 101, 102, 103, 104])
DIM = 16


def turned(x, angles, interleave, dtype):
    """Pairs turned one by one, in numbers: (i, i + half), or neighbours."""
    found, half = x.to(dtype).clone(), angles.shape[-1]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleave else (i, i + half)
        c, s = cos[:, None, i], sin[:, None, i]
        first, second = x[..., a].to(dtype), x[..., b].to(dtype)
        found[..., a], found[..., b] = first * c - second * s, second * c + first * s
    return found


def check(got, x, angles, interleave=False):
    near(got, *(turned(x, angles, interleave, dtype) for dtype in (torch.float64, torch.float32)))


def angles_of(dim=DIM, theta=1e4, scale=1.0):
    return POSITIONS[:, None].double() * theta ** (-torch.arange(0, dim, 2).double() / dim) / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 8])
def test_rope(rotary_dim, interleave, dtype):
    q, k = normal(8, 4, DIM, dtype=dtype), normal(8, 2, DIM, dtype=dtype, seed=1)
    angles = angles_of(rotary_dim or DIM, 500.0, 2.0)
    options = (rotary_dim, interleave, 2.0, 500.0)
    told = flashinfer.apply_rope(q, k, indptr(LENS), OFFSETS, *options)
    for got, x in zip(told, (q, k), strict=True):
        assert got.dtype == dtype
        check(got, x, angles, interleave)
    by_position = flashinfer.apply_rope_pos_ids(q, k, POSITIONS, *options)
    assert all(torch.equal(a, b) for a, b in zip(by_position, told, strict=True))
    into = [q.clone(), k.clone()]
    assert flashinfer.apply_rope_inplace(*into, indptr(LENS), OFFSETS, *options) is None
    again = [q.clone(), k.clone()]
    flashinfer.apply_rope_pos_ids_inplace(*again, POSITIONS, *options)
    for found in (into, again):
        assert all(torch.equal(a, b) for a, b in zip(found, told, strict=True))


def test_defaults_of_rope():
    q, k = normal(8, 4, DIM), normal(8, 2, DIM, seed=1)
    check(flashinfer.apply_rope(q, k, indptr(LENS), OFFSETS)[0], q, angles_of())


def llama31(plain, scale=8.0, low=1.0, high=4.0, context=8192):
    """Each frequency by its wavelength, as the model's code has it."""
    found = []
    for frequency in plain.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            found.append(frequency)
        elif wavelength > context / low:
            found.append(frequency / scale)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append((1 - smooth) * frequency / scale + smooth * frequency)
    return torch.tensor(found, dtype=torch.float64)


def test_rope_of_llama31():
    q, k = normal(8, 4, 64), normal(8, 2, 64, seed=1)
    turns = llama31(5e5 ** (-torch.arange(0, 64, 2).double() / 64))
    told = flashinfer.apply_llama31_rope(q, k, indptr(LENS), OFFSETS)
    check(told[0], q, POSITIONS[:, None].double() * turns)
    check(told[1], k, POSITIONS[:, None].double() * turns)
    by_position = flashinfer.apply_llama31_rope_pos_ids(q, k, POSITIONS)
    into, again = [q.clone(), k.clone()], [q.clone(), k.clone()]
    flashinfer.apply_llama31_rope_inplace(*into, indptr(LENS), OFFSETS)
    flashinfer.apply_llama31_rope_pos_ids_inplace(*again, POSITIONS)
    for found in (by_position, into, again):
        assert all(torch.equal(a, b) for a, b in zip(found, told, strict=True))


@pytest.mark.parametrize("is_neox", [True, False])
def test_rope_from_a_table(is_neox):
    q, k = normal(8, 4 * DIM), normal(8, 2 * DIM, seed=1)
    angles = torch.arange(200)[:, None].double() * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    table = torch.cat([angles.cos(), angles.sin()], -1).float()
    told = flashinfer.apply_rope_with_cos_sin_cache(POSITIONS, q, k, DIM, table, is_neox)
    for got, x in zip(told, (q, k), strict=True):
        check(got.view(8, -1, DIM), x.view(8, -1, DIM), angles[POSITIONS], not is_neox)
    into = [q.clone(), k.clone()]
    flashinfer.apply_rope_with_cos_sin_cache_inplace(POSITIONS, *into, DIM, table, is_neox)
    assert all(torch.equal(a, b) for a, b in zip(into, told, strict=True))
    with pytest.raises(ValueError, match="cos_sin_cache"):
        flashinfer.apply_rope_with_cos_sin_cache(POSITIONS, q, k, DIM, table.half())


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 19])
def test_packbits_is_numpys(count, bitorder):
    x = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    got = flashinfer.packbits(x, bitorder)
    assert got.dtype == torch.uint8 and got.tolist() == np.packbits(x.numpy(), bitorder=bitorder).tolist()


def test_examples_of_the_documentation():
    assert flashinfer.packbits(torch.tensor([1, 0, 1, 1, 0, 0, 1, 1])).tolist() == [0b10110011]
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    packed, starts = flashinfer.segment_packbits(x, torch.tensor([0, 4, 7, 11]), bitorder="big")
    assert packed.tolist() == [0b10110000, 0b00100000, 0b11010000] and starts.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="bitorder"):
        flashinfer.quantization.packbits(x, "middle")
