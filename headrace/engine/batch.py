"""The batch of one step, in arrays whose addresses never change: a recorded program reads them where they are.

token_ids, positions, slots  [tokens]        one entry per new token; slot = page * page_size + offset
query_starts                 [requests + 1]  whose tokens they are
sequence_lens                [requests]      keys of each request, the new ones included
page_table                   [requests, max_pages]
output_rows                  [outputs]       the tokens whose logits are wanted

The requests of a step have nothing to do with each other: one may be at its prompt, others at their next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.errors import CapacityError
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import program_input
from headrace.models.layers import StepInputs


class Batch:
    """Room for up to `tokens` new tokens of up to `requests` requests, `outputs` rows of logits among them."""

    def __init__(self, tokens: int, requests: int, outputs: int, max_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.token_ids = np.zeros(tokens, np.int32)
        self.positions = np.zeros(tokens, np.int32)
        self.slots = np.zeros(tokens, np.int32)
        self.query_starts = np.zeros(requests + 1, np.int32)
        self.sequence_lens = np.zeros(requests, np.int32)
        self.page_table = np.zeros((requests, max_pages), np.int32)
        self.output_rows = np.zeros(outputs, np.int32)
        self._pages: list[list[int]] = [[] for _ in range(requests)]  # what the rows of the table begin with
        self.clear()

    def clear(self) -> None:
        """Starts a new step."""
        self.num_tokens = self.num_requests = self.num_outputs = 0

    def add(self, token_ids: Sequence[int], position: int, pages: Sequence[int], num_outputs: int) -> None:
        """One request's new tokens, the first of them at `position`; its last `num_outputs` tokens give logits.

        pages: those of the whole request, from its first token on. CapacityError, and nothing added, where there is no
        room for its tokens, its pages, its outputs or the request itself.
        """
        count, first, request = len(token_ids), self.num_tokens, self.num_requests
        assert 0 <= num_outputs <= count and position + count <= len(pages) * self.page_size
        self._check_room(count, len(pages), num_outputs)
        if self._pages[request] != pages:  # in most steps a row is what it was
            self.page_table[request, : len(pages)] = pages
            self._pages[request] = list(pages)
        if count == 1:  # most calls: plain numbers are quicker than arrays of one
            self.token_ids[first] = token_ids[0]
            self.positions[first] = position
            self.slots[first] = pages[position // self.page_size] * self.page_size + position % self.page_size
        else:
            self._add_many(token_ids, position, self.page_table[request])
        if num_outputs == 1:
            self.output_rows[self.num_outputs] = first + count - 1
        elif num_outputs:
            new_rows = slice(self.num_outputs, self.num_outputs + num_outputs)
            self.output_rows[new_rows] = range(first + count - num_outputs, first + count)
        self.sequence_lens[request] = position + count
        self.query_starts[request + 1] = first + count
        self.num_tokens += count
        self.num_requests += 1
        self.num_outputs += num_outputs

    def _add_many(self, token_ids: Sequence[int], position: int, table: np.ndarray) -> None:
        new = slice(self.num_tokens, self.num_tokens + len(token_ids))
        positions = np.arange(position, position + len(token_ids), dtype=np.int32)
        self.token_ids[new], self.positions[new] = token_ids, positions
        self.slots[new] = table[positions // self.page_size] * self.page_size + positions % self.page_size

    def _check_room(self, tokens: int, pages: int, outputs: int) -> None:
        requests, max_pages = self.page_table.shape
        if (
            self.num_requests < requests
            and self.num_tokens + tokens <= len(self.token_ids)
            and self.num_outputs + outputs <= len(self.output_rows)
            and pages <= max_pages
        ):
            return
        if self.num_requests == requests:
            raise CapacityError(f"requests: expected at most {requests} in a step, got one more", "a larger batch")
        for name, count, used, room in (
            ("tokens", tokens, self.num_tokens, len(self.token_ids)),
            ("outputs", outputs, self.num_outputs, len(self.output_rows)),
            ("pages of a request", pages, 0, max_pages),
        ):
            if used + count > room:
                raise CapacityError(f"{name}: expected at most {room} in a step, got {used + count}")

    @property
    def sizes(self) -> native.Sizes:
        return native.Sizes(self.num_tokens, self.num_requests, self.num_outputs)

    def inputs(self, program: native.Program) -> StepInputs:
        """The arrays as a program sees them."""
        return StepInputs(
            token_ids=program_input(self.token_ids, program, "tokens"),
            positions=program_input(self.positions, program, "tokens"),
            slots=program_input(self.slots, program, "tokens"),
            query_starts=program_input(self.query_starts, program, "fixed"),
            sequence_lens=program_input(self.sequence_lens, program, "requests"),
            page_table=program_input(self.page_table, program, "requests"),
            output_rows=program_input(self.output_rows, program, "outputs"),
        )
