"""How a product with weights is divided: every column once, alike for all rows of x, in the memory there is."""

import pytest

pytest.importorskip("torch")

from headrace.kernels.triton import linear_plan as plan
from headrace.kernels.triton.weight import layout_of
from headrace.kernels.triton.weight_blocks import FLOATS
from headrace.ops import explain
from headrace.ops.formats import FORMATS

SHAPES = [(4096, 4096), (11008, 4096), (4096, 14336), (128256, 4096), (576, 1536), (1, 256)]
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)
SMALLEST_SHARED = 163 << 10  # of an A100's block


def made(name, rows, cols, tokens, multiprocessors=132, **options):
    layout = layout_of(name, cols)
    width = FLOATS[name].itemsize if name in FLOATS else 4
    chunks = -(-cols // (16 // width * layout.parts))
    return chunks, plan.plan_of(layout, chunks, (rows,), tokens, multiprocessors, ("bfloat16", "ieee"), **options)


@EACH_FORMAT
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17, 32])
def test_every_column_is_in_one_share(name, tokens):
    for rows, cols in SHAPES:
        chunks, found = made(name, rows, cols, tokens)
        shares = [(split * found.steps * found.chunks, found.steps * found.chunks) for split in range(found.splits)]
        assert all(first < chunks for first, _ in shares), "a share without columns"
        assert sum(shares[-1]) >= chunks


@EACH_FORMAT
def test_shares_follow_from_the_weight_alone(name):
    few = plan.few_rows_of(layout_of(name, 4096))
    for rows, cols in SHAPES:
        for side in (range(1, few + 1), range(few + 1, 33)):
            ways = {
                (made(name, rows, cols, tokens)[1].splits, made(name, rows, cols, tokens)[1].chunks) for tokens in side
            }
            assert len(ways) == 1


@EACH_FORMAT
@pytest.mark.parametrize("x_bytes", [2, 4])
def test_steps_in_flight_fit_into_shared_memory(name, x_bytes):
    for tokens in (1, 2, 4, 16, 32):
        layout = layout_of(name, 4096)
        _, found = made(name, 4096, 4096, tokens, x_bytes=x_bytes, norm=True)
        step = plan.staged_bytes(layout, found.tile, found.tokens, x_bytes, True)
        assert (found.tile.stages - 1) * step < SMALLEST_SHARED


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("multiprocessors", [108, 132, 148, 304])
def test_large_matrices_keep_all_processors_busy_with_bytes_in_flight(name, multiprocessors):
    for rows, cols in ((14336, 4096), (4096, 14336), (32000, 4096)):
        _, found = made(name, rows, cols, 1, multiprocessors)
        programs = found.num_tiles * found.splits
        busiest = -(-programs // multiprocessors)
        assert programs >= 0.75 * busiest * multiprocessors
        assert min(2, busiest) * (found.tile.stages - 1) * found.tile.step_bytes >= plan.IN_FLIGHT_BYTES


@EACH_FORMAT
@pytest.mark.parametrize("precision", ["auto", "fast", "exact"])
@pytest.mark.parametrize("device", ["cuda", "hip"])
def test_explained_is_what_is_planned(name, precision, device):
    """The choice knows no layouts: whether x becomes integers it tells from names."""
    layout = layout_of(name, 4096)
    for tokens in (1, 2, 3, 4, 5, 32):
        arch = "sm_90" if device == "cuda" else "gfx942"
        dtype = {"x": "bfloat16", "weight": name}
        told = explain(
            "linear", (tokens, 4096), (4096, 4096), dtype=dtype, device=device, arch=arch, precision=precision
        )
        found = next(each for each in (told.chosen, *told.able) if each.kernel == "triton_linear")
        few = tokens <= plan.few_rows_of(layout, precision, device == "hip")
        integers = few and plan.in_integers(layout, precision, device == "hip")
        assert (found.arithmetic == "int16") == integers
        assert not few or found.arithmetic in ("int16", "fp32")
