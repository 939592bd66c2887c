"""packed: a mapped model answers as one that was packed, and a file that is not exactly that is never used."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headrace.check.blocks import random_matrix
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import CapacityError, HeadraceError, ModelFileError, SourceError
from headrace.kernels.cpu import _native as native
from headrace.llm import LLM
from headrace.ops.formats import FORMATS
from headrace.ops.linear import pack
from headrace.weights import packed
from headrace.weights.gguf import open_gguf

POOL = native.Pool(2)

# The panels of one random matrix per format, hashed. When pack_panel writes something else, this says so: then
# kPackedLayout in weight.h goes up with it, or files of packed weights would be read wrongly.
LAYOUT = (1, "208e")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", TinyModel(matrix_format="Q8_0"))


def packed_once(model: Path) -> Path:
    return packed.pack_model(model, threads=2)


def logits(model: Path, wanted: str) -> np.ndarray:
    llm = LLM(model, threads=2, packed=wanted)
    return llm.logits([1, 2, 3, 200])


def forbid_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "pack_file", lambda *_: pytest.fail("a matrix was packed"))


@pytest.mark.parametrize("format_name", ["F32", "BF16", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_mapped_model_computes_the_same_bits(
    tmp_path: Path, format_name: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(
        tmp_path / "tiny.gguf", TinyModel(matrix_format=format_name, tied_head=tied, vocab_size=301)
    )
    expected = logits(model, "auto")
    packed_once(model)
    forbid_packing(monkeypatch)
    np.testing.assert_array_equal(logits(model, "auto"), expected)
    np.testing.assert_array_equal(logits(model, "require"), expected)


def test_never_packs_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_once(model)
    forbid_packing(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        LLM(model, packed="never")


def test_what_is_required_must_be_there(model: Path) -> None:
    with pytest.raises(SourceError, match="not packed\n  hint: headrace pack"):
        LLM(model, packed="require")


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def cut(content: bytearray) -> None:
    del content[-1:]


def grow(content: bytearray) -> None:
    content.append(0)


def other_magic(content: bytearray) -> None:
    content[0] ^= 1


def other_layout(content: bytearray) -> None:
    content[8] += 1


def empty(content: bytearray) -> None:
    content.clear()


def header_alone(content: bytearray) -> None:
    del content[100:]


DAMAGE = {cut: "cut short", grow: "stale", other_magic: "damaged", other_layout: "layout 2", empty: "cut short"}
DAMAGE[header_alone] = "cut short"


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_a_damaged_file_is_told_and_not_used(
    model: Path, change: Callable[[bytearray], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(model, "never")
    rewrite(packed_once(model), change)
    with pytest.raises(ModelFileError, match=DAMAGE[change]):
        LLM(model, packed="require")
    with caplog.at_level(logging.WARNING, "headrace"):
        np.testing.assert_array_equal(logits(model, "auto"), expected)
    (record,) = caplog.records
    assert DAMAGE[change] in record.getMessage()
    assert "headrace pack" in record.getMessage()


def test_every_byte_of_the_header_counts(model: Path) -> None:
    path = packed_once(model)
    with open_gguf(model) as file, path.open("r+b") as content:
        for position, byte in enumerate(packed._header(file)):
            os.pwrite(content.fileno(), bytes([byte ^ 1]), position)
            with pytest.raises(ModelFileError):
                packed.open_packed(file)
            packed.list_packed()  # whatever it says, listing it is no error
            os.pwrite(content.fileno(), bytes([byte]), position)
        packed.open_packed(file)


@pytest.mark.parametrize("change", ["touched", "replaced"])
def test_a_changed_model_makes_it_stale(model: Path, tmp_path: Path, change: str) -> None:
    packed_once(model)
    status = model.stat()
    if change == "touched":
        os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        other = write_tiny_model(tmp_path / "other.gguf", TinyModel(matrix_format="Q8_0", context_len=128))
        assert other.stat().st_size == status.st_size
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(model)
    with open_gguf(model) as file, pytest.raises(ModelFileError, match="stale"):
        packed.open_packed(file)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_what_others_can_write_is_not_trusted(model: Path, mode: int) -> None:
    packed_once(model).chmod(mode)
    with open_gguf(model) as file, pytest.raises(ModelFileError, match="written by others"):
        packed.open_packed(file)


def test_what_belongs_to_others_is_not_trusted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed_once(model)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with open_gguf(model) as file, pytest.raises(ModelFileError, match="belong to user"):
        packed.open_packed(file)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_a_regular_file_is_opened(model: Path, tmp_path: Path, kind: str) -> None:
    path = packed_once(model)
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with open_gguf(model) as file, pytest.raises(ModelFileError, match="regular|cannot be opened"):
        packed.open_packed(file)


def test_others_may_read_it_whatever_the_umask(model: Path) -> None:
    before = os.umask(0o002)
    try:
        assert packed_once(model).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_full_disk_is_an_error_with_numbers(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(CapacityError, match="need 4 MB, 1 MB are free"):
        packed_once(model)
    assert list((cache / "packed").iterdir()) == []


def test_an_interrupted_writer_leaves_what_was_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = packed_once(model).read_bytes()

    def stop(message: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with open_gguf(model) as file, pytest.raises(KeyboardInterrupt):
        packed.write_packed(file, POOL, stop)
    assert [path.read_bytes() for path in packed.packed_path(model).parent.iterdir()] == [content]


def test_a_link_to_the_model_finds_it_too(model: Path, tmp_path: Path) -> None:
    packed_once(model)
    (tmp_path / "link.gguf").symlink_to(model)
    with open_gguf(tmp_path / "link.gguf") as file:
        packed.open_packed(file)


def test_list_and_remove(model: Path, cache: Path) -> None:
    path = packed_once(model)
    (path.parent / f".{path.name}.1-00.partial").write_bytes(b"12345")
    assert packed.list_packed() == [packed.PackedEntry(path, path.stat().st_size, str(model))]
    num_bytes = path.stat().st_size
    model.unlink()
    assert packed.remove_packed(model) == num_bytes + 5
    assert list(path.parent.iterdir()) == packed.list_packed() == []
    with pytest.raises(SourceError, match="not packed"):
        packed.remove_packed(model)


def test_a_path_that_would_write_to_the_terminal_is_not_shown(model: Path) -> None:
    path = packed_once(model)
    start = struct.calcsize("<8sIIQqQ32s")
    with path.open("r+b") as content:
        os.pwrite(content.fileno(), b"\x1b[2J", start)
    assert [entry.source for entry in packed.list_packed()] == [""]


def test_the_layout_has_its_version() -> None:
    digest = hashlib.sha256()
    for name in FORMATS:
        random = np.random.default_rng(3)
        digest.update(pack(random_matrix(name, 37, 512, random), name, (37, 512), POOL).panels())
    assert (native.PACKED_LAYOUT, digest.hexdigest()[:4]) == LAYOUT


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((16, 64), 4096), ((16, 64), 1 << 62), ((16, 64), -64), ((16, 64), 32), ((1 << 20, 64), 0), ((17, 64), 0)],
)
def test_a_matrix_beyond_the_mapping_is_refused(tmp_path: Path, shape: tuple[int, int], offset: int) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with (tmp_path / "file").open("rb") as file:
        mapped = native.MappedFile(file.fileno(), 4096)
    assert mapped.weight("F32", (16, 64), 0).panels().sum() == 0
    with pytest.raises(HeadraceError, match="is not in a file of 4096"):
        mapped.weight("F32", shape, offset)


def test_a_file_shorter_than_promised_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4095))
    with (tmp_path / "file").open("rb") as file, pytest.raises(ModelFileError, match="the file has 4095"):
        native.MappedFile(file.fileno(), 4096)


def test_a_draft_model_is_mapped_as_the_model_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = write_tiny_model(tmp_path / "draft.gguf", TinyModel(seed=4))
    packed_once(model)
    with pytest.raises(SourceError, match="draft.gguf: not packed"):
        LLM(model, draft_model=draft, threads=2, packed="require")
    packed_once(draft)
    forbid_packing(monkeypatch)
    LLM(model, draft_model=draft, threads=2, packed="require")
    LLM(model, draft_model=draft, threads=2)
