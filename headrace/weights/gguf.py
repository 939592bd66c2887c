"""GGUF files: metadata and tensors, mapped into memory and never trusted.

A GGUF file is four parts, all little-endian:

    header      "GGUF", version, number of tensors, number of metadata pairs
    metadata    key, type, value; a value may be an array, also of strings or of arrays
    directory   per tensor: name, dims (innermost first), type, offset from the start of the data
    data        tensors, each aligned to `general.alignment` (32 if absent)

The file is mapped, so opening costs what the metadata costs, and `GGUFFile.data` is a view of the page cache.

Every length, count, type and offset is compared with what is left of the file before it is used: nothing is
allocated on the word of the file alone. Python's integers do not overflow, so a product needs no other guard.

NOTE: a mapped file must not be shortened while it is open: the system then kills the reader (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from headrace.errors import ArgumentError, ModelFileError, SourceError, UnsupportedError
from headrace.kernels.cpu import _native as native
from headrace.ops.formats import FORMAT_BY_ID, FORMATS, KNOWN_IDS, Bytes, Format

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 2**28  # metadata and directory; the largest known vocabularies need a tenth of it
MAX_NAME_BYTES = 2**16 - 1
MAX_DIMS = 4
MAX_NESTING = 8

# The codes of metadata types, and how NumPy and struct spell the numbers among them.
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MIN_VALUE_BYTES = {STRING: 8, ARRAY: 12} | {kind: struct.calcsize("<" + code) for kind, code in NUMBERS.items()}
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 4 + 8  # name length, name, number of dims, type, offset

_INCOMPLETE = "the file is damaged or was not downloaded completely: fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `shape` is in NumPy order (rows first), `offset` counts from the start of the file."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class FileIdentity:
    """What tells that a path still leads to the same unchanged file."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """Everything before the directory of tensors."""

    version: int
    num_tensors: int
    metadata: dict[str, Any]
    kinds: dict[str, int]


@final
class GGUFFile:
    """An open GGUF file; `open_gguf` makes one.

    `metadata` holds int, float, bool and str; arrays of numbers are NumPy arrays, arrays of strings lists of str.
    It stays valid after `close`. `kinds` are the GGUF type codes of its values, for writing them as they were.
    `total_bytes` is the size of the file, `tensor_bytes` that of its tensors.
    """

    def __init__(
        self, path: Path, identity: FileIdentity, mapped: mmap.mmap, header: Header, tensors: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.identity = identity
        self.version = header.version
        self.metadata = header.metadata
        self.kinds = header.kinds
        self.tensors = tensors
        self.total_bytes = len(mapped)
        self.tensor_bytes = sum(info.num_bytes for info in tensors.values())
        self._mapped: mmap.mmap | None = mapped

    def data(self, name: str) -> Bytes:
        """The bytes of a tensor: uint8 [num_bytes], read-only, a view of the mapped file (no copy)."""
        info, mapped = self._find(name)
        return np.frombuffer(mapped, np.uint8, info.num_bytes, info.offset)

    @contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor for reading the file in order. Raises ModelFileError if it is not the one that was opened."""
        try:
            with self.path.open("rb", buffering=0) as file:
                if FileIdentity.of(file.fileno()) != self.identity:
                    raise ModelFileError(f"{self.path}: changed while it was loaded", hint="load it again")
                yield file.fileno()
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system: they stop counting as memory of this process.

        Views of the tensor stay valid; reading them fetches the pages again. Pages shared with neighbours are kept.
        """
        info, mapped = self._find(name)
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view that is still in use."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with suppress(BufferError):  # views exist: the map goes when they do
                mapped.close()

    def _find(self, name: str) -> tuple[TensorInfo, mmap.mmap]:
        if self._mapped is None:
            raise ArgumentError(f"{self.path} is closed: cannot read tensor {name!r}")
        if name not in self.tensors:
            raise ArgumentError(f"name: {self.path.name} has no tensor {name!r}", hint="see GGUFFile.tensors")
        return self.tensors[name], self._mapped

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path.name}: {len(self.tensors)} tensors, {self.total_bytes / 1e6:.1f} MB>"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """The GGUF file at `path`, its metadata and directory read and checked.

    Raises SourceError (no such file), ModelFileError (not GGUF, damaged, unreadable), UnsupportedError (a version,
    byte order or tensor type that headrace does not read).
    """
    path = Path(path)
    identity, mapped = _map_file(path)
    try:
        return _parse(path, identity, mapped)
    except BaseException:
        mapped.close()
        raise


def _map_file(path: Path) -> tuple[FileIdentity, mmap.mmap]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelFileError(f"{path}: expected a GGUF file, got {what}", hint="give the path of a .gguf file")
        if status.st_size == 0:
            raise ModelFileError(f"{path}: the file is empty", hint=_INCOMPLETE)
        with path.open("rb") as file:
            return FileIdentity.of(file.fileno()), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{path}: cannot be read: {reason}") from error


def _parse(path: Path, identity: FileIdentity, mapped: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(path, mapped)
    header = _read_header(cursor)
    num_parts = header.metadata.get("split.count")
    if isinstance(num_parts, int) and num_parts > 1:
        hint = "join the parts into one file first (llama-gguf-split --merge)"
        raise UnsupportedError(f"{path}: one of {num_parts} parts of a model", hint=hint)
    return GGUFFile(path, identity, mapped, header, _read_directory(cursor, header))


def _read_header(cursor: _Cursor) -> Header:
    version = _read_version(cursor)
    num_tensors = cursor.count("number of tensors", _MIN_ENTRY_BYTES)
    num_pairs = cursor.count("number of metadata pairs", _MIN_PAIR_BYTES)
    header = Header(version, num_tensors, metadata={}, kinds={})
    for index in range(num_pairs):
        key = cursor.name(f"metadata key {index}")
        if key in header.metadata:
            raise cursor.error(f"metadata key {key!r} appears twice")
        header.kinds[key] = cursor.number("I", f"type of {key!r}")
        header.metadata[key] = cursor.value(header.kinds[key], key, MAX_NESTING)
    return header


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.buffer[:4]
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}", _guess_kind(cursor.buffer))
    cursor.take(4, "magic")
    version: int = cursor.number("I", "version")
    if version & 0xFFFF == 0 and version:
        hint = "convert it (gguf-convert-endian) or fetch the little-endian file"
        raise UnsupportedError(f"{cursor.path}: a big-endian GGUF file; little-endian is supported", hint=hint)
    if version not in (2, 3):
        message = f"{cursor.path}: GGUF version {version}; versions 2 and 3 are supported"
        raise UnsupportedError(message, hint="convert or download the model again")
    return version


def _guess_kind(buffer: mmap.mmap) -> str | None:
    """A hint for files that are taken for GGUF most often."""
    beginning = buffer[:16]
    if beginning.startswith(b"version https://"):
        return "this is a Git LFS pointer, not the file: run `git lfs pull`"
    if beginning.startswith(b"PK"):
        return "this is a zip archive (a wheel or a PyTorch checkpoint)"
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is a web page: the download went to the wrong address"
    if beginning[8:10] == b'{"':
        return "this looks like a safetensors file; convert it to GGUF"
    return None


def _read_alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment: expected a power of two, got {alignment!r}"[:200])
    return alignment


def _read_directory(cursor: _Cursor, header: Header) -> dict[str, TensorInfo]:
    alignment = _read_alignment(cursor, header.metadata)
    entries = [_read_entry(cursor, index, alignment) for index in range(header.num_tensors)]
    data_start = -(-cursor.pos // alignment) * alignment
    file_bytes = len(cursor.buffer)
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        info = TensorInfo(entry.name, entry.format, entry.shape, data_start + entry.offset, entry.num_bytes)
        if info.offset + info.num_bytes > file_bytes:
            end = info.offset + info.num_bytes
            raise cursor.error(f"tensor {info.name!r} ends at byte {end}, the file at byte {file_bytes}", _INCOMPLETE)
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r} appears twice")
        tensors[info.name] = info
    _check_overlap(cursor, tensors)
    return tensors


def _read_entry(cursor: _Cursor, index: int, alignment: int) -> TensorInfo:
    """One line of the directory; its offset still counts from the start of the data."""
    name = cursor.name(f"name of tensor {index}")
    num_dims = cursor.number("I", f"number of dims of {name!r}")
    if num_dims > MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {num_dims} dims, expected at most {MAX_DIMS}")
    dims = [cursor.number("Q", f"dims of {name!r}") for _ in range(num_dims)]
    if 0 in dims:
        raise cursor.error(f"tensor {name!r} has a dim of size 0: {dims}")
    form = _find_format(cursor, name, cursor.number("I", f"type of {name!r}"))
    offset = cursor.number("Q", f"offset of {name!r}")
    if offset % alignment:
        raise cursor.error(f"tensor {name!r} lies at offset {offset}, not a multiple of the alignment {alignment}")
    num_values = prod(dims)
    if (dims[0] if dims else 1) % form.block_len:
        raise cursor.error(f"tensor {name!r} has rows of {dims[:1]} values, not whole {form.name} blocks")
    num_bytes = num_values // form.block_len * form.block_bytes
    return TensorInfo(name, form.name, tuple(reversed(dims)), offset, num_bytes)


def _find_format(cursor: _Cursor, tensor: str, type_id: int) -> Format:
    form = FORMAT_BY_ID.get(type_id)
    if form is None:
        kind = KNOWN_IDS.get(type_id, f"number {type_id}")
        message = f"{cursor.path}: tensor {tensor!r} has type {kind}, which headrace does not read"
        raise UnsupportedError(message, hint=f"supported types: {', '.join(FORMATS)}")
    return form


def _check_overlap(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    in_order = sorted(tensors.values(), key=lambda info: info.offset)
    for first, second in pairwise(in_order):
        if first.offset + first.num_bytes > second.offset:
            raise cursor.error(f"tensors {first.name!r} and {second.name!r} overlap")


class _Cursor:
    """Reads forward through the header; every read checks first that the bytes are there."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.pos = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)

    def error(self, message: str, hint: str | None = None) -> ModelFileError:
        """The exception to raise: it names the file."""
        return ModelFileError(f"{self.path}: {message}", hint=hint)

    def take(self, num_bytes: int, what: str) -> int:
        """The position of the next `num_bytes`, which are stepped over."""
        start = self.pos
        if num_bytes > self.end - start:
            left = f"{self.end - start} of the {'file' if self.end == len(self.buffer) else 'header limit'}"
            raise self.error(f"{what} at byte {start} needs {num_bytes} bytes, {left} are left", _INCOMPLETE)
        self.pos = start + num_bytes
        return start

    def number(self, code: str, what: str) -> Any:
        """One number of a struct type: int or float."""
        layout = "<" + code
        return struct.unpack_from(layout, self.buffer, self.take(struct.calcsize(layout), what))[0]

    def count(self, what: str, min_bytes: int) -> int:
        """A count of things of at least `min_bytes` each; one that cannot fit is refused before it costs memory."""
        count: int = self.number("Q", what)
        if count > (self.end - self.pos) // min_bytes:
            raise self.error(f"{what}: {count} cannot fit into what is left of the file", _INCOMPLETE)
        return count

    def text(self, what: str) -> str:
        length = self.number("Q", f"length of {what}")
        start = self.take(length, what)
        return self.decode(self.buffer[start : self.pos], what)

    def decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {raw[:40]!r}") from error

    def name(self, what: str) -> str:
        """A metadata key or tensor name: short and not empty."""
        start = self.pos
        text = self.text(what)
        if not 8 < self.pos - start <= 8 + MAX_NAME_BYTES:
            raise self.error(f"{what}: expected 1 to {MAX_NAME_BYTES} bytes, got {self.pos - start - 8}")
        return text

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self.text(f"value of {key!r}")
        if kind == ARRAY:
            return self.array(key, depth)
        if kind not in NUMBERS:
            raise self.error(f"metadata key {key!r} has type {kind}; types 0 to 12 exist")
        number = self.number(NUMBERS[kind], f"value of {key!r}")
        return number != 0 if kind == BOOL else number

    def array(self, key: str, depth: int) -> Any:
        kind = self.number("I", f"element type of {key!r}")
        if kind not in _MIN_VALUE_BYTES:
            raise self.error(f"array {key!r} has elements of type {kind}; types 0 to 12 exist")
        count = self.count(f"length of array {key!r}", _MIN_VALUE_BYTES[kind])
        if kind == STRING:
            return self.strings(count, key)
        if kind == ARRAY:
            if depth == 0:
                raise self.error(f"array {key!r} is nested more than {MAX_NESTING} deep")
            return [self.array(key, depth - 1) for _ in range(count)]
        dtype = np.dtype("<" + NUMBERS[kind])
        numbers = np.frombuffer(self.buffer, dtype, count, self.take(count * dtype.itemsize, f"array {key!r}"))
        return numbers != 0 if kind == BOOL else numbers.copy()

    def strings(self, count: int, key: str) -> list[str]:
        """The hot loop of opening a file: a vocabulary is hundreds of thousands of these."""
        found: list[str]
        found, self.pos = native.read_strings(self.buffer, self.pos, self.end, count)
        while len(found) < count:  # the next one is wrong: this says how
            found.append(self.text(f"string {len(found)} of array {key!r}"))
        return found
