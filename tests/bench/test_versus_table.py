"""Results as a table to read, as the README's and as data: ratios, factors, shares, and reasons in place of figures."""

from __future__ import annotations

import json

from headrace.bench.timing import Spread
from headrace.bench.versus_cases import Case
from headrace.bench.versus_rounds import Found
from headrace.bench.versus_table import figure, markdown_table, rows_data, text_table

ONE, MANY, KL = Case("batch", 16, 128, 1), Case("batch", 16, 128, 8), Case("accuracy")


def of(value: float, **more: float) -> Found:
    return Found(Spread(value, value, 2 * value, 5), **more)


RESULTS = {
    ONE: {"other": of(50.0), "headrace": of(100.0, roof=0.5, read=4e10)},
    MANY: {"other": Found(why_not="it ended"), "headrace": of(400.0)},
    KL: {"other": of(0.004), "headrace": of(0.001)},
    Case("decode", 64, 8000): {"headrace": Found(why_not="context 256 too short")},
}


def test_the_text_table() -> None:
    lines = text_table(RESULTS).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [str(case) for case in RESULTS for _ in RESULTS[case]]
    ours, theirs, many, dead, exact, others, short = lines[1:]
    assert "headrace" in ours and "50%" in ours and "40.0 GB/s" in ours and " x" not in ours
    assert theirs.endswith("2.00 x as fast") and "4.00 x" in many
    assert dead.endswith("not: it ended") and short.endswith("not: context 256 too short")
    assert "0.001 (worst 0.002, 5)" in exact and others.endswith("0.25 x as much")


def test_the_table_of_the_readme() -> None:
    lines = markdown_table(RESULTS).splitlines()
    assert lines[0] == "| | headrace | of roof | x other |"
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| decode of 1 at 128, tokens/s | 100 | 50% | 2.00 |",
        "| decode of 8 at 128, tokens/s | 400 (4.0 x one) |  | not: it ended |",
        "| KL from float32 weights, nats | 0.001 (worst 0.002) |  | 0.25 |",
        "| decode at 8000, tokens/s | not: context 256 too short |  |  |",
    ]


def test_an_engine_without_its_ways_stands_in_the_columns_of_all() -> None:
    ways = {name: of(50.0) for name in ("headrace", "other, fast", "other, slow")}
    lines = markdown_table({ONE: ways, Case("start"): {"headrace": of(1.0), "other": of(3.0)}}).splitlines()
    assert lines[0] == "| | headrace | of roof | x other, fast | x other, slow |"
    assert lines[3] == "| start to first token, s | 1 |  | 3.00 | 3.00 |"


def test_the_data() -> None:
    rows = json.loads(json.dumps(rows_data(RESULTS)))
    assert [row["row"] for row in rows] == [str(case) for case in RESULTS]
    assert rows[0]["engines"]["other"]["ratio"] == 2.0
    assert rows[1]["engines"]["headrace"]["over_one"] == 4.0
    assert rows[1]["engines"]["other"] == {"why_not": "it ended"}


def test_figures_have_three_digits() -> None:
    assert [figure(x) for x in (1234.6, 99.94, 0.4567, 2.3e-6)] == ["1235", "99.9", "0.457", "2.3e-06"]
