"""Saved beginnings: what comes back is what was computed, and a file that is not exactly that brings nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.config import KV_DTYPES
from headrace.engine import saved_prefix
from headrace.engine.saved_prefix import Limits, Origin, read_prefix
from headrace.errors import ArgumentError, CapacityError, HeadraceError, ModelFileError, PromptTooLongError

PROMPT = [int(i) for i in np.random.default_rng(8).integers(0, 300, 150)]  # two pages and a piece of a third
ASKED = [*PROMPT, 5, 6]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
HEADER_BYTES, DIGEST_BYTES = 156, 32

Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())


@pytest.fixture(scope="module")
def tiny(model: Path) -> Open:
    return lambda **options: LLM(model, **({"batch_invariant": True} | options))


@pytest.fixture(scope="module")
def saved(tiny: Open, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "prompt.cache"
    tiny().save_cache(path, PROMPT)
    return path


def nothing_is_lost(llm: LLM) -> bool:
    llm.engine.clear()
    return llm.engine.pool.num_free == llm.engine.pool.num_pages


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_loaded_is_not_computed_again(tiny: Open, tmp_path: Path, kv_dtype: str) -> None:
    file, expected = tmp_path / "prompt.cache", tiny(kv_dtype=kv_dtype).generate(ASKED, GREEDY)
    writer, reader = (tiny(kv_dtype=kv_dtype) for _ in range(2))
    num_bytes = writer.save_cache(file, PROMPT)
    assert num_bytes == file.stat().st_size == 188 + len(PROMPT) * (4 + writer.kv_bytes_per_token)
    assert reader.load_cache(str(file)) == len(PROMPT)
    stream = reader.stream(ASKED, GREEDY)
    tokens = [piece.token_id for piece in stream]
    assert stream._request.reused_len == len(PROMPT)
    assert (tokens, stream.completion.logits_hash) == (expected.token_ids, expected.logits_hash)
    assert nothing_is_lost(writer) and nothing_is_lost(reader)


def test_what_is_cached_is_saved_without_computing_it(
    tiny: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny()
    answer = llm.generate(PROMPT, GREEDY)
    steps, run = list[int](), type(llm.engine.runner).run
    monkeypatch.setattr(llm.engine.runner, "run", lambda: steps.append(1) or run(llm.engine.runner))
    llm.save_cache(tmp_path / "all", [*PROMPT, *answer.token_ids])
    assert len(steps) == 1  # for the last token, whose keys nobody needed yet
    assert tiny().load_cache(tmp_path / "all") == len(PROMPT) + 8


def test_text_is_encoded_as_for_an_answer(tiny: Open, tmp_path: Path) -> None:
    llm = tiny()
    llm.save_cache(tmp_path / "text", "to be or not")
    assert tiny().load_cache(tmp_path / "text") == len(llm.tokenizer.encode("to be or not"))


def test_pages_may_have_another_size(tiny: Open, saved: Path) -> None:
    llm = tiny()
    other = llm.engine.again(page_size=16)
    read = partial(read_prefix, saved, other.runner.storage, llm._origin, Limits(256, 300))
    assert other.take_in(read) == len(PROMPT)
    request = other.request(ASKED, GREEDY)
    assert list(other.run(request)) == llm.generate(ASKED, GREEDY).token_ids and request.reused_len == len(PROMPT)


def test_a_file_has_nothing_of_other_texts(tiny: Open, saved: Path, tmp_path: Path) -> None:
    llm = tiny(max_requests=1)
    for first in range(4):
        llm.generate([first, *reversed(ASKED)], GREEDY)  # leaves other keys on all pages
    llm.engine.clear()
    llm.save_cache(tmp_path / "used", PROMPT)
    assert (tmp_path / "used").read_bytes() == saved.read_bytes()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_those_who_run_go_on(tiny: Open, saved: Path, tmp_path: Path) -> None:
    """In a cache with room for one of them, they are computed again."""
    num_bytes = 4 * 64 * tiny().kv_bytes_per_token
    for given_bytes in (None, num_bytes):
        llm = tiny(kv_cache_bytes=given_bytes)
        request = llm.engine.request([9] * 100, GREEDY)
        llm.engine.add(request)
        for _ in range(3):
            llm.engine.step()
        llm.save_cache(tmp_path / "saved", PROMPT)
        llm.engine.step()
        assert llm.load_cache(saved) == len(PROMPT)
        while llm.engine.has_work:
            llm.engine.step()
        assert request.token_ids == tiny().generate([9] * 100, GREEDY).token_ids
        assert (llm.engine.scheduler.num_preemptions > 0) == (given_bytes is not None)
        assert nothing_is_lost(llm)


def test_what_has_no_room_is_refused(tiny: Open, saved: Path, tmp_path: Path) -> None:
    small = tiny(kv_cache_bytes=2 * 64 * tiny().kv_bytes_per_token)
    with pytest.raises(CapacityError, match="expected 3 free, got 2 of 2"):
        small.load_cache(saved)
    with pytest.raises(CapacityError, match="150 tokens need 3 pages"):
        small.save_cache(tmp_path / "never", PROMPT)
    assert not (tmp_path / "never").exists() and nothing_is_lost(small)
    with pytest.raises(ArgumentError, match="150 tokens, there is room for 1 to 100"):
        tiny(context_len=100).load_cache(saved)
    with pytest.raises(PromptTooLongError):
        tiny(context_len=100).save_cache(tmp_path / "never", PROMPT)


def test_a_save_that_fails_leaves_what_was_there(
    tiny: Open, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    llm, file = tiny(), tmp_path / "prompt.cache"
    file.write_bytes(b"before")
    monkeypatch.setattr(saved_prefix, "_gathered", full)
    with pytest.raises(CapacityError, match="No space left"):
        llm.save_cache(file, PROMPT)
    assert file.read_bytes() == b"before" and os.listdir(tmp_path) == ["prompt.cache"] and nothing_is_lost(llm)
    with pytest.raises(ArgumentError, match="cannot be written"):
        llm.save_cache(tmp_path / "no" / "folder", PROMPT)


# Files that are refused.


def refused(tiny: Open, file: Path, kind: type[HeadraceError], text: str, **options: Any) -> None:
    llm = tiny(**options)
    with pytest.raises(kind, match=text):
        llm.load_cache(file)
    assert len(llm.engine.prefixes) == 0 and llm.engine.pool.num_free == llm.engine.pool.num_pages


def sealed(data: bytes) -> bytes:
    """With the digest that belongs to it: by someone who knows the format."""
    return data + hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def changed(saved: Path, at: int, new: bytes) -> bytes:
    data = saved.read_bytes()[:-DIGEST_BYTES]
    return sealed(data[:at] + new + data[at + len(new) :])


def test_another_model_is_refused_though_its_shape_is_the_same(saved: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(seed=1))
    with pytest.raises(ArgumentError, match="a saved cache of another model"):
        LLM(other).load_cache(saved)


def test_a_copy_of_the_model_is_the_same(model: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.gguf").write_bytes(model.read_bytes())
    assert LLM(tmp_path / "copy.gguf").load_cache(saved) == len(PROMPT)


def test_a_model_whose_file_was_changed_is_nobody_s(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model.read_bytes())
    llm = LLM(path)
    write_tiny_model(path, TinyModel(seed=1))
    with pytest.raises(ModelFileError, match="has changed since it was loaded"):
        llm.save_cache(tmp_path / "saved", PROMPT)


def test_another_type_of_cache_is_refused(tiny: Open, saved: Path) -> None:
    text = "kv_dtype: expected 'int8', got 'float16'"
    refused(tiny, saved, ArgumentError, text, kv_dtype="int8", batch_invariant=False)


def test_another_format_is_refused(tiny: Open, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(changed(saved, 8, struct.pack("<I", 2)))
    refused(tiny, tmp_path / "new", ArgumentError, "of format 2, this headrace reads format 1")


def test_a_promise_of_bits_takes_only_its_own(tiny: Open, saved: Path, tmp_path: Path) -> None:
    free = tiny(batch_invariant=False)
    free.save_cache(tmp_path / "free", PROMPT)
    assert free.load_cache(saved) == free.load_cache(tmp_path / "free") == len(PROMPT)
    refused(tiny, tmp_path / "free", ArgumentError, "batch_invariant: expected the bits of '.*', got those of 'any'")
    (tmp_path / "old").write_bytes(changed(saved, 36, b"0.0.9"))
    refused(tiny, tmp_path / "old", ArgumentError, "batch_invariant: expected the bits of .* got those of '0.0.9")


def test_what_is_no_file_is_refused(tiny: Open, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, text in (("missing", "No such file"), (".", "expected a file"), ("fifo", "expected a file")):
        refused(tiny, tmp_path / name, ArgumentError, text)
    (tmp_path / "text").write_text("hello")
    refused(tiny, tmp_path / "text", ModelFileError, "not a saved cache")


def test_a_file_that_was_cut_short_or_goes_on_is_refused(tiny: Open, saved: Path, tmp_path: Path) -> None:
    data, file = saved.read_bytes(), tmp_path / "cut"
    for length in (
        0,
        7,
        8,
        HEADER_BYTES - 1,
        HEADER_BYTES,
        HEADER_BYTES + 600,
        len(data) - DIGEST_BYTES,
        len(data) - 1,
    ):
        file.write_bytes(data[:length])
        refused(tiny, file, ModelFileError, "not a saved cache" if length < 8 else "a damaged saved cache")
    file.write_bytes(data + b"\0")
    refused(tiny, file, ModelFileError, f"{len(data) + 1} bytes where 150 tokens take {len(data)}")


@pytest.mark.parametrize(
    "at,new,kind,text",
    [
        (12, struct.pack("<I", 0), ArgumentError, "0 tokens, there is room for 1 to 256"),
        (12, struct.pack("<I", 2**32 - 1), ArgumentError, "4294967295 tokens, there is room for 1 to 256"),
        (12, struct.pack("<I", 149), ModelFileError, "bytes where 149 tokens take"),
        (HEADER_BYTES, struct.pack("<i", 300), ModelFileError, "tokens that are not in the vocabulary"),
        (HEADER_BYTES, struct.pack("<i", -1), ModelFileError, "tokens that are not in the vocabulary"),
        (HEADER_BYTES + 4 * 150 + 64, b"\x00\x7e", ModelFileError, "numbers that are not finite"),
    ],
)
def test_a_file_that_lies_is_refused(
    tiny: Open, saved: Path, tmp_path: Path, at: int, new: bytes, kind: type[HeadraceError], text: str
) -> None:
    (tmp_path / "lie").write_bytes(changed(saved, at, new))
    refused(tiny, tmp_path / "lie", kind, text)


@pytest.fixture(scope="module")
def reader(tiny: Open) -> LLM:
    return tiny(batch_invariant=False)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_no_bit_may_change(reader: LLM, saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    region = data.draw(st.sampled_from([HEADER_BYTES + 600, len(content)]))
    content[data.draw(st.integers(0, region - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "changed").write_bytes(content)
    with pytest.raises((ModelFileError, ArgumentError)):
        reader.load_cache(tmp_path / "changed")
    assert len(reader.engine.prefixes) == 0 and reader.engine.pool.num_free == reader.engine.pool.num_pages


def test_an_origin_is_the_model_s_own(tiny: Open) -> None:
    first, second = tiny()._origin, tiny(kv_dtype="int8", batch_invariant=False)._origin
    assert first.model == second.model and second == Origin(first.model, "int8")
