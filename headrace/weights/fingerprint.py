"""What tells one model from another, wherever its file lies and whenever it was written.

Models of one family may have the same metadata and differ in their weights alone, so a piece of every tensor is looked
at: training, merging and quantizing change all of them. That reads little beside the file.
"""

from __future__ import annotations

import hashlib
import os

from headrace.weights.gguf import GGUFFile

_CHUNK_BYTES = 2**21
_PIECE_BYTES = 4096  # of a tensor


def fingerprint(file: GGUFFile) -> bytes:
    """32 bytes: SHA-256 of the directory's hash and of the beginning of every tensor."""
    digest = hashlib.sha256(directory_hash(file))
    with file.reading() as descriptor:
        for info in file.tensors.values():
            digest.update(os.pread(descriptor, min(info.num_bytes, _PIECE_BYTES), info.offset))
    return digest.digest()


def directory_hash(file: GGUFFile) -> bytes:
    """SHA-256 of everything before the first tensor: metadata, names, shapes, formats and places."""
    left = min((info.offset for info in file.tensors.values()), default=0)
    digest = hashlib.sha256()
    with file.reading() as descriptor:
        while left and (chunk := os.read(descriptor, min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()
