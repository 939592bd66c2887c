"""Keys of a paged cache as ragged arrays, and gradients of these added up in their pages.

    request r, key j  ->  slot page_table[r, j // page_size] * page_size + j % page_size  ->  a row of the ragged array

Requests that share pages get copies of their rows, whose gradients are added up in float32, in the order of requests:
the same bits every time. On a GPU nothing is waited for: the ragged array has room for whole rows of the page table, of
which key_lens tell how much counts, and the sums are made in an array as large as the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gathered:
    """Where the keys of all requests lie, one after the other: slots int64 [keys], key_starts int32 [requests + 1].

    With key_lens int32 [requests], key_starts are [requests], and `used` bool [keys] tells which slots are keys.
    """

    slots: Tensor
    key_starts: Tensor
    page_size: int
    key_lens: Tensor | None = None
    used: Tensor | None = None

    def rows(self, pages: Tensor) -> Tensor:
        """The keys' rows of pages [pages, page_size or 1, ...]; one for a whole page is repeated."""
        places = self.slots % self.page_size if pages.shape[1] == self.page_size else torch.zeros_like(self.slots)
        return pages[self.slots // self.page_size, places]

    def into_pages(self, gradients: Tensor, pages: Tensor) -> Tensor:
        """Gradients of pages from those of their rows; 0 for rows that nobody took."""
        if self.used is not None:
            return self._added_up(gradients, pages)
        used, index = torch.unique(self.slots, return_inverse=True)
        wide = torch.promote_types(gradients.dtype, torch.float32)
        sums = gradients.new_zeros((len(used), *gradients.shape[1:]), dtype=wide)
        # NOTE: index_add_ goes through the rows in order; index_put_ would add them in any.
        sums.index_add_(0, index, gradients.to(wide))
        found = torch.zeros(pages.shape, dtype=pages.dtype)
        found[used // self.page_size, used % self.page_size] = sums.to(pages.dtype)
        return found

    def _added_up(self, gradients: Tensor, pages: Tensor) -> Tensor:
        assert self.used is not None
        wide = torch.promote_types(gradients.dtype, torch.float32)
        rows = torch.where(self.used.reshape(-1, *[1] * (gradients.dim() - 1)), gradients, 0).to(wide)
        sums = gradients.new_zeros((pages.shape[0] * self.page_size, *gradients.shape[1:]), dtype=wide)
        # Sorted by slot there, so the order of summation is that of requests.
        sums.index_put_((self.slots,), rows, accumulate=True)
        return sums.reshape(pages.shape).to(pages.dtype)


def gathered(page_table: Tensor, sequence_lens: Tensor, pages: Tensor) -> Gathered:
    """The keys of every request in pages [pages, page_size, ...], in their order."""
    if page_table.is_cpu:
        return packed_rows(page_table, sequence_lens, pages.shape[1])
    return whole_rows(page_table, sequence_lens, pages)


def whole_rows(page_table: Tensor, sequence_lens: Tensor, pages: Tensor) -> Gathered:
    """As many slots for each request as its row of the table has: sizes follow from shapes alone."""
    num_pages, page_size = pages.shape[:2]
    requests, columns = page_table.shape
    room = columns * page_size
    place = torch.arange(room, device=page_table.device)
    lens = sequence_lens.clamp(0, room)
    used = (place < lens[:, None]).flatten()
    slots = (page_table.long()[:, place // page_size] * page_size + place % page_size).flatten()
    # Others go anywhere, each somewhere else: what is added up there is 0.
    anywhere = torch.arange(requests * room, device=page_table.device) % max(num_pages * page_size, 1)
    slots = torch.where(used, slots.clamp(0, num_pages * page_size - 1), anywhere)
    starts = torch.arange(requests, dtype=torch.int32, device=page_table.device) * room
    return Gathered(slots, starts, page_size, lens.int(), used)


def packed_rows(page_table: Tensor, sequence_lens: Tensor, page_size: int) -> Gathered:
    """As many slots as there are keys; entries of the table past a sequence's end are not read."""
    lens = sequence_lens.long()
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    request = torch.repeat_interleave(torch.arange(len(lens)), lens)
    place = torch.arange(len(request)) - starts[request]
    slots = page_table[request, place // page_size].long() * page_size + place % page_size
    return Gathered(slots, starts.int(), page_size)
