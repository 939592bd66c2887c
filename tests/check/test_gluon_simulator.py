"""The simulator of Gluon kernels: what is in order runs, and each way of being out of order is an error."""

import numpy as np
import pytest

pytest.importorskip("triton")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headrace.check.gluon_memory import OutOfOrder
from headrace.check.gluon_simulator import Deadlock, simulate
from headrace.check.gluon_values import Descriptor

FULL, FREE = gl.constexpr(0), gl.constexpr(1)
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
ROWS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def _load(tiles, tile, barriers, count, SKIP: gl.constexpr):
    for i in range(count):
        if SKIP != "free":
            mbarrier.wait(barriers.index(FREE), (i & 1) ^ 1)
        mbarrier.expect(barriers.index(FULL), 64 * 64 * 2)
        tma.async_copy_global_to_shared(tiles, [i * 64, 0], barriers.index(FULL), tile)


@gluon.jit
def _sum_products(tile, own, barriers, out, count, SKIP: gl.constexpr):
    rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    total = gl.zeros([64, 64], gl.float32, ROWS)
    for i in range(count):
        if SKIP != "full":
            mbarrier.wait(barriers.index(FULL), i & 1)
        own.store(gl.full([64, 64], 1.0, gl.float32, ROWS).to(own.dtype))
        if SKIP != "fence":
            fence_async_shared()
        if SKIP != "meeting":
            gl.thread_barrier()
        total = warpgroup_mma(own, tile, total, is_async=True)
        if SKIP != "product":
            total = warpgroup_mma_wait(0, deps=[total])
        if SKIP != "arrival":
            mbarrier.arrive(barriers.index(FREE), count=1)
        total = warpgroup_mma_wait(0, deps=[total])
        if SKIP == "once":
            mbarrier.arrive(barriers.index(FREE), count=1)
    gl.store(out + rows[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :], total)


@gluon.jit
def _ring_kernel(tiles, out, count, SKIP: gl.constexpr):
    tile = gl.allocate_shared_memory(tiles.dtype, [64, 64], TILE)
    own = gl.allocate_shared_memory(tiles.dtype, [64, 64], TILE)
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(FULL), count=1)
    mbarrier.init(barriers.index(FREE), count=1)
    gl.warp_specialize(
        [(_sum_products, (tile, own, barriers, out, count, SKIP)), (_load, (tiles, tile, barriers, count, SKIP))],
        [1],
        [24],
    )


def run(skip, *, seed=0, eagerness=0.5, count=4):
    tiles = np.random.default_rng(0).standard_normal((64 * count, 64)).astype(np.float16)
    out = np.full((64, 64), np.nan, np.float32)
    given = {"tiles": Descriptor(tiles, [64, 64]), "out": out, "count": count, "SKIP": skip}
    simulate(_ring_kernel, (1,), given, seed=seed, eagerness=eagerness)
    expected = tiles.astype(np.float32).sum(0)
    return np.abs(out - expected).max(), 2.0**-10 * np.abs(tiles.astype(np.float32)).sum(0).max()


@pytest.mark.parametrize("eagerness", [0.0, 0.5, 1.0])
def test_a_ring_in_order_computes_in_any_order_of_events(eagerness):
    for seed in range(3):
        error, allowed = run("", seed=seed, eagerness=eagerness)
        assert error <= allowed


@pytest.mark.parametrize("skip", ["full", "free", "fence", "meeting", "product"])
def test_what_is_out_of_order_is_found_whatever_the_order_was(skip):
    for eagerness in (0.0, 1.0):
        with pytest.raises(OutOfOrder):
            run(skip, eagerness=eagerness)


def test_an_arrival_too_many_is_found():
    """It lets a copy go too early, or completes a phase that somebody waits for the end of."""
    with pytest.raises((OutOfOrder, Deadlock)):
        run("once")


def test_an_arrival_that_is_missing_is_a_deadlock_that_tells_who_waits():
    with pytest.raises(Deadlock, match="partition 1 waits for barrier"):
        run("arrival")


def test_copies_outside_of_an_array_bring_zeros():
    source = Descriptor(np.ones((3, 100, 64), np.float16), [1, 64, 64])
    assert source.box([1, 64, 0]).sum() == 36 * 64
    assert source.box([3, 0, 0]).sum() == 0 and source.box([-1, 0, 0]).sum() == 0
