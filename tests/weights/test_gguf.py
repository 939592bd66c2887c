"""gguf: files are read right, and damaged ones end in one clear error, whatever the damage."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import ArgumentError, HeadraceError, ModelFileError, SourceError, UnsupportedError
from headrace.ops.formats import FORMATS
from headrace.weights.gguf import GGUFFile, open_gguf

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return U64.pack(len(raw)) + raw


# A small whole file, field by field, so that a test can replace any one of them by name.
FIELDS: dict[str, bytes] = {
    "magic": b"GGUF", "version": U32.pack(3), "num_tensors": U64.pack(2), "num_pairs": U64.pack(4),
    "key1": text("general.architecture"), "type1": U32.pack(8), "value1": text("llama"),
    "key2": text("tokens"), "type2": U32.pack(9), "elements2": U32.pack(8), "count2": U64.pack(2),
    "token0": text("héllo"), "token1": text(""),
    "key3": text("scores"), "type3": U32.pack(9), "elements3": U32.pack(6), "count3": U64.pack(2),
    "scores": struct.pack("<2f", 0.5, -1.0),
    "key4": text("nested"), "type4": U32.pack(9), "elements4": U32.pack(9), "count4": U64.pack(1),
    "inner_type": U32.pack(0), "inner_count": U64.pack(3), "inner": b"\x01\x02\x03",
    "name1": text("a.weight"), "num_dims1": U32.pack(2), "dims1": struct.pack("<2Q", 64, 3),
    "format1": U32.pack(8), "offset1": U64.pack(0),
    "name2": text("b.bias"), "num_dims2": U32.pack(1), "dims2": U64.pack(5),
    "format2": U32.pack(0), "offset2": U64.pack(224),
}  # fmt: skip
DATA = bytes(range(204)) + bytes(20) + np.arange(5, dtype="<f4").tobytes()


def build(**changes: bytes) -> bytes:
    """The small file with some fields replaced."""
    header = b"".join((FIELDS | changes).values())
    return header + bytes(-len(header) % 32) + DATA


def open_bytes(folder: Path, raw: bytes) -> GGUFFile:
    path = folder / "small.gguf"
    path.write_bytes(raw)
    return open_gguf(path)


def test_the_small_file_is_read(tmp_path: Path) -> None:
    with open_bytes(tmp_path, build()) as file:
        assert file.version == 3
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["tokens"] == ["héllo", ""]
        np.testing.assert_array_equal(file.metadata["scores"], np.array([0.5, -1.0], np.float32))
        assert [inner.tolist() for inner in file.metadata["nested"]] == [[1, 2, 3]]
        assert (file.tensors["a.weight"].format, file.tensors["a.weight"].shape) == ("Q8_0", (3, 64))
        assert file.data("a.weight").tobytes() == DATA[:204]
        assert file.data("b.bias").view("<f4").tolist() == [0, 1, 2, 3, 4]
        assert (file.total_bytes, file.tensor_bytes) == (len(build()), 204 + 20)


def test_version_2_is_read(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, build(version=U32.pack(2))).version == 2


def test_a_tensor_without_dims_is_one_value(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, build(num_dims2=U32.pack(0), dims2=b""))
    assert (file.tensors["b.bias"].shape, file.tensors["b.bias"].num_bytes) == ((), 4)


HUGE = U64.pack(2**64 - 1)
DAMAGED: dict[str, tuple[dict[str, bytes], type[HeadraceError], str]] = {
    "magic": ({"magic": b"GGML"}, ModelFileError, "not a GGUF file.*GGML"),
    "wheel": ({"magic": b"PK\3\4"}, ModelFileError, "zip archive"),
    "pointer": ({"magic": b"version https://git-lfs"}, ModelFileError, "git lfs pull"),
    "page": ({"magic": b"<!DOCTYPE html>"}, ModelFileError, "web page"),
    "version 1": ({"version": U32.pack(1)}, UnsupportedError, "version 1"),
    "version 4": ({"version": U32.pack(4)}, UnsupportedError, "version 4"),
    "big endian": ({"version": struct.pack(">I", 3)}, UnsupportedError, "big-endian"),
    "tensor count": ({"num_tensors": HUGE}, ModelFileError, "number of tensors: 18446744073709551615 cannot fit"),
    "pair count": ({"num_pairs": HUGE}, ModelFileError, "number of metadata pairs.*cannot fit"),
    "key length": ({"key1": HUGE}, ModelFileError, "metadata key 0 at byte .* needs 18446744073709551615 bytes"),
    "empty key": ({"key1": text("")}, ModelFileError, "metadata key 0: expected 1 to"),
    "long key": ({"key1": text("k" * 2**16)}, ModelFileError, "expected 1 to 65535 bytes, got 65536"),
    "key not utf-8": ({"key1": text(b"\xff\xfe")}, ModelFileError, "metadata key 0 is not UTF-8"),
    "key twice": ({"key3": text("tokens")}, ModelFileError, "'tokens' appears twice"),
    "value type": ({"type1": U32.pack(13)}, ModelFileError, "has type 13"),
    "value not utf-8": ({"value1": text(b"\xc3")}, ModelFileError, "'general.architecture' is not UTF-8"),
    "element type": ({"elements3": U32.pack(77)}, ModelFileError, "elements of type 77"),
    "array count": ({"count3": U64.pack(2**61)}, ModelFileError, "length of array 'scores'"),
    "string count": ({"count2": U64.pack(2**40)}, ModelFileError, "length of array 'tokens'"),
    "token length": ({"token0": HUGE}, ModelFileError, "string 0 of array 'tokens' at byte"),
    "token not utf-8": ({"token0": text(b"\xe9")}, ModelFileError, "string 0 of array 'tokens' is not UTF-8"),
    "nested count": ({"inner_count": HUGE}, ModelFileError, "length of array 'nested'"),
    "deep nesting": ({"count4": (U64.pack(1) + U32.pack(9)) * 20}, ModelFileError, "nested more than"),
    "many dims": ({"num_dims1": U32.pack(5)}, ModelFileError, "has 5 dims"),
    "zero dim": ({"dims1": struct.pack("<2Q", 64, 0)}, ModelFileError, "dim of size 0"),
    "product overflow": ({"dims1": struct.pack("<2Q", 2**63, 2**63)}, ModelFileError, "'a.weight' ends at byte"),
    "broken rows": ({"dims1": struct.pack("<2Q", 48, 4)}, ModelFileError, "not whole Q8_0 blocks"),
    "name twice": ({"name2": text("a.weight")}, ModelFileError, "tensor 'a.weight' appears twice"),
    "name not utf-8": ({"name2": text(b"\xff")}, ModelFileError, "name of tensor 1 is not UTF-8"),
    "known type": ({"format2": U32.pack(39)}, UnsupportedError,
                   "(?s)'b.bias' has type MXFP4.*supported types: F32, F16"),
    "unknown type": ({"format2": U32.pack(999)}, UnsupportedError, "'b.bias' has type number 999"),
    "unaligned": ({"offset2": U64.pack(225)}, ModelFileError, "offset 225, not a multiple of the alignment 32"),
    "far offset": ({"offset2": U64.pack(2**64 - 32)}, ModelFileError, "'b.bias' ends at byte 18446744073709"),
    "overlap": ({"offset2": U64.pack(192)}, ModelFileError, "'a.weight' and 'b.bias' overlap"),
    "alignment 0": ({"key1": text("general.alignment"), "type1": U32.pack(4), "value1": U32.pack(0)},
                    ModelFileError, "power of two, got 0"),
    "alignment text": ({"key1": text("general.alignment")}, ModelFileError, "power of two, got 'llama'"),
    "huge alignment": ({"key1": text("general.alignment"), "type1": U32.pack(10), "value1": U64.pack(2**63)},
                       ModelFileError, "not a multiple|ends at byte"),
    "one part": ({"key1": text("split.count"), "type1": U32.pack(2), "value1": b"\3\0"},
                 UnsupportedError, "one of 3 parts"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_each_damage_has_its_error(case: str, tmp_path: Path) -> None:
    changes, error, pattern = DAMAGED[case]
    with pytest.raises(error, match=pattern) as caught:
        open_bytes(tmp_path, build(**changes))
    assert "small.gguf" in caught.value.message


def open_or_error(folder: Path, raw: bytes) -> None:
    """Either a HeadraceError, or a file whose every tensor is inside it; never much more memory than the file."""
    path = folder / "small.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        file = open_gguf(path)
    except HeadraceError:
        return
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 64 * len(raw) + 2**17
    for name, info in file.tensors.items():
        assert len(file.data(name)) == info.num_bytes
        assert info.num_bytes * FORMATS[info.format].block_len == np.prod(info.shape) * FORMATS[info.format].block_bytes


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = build()
    for length in range(len(whole)):
        with pytest.raises(ModelFileError):
            open_bytes(tmp_path, whole[:length])


LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 400),
)
REUSES_FOLDER = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@REUSES_FOLDER
@given(data=st.data())
def test_any_number_in_place_of_any_field(tmp_path: Path, data: st.DataObject) -> None:
    changes = {}
    for field in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True)):
        number = U64.pack(data.draw(LENGTHS))
        changes[field] = number[: len(FIELDS[field])] + FIELDS[field][8:]
    open_or_error(tmp_path, build(**changes))


@REUSES_FOLDER
@given(flips=st.lists(st.integers(0, 8 * len(build()) - 1), min_size=1, max_size=8))
def test_flipped_bits(tmp_path: Path, flips: list[int]) -> None:
    raw = bytearray(build())
    for bit in flips:
        raw[bit // 8] ^= 1 << bit % 8
    open_or_error(tmp_path, bytes(raw))


@REUSES_FOLDER
@given(start=st.integers(0, len(build())), length=st.integers(0, 40), insert=st.binary(max_size=40))
def test_bytes_cut_out_and_put_in(tmp_path: Path, start: int, length: int, insert: bytes) -> None:
    raw = build()
    open_or_error(tmp_path, raw[:start] + insert + raw[start + length :])


@REUSES_FOLDER
@given(raw=st.binary(max_size=200))
def test_random_bytes_after_the_magic(tmp_path: Path, raw: bytes) -> None:
    open_or_error(tmp_path, b"GGUF\x03\0\0\0" + raw)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_gguf(tmp_path / "missing.gguf")
    with pytest.raises(SourceError, match="no such file"):
        open_gguf(Path(__file__) / "below-a-file.gguf")
    with pytest.raises(ModelFileError, match="got a directory"):
        open_gguf(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_gguf("bad\0name.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match="empty"):
        open_gguf(tmp_path / "empty.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.gguf").write_bytes(build())
    monkeypatch.setattr(Path, "open", refuse)  # the superuser may read every file, so the system is played
    with pytest.raises(ModelFileError, match=r"secret.gguf: cannot be read: Permission denied"):
        open_gguf(tmp_path / "secret.gguf")


EVERY_TYPE: dict[str, tuple[str, Any]] = {
    "uint8": ("UINT8", 200), "int8": ("INT8", -100), "uint16": ("UINT16", 60000), "int16": ("INT16", -30000),
    "uint32": ("UINT32", 4_000_000_000), "int32": ("INT32", -2_000_000_000), "float32": ("FLOAT32", 0.1),
    "bool": ("BOOL", True), "string": ("STRING", "naïve 中文 🎉"), "uint64": ("UINT64", 2**64 - 1),
    "int64": ("INT64", -(2**63)), "float64": ("FLOAT64", 0.1),
}  # fmt: skip


def test_values_equal_the_reference_package(tmp_path: Path) -> None:
    path = tmp_path / "every.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in EVERY_TYPE.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
        writer.add_key_value(f"{key}.array", [value] * 3, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind])
    weights = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    writer.add_tensor("half", weights.astype(np.float16))
    writer.add_tensor(
        "blocks",
        gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q5_1),
        raw_dtype=gguf.GGMLQuantizationType.Q5_1,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    for key, (kind, _) in EVERY_TYPE.items():
        assert ours.metadata[key] == theirs.fields[key].contents()
        assert type(ours.metadata[key]) is type(theirs.fields[key].contents())
        assert ours.kinds[key] == gguf.GGUFValueType[kind]
        assert list(ours.metadata[f"{key}.array"]) == theirs.fields[f"{key}.array"].contents()
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert set(ours.tensors) == {"half", "blocks"}
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.format, info.offset, info.num_bytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(ours.data(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def test_data_is_a_read_only_view_that_outlives_close(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, build())
    data = file.data("a.weight")
    assert np.shares_memory(data, file.data("a.weight"))
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1
    file.close()
    file.close()
    assert data.tobytes() == DATA[:204]
    with pytest.raises(ArgumentError, match="is closed"):
        file.data("a.weight")


def test_an_unknown_tensor_is_an_argument_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no tensor 'c'"):
        open_bytes(tmp_path, build()).data("c")


def resident_bytes(path: Path) -> int:
    """How much of the mapped file counts as memory of this process."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc to see resident pages")
def test_released_tensors_leave_memory_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    large = np.arange(2**20, dtype=np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("before", "large", "after"):
        writer.add_tensor(name, large)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)
    for name in file.tensors:
        np.testing.assert_array_equal(file.data(name).view("<f4"), large)
    assert resident_bytes(path) >= file.tensor_bytes
    before = resident_bytes(path)
    file.release("large")
    assert before - resident_bytes(path) >= large.nbytes - 2 * os.sysconf("SC_PAGE_SIZE")
    np.testing.assert_array_equal(file.data("large").view("<f4"), large)


def test_a_truncated_big_vocabulary_is_refused_and_the_whole_one_read(tmp_path: Path) -> None:
    words = [f"word{index}é" for index in range(20_000)]
    tokens = b"".join(text(word) for word in words)
    fields = {"count2": U64.pack(len(words)), "token0": tokens, "token1": b""}
    whole = build(**fields)
    assert open_bytes(tmp_path, whole).metadata["tokens"] == words
    with pytest.raises(ModelFileError):
        open_bytes(tmp_path, whole[: len(whole) // 2])
