"""Writing GGUF files: what `gguf.open_gguf` reads.

The directory of tensors comes before their data and needs only their sizes, so data may be produced while it is
written: a tensor's data is either all its bytes or an iterable of pieces.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headrace.errors import ArgumentError
from headrace.ops.formats import Bytes, get_format
from headrace.weights.gguf import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING
from headrace.weights.whole_file import whole_file

Tensor = tuple[str, str, tuple[int, ...], Bytes | Iterable[Bytes]]  # name, format, shape, data

_KIND_BY_DTYPE = {np.dtype("<" + code): kind for kind, code in NUMBERS.items() if kind != BOOL} | {np.dtype(bool): BOOL}


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[Tensor],
    *,
    kinds: Mapping[str, int] | None = None,
) -> None:
    """Write a GGUF file (version 3) that appears only when it is whole.

    A tensor is (name, format, shape with rows first, data); data is uint8, one array or pieces in order.
    Metadata may be bool, int, float, str, NumPy arrays of numbers, lists of str or of arrays. `kinds` gives GGUF type
    codes to numbers that should not get the default: UINT32 (or the first of INT32, UINT64, INT64 that fits), FLOAT32.
    """
    tensors = list(tensors)
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise ArgumentError(f"metadata: general.alignment must be a power of two, got {alignment}")
    header = _encode_header(metadata, dict(kinds or {}), len(tensors))
    header += _encode_directory(tensors, alignment)
    with whole_file(Path(path)) as file:
        file.write(header)
        for tensor in tensors:
            _pad(file, alignment)
            _write_data(file, tensor)
        _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _write_data(file: BinaryIO, tensor: Tensor) -> None:
    name, _, _, data = tensor
    start = file.tell()
    for piece in [data] if isinstance(data, np.ndarray) else data:
        if piece.dtype != np.uint8:
            raise ArgumentError(f"tensors: data of {name!r}: expected uint8, got {piece.dtype}")
        file.write(np.ascontiguousarray(piece).data)
    if file.tell() - start != _num_bytes(tensor):
        raise ArgumentError(
            f"tensors: data of {name!r}: expected {_num_bytes(tensor)} bytes, got {file.tell() - start}"
        )


def _num_bytes(tensor: Tensor) -> int:
    _, format_name, shape, _ = tensor
    return prod(shape[:-1]) * get_format(format_name).row_bytes(shape[-1] if shape else 1)


def _encode_header(metadata: Mapping[str, Any], kinds: dict[str, int], num_tensors: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, num_tensors, len(metadata))]
    for key, value in metadata.items():
        kind = kinds.get(key, _kind_of(key, value))
        parts += [_encode_text(key), struct.pack("<I", kind), _encode_value(key, kind, value)]
    return b"".join(parts)


def _encode_directory(tensors: list[Tensor], alignment: int) -> bytes:
    """Names, dims, types and offsets; ends where the first tensor's padding begins."""
    if len({name for name, *_ in tensors}) != len(tensors):
        raise ArgumentError("tensors: two tensors have the same name")
    parts = []
    offset = 0
    for tensor in tensors:
        name, format_name, shape, _ = tensor
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_encode_text(name), dims, struct.pack("<IQ", get_format(format_name).gguf_id, offset)]
        offset += -(-_num_bytes(tensor) // alignment) * alignment
    return b"".join(parts)


def _encode_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _kind_of(key: str, value: Any) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, (list, tuple, np.ndarray)):
        return ARRAY
    if isinstance(value, (bool, np.bool_)):
        return BOOL
    if isinstance(value, np.generic):
        return _KIND_BY_DTYPE[value.dtype]
    if isinstance(value, float):
        return 6
    for kind, low, high in ((4, 0, 2**32), (5, -(2**31), 2**31), (10, 0, 2**64), (11, -(2**63), 2**63)):
        if isinstance(value, int) and low <= value < high:
            return kind
    raise ArgumentError(f"metadata: {key!r} has a value that GGUF cannot hold: {value!r}"[:200])


def _encode_value(key: str, kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _encode_text(value)
    if kind == ARRAY:
        return _encode_array(key, value)
    try:
        return struct.pack("<" + NUMBERS[kind], value)
    except struct.error as error:
        raise ArgumentError(f"metadata: {key!r}: {value!r} does not fit type {kind}") from error


def _encode_array(key: str, values: Any) -> bytes:
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype not in _KIND_BY_DTYPE:
            raise ArgumentError(
                f"metadata: {key!r}: expected a 1-D array of numbers, got {values.dtype} {values.shape}"
            )
        return struct.pack("<IQ", _KIND_BY_DTYPE[values.dtype], len(values)) + np.ascontiguousarray(values).tobytes()
    kinds = {_kind_of(key, value) for value in values} or {STRING}
    if kinds not in ({STRING}, {ARRAY}):
        raise ArgumentError(f"metadata: {key!r}: a list holds strings or arrays; numbers go into a NumPy array")
    (kind,) = kinds
    parts = [struct.pack("<IQ", kind, len(values))]
    return b"".join(parts + [_encode_value(key, kind, value) for value in values])
