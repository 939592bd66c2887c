"""A decode step captured once: replayed with other lengths, pages and numbers it computes those, the same each time."""

import numpy as np
import pytest
import torch
from decode_batch import LENGTHS, assert_right, attend, bits, decode, gpu_kernels, refill

pytestmark = pytest.mark.gpu
KERNELS = ("triton_paged", "triton_mla", "gluon_mla", "triton_attention")


def captured(batch, tensors, **options):
    """A graph, and the result that its replays write to."""
    attend(batch, tensors, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(batch, tensors, **options)
    return graph, result


def able(kind, kernel, tensors):
    why_not = gpu_kernels(kind, tensors).get(kernel, "there is no such kernel")
    if why_not:
        pytest.skip(f"{kernel}: {why_not}")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_a_graph_serves_lengths_it_was_not_captured_with(kind, kernel, deterministic):
    first = decode(kind, LENGTHS[0])
    tensors = first.tensors("cuda")
    able(kind, kernel, tensors)
    graph, result = captured(first, tensors, kernel=kernel, deterministic=deterministic)
    for seed, lens in enumerate((*LENGTHS[1:], LENGTHS[0]), 1):
        batch = decode(kind, lens, seed=seed)
        refill(tensors, batch)
        result.out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(batch, result, kernel, tensors)
        once = bits(result)
        graph.replay()
        assert all(np.array_equal(one, other) for one, other in zip(once, bits(result), strict=True))


@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_the_chosen_kernel_can_be_captured(kind):
    batch = decode(kind, LENGTHS[0])
    tensors = batch.tensors("cuda")
    graph, result = captured(batch, tensors)
    eager = attend(batch, tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert all(np.array_equal(one, other) for one, other in zip(bits(eager), bits(result), strict=True))


def test_lengths_of_zero_and_one_are_served_by_a_graph_of_long_ones():
    batch = decode("paged", LENGTHS[0])
    tensors = batch.tensors("cuda")
    graph, result = captured(batch, tensors)
    tensors["sequence_lens"].copy_(torch.tensor([0, 1, 64, 0], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    assert (result.out[[0, 3]] == 0).all() and torch.isneginf(result.lse[[0, 3]]).all()
    assert result.out[1:3].isfinite().all()
