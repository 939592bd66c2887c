"""The arrays of a KV cache: shapes, types, and memory taken only where it is written."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from headrace.config import ModelConfig, RopeConfig
from headrace.errors import ArgumentError, CapacityError
from headrace.kernels.cpu.arrays import as_tensor
from headrace.kv_cache import storage

CONFIG = ModelConfig("llama", 3, 64, 4, 2, 16, 128, 100, 256, 1e-5, RopeConfig())
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("dtype", storage.ITEM_BYTES)
def test_every_layer_has_zeroed_pages_of_the_type(dtype):
    made = storage.allocate(CONFIG, num_pages=5, page_size=8, dtype=dtype)
    assert len(made.keys) == len(made.values) == 3
    assert (made.num_pages, made.page_size, made.dtype) == (5, 8, dtype)
    for array in (*made.keys, *made.values):
        assert array.shape == (5, 8, 2, 16)
        assert array.numpy().dtype == TYPES[dtype] and not array.numpy().any()


def test_values_may_be_wider_than_keys():
    made = storage.allocate(replace(CONFIG, value_head_dim=24), num_pages=1, page_size=4)
    assert made.keys[0].shape[-1] == 16 and made.values[0].shape[-1] == 24


def test_an_array_and_its_numpy_face_are_the_same_memory():
    made = storage.allocate(CONFIG, num_pages=2, page_size=4, dtype="bfloat16")
    made.keys[1].numpy()[1, 2, 1, 3] = 1.5
    assert made.keys[1].numpy()[1, 2, 1, 3] == 1.5 and not made.keys[0].numpy().any()
    assert as_tensor(made.keys[1], "keys") is made.keys[1].tensor


def test_memory_lives_as_long_as_any_face_of_it():
    face = storage.allocate(CONFIG, num_pages=64, page_size=64).keys[0].numpy()
    face[:] = 2
    assert face.sum(dtype=np.float64) == 2 * face.size


def test_a_large_cache_takes_no_memory_until_written():
    before = resident_bytes()
    made = storage.allocate(CONFIG, num_pages=1 << 14, page_size=64)
    total = storage.bytes_per_token(CONFIG) * 64 << 14
    assert total > 2**28
    assert resident_bytes() - before < total / 16
    made.keys[0].numpy()[: 1 << 12] = 1
    assert resident_bytes() - before >= made.keys[0].numpy()[: 1 << 12].nbytes / 2


@pytest.mark.parametrize("dtype,expected", [("float32", 3 * 2 * 32 * 4), ("float16", 3 * 2 * 32 * 2)])
def test_bytes_per_token(dtype, expected):
    assert storage.bytes_per_token(CONFIG, dtype) == expected


def test_no_room_is_a_capacity_error():
    with pytest.raises(CapacityError, match="memory: expected less than"):
        storage.allocate(CONFIG, num_pages=1 << 50, page_size=64)


@pytest.mark.parametrize(
    "change,text", [({"dtype": "int8"}, "dtype: expected float32"), ({"num_pages": 0}, "num_pages")]
)
def test_bad_arguments_are_named(change, text):
    with pytest.raises(ArgumentError, match=text):
        storage.allocate(CONFIG, **({"num_pages": 1, "page_size": 4} | change))
