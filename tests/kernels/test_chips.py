"""Whose tiles a generation takes."""

import pytest

from headrace.kernels.chips import chip_like
from headrace.kernels.mla_tiles import tile_for
from headrace.kernels.paged_tiles import SHARED_OF_WORKER, WIDEST
from headrace.kernels.triton.attention_tiles import FORWARD, tile_of

LIKE = {
    "sm_75": "sm_86",
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_86",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx90a": "gfx942",
    "gfx942": "gfx942",
    "": "sm_90",
}


@pytest.mark.parametrize("arch,chip", LIKE.items())
def test_a_generation_without_tiles_takes_those_of_a_chip_with_no_more_memory(arch, chip):
    assert chip_like(arch) == chip


@pytest.mark.parametrize("chip", sorted(set(LIKE.values())))
def test_every_kernel_has_tiles_for_every_chip(chip):
    assert chip in SHARED_OF_WORKER and chip in WIDEST
    assert tile_for(chip, "plain", 16).rows == 16
    assert tile_of(FORWARD, chip, 16, 128).rows >= 64
