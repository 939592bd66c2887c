"""FlashInfer's block-sparse attention: what is listed is what is seen, blocks of one size and of many."""

import pytest
import torch
from paged_oracle import Request, hold, normal

import headrace.compat.flashinfer as flashinfer
from headrace.compat.flashinfer.sparse import convert_bsr_mask_layout

DIM = 16
INDPTR, INDICES = torch.tensor([0, 2, 3, 3, 5]), torch.tensor([0, 2, 1, 3, 0])


def workspace():
    return torch.empty(16, dtype=torch.uint8)


def dense(rows, columns, num_rows, block=None):
    """The mask of the blocks listed above, bool [num_rows, 4 * columns]; block [5, rows, columns]: within them."""
    seen = torch.zeros(4 * rows, 4 * columns, dtype=torch.bool)
    for i in range(4):
        for n in range(INDPTR[i], INDPTR[i + 1]):
            j = int(INDICES[n])
            part = True if block is None else block[n]
            seen[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = part
    return seen[:num_rows]


@pytest.mark.parametrize("form", ["whole", "mask", "packed"])
@pytest.mark.parametrize("rows,columns,num_rows", [(1, 1, 4), (3, 5, 12), (3, 4, 10)])
def test_blocks_of_one_size(rows, columns, num_rows, form):
    q, k, v = (
        normal(n, h, DIM, seed=i) for i, (n, h) in enumerate(((num_rows, 4), (4 * columns, 2), (4 * columns, 2)))
    )
    block = torch.rand(5, rows, columns, generator=torch.Generator().manual_seed(1)) < 0.6
    given = {}
    if form == "mask":
        given = {"mask": block, "causal": True}
    elif form == "packed":
        lens = (INDPTR.diff() * rows * columns).tolist()
        flat = convert_bsr_mask_layout(block, INDPTR)
        bounds = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()])
        given = {"packed_mask": flashinfer.segment_packbits(flat, bounds, "little")[0], "mask": ~block}
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace())
    sizes = (num_rows, 4 * columns, rows, columns, 4, 2, DIM)
    wrapper.plan(INDPTR, INDICES, *sizes, q_data_type="float32", o_data_type="float32", sm_scale=0.3, **given)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    seen = dense(rows, columns, num_rows, None if form == "whole" else block)
    hold(out, lse, [Request(q, k, v, {"seen": seen, "scale": 0.3})])
    empty = ~seen.any(1)
    assert empty.any() and (out[empty] == 0).all() and torch.isneginf(lse[empty]).all()


def test_what_is_not_listed_is_not_read():
    q, k = normal(8, 4, DIM), normal(8, 2, DIM, seed=1)
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(torch.tensor([0, 1, 2]), torch.tensor([1, 1]), 8, 8, 4, 2, 4, 2, DIM, o_data_type="float32")
    expected = wrapper.run(q, k, k)
    k[:2], k[4:] = torch.nan, torch.nan
    assert torch.equal(wrapper.run(q, k, k), expected)


def test_results_are_float16_unless_said_otherwise():
    q, k = normal(4, 4, DIM, dtype=torch.bfloat16), normal(4, 2, DIM, dtype=torch.bfloat16)
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace())
    wrapper.begin_forward(INDPTR, INDICES, 4, 4, 1, 1, 4, 2, DIM)
    out = wrapper.run(q, k, k)
    assert out.dtype == torch.float16
    assert torch.equal(wrapper.forward(q, k, k), out)
    lse, buffer = torch.empty(4, 4), torch.empty_like(out)
    assert (
        wrapper.run(q, k, k, out=buffer, lse=lse) is buffer
        and torch.equal(buffer, out)
        and torch.isfinite(lse[0]).all()
    )
    wrapper.reset_workspace_buffer(workspace(), workspace())
    wrapper.end_forward()


def test_masks_of_heads_are_the_other_wrappers():
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace())
    with pytest.raises(NotImplementedError, match="block_mask"):
        wrapper.plan(None, None, 4, 4, 1, 1, 4, 2, DIM, block_mask=torch.ones(4, 4, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(normal(4, 4, DIM), normal(4, 2, DIM), normal(4, 2, DIM))


def test_blocks_of_many_sizes():
    rows = torch.tensor([[1, 4, 2], [3, 0, 4]], dtype=torch.int32)
    columns = torch.tensor([[5, 1, 2, 3], [2, 2, 7, 0]], dtype=torch.int32)
    blocks = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    blocks[0, 1] = False
    q, k, v = normal(4, 7, DIM), normal(2, 11, DIM, seed=1), normal(2, 11, DIM, seed=2)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace())
    wrapper.plan(blocks, rows, columns, 4, 2, DIM, sm_scale=0.3, q_data_type=torch.float32)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, 7)
    for head in range(2):
        seen = blocks[head].repeat_interleave(rows[head], 0).repeat_interleave(columns[head], 1)
        own = slice(2 * head, 2 * head + 2)
        request = Request(q[own].transpose(0, 1), k[head][:, None], v[head][:, None], {"seen": seen, "scale": 0.3})
        hold(out[own].transpose(0, 1), lse[own].T, [request])
    buffers = torch.empty_like(out), torch.empty_like(lse)
    told = wrapper.run(q, k, v, *buffers, return_lse=True)
    assert told[0] is buffers[0] and torch.equal(told[0], out) and told[1] is buffers[1]
    assert torch.equal(wrapper.forward(q, k, v, sm_scale=0.3), out)
