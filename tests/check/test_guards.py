"""Guarded arrays of tests: the same numbers and strides, poison beside them, and a write beside them found."""

import ml_dtypes
import numpy as np
import pytest
import torch

from headrace.check.guards import Guarded, as_numpy

DTYPES = ["float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_tensor_has_the_numbers_and_strides_of_the_array(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(1, 0, 2)
    tensor = Guarded("cpu").tensor(array)
    assert tensor.stride() == tuple(stride // array.itemsize for stride in array.strides)
    assert np.array_equal(as_numpy(tensor).astype(float), array.astype(float))


def test_what_lies_beside_is_poison():
    tensor = Guarded("cpu").tensor(np.ones(3, np.float32))
    assert torch.isnan(torch.as_strided(tensor, (4,), (1,))[3])


@pytest.mark.parametrize("place,words", [(3, "behind"), (-1, "before")])
def test_a_write_beside_is_found(place, words):
    guarded = Guarded("cpu")
    tensor = guarded.tensor(np.ones(3, np.float32), "out")
    guarded.assert_untouched()
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + place)[0] = 2.0
    with pytest.raises(AssertionError, match=f"out: memory {words}"):
        guarded.assert_untouched()
