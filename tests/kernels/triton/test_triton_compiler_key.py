"""Triton's key is the one that Triton computes, once: until its files are others, or nothing can be kept."""

import os
from types import SimpleNamespace

import pytest

from headrace.kernels.triton import compiler_key


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A Triton of paper: its files, and how often it computed its key."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    runtime = tmp_path / "triton" / "runtime"
    runtime.mkdir(parents=True)
    (runtime / "cache.py").write_text("")
    made = SimpleNamespace(__file__=str(runtime / "cache.py"), library=runtime / "libtriton.so", computed=0)

    def key():
        made.computed += 1
        return made.library.read_text()

    made.library.write_text("first")
    made.triton_key = made.own_key = key
    return made


def asked_in_a_new_process(package):
    package.triton_key = package.own_key
    compiler_key.remember(package)
    assert package.triton_key() == package.triton_key()
    return package.triton_key()


def test_it_is_computed_once_for_all_processes(package):
    assert [asked_in_a_new_process(package) for _ in range(3)] == ["first"] * 3 and package.computed == 1


def test_another_installation_has_another(package):
    asked_in_a_new_process(package)
    package.library.write_text("other")
    os.utime(package.library, ns=(1, 1))
    assert asked_in_a_new_process(package) == "other" and package.computed == 2


@pytest.mark.parametrize("text", ["", "{}", '{"stamp": 1}', "[]", "no JSON"])
def test_a_file_that_is_not_ours_counts_as_none(package, text, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "triton-key.json").write_text(text)
    assert asked_in_a_new_process(package) == "first" and package.computed == 1


def test_where_nothing_can_be_kept_it_is_computed(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file" / "folder"))
    assert [asked_in_a_new_process(package) for _ in range(2)] == ["first"] * 2 and package.computed == 2


def test_a_triton_without_such_a_key_stays_as_it_is():
    other = SimpleNamespace(__file__="x/y/cache.py")
    compiler_key.remember(other)
    assert not hasattr(other, "triton_key")


def test_the_key_is_tritons_own(monkeypatch, tmp_path):
    cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    own = cache.triton_key()
    compiler_key.remember(cache)
    assert [cache.triton_key(), cache.triton_key()] == [own, own] and (tmp_path / "triton-key.json").exists()
