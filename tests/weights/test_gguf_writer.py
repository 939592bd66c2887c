"""gguf_writer: what is written is read back, by the reference package too, and a file is whole or absent."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from headrace.errors import ArgumentError, CapacityError
from headrace.weights.gguf import open_gguf
from headrace.weights.gguf_writer import write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "text": "naïve 中文 🎉",
    "flag": True,
    "small": 7,
    "negative": -7,
    "large": 2**40,
    "very negative": -(2**40),
    "real": 0.5,
    "exact": np.float64(0.1),
    "byte": np.uint8(3),
    "tokens": ["a", "", "ĠĠ"],
    "nothing": [],
    "scores": np.array([0.5, -1.0], np.float32),
    "flags": np.array([True, False]),
    "long": np.array([2**63 - 1, -1]),
}


def tensors() -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        ("odd", "F16", (3, 5), random.integers(0, 256, 30, dtype=np.uint8)),
        ("blocks", "Q4_K", (2, 512), random.integers(0, 256, (2, 288), dtype=np.uint8)),
        ("vector", "F32", (7,), random.integers(0, 256, 28, dtype=np.uint8)),
        ("cube", "Q8_0", (2, 3, 32), random.integers(0, 256, 204, dtype=np.uint8)),
    ]


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_what_is_written_is_read_back(tmp_path: Path, alignment: int | None) -> None:
    metadata = METADATA if alignment is None else METADATA | {"general.alignment": alignment}
    write_gguf(tmp_path / "new.gguf", metadata, tensors())
    file = open_gguf(tmp_path / "new.gguf")
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        assert np.array_equal(file.metadata[key], value)
    assert [(info.name, info.format, info.shape) for info in file.tensors.values()] == [t[:3] for t in tensors()]
    for name, _, _, data in tensors():
        assert file.tensors[name].offset % (alignment or 32) == 0
        assert file.data(name).tobytes() == data.tobytes()


def test_the_reference_package_reads_the_same(tmp_path: Path) -> None:
    write_gguf(tmp_path / "new.gguf", METADATA, tensors())
    theirs = gguf.GGUFReader(tmp_path / "new.gguf")
    kinds = {key: field.types[0].name for key, field in theirs.fields.items()}
    expected = {
        "text": "STRING", "flag": "BOOL", "small": "UINT32", "negative": "INT32", "large": "UINT64",
        "very negative": "INT64", "real": "FLOAT32", "exact": "FLOAT64", "byte": "UINT8", "tokens": "ARRAY",
    }  # fmt: skip
    assert expected.items() <= kinds.items()
    for key in set(METADATA) - {"nothing"}:
        assert np.array_equal(theirs.fields[key].contents(), METADATA[key])
    for tensor, (name, form, _, data) in zip(theirs.tensors, tensors(), strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (name, form)
        assert tensor.data.tobytes() == data.tobytes()


def test_kinds_and_nested_arrays_survive_a_copy(tmp_path: Path) -> None:
    metadata = {"wide": 1, "short": -1, "exact": 0.1, "nested": [np.array([1, 2], np.uint8), np.array([], np.int32)]}
    write_gguf(tmp_path / "first.gguf", metadata, [], kinds={"wide": 10, "short": 3, "exact": 12})
    first = open_gguf(tmp_path / "first.gguf")
    write_gguf(tmp_path / "second.gguf", first.metadata, [], kinds=first.kinds)
    assert (first.kinds, first.metadata["exact"]) == ({"wide": 10, "short": 3, "exact": 12, "nested": 9}, 0.1)
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def test_data_may_come_in_pieces(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", {}, tensors())
    pieces = [(name, form, shape, iter(np.array_split(data.reshape(-1), 3))) for name, form, shape, data in tensors()]
    write_gguf(tmp_path / "pieces.gguf", {}, pieces)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


WRONG: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "too few bytes": ({}, [("a", "F32", (2,), np.zeros(7, np.uint8))], "data of 'a': expected 8 bytes, got 7"),
    "not bytes": ({}, [("a", "F32", (2,), np.zeros(2, np.float32))], "data of 'a': expected uint8, got float32"),
    "broken rows": ({}, [("a", "Q4_0", (2, 33), np.zeros(36, np.uint8))], "multiple of 32 for Q4_0"),
    "same name": ({}, [("a", "F32", (0,), np.zeros(0, np.uint8))] * 2, "same name"),
    "no such value": ({"k": object()}, [], "'k' has a value that GGUF cannot hold"),
    "too large": ({"k": 2**64}, [], "'k' has a value that GGUF cannot hold"),
    "matrix": ({"k": np.zeros((2, 2))}, [], "'k': expected a 1-D array"),
    "list of numbers": ({"k": [1, 2]}, [], "numbers go into a NumPy array"),
    "alignment": ({"general.alignment": 24}, [], "power of two, got 24"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_leave_no_file(tmp_path: Path, case: str) -> None:
    metadata, wrong, pattern = WRONG[case]
    with pytest.raises(ArgumentError, match=pattern):
        write_gguf(tmp_path / "new.gguf", metadata, wrong)
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield np.zeros(4, np.uint8)
        raise KeyboardInterrupt

    (tmp_path / "new.gguf").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "new.gguf", {}, [("a", "F32", (2,), interrupted())])
    assert os.listdir(tmp_path) == ["new.gguf"]
    assert (tmp_path / "new.gguf").read_bytes() == b"old"


@pytest.fixture
def little_space() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("little_space")
def test_a_full_disk_is_a_capacity_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="free some space"):
        write_gguf(tmp_path / "new.gguf", {}, [("a", "F32", (2**16,), np.zeros(2**18, np.uint8))])
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_data_is_made(tmp_path: Path) -> None:
    def no_space() -> Iterator[np.ndarray]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with pytest.raises(CapacityError, match="No space left on device"):
        write_gguf(tmp_path / "new.gguf", {}, [("a", "F32", (2,), no_space())])
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be written: No such file"):
        write_gguf(tmp_path / "missing" / "new.gguf", {}, [])
