"""A planned batch: where each request's queries and keys are, and which of them a custom mask lets it see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from headrace.compat.flashinfer.quantization import unpacked_segments


@dataclass(frozen=True)
class Batch:
    """Requests one after the other; keys in pages (page_table) or in one array (key_starts).

    query_starts int32 [requests + 1], key_lens int32 [requests], page_table int32 [requests, max_pages], key_starts
    int32 [requests], mask bool [tokens, columns], whose last column is each request's last key.
    """

    query_starts: Tensor
    key_lens: Tensor
    page_table: Tensor | None = None
    key_starts: Tensor | None = None
    mask: Tensor | None = None

    @property
    def query_lens(self) -> Tensor:
        """int32 [requests]."""
        return self.query_starts.diff()

    @property
    def num_tokens(self) -> int:
        return int(self.query_starts[-1])

    def masked(self, custom_mask: Tensor | None, packed_custom_mask: Tensor | None) -> Batch:
        """With a mask: bits request by request, each [its queries, its keys], as bools or packed into bytes."""
        if custom_mask is None and packed_custom_mask is None:
            return self
        counts = (self.query_lens.long() * self.key_lens.long()).tolist()
        if packed_custom_mask is not None:
            bits = unpacked_segments(packed_custom_mask, counts)
        else:
            assert custom_mask is not None
            bits = custom_mask.reshape(-1).bool()
        if bits.numel() < sum(counts):
            raise ValueError(f"custom_mask: expected {sum(counts)} bits, queries times keys summed, got {bits.numel()}")
        return replace(self, mask=self._aligned(bits, counts))

    def _aligned(self, bits: Tensor, counts: list[int]) -> Tensor | None:
        columns = int(self.key_lens.max()) if len(self.key_lens) else 0
        if not columns:
            return None
        mask = torch.zeros(self.num_tokens, columns, dtype=torch.bool)
        starts, lens = self.query_starts.tolist(), self.key_lens.tolist()
        for own, (begin, end), keys in zip(bits[: sum(counts)].split(counts), pairwise(starts), lens, strict=True):
            mask[begin:end, columns - keys :] = own.view(end - begin, keys)
        return mask


def int32(array: Tensor) -> Tensor:
    """Starts, lengths and page numbers as the kernels read them."""
    return array.detach().to("cpu", torch.int32).flatten().contiguous()


def paged_batch(query_starts: Tensor, kv_indptr: Tensor, kv_indices: Tensor, key_lens: Tensor, page_size: int) -> Batch:
    """Requests whose pages begin at kv_indices[kv_indptr[r]], as many as their keys fill."""
    lens = int32(key_lens)
    table = page_table(int32(kv_indptr)[: len(lens)], -(-lens // page_size), int32(kv_indices))
    return Batch(int32(query_starts), lens, page_table=table)


def listed_pages(kv_indptr: Tensor, kv_indices: Tensor) -> Tensor:
    """The table of requests whose pages are kv_indices[kv_indptr[r] : kv_indptr[r + 1]]."""
    ends = int32(kv_indptr)
    return page_table(ends[:-1], ends.diff(), int32(kv_indices))


def page_table(starts: Tensor, counts: Tensor, kv_indices: Tensor) -> Tensor:
    """The pages of each request in a row of its own, int32 [requests, max_pages]; 0 behind them."""
    most = max(int(counts.max()), 1) if len(counts) else 1
    used = torch.arange(most) < counts[:, None]
    table = torch.zeros(len(counts), most, dtype=torch.int32)
    table[used] = kv_indices[(starts[:, None] + torch.arange(most))[used].long()]
    return table


def paged_lens(kv_indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Keys of each request, int32 [requests]; none where there are no pages, whatever is said of the last."""
    counts = int32(kv_indptr).diff()
    return torch.where(counts > 0, (counts - 1) * page_size + int32(last_page_len), 0).to(torch.int32)


def ragged_batch(query_starts: Tensor, kv_indptr: Tensor) -> Batch:
    """Requests whose keys lie one after the other in one array."""
    starts = int32(kv_indptr)
    return Batch(int32(query_starts), starts.diff(), key_starts=starts[:-1])


def single_batch(num_queries: int, num_keys: int) -> Batch:
    """One request, all queries and all keys."""
    return ragged_batch(torch.tensor([0, num_queries]), torch.tensor([0, num_keys]))


def places(lens: Tensor) -> tuple[Tensor, Tensor]:
    """Whose each item is and which of its own, int64, for as many items of each as lens says."""
    lens = lens.long()
    owner = torch.repeat_interleave(torch.arange(len(lens)), lens)
    return owner, torch.arange(len(owner)) - (lens.cumsum(0) - lens)[owner]


def gathered(array: Tensor, batch: Batch) -> Tensor:
    """The keys or values of all requests, one after the other, [keys, heads, dim] in float32 at least."""
    owner, place = places(batch.key_lens)
    narrow = array.element_size() == 1  # of which torch indexes none
    source = array.view(torch.uint8) if narrow else array
    if batch.page_table is not None:
        page_size = array.shape[1]
        pages = batch.page_table[owner, place // page_size].long()
        found = source[pages, place % page_size]
    else:
        assert batch.key_starts is not None
        found = source[batch.key_starts.long()[owner] + place]
    found = found.view(array.dtype) if narrow else found
    return found.to(torch.promote_types(torch.float32, array.dtype) if not narrow else torch.float32)


def as_gathered(batch: Batch) -> Batch:
    """The batch of keys and values that were gathered."""
    lens = batch.key_lens
    return replace(batch, page_table=None, key_starts=(lens.cumsum(0) - lens).to(torch.int32))
