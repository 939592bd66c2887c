"""The comparison of schedules: every rule does all the work, headrace is never far behind, the page is up to date."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench import schedules
from headrace.bench.schedules import MERGE, OVERHEAD, RULES, SNAP, TILE, TRACES, Trace

# What closed-form intervals may take beyond an even share: kernels/schedule.py derives it.
REST = OVERHEAD + TILE + 2 * SNAP + 2 * MERGE

RAGGED = st.builds(
    lambda tiles, workers: Trace("", tuple(tiles), workers),
    st.lists(st.integers(1, 40) | st.sampled_from([1, 64, 700]), min_size=1, max_size=60),
    st.integers(1, 40),
)


def time_of(rule, trace):
    return schedules.simulate(RULES[rule](trace), trace.workers)


@pytest.mark.parametrize("rule", RULES)
@given(trace=RAGGED)
def test_every_rule_does_every_tile_once(rule, trace):
    done, pieces = [0] * len(trace.tiles), [0] * len(trace.tiles)
    claims = RULES[rule](trace)
    for piece in (piece for mine in claims for piece in mine):
        done[piece.item] += piece.tiles
        pieces[piece.item] += 1
    assert done == list(trace.tiles)
    for piece in (piece for mine in claims for piece in mine):
        assert (piece.partials > 0) == (pieces[piece.item] > 1)


@given(RAGGED)
def test_no_rule_takes_less_than_the_least(trace):
    assert all(time_of(rule, trace) >= schedules.least(trace) for rule in RULES)


@given(RAGGED)
def test_headrace_is_never_more_than_its_bound_behind_any_rule(trace):
    best = min(time_of(rule, trace) for rule in RULES)
    assert time_of("headrace", trace) <= schedules.least(trace) + REST <= best + REST


def named(name):
    return next(trace for trace in TRACES if trace.name == name)


def test_one_long_request_among_many_is_split():
    trace = named("1 x 2048 among 160 x 8")
    assert time_of("FlashInfer", trace) >= 2048 * TILE  # as many requests as workers: it splits none
    assert time_of("headrace", trace) * 40 < time_of("FlashInfer", trace)
    assert time_of("headrace", trace) <= time_of("FA3", trace)


def test_a_last_wave_nearly_empty_is_not_waited_for():
    trace = named("140 x 64")
    for other in ("FA3", "FlashInfer"):
        assert time_of(other, trace) == 2 * (OVERHEAD + 64 * TILE)
    assert time_of("headrace", trace) < 0.6 * time_of("FA3", trace)


def test_a_short_uniform_batch_is_split_equally():
    trace = named("32 x 64")
    assert time_of("headrace", trace) == time_of("FA3", trace) < time_of("FlashMLA", trace)


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_on_the_traces_of_the_page_headrace_is_within_two_percent_of_the_best(trace):
    assert time_of("headrace", trace) <= 1.02 * min(time_of(rule, trace) for rule in ("FA3", "FlashMLA", "FlashInfer"))


def test_the_page_shows_this_table_and_this_plot():
    text = schedules.DOC.read_text(encoding="utf-8")
    assert schedules.table_section() in text, "bring it up to date with: python -m headrace.bench.schedules --write"
    assert schedules.DOC.with_suffix(".svg").read_text(encoding="utf-8") == schedules.draw()


def test_the_plot_is_well_formed():
    from xml.etree import ElementTree

    root = ElementTree.fromstring(schedules.draw())
    paths = [path for path in root.iter() if path.get("fill") == "none"]
    assert len(paths) == len(schedules.PANELS) * len(RULES)
    assert all(len(re.findall("[ML]", path.get("d"))) == len(schedules.NUMBERS) for path in paths)


def test_writing_replaces_only_the_table(tmp_path):
    page = tmp_path / "schedule.md"
    page.write_text(f"before\n{schedules.BEGIN}\nold\n{schedules.END}\nafter\n", encoding="utf-8")
    schedules.write(page)
    assert page.read_text(encoding="utf-8") == f"before\n{schedules.table_section()}\nafter\n"
    assert page.with_suffix(".svg").exists()
