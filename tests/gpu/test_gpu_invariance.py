"""The same bits alone and in company, for every kernel that promises them; and from run to run for all."""

import numpy as np
import pytest
import torch
from decode_batch import LENGTHS, attend, bits, decode, gpu_kernels

from headrace.errors import KernelError

pytestmark = pytest.mark.gpu
KERNELS = ("triton_paged", "triton_mla", "gluon_mla", "triton_attention")


def one_of(tensors, row):
    """A request alone: the same pages, a table of one row."""
    alone = dict(tensors)
    for name in ("query", "page_table", "sequence_lens"):
        alone[name] = tensors[name][row : row + 1].clone()
    alone["query_starts"] = torch.tensor([0, 1], dtype=torch.int32, device=tensors["query"].device)
    return alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_a_request_alone_has_the_bits_it_has_in_company(kind, kernel, dtype):
    batch = decode(kind, LENGTHS[0], dtype)
    tensors = batch.tensors("cuda")
    why_not = gpu_kernels(kind, tensors).get(kernel, "there is no such kernel")
    if why_not:
        pytest.skip(f"{kernel}: {why_not}")
    options = {"kernel": kernel, "deterministic": True}
    try:
        together = bits(attend(batch, tensors, **options, require=("batch_invariant",)))
    except KernelError as error:
        pytest.skip(error.message)
    for row in range(len(LENGTHS[0])):
        alone = bits(attend(batch, one_of(tensors, row), **options))
        assert all(np.array_equal(one[row], other[0]) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_a_call_has_the_same_bits_every_time(kind):
    batch = decode(kind, LENGTHS[1])
    tensors = batch.tensors("cuda")
    first = bits(attend(batch, tensors))
    for _ in range(20):
        assert all(np.array_equal(one, other) for one, other in zip(first, bits(attend(batch, tensors)), strict=True))
