"""Rope on a GPU: the table at any position, heads turned in both orders, in place and elsewhere; rows of tables."""

import numpy as np
import pytest

from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.config import RopeConfig
from headrace.ops import embedding as rows
from headrace.ops import rope

pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_table_is_exact_at_any_position(device, dtype):
    positions = np.array([0, 1, 2, 1000, 99_999, 100_000, 2**31 - 1, 5, 3], np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(theta=1e4, rotary_dim=66)).astype(dtype)
    guarded = Guarded(device)
    out = guarded.tensor(poisoned((9, 66), "float32"), "out")
    given = guarded.tensor(positions), guarded.tensor(frequencies)
    rope.rope_table(*given, magnitude=1.2345, out=out, kernel="triton_rope")
    exact = rope.table_reference(positions, frequencies, 1.2345)
    assert_within_budget(as_numpy(out), exact, exact.astype(np.float32), "float32")
    guarded.assert_untouched()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads,rotary_dim", [(1, 2), (3, 34), (40, 80)])
def test_heads_are_turned_in_place_and_elsewhere(device, heads, rotary_dim, interleaved, dtype):
    random = np.random.default_rng(rotary_dim)
    x = rounded(random.standard_normal((3, heads, 90)), dtype)[:, :, 5:85]
    table = rope.table_reference(np.arange(3) * 7, rope.inverse_frequencies(RopeConfig(rotary_dim=rotary_dim)))
    table = table.astype(np.float32)
    exact = rope.rotate_reference(x, table, interleaved)
    straightforward = rounded(exact.astype(np.float32), dtype)
    guarded = Guarded(device)
    tensor, turns = guarded.tensor(x, "x"), guarded.tensor(table)
    out = guarded.tensor(poisoned(x.shape, dtype), "out")
    rope.rotate(tensor, turns, interleaved=interleaved, out=out, kernel="triton_rope")
    assert_within_budget(as_numpy(out), exact, straightforward, dtype)
    rope.rotate(tensor, turns, interleaved=interleaved, out=tensor, kernel="triton_rope")
    assert_within_budget(as_numpy(tensor), exact, straightforward, dtype)
    guarded.assert_untouched()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_table_are_copied_and_those_outside_are_nan(device, dtype):
    table = rounded(np.random.default_rng(4).standard_normal((7, 1030)), dtype)[:, 1:1026]
    guarded = Guarded(device)
    out = guarded.tensor(poisoned((5, 1025), "float32"), "out")
    rows.embedding(
        guarded.tensor(np.array([6, 0, 7, 6, -1], np.int32)), guarded.tensor(table), out=out, kernel="triton_embedding"
    )
    got = as_numpy(out)
    assert np.array_equal(got[[0, 1, 3]], table[[6, 0, 6]].astype(np.float32)) and np.isnan(got[[2, 4]]).all()
    guarded.assert_untouched()
