"""Tables are aligned plain text; the document is strict JSON."""

from __future__ import annotations

import json

import pytest

from headrace.bench.report import document, table


def test_columns_line_up_numbers_to_the_right() -> None:
    text = table(["name", "speed", "of"], [["a", "9.5", "x"], ["longer", "100.0", ""]])
    assert text.splitlines() == ["name    speed  of", "a         9.5  x", "longer  100.0"]


def test_a_table_without_rows_is_its_heads() -> None:
    assert table(["a", "b"], []) == "a  b"


def test_the_document_is_one_line_and_refuses_what_json_has_not() -> None:
    text = document({"name": "é", "rows": [1, None]})
    assert "\n" not in text and json.loads(text) == {"name": "é", "rows": [1, None]}
    with pytest.raises(ValueError):
        document({"speed": float("nan")})
