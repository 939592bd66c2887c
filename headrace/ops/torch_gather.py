"""Keys of a paged cache as ragged arrays, and gradients of these added up in their pages.

    request r, key j  ->  slot page_table[r, j // page_size] * page_size + j % page_size  ->  a row of the ragged array

Requests that share pages get copies of their rows, whose gradients are added up in float32, in the order of requests:
the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gathered:
    """Where the keys of all requests lie, one after the other: slots int64 [keys], key_starts int32 [requests + 1]."""

    slots: Tensor
    key_starts: Tensor
    page_size: int

    def rows(self, pages: Tensor) -> Tensor:
        """The keys' rows of pages [pages, page_size or 1, ...]; one for a whole page is repeated."""
        places = self.slots % self.page_size if pages.shape[1] == self.page_size else torch.zeros_like(self.slots)
        return pages[self.slots // self.page_size, places]

    def into_pages(self, gradients: Tensor, pages: Tensor) -> Tensor:
        """Gradients of pages from those of their rows; 0 for rows that nobody took."""
        used, index = torch.unique(self.slots, return_inverse=True)
        wide = torch.promote_types(gradients.dtype, torch.float32)
        sums = gradients.new_zeros((len(used), *gradients.shape[1:]), dtype=wide)
        # NOTE: index_add_ goes through the rows in order; index_put_ would add them in any.
        sums.index_add_(0, index, gradients.to(wide))
        found = torch.zeros(pages.shape, dtype=pages.dtype)
        found[used // self.page_size, used % self.page_size] = sums.to(pages.dtype)
        return found


def gathered(page_table: Tensor, sequence_lens: Tensor, page_size: int) -> Gathered:
    """The keys of every request, in their order; entries of the table past a sequence's end are not read."""
    lens = sequence_lens.long()
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    request = torch.repeat_interleave(torch.arange(len(lens)), lens)
    place = torch.arange(len(request)) - starts[request]
    slots = page_table[request, place // page_size].long() * page_size + place % page_size
    return Gathered(slots, starts.int(), page_size)
