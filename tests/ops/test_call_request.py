"""explain of a call: shapes say what arrays say, nothing is launched, and a mask is what it was recognised as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headrace.check.attention_batch import attention_batch, op_of
from headrace.check.attention_cases import ATTENTION, AttentionCase
from headrace.errors import ArgumentError, KernelError
from headrace.kernels.cpu.attention import division
from headrace.machine import this_machine
from headrace.ops.attention_options import checked_options
from headrace.ops.call_request import explain, kernels_of, requests_of
from headrace.ops.select import choices, reset_choices

DECODE = ((1, 1, 8, 64), (1, 300, 2, 64), (1, 300, 2, 64))


def as_shapes(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same call with a shape in place of every array, and the dtypes."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    shapes = {name: array.shape for name, array in arrays.items()}
    return arguments | shapes, {name: str(array.dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("case", [case for case in ATTENTION if not case.mask], ids=lambda case: case.name)
def test_shapes_say_what_arrays_say(case: AttentionCase) -> None:
    arguments, name = attention_batch(case, "bfloat16", "float32"), op_of(case).__name__
    [of_arrays] = requests_of(name, **arguments)
    shapes, dtypes = as_shapes(arguments)
    [of_shapes] = requests_of(name, **shapes, dtype=dtypes)
    assert (of_shapes.shapes, of_shapes.dtypes) == (of_arrays.shapes, of_arrays.dtypes)
    assert of_shapes.options | {"num_keys": 0} == of_arrays.options | {"num_keys": 0}
    for kernel in kernels_of(name):
        assert kernel.why_not(of_shapes) == kernel.why_not(of_arrays)


def test_what_is_explained_is_what_a_call_chooses() -> None:
    case = next(case for case in ATTENTION if case.name == "dense_decode")
    arguments = attention_batch(case, "bfloat16", "bfloat16")
    told = explain("attention", **arguments)
    reset_choices()
    op_of(case)(**arguments)
    assert told.chosen and choices() == {("attention", told.chosen.kernel): 1}
    with pytest.raises(KernelError, match="require batch_invariant"):
        op_of(case)(**arguments, require=("batch_invariant",))


def test_nothing_is_launched_and_large_shapes_take_no_memory() -> None:
    reset_choices()
    told = explain("attention", (64, 1, 32, 128), (64, 1 << 24, 8, 128), (64, 1 << 24, 8, 128), dtype="bfloat16")
    assert told.chosen and told.request.traffic.num_bytes > 4 << 40
    assert choices() == {}


def test_a_request_explains_itself() -> None:
    [request] = requests_of("attention", *DECODE)
    assert explain("attention", request) == explain("attention", *DECODE)


def test_a_documents_mask_is_told() -> None:
    mask = np.kron(np.eye(4, dtype=bool), np.ones((1, 75), bool))
    told = explain("attention", (1, 4, 8, 64), *DECODE[1:], mask=mask)
    assert told.chosen and "mask recognised as 4 documents" in told.chosen.notes[0] and "note: mask" in str(told)
    assert (
        told.request.traffic.num_bytes
        < explain("attention", (1, 4, 8, 64), *DECODE[1:]).request.traffic.num_bytes * 1.01
    )
    whole = explain("attention", (1, 4, 8, 64), *DECODE[1:], mask=(4, 300))
    assert whole.request.shapes["mask"] == (1, 1, 4, 300)


def test_several_masks_of_documents_are_several_launches() -> None:
    masks = np.stack([np.kron(np.eye(4, dtype=bool), np.ones((1, 75), bool)), np.tri(4, 300, dtype=bool)])[:, None]
    masks[1] = np.arange(300) // 100 == np.array([0, 1, 2, 2])[:, None]
    shapes = tuple((2, *shape[1:]) for shape in ((1, 4, 8, 64), *DECODE[1:]))
    told = explain("attention", *shapes, mask=masks)
    assert told.chosen and told.chosen.notes[-1] == "the largest of 2 launches"


def test_other_ops_explain_themselves() -> None:
    assert explain("linear", (4, 64), (32, 64), dtype={"weight": "Q4_0"}).request.dtypes["weight0"] == "Q4_0"
    assert explain("rms_norm", (4, 64), (64,), dtype="bfloat16").request.dtypes == {"x": "bfloat16", "out": "bfloat16"}
    options = {"query_starts": (3,), "value_dim": 64, "scale": 0.1}
    told = explain("mla_attention", (2, 16, 80), (9, 4, 80), (2, 4), (2,), dtype="bfloat16", **options)
    assert told.chosen and told.request.op == "mla_attention"


def test_what_goes_with_attention_explains_itself() -> None:
    parts = [(np.zeros((4, 8, 64), np.float16), np.zeros((4, 8), np.float32))] * 3
    merged = explain("merge_attention", parts)
    assert merged.request == explain("merge_attention", [(4, 8, 64)] * 3, dtype="float16").request
    pages, scales = (9, 16, 2, 64), (9, 16, 2)
    types = {"key": "float32", "value": "float32", "key_pages": "int8", "value_pages": "int8"}
    options = {"slots": (4,), "key_scales": scales, "value_scales": scales, "dtype": types}
    appended = explain("append_pages", (4, 2, 64), (4, 2, 64), pages, pages, **options)
    assert appended.request.dtypes["key_pages"] == "int8" and appended.chosen and merged.chosen


def test_equal_beginnings_of_a_page_table_are_told() -> None:
    pages, lens, starts = (512, 64, 8, 128), np.full(8, 64 * 64, np.int32), np.arange(9, dtype=np.int32)
    apart = np.arange(8 * 64, dtype=np.int32).reshape(8, 64)
    shared = np.where(np.arange(64) < 60, apart[0], apart).astype(np.int32)
    notes = []
    for table in (apart, shared, (8, 64)):
        told = explain("paged_attention", (8, 32, 128), pages, pages, table, lens, query_starts=starts, cascade=True)
        assert told.chosen
        notes.append(told.chosen.notes)
    assert notes[0] == notes[2] == () and len(notes[1]) == 1 and "8" in notes[1][0]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_long_decode_is_cut_among_the_threads(threads: int) -> None:
    arrays = {name: np.zeros((1, length, 1, 64), np.float32) for name, length in (("query", 1), ("key", 9000))}
    arrays |= {"value": arrays["key"], "out": arrays["query"], "lse": np.zeros((1, 1, 1), np.float32)}
    options = checked_options(64).native()
    splits, intervals, num_bytes = division(threads, "portable", arrays, options, arithmetic="fp32")
    assert splits == intervals == threads and (num_bytes >= 4 * 64 * splits) == (threads > 1)
    short = arrays | {"key": arrays["key"][:, :20], "value": arrays["value"][:, :20]}
    assert division(threads, "portable", short, options, arithmetic="fp32")[::2] == (1, 0)


def test_splits_and_workspace_are_told() -> None:
    told = explain("attention", (1, 1, 1, 64), (1, 60_000, 1, 64), (1, 60_000, 1, 64))
    assert told.chosen and told.chosen.splits == told.chosen.workers == this_machine().cores
    assert (told.chosen.workspace_bytes > 0) == (told.chosen.splits > 1)
    fixed = explain("attention", (1, 1, 1, 64), (1, 60_000, 1, 64), (1, 60_000, 1, 64), deterministic=True)
    assert fixed.chosen and fixed.chosen.batch_invariant
    huge = explain("attention", *((1 << 10, 1 << 24, 8, 128),) * 3)
    assert huge.chosen and "splits are not known" in huge.chosen.notes[0]


@pytest.mark.parametrize(
    "op,arrays,options,text",
    [
        ("softmax", (), {}, "op: expected one of append_pages, attention, attention_backward, linear"),
        ("attention", DECODE, {"causl": True}, "attention: got an unexpected keyword argument 'causl'"),
        ("attention", DECODE[:2], {}, "attention: missing a required argument: 'value'"),
        ("attention", DECODE, {"softcap": -1.0}, "softcap: expected a finite number > 0"),
        ("attention", ((1, 1, 7, 64), *DECODE[1:]), {}, "multiple of 2 heads"),
        ("attention", DECODE, {"require": ("speed",)}, "require: expected names among"),
        ("linear", ((4, 64), (32, 64)), {"precision": "slow"}, "precision: expected one of"),
    ],
)
def test_mistakes_are_those_of_the_op(op: str, arrays: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        explain(op, *arrays, **options)
    assert text in str(caught.value)
