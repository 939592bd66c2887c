"""A beginning on disk: the keys and values of a text's tokens, for a later process that need not compute them again.

    header   magic, format, number of tokens, type of the cache, whose bits they are, the model's fingerprint
    tokens   int32 each
    layers   one after the other: keys [tokens, kv_heads, head_dim], values, and the scales of both where there are any
    digest   BLAKE2b of all before it

All of it is little-endian and of fixed size once the header is known: 188 bytes, and for each token 4 and what it takes
in the cache. Pages are no part of it, so caches with pages of any size can read it. The file appears under its name
only when it is whole, and is readable by its owner alone: what was said can be read from it.

Nothing in a file is believed: its size must be the one that its header asks for, tokens must be of the vocabulary,
numbers finite, the digest right, and until all of that is known nobody can find what it brings. NOTE: who can write
such a file can still choose what a model makes of that beginning; take files only from where you would take models.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from headrace.engine.sequence import CachedSequence
from headrace.errors import ArgumentError, ModelFileError
from headrace.kv_cache.storage import Storage
from headrace.weights.whole_file import whole_file

MAGIC = b"HRPREFIX"
FORMAT = 1
_HEADER = struct.Struct("<8sII20s88s32s")  # magic, format, tokens, cache type, bits, model
_DIGEST_BYTES = 32
_NAMES = ("keys", "values", "key_scales", "value_scales")


@dataclass(frozen=True)
class Origin:
    """What keys and values were computed with.

    model: a fingerprint. kv_dtype: as in `EngineConfig`. bits: of a batch-invariant engine, whose they are, release
    and instruction set; empty for any other, which does not mind.
    """

    model: bytes
    kv_dtype: str
    bits: str = ""


@dataclass(frozen=True)
class Limits:
    """What the reader has room for: tokens of a text, and of the vocabulary."""

    tokens: int
    vocabulary: int


def write_prefix(path: Path, sequence: CachedSequence, storage: Storage, origin: Origin) -> int:
    """Keeps what is cached of a sequence; the file's bytes. Raises CapacityError and ArgumentError as `whole_file`."""
    digest, num_bytes = _digest(), 0

    def put(data: bytes | memoryview) -> None:
        nonlocal num_bytes
        digest.update(data)
        num_bytes += out.write(data)

    with whole_file(path) as out:
        os.fchmod(out.fileno(), 0o600)
        names = (origin.kv_dtype.encode(), origin.bits.encode(), origin.model)
        put(_HEADER.pack(MAGIC, FORMAT, len(sequence.ids), *names))
        put(np.array(sequence.ids, "<i4").view(np.uint8).data)
        for pages in _parts(storage):
            put(_gathered(pages, sequence).data)
        num_bytes += out.write(digest.digest())
    return num_bytes


def read_prefix(
    path: Path, storage: Storage, origin: Origin, limits: Limits, allocate: Callable[[int], list[int]]
) -> CachedSequence:
    """The tokens of a file and the pages that now hold their keys and values, out of `allocate(tokens)`.

    Raises ArgumentError where there is no file and for one of another origin, ModelFileError for one that is damaged.
    After any error the pages mean nothing.
    """
    with _opened(path) as file:
        digest = _digest()
        header = file.read(_HEADER.size)
        digest.update(header)
        count = _checked_header(path, header, origin, limits)
        _check_size(path, file, count, storage)
        sequence = CachedSequence(_token_ids(path, file, digest, count, limits), allocate(count))
        for pages in _parts(storage):
            rows = np.empty((count, *pages.shape[2:]), pages.dtype)
            _read_into(path, file, rows)
            digest.update(rows.view(np.uint8).reshape(-1).data)
            if not _finite(rows):
                raise _damaged(path, "numbers that are not finite")
            _scatter(rows, pages, sequence.pages)
        if file.read(_DIGEST_BYTES) != digest.digest():
            raise _damaged(path, "bytes that have changed since they were written")
    return sequence


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _parts(storage: Storage) -> Iterator[np.ndarray]:
    """The arrays [pages, page_size, ...] of all layers, in the order of the file."""
    for layer in storage.layers:
        for name in _NAMES:
            if (array := getattr(layer, name)) is not None:
                yield array.numpy()


def _gathered(pages: np.ndarray, sequence: CachedSequence) -> np.ndarray:
    """The bytes of the sequence's rows, in order. What else lies on its last page is another text's."""
    rows = pages[sequence.pages].reshape(-1, *pages.shape[2:])[: len(sequence.ids)]
    return np.ascontiguousarray(rows).view(np.uint8).reshape(-1)


def _scatter(rows: np.ndarray, pages: np.ndarray, numbers: Sequence[int]) -> None:
    page_size = pages.shape[1]
    for i, page in enumerate(numbers):
        own = rows[i * page_size : (i + 1) * page_size]
        pages[page, : len(own)] = own


def _finite(rows: np.ndarray) -> bool:
    return np.issubdtype(rows.dtype, np.integer) or bool(np.isfinite(rows).all())


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ArgumentError(f"{path}: expected a file, got something else")
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror or error}") from error


def _checked_header(path: Path, header: bytes, origin: Origin, limits: Limits) -> int:
    """The number of tokens. Raises where the file is of another kind or origin."""
    if header[: len(MAGIC)] != MAGIC:
        raise ModelFileError(f"{path}: not a saved cache", "save_cache and --prompt-cache write them")
    if len(header) < _HEADER.size:
        raise _damaged(path, f"{len(header)} bytes")
    _, version, count, kv_dtype, bits, model = _HEADER.unpack(header)
    found = Origin(model, _text(kv_dtype), _text(bits))
    if version != FORMAT:
        raise ArgumentError(f"{path}: a saved cache of format {version}, this headrace reads format {FORMAT}")
    if found.model != origin.model:
        raise ArgumentError(f"{path}: a saved cache of another model", "load the model that it was saved with")
    if found.kv_dtype != origin.kv_dtype:
        raise ArgumentError(
            f"{path}: kv_dtype: expected {origin.kv_dtype!r}, got {found.kv_dtype!r}", "the one that it was saved with"
        )
    if origin.bits and found.bits != origin.bits:
        raise ArgumentError(
            f"{path}: batch_invariant: expected the bits of {origin.bits!r}, got those of {found.bits or 'any'!r}",
            "save it with batch_invariant, on a machine alike",
        )
    if not 0 < count <= limits.tokens:
        raise ArgumentError(f"{path}: {count} tokens, there is room for 1 to {limits.tokens}", "a larger context_len")
    return int(count)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def _check_size(path: Path, file: BinaryIO, count: int, storage: Storage) -> None:
    row_bytes = sum(pages[0, 0].nbytes for pages in _parts(storage))
    expected = _HEADER.size + count * (4 + row_bytes) + _DIGEST_BYTES
    if (found := os.fstat(file.fileno()).st_size) != expected:
        raise _damaged(path, f"{found} bytes where {count} tokens take {expected}")


def _token_ids(path: Path, file: BinaryIO, digest: hashlib.blake2b, count: int, limits: Limits) -> list[int]:
    ids = np.empty(count, "<i4")
    _read_into(path, file, ids)
    digest.update(ids.view(np.uint8).data)
    if ids.min() < 0 or ids.max() >= limits.vocabulary:
        raise _damaged(path, "tokens that are not in the vocabulary")
    return [int(i) for i in ids]


def _read_into(path: Path, file: BinaryIO, array: np.ndarray) -> None:
    data = array.view(np.uint8).reshape(-1)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise _damaged(path, "an early end")


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path}: a damaged saved cache: it has {what}", "delete it, and save it again")
