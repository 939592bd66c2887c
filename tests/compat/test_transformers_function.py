"""The attention function for transformers, without a model: masks, biases and lengths do what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from formula import formula
from transformers import masking_utils

from headrace.check.compare import assert_within_budget
from headrace.compat import transformers as ours

WINDOW = 6
MASKS = {
    "causal": {},
    "static, begun": {"kv_length": 32},
    "static, going on": {"kv_length": 32, "q_offset": 9},
    "dynamic, going on": {"kv_length": 21, "q_offset": 4},
    "a window": {"mask_function": masking_utils.sliding_window_causal_mask_function(WINDOW), "local_size": WINDOW},
    "padded right": {"attention_mask": [17, 5, 11]},
    "padded left": {"attention_mask": [-17, -5, -11]},
    "seen by all, padded": {"mask_function": masking_utils.bidirectional_mask_function, "attention_mask": [17, 5, 11]},
    "packed": {
        "mask_function": masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(torch.arange(17) >= torch.tensor([[4], [17], [1]])),
            masking_utils.causal_mask_function,
        )
    },
    "chunks": {"mask_function": masking_utils.chunked_causal_mask_function(5, torch.zeros(3, dtype=torch.long))},
    "every other key": {"mask_function": lambda b, h, q, k: (k % 2 == 0) & (k <= q)},
}
AS_OPTIONS = set(MASKS) - {"padded left", "every other key"}


def _mask(said: dict[str, Any]) -> Any:
    """What transformers makes of it, for 3 sequences of 17 queries."""
    said = {"kv_length": 17, **said}
    if "attention_mask" in said:
        lens, places = torch.tensor(said["attention_mask"])[:, None], torch.arange(17)
        said["attention_mask"] = torch.where(lens > 0, places < lens, places >= 17 + lens)
    return masking_utils.sdpa_mask(batch_size=3, q_length=17, allow_is_causal_skip=False, **said)


def _arrays(num_keys: int, dtype: str) -> list[Any]:
    torch.manual_seed(2)
    shapes = [(3, heads, tokens, 12) for heads, tokens in ((4, 17), (2, num_keys), (2, num_keys))]
    return [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]


def _math(query: Any, key: Any, value: Any, mask: Any) -> Any:
    return formula(None, query, key, value, mask)[0]


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_lets_be_seen_is_seen(monkeypatch, name):
    mask = _mask(MASKS[name])
    arrays = _arrays(mask.shape[-1], "float32")
    given, attention = [], ours.attention
    monkeypatch.setattr(ours, "attention", lambda *a, **options: given.append(options) or attention(*a, **options))
    module = SimpleNamespace(is_causal=True)
    for _ in range(2):  # the second layer takes what the first one found
        got, weights = ours.attention_forward(module, *arrays, mask)
        exact = _math(*(each.double() for each in arrays), mask).numpy()
        assert_within_budget(got.numpy(), exact, _math(*arrays, mask).numpy(), "float32")
        assert weights is None
    assert [("mask" not in options) for options in given] == [name in AS_OPTIONS] * 2


def test_a_mask_that_was_changed_is_looked_at_again():
    mask = _mask(MASKS["causal"]).contiguous()
    arrays, module = _arrays(17, "float32"), SimpleNamespace(is_causal=True)
    before, _ = ours.attention_forward(module, *arrays, mask)
    mask[:, :, :, 3] = False
    after, _ = ours.attention_forward(module, *arrays, mask)
    exact = _math(*(each.double() for each in arrays), mask).numpy()
    assert_within_budget(after.numpy(), exact, _math(*arrays, mask).numpy(), "float32")
    assert not torch.equal(before, after)


def test_arrays_are_read_where_they_lie(monkeypatch):
    query, key, value = _arrays(40, "float32")
    key, value = (each[:, :, 3:20] for each in (key, value))  # strided, as a cache with room is
    read, attention = [], ours.attention
    monkeypatch.setattr(ours, "attention", lambda *a, **options: read.append(a) or attention(*a, **options))
    ours.attention_forward(SimpleNamespace(), query, key, value, None)
    assert [each.data_ptr() for each in read[0]] == [each.data_ptr() for each in (query, key, value)]


def test_cumulative_lengths_keep_sequences_apart():
    query, key, value = (each[:1] for each in _arrays(17, "float32"))
    starts = torch.tensor([0, 4, 5, 17])
    got, _ = ours.attention_forward(
        SimpleNamespace(is_causal=True), query, key, value, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts
    )
    owner = torch.repeat_interleave(torch.arange(3), starts.diff())
    mask = (owner[:, None] == owner).tril()
    exact = _math(query.double(), key.double(), value.double(), mask).numpy()
    assert_within_budget(got.numpy(), exact, _math(query, key, value, mask).numpy(), "float32")


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_a_position_bias_is_added(mask):
    arrays, module = _arrays(17, "float32"), SimpleNamespace(is_causal=False)
    bias, seen = torch.randn(1, 4, 17, 17), torch.ones(17, 17, dtype=torch.bool).tril()
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    given = {None: None, "bool": seen, "float": added}[mask]
    got, _ = ours.attention_forward(module, *arrays, given, position_bias=bias)

    def plain(query: Any, key: Any, value: Any) -> Any:
        key, value = (each.repeat_interleave(2, dim=1) for each in (key, value))
        scores = query @ key.mT / 12**0.5 + bias + (0 if mask is None else added)
        return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).numpy()

    assert_within_budget(got.numpy(), plain(*(each.double() for each in arrays)), plain(*arrays), "float32")


def test_one_query_sees_all_keys_and_cross_attention_too():
    query, key, value = _arrays(30, "float32")
    for queries, is_causal in ((1, True), (17, False)):
        some = query[:, :, :queries]
        got, _ = ours.attention_forward(SimpleNamespace(is_causal=is_causal), some, key, value, None)
        seen = torch.ones(queries, 30, dtype=torch.bool)
        exact = _math(some.double(), key.double(), value.double(), seen).numpy()
        assert_within_budget(got.numpy(), exact, _math(some, key, value, seen).numpy(), "float32")


@pytest.mark.parametrize("name", ["cache", "sinks", "block_indices"])
def test_what_would_change_the_result_is_not_passed_over(name):
    with pytest.raises(NotImplementedError, match=name):
        ours.attention_forward(SimpleNamespace(), *_arrays(17, "float32"), None, **{name: object()})


def test_attention_weights_are_not_to_be_had():
    arrays = _arrays(17, "float32")
    with pytest.warns(UserWarning, match="output_attentions"):
        _, weights = ours.attention_forward(SimpleNamespace(), *arrays, None, output_attentions=True)
    assert weights is None
