"""A file that appears under its name only when it is whole.

It is written beside its target under a temporary name, flushed to the disk and then renamed, which is atomic.
Whatever goes wrong on the way, Ctrl-C included, the temporary file is removed and the target stays as it was.
A process that is killed leaves its temporary file; the process number in the name tells that it is nobody's.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headrace.errors import ArgumentError, CapacityError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write to; after the block it is `target`, or nothing if the block raised.

    Raises CapacityError when the disk is full, ArgumentError when the folder cannot be written to.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        partial.unlink(missing_ok=True)  # after the rename there is none


def disk_error(target: Path, error: OSError) -> CapacityError | ArgumentError:
    """The error for a failed write to `target`."""
    if error.errno in NO_SPACE:
        return CapacityError(f"{target}: {error.strerror}", hint=f"free some space in {target.parent}")
    return ArgumentError(f"{target}: cannot be written: {error.strerror or error}")
