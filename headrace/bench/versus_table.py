"""The results of `bench versus` as a table to read, as the README's table, and as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from headrace.bench.report import table
from headrace.bench.timing import Spread
from headrace.bench.versus_cases import AMOUNTS, Case
from headrace.bench.versus_rounds import Found

OURS = "headrace"
Results = Mapping[Case, Mapping[str, Found]]


def figure(value: float) -> str:
    """Three digits, more for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"


def spread_text(case: Case, spread: Spread) -> str:
    if case.phase == "accuracy":
        return f"{figure(spread.median)} (worst {figure(spread.high)}, {spread.count})"
    return f"{figure(spread.median)} ({figure(spread.low)}-{figure(spread.high)}, {spread.count})"


def ratio(results: Results, case: Case, name: str) -> float | None:
    """Headrace's figure by the other's, in the sense of `Case.ratio`."""
    ours, theirs = results[case].get(OURS), results[case].get(name)
    if not (ours and theirs and ours.spread and theirs.spread and ours.spread.median and theirs.spread.median):
        return None
    return case.ratio(ours.spread.median, theirs.spread.median)


def over_one(results: Results, case: Case, name: str) -> float | None:
    """How many times one sequence's tokens/s a batch gives."""
    one = next((other for other in results if other.phase == "batch" and other.sequences == 1), None)
    if case.phase != "batch" or one is None or case == one:
        return None
    alone, together = results[one].get(name), results[case].get(name)
    if not (alone and together and alone.spread and together.spread):
        return None
    return together.spread.median / alone.spread.median


def text_table(results: Results) -> str:
    """One line per row and engine."""
    heads = ["row", "engine", "median (min-max, n)", "unit", "of roof", "plain read", "over one", "headrace is"]
    return table(heads, [line for case in results for line in _lines(results, case)])


def _ours_first(found: Mapping[str, Found]) -> list[tuple[str, Found]]:
    return sorted(found.items(), key=lambda item: (item[0] != OURS, item[0]))


def _lines(results: Results, case: Case) -> Iterator[list[str]]:
    for name, found in _ours_first(results[case]):
        if found.spread is None:
            yield [str(case), name, f"not: {found.why_not}", "", "", "", "", ""]
            continue
        factor, ours = over_one(results, case, name), ratio(results, case, name)
        word = "as much" if case.phase in AMOUNTS else "as fast"
        yield [
            str(case),
            name,
            spread_text(case, found.spread),
            case.unit,
            f"{found.roof:.0%}" if found.roof else "",
            f"{found.read / 1e9:.1f} GB/s" if found.read else "",
            f"{factor:.2f} x" if factor else "",
            f"{ours:.2f} x {word}" if ours and name != OURS else "",
        ]


def markdown_table(results: Results) -> str:
    """One line per row: ours, its share of the roof, and a ratio for each of the others."""
    others = _columns({name for found in results.values() for name in found if name != OURS})
    lines = ["| | headrace | of roof | " + " | ".join(f"x {name}" for name in others) + " |"]
    lines.append("|---|---|---|" + "---|" * len(others))
    for case in results:
        cells = [f"{case}, {case.unit}", _our_cell(results, case), _roof_cell(results, case)]
        cells += [_cell(results, case, name) for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _columns(names: set[str]) -> list[str]:
    """The engines' ways; an engine without its ways, as in its start, is in the columns of all of them."""
    kinds = {name.partition(",")[0] for name in names if "," in name}
    return sorted(names - kinds)


def _our_cell(results: Results, case: Case) -> str:
    found = results[case].get(OURS, Found(why_not="failed"))
    if found.spread is None:
        return f"not: {found.why_not}"
    factor = over_one(results, case, OURS)
    told = figure(found.spread.median)
    if case.phase == "accuracy":
        told += f" (worst {figure(found.spread.high)})"
    return f"{told} ({factor:.1f} x one)" if factor else told


def _roof_cell(results: Results, case: Case) -> str:
    found = results[case].get(OURS)
    return f"{found.roof:.0%}" if found and found.roof else ""


def _cell(results: Results, case: Case, name: str) -> str:
    name = name if name in results[case] else name.partition(",")[0]
    found = results[case].get(name)
    if found is None:
        return ""
    if found.spread is None:
        return f"not: {found.why_not}"
    ours = ratio(results, case, name)
    return f"{ours:.2f}" if ours else figure(found.spread.median)


def rows_data(results: Results) -> list[dict[str, Any]]:
    """For the JSON document."""
    return [
        {**asdict(case), "row": str(case), "unit": case.unit, "engines": _engines_data(results, case)}
        for case in results
    ]


def _engines_data(results: Results, case: Case) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, found in _ours_first(results[case]):
        if found.spread is None:
            data[name] = {"why_not": found.why_not}
            continue
        spread = found.spread
        middle = {"median": spread.median, "min": spread.low, "max": spread.high, "count": spread.count}
        rates = {"roof_fraction": found.roof, "plain_read_gb_per_s": found.read and found.read / 1e9}
        factors = {"over_one": over_one(results, case, name), "ratio": ratio(results, case, name)}
        data[name] = {**middle, **rates, **factors}
    return data


def conditions_text(conditions: Mapping[str, Any]) -> str:
    """One sentence per fact."""
    return "; ".join(f"{key}: {value}" for key, value in conditions.items() if value)
