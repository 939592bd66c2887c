"""Schedules compared on paper: how long ragged batches take by headrace's rule and by three others'.

python -m headrace.bench.schedules           prints the table
python -m headrace.bench.schedules --write   puts it into docs/kernels/schedule.md and draws schedule.svg beside it

A simulation, not a measurement: time is linear in KV tiles of 64 keys, each segment has an overhead, each partial one a
merge, workers do not disturb each other. The other libraries' rules are written from what they do, each in a few lines,
for decode (one tile of query rows); all are priced by the same costs. Their order of work is theirs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from headrace.bench.report import table
from headrace.kernels.schedule import ScheduleCosts, Segment, plan, segments

DOC = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "schedule.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"

TILE = 10  # the unit of costs is a tenth of a tile
OVERHEAD = 5 * TILE
MERGE = 4
SNAP = TILE
CHUNK_TILES = 4  # of batch-invariant mode: 256 keys
FLASHMLA_OVERHEAD = 5  # tiles; a constant of its rule, whatever a segment costs
FLASHINFER_LEAST = 2  # tiles of a chunk


class Piece(NamedTuple):
    """Some tiles of one item, done by one worker without a break; `partials` results of it are merged later."""

    item: int
    tiles: int
    partials: int


@dataclass(frozen=True)
class Trace:
    """A batch in decode: KV tiles of each request, and the workers there are."""

    name: str
    tiles: tuple[int, ...]
    workers: int = 132


# What workers claim, in order: each is done by one worker from its first piece to its last.
Claims = list[list[Piece]]


def costs_of(trace: Trace) -> ScheduleCosts:
    """What every rule is priced by."""
    return ScheduleCosts(OVERHEAD, MERGE, trace.workers, snap=SNAP)


def headrace(trace: Trace) -> Claims:
    """Closed-form intervals or equal splits, whichever is predicted to take less."""
    counts = list(trace.tiles)
    cuts = plan(counts, [TILE] * len(counts), costs_of(trace)).boundaries
    return [
        [Piece(s.item, s.end - s.begin, int(s.partial)) for s in segments(counts, begin, end)]
        for begin, end in pairwise(cuts)
    ]


def headrace_invariant(trace: Trace) -> Claims:
    """The same over chunks that do not depend on the batch; of a split item each chunk is a partial result."""
    chunks = [-(-tiles // CHUNK_TILES) for tiles in trace.tiles]
    each = [_divide_up(TILE * tiles, max(1, number)) or 1 for tiles, number in zip(trace.tiles, chunks, strict=True)]
    cuts = plan(chunks, each, costs_of(trace)).boundaries
    claims = []
    for begin, end in pairwise(cuts):
        found = list(segments(chunks, begin, end))
        claims.append([Piece(s.item, _tiles_of(trace, s), (s.end - s.begin) * s.partial) for s in found])
    return claims


def _tiles_of(trace: Trace, segment: Segment) -> int:
    tiles = trace.tiles[segment.item]
    return min(tiles, segment.end * CHUNK_TILES) - min(tiles, segment.begin * CHUNK_TILES)


def fa3(trace: Trace) -> Claims:
    """FlashAttention 3: splits from a worker's share of all tiles and a tenth; then the longest first.

    A request gets at most as many splits as if it were alone; above 992 requests none is split.
    """
    share = _divide_up(11 * sum(trace.tiles), 10 * trace.workers)
    most = _fa3_alone(max(trace.tiles), trace.workers) if len(trace.tiles) <= 992 else 1
    splits = [max(1, min(_divide_up(tiles, max(1, share)), most)) for tiles in trace.tiles]
    order = sorted(range(len(splits)), key=lambda item: -_divide_up(trace.tiles[item], splits[item]))
    return [[piece] for item in order for piece in _parts(item, trace.tiles[item], splits[item])]


def _fa3_alone(tiles: int, workers: int) -> int:
    """The fewest splits that fill the last wave of one item 85 % as well as the best number does."""
    if workers <= 1 or tiles <= 4:
        return 1
    filled = [splits / workers / _divide_up(splits, workers) for splits in range(1, min(128, workers, tiles) + 1)]
    return next(i + 1 for i, part in enumerate(filled) if part >= 0.85 * max(filled))


def flashmla(trace: Trace) -> Claims:
    """FlashMLA: a walk gives each worker the same budget of tiles, with room for one more overhead."""
    padded = sum(tiles + FLASHMLA_OVERHEAD for tiles in trace.tiles)
    share = _divide_up(padded, trace.workers) + FLASHMLA_OVERHEAD
    claims: Claims = []
    item, done = 0, 0
    for _ in range(trace.workers):
        budget, mine = share, []
        while item < len(trace.tiles) and budget >= (rest := trace.tiles[item] - done) + FLASHMLA_OVERHEAD:
            mine.append(Piece(item, rest, int(done > 0)))
            budget -= rest + FLASHMLA_OVERHEAD
            item, done = item + 1, 0
        if item < len(trace.tiles) and budget > FLASHMLA_OVERHEAD:
            mine.append(Piece(item, budget - FLASHMLA_OVERHEAD, 1))
            done += budget - FLASHMLA_OVERHEAD
        claims.append(mine)
    return claims


def flashinfer(trace: Trace) -> Claims:
    """FlashInfer's decode: no split when requests fill the workers; else the shortest uniform chunk that fits them."""
    chunk = max(trace.tiles)
    if len(trace.tiles) < trace.workers:
        low, high = FLASHINFER_LEAST, max(FLASHINFER_LEAST, chunk)
        while low < high:
            middle = (low + high) // 2
            fits = sum(max(1, _divide_up(tiles, middle)) for tiles in trace.tiles) <= trace.workers
            low, high = (low, middle) if fits else (middle + 1, high)
        chunk = low
    return [[piece] for item, tiles in enumerate(trace.tiles) for piece in _chunks(item, tiles, max(1, chunk))]


def _parts(item: int, tiles: int, splits: int) -> list[Piece]:
    return _chunks(item, tiles, max(1, _divide_up(tiles, splits)))


def _chunks(item: int, tiles: int, chunk: int) -> list[Piece]:
    """`chunk` tiles each and a rest; an item of no tiles is one piece."""
    lengths = [min(chunk, tiles - begin) for begin in range(0, tiles, chunk)] or [0]
    return [Piece(item, length, int(len(lengths) > 1)) for length in lengths]


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


RULES: dict[str, Callable[[Trace], Claims]] = {
    "headrace": headrace,
    "headrace, batch-invariant": headrace_invariant,
    "FA3": fa3,
    "FlashMLA": flashmla,
    "FlashInfer": flashinfer,
}


def simulate(claims: Claims, workers: int) -> int:
    """When the last worker is done, in tenths of a tile: each claims the next as soon as it is free."""
    free, latest = [0] * workers, 0
    for pieces in claims:
        done = free[0] + sum(OVERHEAD + TILE * piece.tiles + MERGE * piece.partials for piece in pieces)
        heapreplace(free, done)
        latest = max(latest, done)
    return latest


def least(trace: Trace) -> int:
    """No rule takes less: all work, an overhead for each request, spread evenly."""
    return _divide_up(sum(OVERHEAD + TILE * tiles for tiles in trace.tiles), trace.workers)


def one_long(num_short: int, long: int = 2048, short: int = 8) -> tuple[int, ...]:
    """A long request in the midst of short ones, as they came."""
    return (*(short for _ in range(num_short // 2)), long, *(short for _ in range(num_short - num_short // 2)))


def zipf(num_requests: int, longest: int = 2048) -> tuple[int, ...]:
    """Lengths that fall as 1 / rank, strewn about: steps of the golden section."""
    order = sorted(range(num_requests), key=lambda rank: (rank * 618034) % 1000003)
    return tuple(max(1, longest // (rank + 1)) for rank in order)


TRACES = (
    Trace("1 x 512", (512,)),
    Trace("32 x 64", (64,) * 32),
    Trace("140 x 64", (64,) * 140),
    Trace("512 x 8", (8,) * 512),
    Trace("1 x 2048 among 127 x 8", one_long(127)),
    Trace("1 x 2048 among 160 x 8", one_long(160)),
    Trace("Zipf, 16 from 2048", zipf(16)),
    Trace("Zipf, 64 from 2048", zipf(64)),
    Trace("Zipf, 256 from 2048", zipf(256)),
    Trace("2 workers: 1 x 512 among 15 x 8", one_long(15, 512), workers=2),
    Trace("2 workers: 3 x 64", (64,) * 3, workers=2),
)


def comparison() -> str:
    """The table: makespan in tiles by trace and rule."""
    rows = []
    for trace in TRACES:
        times = [least(trace), *(simulate(rule(trace), trace.workers) for rule in RULES.values())]
        rows.append([trace.name, *(f"{time / TILE:.1f}" for time in times)])
    return table(["trace", "least", *RULES], rows)


# The plot: three panels, makespan over the least possible by number of requests.

PANELS: tuple[tuple[str, Callable[[int], tuple[int, ...]]], ...] = (
    ("all equal: n x 64 tiles", lambda number: (64,) * number),
    ("one long: 2048 tiles, n - 1 x 8", lambda number: one_long(number - 1)),
    ("Zipf: n requests from 2048 tiles", zipf),
)
COLOURS = dict(zip(RULES, ("#c02020", "#e89090", "#2060b0", "#208050", "#806010"), strict=True))
NUMBERS = range(4, 257, 4)
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 220, 44, 46, 40
HIGHEST = 4  # the plot ends here: what takes longer leaves it at the top


def draw() -> str:
    """The plot as SVG."""
    panels = [_panel(column, name, lengths) for column, (name, lengths) in enumerate(PANELS)]
    width = LEFT + len(PANELS) * (WIDTH + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 44}" '
        'font-family="sans-serif" font-size="11">',
        "<!--\n# Predicted time over the least possible, by rule and batch; drawn by headrace/bench/schedules.py.\n-->",
        f'<rect width="{width}" height="{TOP + HEIGHT + 44}" fill="white"/>',
        *_legend(),
        *(line for panel in panels for line in panel),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _legend() -> list[str]:
    lines, x = [], LEFT
    for name, colour in COLOURS.items():
        lines.append(f'<path d="M{x} 12h18" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{x + 23}" y="16">{name}</text>')
        x += 50 + 6 * len(name)
    return lines


def _panel(column: int, name: str, lengths: Callable[[int], tuple[int, ...]]) -> list[str]:
    left = LEFT + column * (WIDTH + GAP)
    lines = [f'<text x="{left}" y="{TOP - 8}" font-weight="bold">{name}</text>']
    for ratio in range(1, HIGHEST + 1):
        y = _y(ratio)
        lines.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{ratio}x</text>')
    for number in (NUMBERS[0], 64, 128, 192, 256):
        x = _x(left, number)
        lines.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{number}</text>')
    lines.append(f'<text x="{left + WIDTH // 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">requests, n</text>')
    for rule, colour in reversed(COLOURS.items()):
        path = _path(left, _ratios(RULES[rule], lengths))
        lines.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return lines


def _ratios(rule: Callable[[Trace], Claims], lengths: Callable[[int], tuple[int, ...]]) -> list[float]:
    traces = [Trace("", lengths(number)) for number in NUMBERS]
    return [simulate(rule(trace), trace.workers) / least(trace) for trace in traces]


def _path(left: int, ratios: Sequence[float]) -> str:
    points = (f"{_x(left, number):.1f} {_y(ratio):.1f}" for number, ratio in zip(NUMBERS, ratios, strict=True))
    return "M" + "L".join(points)


def _x(left: int, number: int) -> float:
    return left + WIDTH * (number - NUMBERS[0]) / (NUMBERS[-1] - NUMBERS[0])


def _y(ratio: float) -> float:
    return TOP + HEIGHT - HEIGHT * (min(ratio, HIGHEST) - 1) / (HIGHEST - 1)


def table_section() -> str:
    """The table as the page holds it, markers included."""
    return f"{BEGIN}\n```\n{comparison()}\n```\n{END}"


def write(page: Path) -> None:
    """Brings the page's table, and the plot beside it, up to date."""
    text = page.read_text(encoding="utf-8")
    section = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    page.write_text(section.sub(lambda _: table_section(), text), encoding="utf-8")
    page.with_suffix(".svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write(DOC)
    else:
        print(comparison())
