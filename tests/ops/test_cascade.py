"""Shared beginnings: computed once where page tables begin alike, inside the budget, the best groups, bytes counted."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import heads, paged
from headrace.check.attention_expected import assert_close, computed, prepared
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.machine import Machine
from headrace.ops import cascade, choices, reset_choices
from headrace.ops.attention_latent import mla_attention
from headrace.ops.attention_paged import paged_attention
from headrace.ops.cascade import Group, Sharing, groups_of

DECODE = paged("decode", (1,) * 5, (130, 140, 20, 100, 99), **heads(6, 2, 40, 24), page_size=16)
TOGETHER = ((0, 1, 3), 5)  # requests, pages they share

CASES = [
    (DECODE, [TOGETHER]),
    (DECODE, [((0, 3), 6), ((1, 4), 2)]),
    (dataclasses.replace(DECODE, name="append", query_lens=(7, 0, 3, 1, 19)), [((0, 3, 4), 4)]),
    (dataclasses.replace(DECODE, name="sinks", sinks=True), [TOGETHER]),
    (dataclasses.replace(DECODE, name="all_sinks", sinks=True), [((0, 1, 2, 3, 4), 1)]),
    (dataclasses.replace(DECODE, name="softcap", softcap=5.0), [TOGETHER]),
    (dataclasses.replace(DECODE, name="tree", query_lens=(4, 3, 1, 5, 2), mask="tree", causal=False), [TOGETHER]),
    (dataclasses.replace(DECODE, name="not_causal", query_lens=(4, 3, 1, 5, 2), causal=False), [TOGETHER]),
    (dataclasses.replace(DECODE, name="to_the_right", causal=False, window=(None, 3)), [TOGETHER]),
    (dataclasses.replace(DECODE, name="int8", kv_format="int8", scales="token"), [TOGETHER]),
    (dataclasses.replace(DECODE, name="int4", kv_format="uint8", scales="page"), [TOGETHER]),
    (dataclasses.replace(DECODE, name="float8", kv_format="float8_e4m3fn"), [TOGETHER]),
]


def shared_batch(case, groups, *types):
    """The case with tables that begin alike."""
    batch = attention_batch(case, *types)
    for (first, *others), num_pages in groups:
        batch["page_table"][others, :num_pages] = batch["page_table"][first, :num_pages]
        batch["page_table"] = np.ascontiguousarray(batch["page_table"])
    return batch


def found(batch, wanted=True):
    return cascade.cascade_of(prepared(batch), wanted)


@pytest.mark.parametrize("types", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("case,groups", CASES, ids=lambda part: getattr(part, "name", str(part)))
def test_what_is_shared_is_within_budget(case, groups, types):
    batch = shared_batch(case, groups, *types)
    told = found(batch)
    assert [(group.requests, group.num_pages) for group in told.groups] == [*sorted(groups)]
    exact = reference(case, batch)
    # Partial results are float32 whatever the products are: no part is rounded more than the whole.
    arithmetic = "bf16" if types == ("bfloat16", "bfloat16") and not case.kv_format else "fp32"
    plain = straightforward(case, batch, exact, arithmetic)
    reset_choices()
    assert_close(computed(case, batch, cascade=True), exact, plain)
    counted = {op: sum(n for (name, _), n in choices().items() if name == op) for op, _ in choices()}
    assert counted["paged_attention"] == 2 and counted["merge_attention"] in (1, 2)


def test_float64_stays_exact():
    batch = shared_batch(CASES[3][0], [TOGETHER], "float64", "float64")
    exact = reference(DECODE, batch)
    got = computed(DECODE, batch, "float64", cascade=True)
    assert_close(got, exact, straightforward(DECODE, batch, exact, "fp64"))


def test_latents_are_shared_too():
    case = dataclasses.replace(DECODE, **heads(6, 1, 40, 24))
    batch = shared_batch(case, [TOGETHER])
    latents = batch["key_pages"]
    batch |= {"value_pages": latents[..., :24], "scale": 0.2}
    exact = reference(case, batch)
    names = ("query", "page_table", "sequence_lens", "query_starts", "scale")
    given = {name: batch[name] for name in names} | {"latent_pages": latents[:, :, 0], "value_dim": 24}
    assert_close(mla_attention(**given, cascade=True), exact, straightforward(case, batch, exact))


def test_torch_tensors_give_the_same_bits():
    torch = pytest.importorskip("torch")
    batch = shared_batch(*CASES[2])
    arrays = {name: torch.from_numpy(array) for name, array in batch.items() if isinstance(array, np.ndarray)}
    got, expected = (paged_attention(**each, cascade=True) for each in (batch | arrays, batch))
    assert np.array_equal(got.out.numpy(), expected.out) and np.array_equal(got.lse.numpy(), expected.lse)


# What is counted


def keys_read(calls):
    return sum(int(np.asarray(call.arrays["key_lens"]).sum()) for call in calls)


@pytest.mark.parametrize("case,groups", CASES, ids=lambda part: getattr(part, "name", str(part)))
def test_the_bytes_saved_are_those_that_are_not_read(case, groups):
    call = prepared(shared_batch(case, groups, "float16"))
    told = cascade.cascade_of(call, True)
    _, shared = cascade.shared_call(call, told)
    parts = [shared, cascade.rest_call(call, told)]
    assert told.saved_keys == keys_read([call]) - keys_read(parts) > 0
    per_key = {"": 2 * 2 * (40 + 24), "int8": 2 * (64 + 8), "uint8": 2 * (32 + 8), "float8_e4m3fn": 2 * 64}
    assert told.saved_bytes == told.saved_keys * per_key[case.kv_format]
    # Every page of every request is in one of the parts, those of groups once.
    read = sorted(page for part in parts for page in pages_of(part))
    again = sorted(
        page for page, count in zip(*np.unique(pages_of(call), return_counts=True), strict=True) for _ in range(count)
    )
    saved = sum((len(requests) - 1) * pages for requests, pages in groups)
    assert set(read) == set(again) and len(read) == len(again) - saved


def pages_of(call):
    page_size = call.arrays["key"].shape[1]
    counts = -(-np.asarray(call.arrays["key_lens"]) // page_size)
    return [int(page) for row, n in zip(call.arrays["page_table"], counts, strict=True) for page in row[:n]]


def pages_in_common(table, limits, requests):
    columns = range(min(limits[r] for r in requests))
    return len(list(itertools.takewhile(lambda c: len({table[r, c] for r in requests}) == 1, columns)))


@st.composite
def tables(draw):
    width, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    pages = st.lists(st.integers(0, draw(st.integers(0, 2))), min_size=width, max_size=width)
    table = np.array(draw(st.lists(pages, min_size=count, max_size=count)), np.int32)
    limits = np.array(draw(st.lists(st.integers(0, width), min_size=count, max_size=count)))
    row_s = draw(st.sampled_from([0.0, 0.3, 1.4]))
    return table, Sharing(limits, np.full(count, draw(st.integers(1, 2))), 1.0, 0.0, row_s)


@settings(max_examples=300, deadline=None)
@given(drawn=tables())
def test_groups_save_at_least_what_any_one_of_them_could(drawn):
    table, sharing = drawn
    groups = groups_of(table, sharing)
    members = [r for group in groups for r in group.requests]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.requests) > 1
        assert 0 < group.num_pages == pages_in_common(table, sharing.limits, group.requests)
    best = 0.0
    for count in range(2, len(table) + 1):
        for some in itertools.combinations(range(len(table)), count):
            group = Group(some, pages_in_common(table, sharing.limits, some))
            best = max(best, sharing.saved_s(group) if group.num_pages else 0.0)
    assert sum(sharing.saved_s(group) for group in groups) >= best * (1 - 1e-9)


# When it is done


def machine(read, fp32=1e15):
    return Machine({"read": read, "cache_read": read, "fp32": fp32, "bf16": fp32, "int8": fp32}, False)


def test_auto_goes_by_what_it_saves(monkeypatch):
    batch = shared_batch(*CASES[0])
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6))
    assert found(batch, "auto").groups == found(batch, True).groups
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e15))
    assert found(batch, "auto") is None
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6, fp32=1e4))
    assert found(batch, "auto") is None, "bound by arithmetic, which is the same shared or not"


def test_it_says_what_is_shared():
    told = str(found(shared_batch(DECODE, [TOGETHER], "float16")))
    assert told == "shared beginnings read once: 3 requests x 80 keys; 0.0 MB less"


def test_nothing_is_shared_where_nothing_is_the_same(monkeypatch):
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6))
    batch = attention_batch(DECODE)
    assert found(batch) is None and found(batch, "auto") is None
    whole = shared_batch(dataclasses.replace(DECODE, query_lens=(130, 0, 0, 100, 0)), [TOGETHER])
    assert found(whole) is None, "the first rows of a prompt see none of it in full"
    one_page = shared_batch(dataclasses.replace(DECODE, key_lens=(15,) * 5), [((0, 1), 1)])
    assert found(one_page) is None, "its page is not full"


NEVER = [
    ({"deterministic": True}, "with deterministic=True"),
    ({"window": (50, None)}, "with a window"),
    ({"align": "top_left"}, "with causality aligned at the top left"),
    ({"alibi_slopes": np.ones(6, np.float32)}, "with alibi_slopes"),
]


@pytest.mark.parametrize("options,text", NEVER)
def test_what_cannot_be_shared_is_not(options, text, monkeypatch):
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6))
    batch = shared_batch(DECODE, [TOGETHER]) | options
    assert found(batch, "auto") is None
    with pytest.raises(ArgumentError, match=f"cascade: expected False {text}.*got True"):
        paged_attention(**batch, cascade=True)
    plain = paged_attention(**batch, cascade=False)
    assert np.array_equal(paged_attention(**batch).out, plain.out)


def test_a_program_never_shares(monkeypatch):
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6))
    batch = shared_batch(DECODE, [TOGETHER])
    program = native.Program(native.Pool(1), native.Sizes(5, 5, 1))
    batch["query"] = Buffer(as_tensor(batch["query"], "query").follow("tokens"), program)
    assert found(batch, "auto") is None
    with pytest.raises(ArgumentError, match="cascade: expected False in a program"):
        found(batch)


def test_mistakes_are_told_as_without_it(monkeypatch):
    monkeypatch.setattr(cascade, "this_machine", lambda: machine(1e6))
    batch = shared_batch(DECODE, [TOGETHER])
    for name, place, value in (("sequence_lens", 1, 10**6), ("query_starts", 2, 9), ("sequence_lens", 0, -1)):
        wrong = batch | {name: batch[name].copy()}
        wrong[name][place] = value
        with pytest.raises(ArgumentError, match=name):
            paged_attention(**wrong)
    wrong = batch | {"page_table": batch["page_table"].copy()}
    wrong["page_table"][[0, 1, 3], 0] = 10**6
    with pytest.raises(ArgumentError, match="page_table"):
        paged_attention(**wrong)
    with pytest.raises(ArgumentError, match='cascade: expected True, False or "auto", got 1'):
        paged_attention(**batch, cascade=1)
