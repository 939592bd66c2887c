"""The arrays of a KV cache: shapes, types, and memory taken only where it is written."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from headrace.config import KV_DTYPES, ModelConfig, RopeConfig
from headrace.errors import ArgumentError, CapacityError
from headrace.kernels.cpu.arrays import as_tensor
from headrace.kv_cache import storage
from headrace.ops.kv_formats import FORMATS

CONFIG = ModelConfig("llama", 3, 64, 4, 2, 16, 128, 100, 256, 1e-5, RopeConfig())
TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "int4": np.uint8,
}
SCALED = ("int8", "int4")


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def arrays_of(made):
    """Every array of a cache, by layer and name."""
    found = {(i, name): array for i, layer in enumerate(made.layers) for name, array in vars(layer).items()}
    return {place: array for place, array in found.items() if array is not None}


def test_types_are_those_of_the_engine_and_of_the_ops():
    assert tuple(TYPES) == KV_DTYPES == tuple(FORMATS)
    assert tuple(name for name in FORMATS if FORMATS[name].needs_scales) == SCALED


@pytest.mark.parametrize("dtype", TYPES)
def test_every_layer_has_zeroed_pages_of_the_type(dtype):
    made = storage.allocate(CONFIG, num_pages=5, page_size=8, dtype=dtype)
    assert (len(made.layers), made.num_pages, made.page_size, made.dtype) == (3, 5, 8, dtype)
    found = arrays_of(made)
    assert len(found) == 3 * (4 if dtype in SCALED else 2)
    for (_, name), array in found.items():
        scales = name.endswith("scales")
        assert array.shape == ((5, 8, 2) if scales else (5, 8, 2, 8 if dtype == "int4" else 16))
        assert array.numpy().dtype == (np.float32 if scales else TYPES[dtype]) and not array.numpy().any()


@pytest.mark.parametrize("page_size", [1, 3, 8])
@pytest.mark.parametrize("dtype", TYPES)
def test_no_two_arrays_share_a_byte_and_parts_begin_at_lines(dtype, page_size):
    """Three heads of 10: no part of a page is a whole number of cache lines by itself."""
    config = replace(CONFIG, num_kv_heads=3, head_dim=10, value_head_dim=14)
    found = arrays_of(storage.allocate(config, num_pages=3, page_size=page_size, dtype=dtype))
    for number, array in enumerate(found.values()):
        array.numpy().view(np.uint8)[:] = number + 1
    for number, array in enumerate(found.values()):
        assert (array.numpy().view(np.uint8) == number + 1).all()
        assert all(page.ctypes.data % 64 == 0 for page in array.numpy())


def test_values_may_be_wider_than_keys():
    [layer, *_] = storage.allocate(replace(CONFIG, value_head_dim=24), num_pages=1, page_size=4).layers
    assert layer.keys.shape[-1] == 16 and layer.values.shape[-1] == 24


def test_an_array_and_its_numpy_face_are_the_same_memory():
    first, second, _ = storage.allocate(CONFIG, num_pages=2, page_size=4, dtype="bfloat16").layers
    second.keys.numpy()[1, 2, 1, 3] = 1.5
    assert second.keys.numpy()[1, 2, 1, 3] == 1.5 and not first.keys.numpy().any()
    assert as_tensor(second.keys, "keys") is second.keys.tensor


def test_memory_lives_as_long_as_any_face_of_it():
    face = storage.allocate(CONFIG, num_pages=64, page_size=64).layers[0].keys.numpy()
    face[:] = 2
    assert face.sum(dtype=np.float64) == 2 * face.size


def test_a_large_cache_takes_no_memory_until_written():
    before = resident_bytes()
    made = storage.allocate(CONFIG, num_pages=1 << 14, page_size=64)
    total = storage.bytes_per_token(CONFIG) * 64 << 14
    assert total > 2**28
    assert resident_bytes() - before < total / 16
    keys = made.layers[0].keys.numpy()[: 1 << 12]
    keys[:] = 1
    assert resident_bytes() - before >= keys.nbytes / 2


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_per_token_are_those_of_the_arrays(dtype):
    config = replace(CONFIG, value_head_dim=24)
    made = storage.allocate(config, num_pages=2, page_size=4, dtype=dtype)
    assert storage.bytes_per_token(config, dtype) * 8 == sum(a.numpy().nbytes for a in arrays_of(made).values())


@pytest.mark.parametrize(
    "dtype,expected", [("float32", 3 * 2 * 32 * 4), ("float16", 3 * 2 * 32 * 2), ("int8", 3 * 2 * (32 + 8))]
)
def test_bytes_per_token(dtype, expected):
    assert storage.bytes_per_token(CONFIG, dtype) == expected


def test_no_room_is_a_capacity_error():
    with pytest.raises(CapacityError, match="memory: expected less than"):
        storage.allocate(CONFIG, num_pages=1 << 50, page_size=64)


@pytest.mark.parametrize(
    "change,text",
    [({"dtype": "uint8"}, "dtype: expected float32, .*int4, got 'uint8'"), ({"num_pages": 0}, "num_pages")],
)
def test_bad_arguments_are_named(change, text):
    with pytest.raises(ArgumentError, match=text):
        storage.allocate(CONFIG, **({"num_pages": 1, "page_size": 4} | change))


def test_two_codes_in_a_byte_need_an_even_head_dim():
    odd = replace(CONFIG, value_head_dim=15)
    assert storage.bytes_per_token(odd, "int8") == 3 * 2 * (31 + 8)
    with pytest.raises(ArgumentError, match=r"int4 needs an even head_dim, this model's is 15\n  hint: int8"):
        storage.bytes_per_token(odd, "int4")
