"""Rows: how they are asked for, whether there is room for them, and what their ratio means."""

from __future__ import annotations

import pytest

from headrace.bench.versus_cases import FAMILIES, QUICK, ROWS, Case, chosen_cases, why_no_room
from headrace.errors import ArgumentError


def test_all_rows_in_the_order_of_the_table() -> None:
    assert chosen_cases(ROWS) == tuple(case for cases in FAMILIES.values() for case in cases)
    assert chosen_cases(", ".join(reversed(ROWS.split(",")))) == chosen_cases(ROWS)


def test_single_rows() -> None:
    assert [str(case) for case in chosen_cases(QUICK)] == ["prefill 512", "decode at 16", "decode at 4096"]
    assert [case.sequences for case in chosen_cases("batch@16")] == [1, 16]  # a factor is over one
    assert [case.phase for case in chosen_cases("load")] == ["load", "memory"]


@pytest.mark.parametrize("rows", ["", " , ", "decode,nothing", "decode@17", "prefill@"])
def test_rows_that_do_not_exist_are_refused(rows: str) -> None:
    with pytest.raises(ArgumentError, match="--rows: expected some of prefill"):
        chosen_cases(rows)


def test_a_row_needs_room() -> None:
    case = Case("decode", 64, 1000)
    assert why_no_room(case, case.context_len) == ""
    assert "too short" in why_no_room(case, case.context_len - 1)


def test_a_ratio_says_how_many_times_as_fast_or_as_much() -> None:
    assert Case("decode").ratio(ours=30, theirs=10) == 3
    assert Case("start").ratio(ours=0.5, theirs=2.0) == 4
    assert Case("memory").ratio(ours=100, theirs=400) == 0.25
    assert Case("accuracy").ratio(ours=0.001, theirs=0.004) == 0.25


def test_names_and_units_tell_rows_apart() -> None:
    cases = chosen_cases(ROWS)
    assert len({str(case) for case in cases}) == len(cases)
    assert all(case.unit for case in cases)
