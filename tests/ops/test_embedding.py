"""embedding and select_rows: rows by their numbers, of packed weights and of arrays, numbers outside named."""

import numpy as np
import pytest

from headrace.check.compare import poisoned, rounded
from headrace.errors import ArgumentError, KernelError
from headrace.ops import embedding as rows
from headrace.ops.linear import pack

IDS = np.array([6, 0, 6, 3], np.int32)


def table(dtype="float32"):
    return rounded(np.random.default_rng(0).standard_normal((7, 33)), dtype)


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_rows_of_arrays(dtype):
    out = poisoned((4, 33), "float32")
    assert rows.embedding(IDS, table(dtype), out=out) is out
    assert np.array_equal(out, table(dtype)[IDS].astype(np.float32))


def test_rows_of_packed_weights_are_those_of_the_array():
    packed = pack(table().view(np.uint8), "F32", (7, 33))
    assert np.array_equal(rows.embedding(IDS, packed), table()[IDS])
    assert np.array_equal(rows.select_rows(table(), IDS), table()[IDS])


def test_mistakes_are_named():
    with pytest.raises(ArgumentError, match="ids: expected 0 to 6, got 7"):
        rows.embedding(np.array([1, 7], np.int32), table())
    with pytest.raises(ArgumentError, match=r"ids: expected int32 \[n\], got int64"):
        rows.embedding(np.array([1]), table())
    with pytest.raises(ArgumentError, match=r"table: expected \[vocab, dim\] of float32"):
        rows.embedding(IDS, table().astype(np.float64))
    with pytest.raises(KernelError, match="needs a packed weight"):
        rows.embedding(IDS, table(), kernel="cpu_portable")
