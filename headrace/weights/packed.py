"""Packed weights kept on disk: written once when asked for, mapped by every later start, shared by all processes.

`write_packed` keeps the matrices of a GGUF file as the kernels read them (`kernels/cpu/weight.h`, one layout for all
instruction sets) in `cache_dir()/packed`. Vectors, metadata and the tokenizer still come from the GGUF file.

    header    magic, layout version; the GGUF file's size, modification time, hash of all before its tensors, and path
    matrices  from DATA_OFFSET on, in the order of the GGUF file's directory, each at a multiple of 64 bytes

There is nothing in it to believe: the header must be, byte for byte, the one that the GGUF file at hand would get, and
where each matrix lies follows from that file's directory. Any bytes are weights, if foolish ones, so whoever could
write the file could choose what the model says: it must belong to this user or to root, and be writable by nobody else.

The file is written in pieces of 2 MiB, aligned, and mapped likewise: file systems with large folios (ext4, XFS, tmpfs)
then keep it on 2 MiB pages, from which a model decodes as fast as from memory of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.errors import CapacityError, HeadraceError, ModelFileError, SourceError
from headrace.kernels.cpu import _native as native
from headrace.machine import cache_dir, usable_cores
from headrace.ops.linear import PackedWeight
from headrace.weights.fingerprint import directory_hash
from headrace.weights.gguf import GGUFFile, TensorInfo, open_gguf
from headrace.weights.load import Matrices, Progress, load_config, pack_matrices
from headrace.weights.sources import resolve
from headrace.weights.wheel import Progress as DownloadProgress
from headrace.weights.whole_file import whole_file

MAGIC = b"HRPACKED"
PIECE_BYTES = DATA_OFFSET = 2**21
_HEADER = struct.Struct("<8sIIQqQ32s")  # magic, layout, path length, file size, modified_ns, data bytes, hash
_MAX_PATH_BYTES = 4096


@dataclass(frozen=True)
class PackedEntry:
    """A file of packed weights: its size, and the GGUF file it was made from ("" when its header is damaged)."""

    path: Path
    num_bytes: int
    source: str


class PackedFile:
    """The matrices of a GGUF file, mapped."""

    def __init__(self, file: GGUFFile, mapped: native.MappedFile) -> None:
        self._mapped = mapped
        self._offsets = _offsets(file)

    def matrix(self, info: TensorInfo) -> PackedWeight:
        """The matrix of this tensor; it keeps the mapping alive."""
        return self._mapped.weight(info.format, info.shape, self._offsets[info.name])


def packed_path(source: Path) -> Path:
    """Where the packed weights of the GGUF file at `source` are kept."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:32]
    return _folder() / f"{name}.packed"


def pack_model(model: str | Path, threads: int | None = None, progress: DownloadProgress | None = None) -> Path:
    """`write_packed` for a model by name or file."""
    pool = native.Pool(threads or usable_cores())  # of one node: a matrix in one piece
    with open_gguf(resolve(model, progress=progress)) as file:
        return write_packed(file, pool, progress)


def write_packed(file: GGUFFile, pool: native.Pool, progress: Progress | None = None) -> Path:
    """Keep the file's matrices packed; the path of what was written. What was there before is replaced at once.

    pool: of one node. Raises ModelFileError and UnsupportedError for files that cannot be run, CapacityError when the
    disk has no room.
    """
    load_config(file)
    target = packed_path(file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, _total_bytes(file))
    with whole_file(target) as out:
        os.fchmod(out.fileno(), 0o644)  # whatever the umask: writable by others, it would not be trusted
        out.write(_header(file))
        out.seek(DATA_OFFSET)
        for piece in _pieces(_packed_matrices(file, pool, progress)):
            out.write(piece.data)
    return target


def open_packed(file: GGUFFile) -> PackedFile:
    """The packed weights of an open GGUF file, mapped.

    Raises SourceError where there are none, ModelFileError for some that are stale, damaged or not this user's.
    """
    path = packed_path(file.path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceError(f"{file.path}: not packed", hint=f"headrace pack {file.path}") from error
    except OSError as error:
        raise _unusable(file, f"cannot be opened: {error.strerror}") from error
    try:
        _check_owner(file, os.fstat(descriptor))
        _check_header(file, descriptor)
        return PackedFile(file, native.MappedFile(descriptor, _total_bytes(file)))
    except OSError as error:
        raise _unusable(file, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def find_packed(file: GGUFFile, pool: native.Pool, wanted: str = "auto") -> Matrices | None:
    """The matrices of `open_packed`, or None where the file itself is to be packed.

    wanted: "auto" takes what is there, and says on stderr why not if it cannot be used; "never"; "require" raises.
    A mapped file lies on whatever NUMA nodes it was read by: with threads on several, "auto" leaves it alone.
    """
    if wanted == "never" or (wanted == "auto" and (pool.num_nodes > 1 or not packed_path(file.path).exists())):
        return None
    try:
        return open_packed(file).matrix
    except ModelFileError as error:
        if wanted == "require":
            raise
        import logging  # 5 ms that a start does not need

        logging.getLogger("headrace").warning("%s; packing it anew for this start (%s)", error.message, error.hint)
        return None


def list_packed() -> list[PackedEntry]:
    """What is kept packed, by name of the source."""
    entries = []
    for path in _folder().glob("*.packed"):
        try:
            entries.append(PackedEntry(path, path.stat().st_size, _source_of(path)))
        except OSError:  # removed meanwhile, or somebody else's
            continue
    return sorted(entries, key=lambda entry: entry.source)


def remove_packed(model: str | Path) -> int:
    """Delete the packed weights of a model, whose file may be gone; the bytes that were freed.

    What interrupted writers left goes too. Raises SourceError where there is nothing.
    """
    source = Path(model)
    with suppress(SourceError):
        source = resolve(model, offline=True)
    target = packed_path(source)
    found = [path for path in (target, *_folder().glob(f".{target.name}.*.partial")) if path.exists()]
    if not found:
        raise SourceError(f"{model}: not packed", hint="headrace models lists what is")
    freed = sum(path.stat().st_size for path in found)
    for path in found:
        path.unlink(missing_ok=True)
    return freed


def _folder() -> Path:
    return cache_dir() / "packed"


def _matrices(file: GGUFFile) -> list[TensorInfo]:
    return [info for info in file.tensors.values() if len(info.shape) == 2]


def _offsets(file: GGUFFile) -> dict[str, int]:
    """Where each matrix begins, by name."""
    offset, offsets = DATA_OFFSET, {}
    for info in _matrices(file):
        offsets[info.name] = offset
        offset += native.packed_bytes(info.format, info.shape)
    return offsets


def _total_bytes(file: GGUFFile) -> int:
    data = sum(native.packed_bytes(info.format, info.shape) for info in _matrices(file))
    return DATA_OFFSET + -(-data // PIECE_BYTES) * PIECE_BYTES


def _header(file: GGUFFile) -> bytes:
    source = os.fsencode(os.path.realpath(file.path))[:_MAX_PATH_BYTES]
    identity = file.identity
    numbers = (len(source), identity.num_bytes, identity.modified_ns, _total_bytes(file))
    return _HEADER.pack(MAGIC, native.PACKED_LAYOUT, *numbers, directory_hash(file)) + source


def _packed_matrices(file: GGUFFile, pool: native.Pool, progress: Progress | None) -> Iterator[np.ndarray]:
    """The bytes of all matrices in order, each filled up to a multiple of 64."""
    done_bytes = 0
    with pack_matrices(file, pool, together=False) as pack:
        for info in _matrices(file):
            panels = pack(info).panels()
            yield panels
            yield np.zeros(-len(panels) % 64, np.uint8)
            done_bytes += info.num_bytes
            if progress:
                progress("packing", done_bytes, file.total_bytes)


def _pieces(arrays: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same bytes in pieces of PIECE_BYTES, zeros after the last. NOTE: each is overwritten by the next."""
    piece, filled = np.empty(PIECE_BYTES, np.uint8), 0
    for array in arrays:
        taken = 0
        while taken < len(array):
            count = min(PIECE_BYTES - filled, len(array) - taken)
            piece[filled : filled + count] = array[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == PIECE_BYTES:
                yield piece
                filled = 0
    if filled:
        piece[filled:] = 0
        yield piece


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"{folder}: packed weights need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise CapacityError(message, hint="free some space, or set HEADRACE_CACHE elsewhere")


def _check_owner(file: GGUFFile, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(file, "are not a regular file")
    if status.st_uid not in (os.geteuid(), 0):
        raise _unusable(file, f"belong to user {status.st_uid}, expected {os.geteuid()} or root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unusable(file, f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})")
    if status.st_size != _total_bytes(file):
        raise _unusable(file, f"are stale or cut short: expected {_total_bytes(file)} bytes, got {status.st_size}")


def _check_header(file: GGUFFile, descriptor: int) -> None:
    expected = _header(file)
    found = os.pread(descriptor, len(expected), 0)
    if found == expected:
        return
    if found[: len(MAGIC)] != MAGIC or len(found) < _HEADER.size:
        raise _unusable(file, "are damaged")
    layout = _HEADER.unpack_from(found)[1]
    if layout != native.PACKED_LAYOUT:
        raise _unusable(file, f"have layout {layout}, this headrace reads layout {native.PACKED_LAYOUT}")
    raise _unusable(file, "are stale: the model's file has changed since")


def _unusable(file: GGUFFile, reason: str) -> HeadraceError:
    return ModelFileError(f"packed weights of {file.path} {reason}", hint=f"headrace pack {file.path}")


def _source_of(path: Path) -> str:
    """The path in a header, as far as it is one that can be shown."""
    with path.open("rb") as packed:
        head = packed.read(_HEADER.size + _MAX_PATH_BYTES)
    if len(head) < _HEADER.size or head[: len(MAGIC)] != MAGIC:
        return ""
    source = os.fsdecode(head[_HEADER.size :][: _HEADER.unpack_from(head)[2]])
    return source if source.isprintable() else ""
