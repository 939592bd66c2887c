"""The work list of MLA decode, and the merge of what it cuts: in Triton's interpreter, and on the GPU."""

import numpy as np
import pytest

from headrace.check.compare import assert_within_budget

torch = pytest.importorskip("torch")
plan = pytest.importorskip("headrace.kernels.gluon.mla_plan")
merge = pytest.importorskip("headrace.kernels.gluon.mla_merge").merge
UNIT, TILE = plan.UNIT, plan.TILE


def planned(lens, query_lens, *, heads, workers, together, device, most_keys=1 << 20):
    starts = np.cumsum([0, *query_lens], dtype=np.int32)
    arrays = {
        "key_lens": torch.tensor(lens, dtype=torch.int32, device=device),
        "query_starts": torch.from_numpy(starts).to(device),
        "query": torch.empty(int(starts[-1]), heads, 1, device=device),
    }
    division = {"workers": workers, "tiles_together": together, "most_keys": most_keys}
    items, bounds, most = plan.plan_work(arrays, **division)
    return items.cpu().numpy(), bounds.cpu().numpy().tolist(), most, arrays, division


def expected_items(query_lens, heads, together):
    """Request and first row tile of each."""
    tiles = [-(-count * heads // TILE) for count in query_lens]
    return [[r, first] for r, count in enumerate(tiles) for first in range(0, count, together)]


@pytest.mark.parametrize("seed", range(4))
def test_every_unit_is_in_one_interval_and_none_is_much_longer(seed, device):
    random = np.random.default_rng(seed)
    requests, heads = int(random.integers(1, 12)), int(random.integers(1, 150))
    lens = random.integers(0, (40, 400, 4000, 40000)[seed], requests).tolist()
    query_lens = random.integers(0, 4, requests).tolist()
    workers, together = int(random.integers(1, 40)), int(random.integers(1, 4))
    given = {"heads": heads, "workers": workers, "together": together, "device": device}
    items, bounds, most, *_ = planned(lens, query_lens, **given)
    wanted = expected_items(query_lens, heads, together)
    assert items[: len(wanted)].tolist() == wanted and len(wanted) <= most
    assert bounds[0] == [0, 0] and bounds[-1] == [len(wanted), 0] and bounds == sorted(bounds)
    units = [-(-lens[request] // UNIT) for request, _ in wanted]
    assert all(unit < max(units[item], 1) for item, unit in bounds if item < len(units))
    before = np.cumsum([0, *(count + plan.OVERHEAD for count in units)])
    ends = [before[item] + (unit + plan.OVERHEAD if unit else 0) for item, unit in bounds]
    shares = np.diff(ends)
    assert shares.sum() == before[-1]
    assert shares.max() <= -(-before[-1] // workers) + max(plan.WHOLE, 2 * (plan.SNAP + plan.OVERHEAD))


@pytest.mark.parametrize(
    "requests,workers,begins",
    [
        (128, 66, [[2 * p, 0] for p in range(64)] + [[128, 0]] * 3),
        (16, 66, [[p // 4, p % 4 * 8] for p in range(64)] + [[16, 0]] * 3),
        (128, 132, [[p, 0] for p in range(128)] + [[128, 0]] * 5),
    ],
)
def test_a_uniform_batch_is_cut_evenly_or_not_at_all(requests, workers, begins, device):
    _, bounds, *_ = planned([4096] * requests, [1] * requests, heads=16, workers=workers, together=1, device=device)
    assert bounds == begins


def test_one_long_request_among_short_ones_is_shared_out(device):
    _, bounds, *_ = planned([131072] + [1024] * 31, [1] * 32, heads=16, workers=132, together=1, device=device)
    assert sum(item == 0 for item, _ in bounds) > 90


def test_lengths_and_starts_out_of_range_are_held_within_the_arrays(device):
    items, bounds, most, *_ = planned(
        [1 << 30, -5], [1, 1], heads=16, workers=5, together=1, device=device, most_keys=640
    )
    assert items.tolist() == [[0, 0], [1, 0]] and bounds[-1] == [2, 0]
    assert all(unit <= 5 for _, unit in bounds)


def test_parts_are_merged_by_their_sums(device):
    lens, heads, workers = [1500, 0, 700], 20, 6
    _, bounds, most, arrays, division = planned(
        lens, [1, 1, 4], heads=heads, workers=workers, together=2, device=device
    )
    random = np.random.default_rng(0)
    slots = 2 * workers * 2 * TILE
    parts = random.standard_normal((slots, 512)).astype(np.float32)
    sums = random.standard_normal(slots).astype(np.float32)
    sums[::7] = -np.inf
    out = torch.full((6, heads, 512), 7.0, dtype=torch.float16, device=device)
    lse = torch.full((6, heads), 7.0, device=device)
    items, lists, _ = plan.plan_work(arrays, **division)
    partial = (torch.from_numpy(parts).to(device), torch.from_numpy(sums).to(device))
    merge(arrays | {"out": out, "lse": lse}, partial, (items, lists), **division)
    got, got_lse = out.cpu().numpy().reshape(-1, 512), lse.cpu().numpy().reshape(-1)
    starts = {0: 0, 1: heads, 2: 2 * heads}
    merged = 0
    for number, (request, tile) in enumerate(items.tolist()[:3]):
        takers = [p for p in range(workers) if bounds[p] < [number + 1, 0] and bounds[p + 1] > [number, 0]]
        for row in range(min(2 * TILE, (1, 1, 4)[request] * heads - tile * TILE)):
            place = starts[request] + tile * TILE + row
            if len(takers) == 1:  # written by who took it whole
                assert (got[place] == 7).all() and got_lse[place] == 7
                continue
            merged += 1
            at = [((2 * p + (bounds[p][0] != number)) * 2 + row // TILE) * TILE + row % TILE for p in takers]
            weights = np.exp(sums[at].astype(np.float64))
            exact = (weights @ parts[at].astype(np.float64)) / max(weights.sum(), 1e-300)
            assert_within_budget(got[place], exact, exact.astype(np.float32), "float16")
            with np.errstate(divide="ignore"):
                total = np.log(weights.sum())
            assert_within_budget(got_lse[place : place + 1], total[None], total[None], "float32", logarithms=True)
    assert merged > 0
