"""Attention over products of bf16: the schedule of tiles on emulated ones, and bits that depend on a row's own keys."""

import itertools

import numpy as np
import pytest

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import ATTENTION, AttentionCase, paged
from headrace.check.attention_expected import assert_close, prepared
from headrace.check.compare import poisoned
from headrace.kernels import cpu
from headrace.kernels.cpu import attention as attention_cpu
from headrace.ops.attention_options import AttentionResult

LEVELS = ("avx512_bf16", "amx", "amx_emulated")
PROMPT = AttentionCase("prompt", "paged", (300,), (300,), 8, 2, 80, page_size=32)


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param in cpu.ISAS and cpu.ISAS.index(request.param) > cpu.ISAS.index(cpu.best_isa()):
        pytest.skip(f"this CPU has {cpu.best_isa()}")
    return request.param


def computed(level, batch, value_dim, out_dtype="float32"):
    call = prepared(batch)
    shape = call.arrays["query"].shape
    result = AttentionResult(poisoned((*shape[:-1], value_dim), out_dtype), poisoned(shape[:-1], "float32"))
    arrays = {**call.arrays, "out": result.out, "lse": result.lse}
    attention_cpu.run(level, arrays, call.options.native(), arithmetic="bf16")
    return result


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
@pytest.mark.costly
def test_emulated_tiles_are_within_budget(case, deterministic):
    batch = attention_batch(case, "bfloat16", "bfloat16")
    exact = reference(case, batch)
    got = computed("amx_emulated", batch | {"deterministic": deterministic}, case.out_shape[-1])
    assert_close(got, exact, straightforward(case, batch, exact, "bf16"))


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("case", ATTENTION[::5], ids=lambda case: case.name)
def test_wider_types_are_rounded(level, case, dtypes):
    batch = attention_batch(case, *dtypes)
    exact = reference(case, batch)
    got = computed(level, batch | {"precision": "fast"}, case.out_shape[-1])
    assert_close(got, exact, straightforward(case, batch, exact, "bf16"))


@pytest.mark.parametrize("extra", [{}, {"window": (100, None)}, {"softcap": 20.0}])
def test_bits_do_not_depend_on_how_a_prompt_is_chunked(level, extra):
    batch = attention_batch(PROMPT, "bfloat16", "bfloat16") | extra | {"deterministic": True}
    whole = computed(level, batch, 80)
    for begin, end in itertools.pairwise([0, 1, 64, 100, 137, 139, 300]):
        part = batch | {
            "query": batch["query"][begin:end],
            "sequence_lens": np.array([end], np.int32),
            "query_starts": np.array([0, end - begin], np.int32),
        }
        got = computed(level, part, 80)
        assert np.array_equal(got.out, whole.out[begin:end])
        assert np.array_equal(got.lse, whole.lse[begin:end])


def test_bits_do_not_depend_on_neighbours(level):
    case = paged("neighbours", (1, 40, 3, 100), (130, 90, 700, 100), heads=12, kv_heads=3, head_dim=72)
    batch = attention_batch(case, "bfloat16", "bfloat16") | {"deterministic": True}
    together = computed(level, batch, 72)
    for r, (begin, end) in enumerate(itertools.pairwise(batch["query_starts"])):
        alone = batch | {"query": batch["query"][begin:end], "query_starts": np.array([0, end - begin], np.int32)}
        alone |= {name: batch[name][r : r + 1] for name in ("page_table", "sequence_lens")}
        got = computed(level, alone, 72)
        assert np.array_equal(got.out, together.out[begin:end])
        assert np.array_equal(got.lse, together.lse[begin:end])


def test_one_key_is_returned_as_it_is(level):
    case = paged("one_key", (9,), (9,), heads=4, kv_heads=2, head_dim=33, window=(0, None))
    batch = attention_batch(case, "bfloat16", "bfloat16")
    assert np.array_equal(computed(level, batch, 33).out, reference(case, batch).out)


def test_a_nan_that_is_seen_stays_visible(level):
    batch = attention_batch(PROMPT, "bfloat16", "bfloat16")
    batch["query"][7, 3, 5] = np.nan
    got = computed(level, batch, 80)
    assert np.isnan(got.out[7, 3]).all() and np.isnan(got.lse[7, 3])
    assert np.isnan(got.out).sum() == 80 and np.isnan(got.lse).sum() == 1
