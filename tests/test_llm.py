"""The front door with the default model: what it answers, how it streams, what it keeps, and how it fails."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import LLM, Completion, HeadraceError, SamplingParams
from headrace.check.fakes import write_tiny_model
from headrace.errors import ArgumentError, ModelFileError, PromptTooLongError, SourceError, TemplateError
from headrace.weights.gguf import open_gguf

CAPITAL = "The capital of France is"
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
PEAK_BEYOND_FILE_BYTES = 150 * 2**20


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path)


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    answer = llm.generate(CAPITAL, SHORT)
    assert isinstance(answer, Completion)
    assert answer.text.startswith(" Paris")
    assert answer.prompt_token_ids == llm.tokenizer.encode(CAPITAL)
    assert llm.tokenizer.decode(answer.token_ids) == answer.text
    assert (len(answer.token_ids), answer.finish_reason) == (12, "length")
    assert llm.generate(answer.prompt_token_ids, SHORT).token_ids == answer.token_ids


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_it_knows_it_with_a_cache_of_eight_bits(default_model_path: Path, kv_dtype: str) -> None:
    llm = LLM(default_model_path, kv_dtype=kv_dtype)
    answer = llm.generate(CAPITAL, SHORT)
    assert answer.text.startswith(" Paris")
    again = llm.generate(CAPITAL + answer.text, SHORT)  # behind what is cached
    depth = len(again.prompt_token_ids) + 6
    read_bytes = again.bytes_per_token + llm.kv_bytes_per_token * depth
    assert again.gb_per_s == pytest.approx(read_bytes * again.timings.decode_tokens_per_s / 1e9)
    assert llm.kv_bytes_per_token == 30 * 3 * 2 * (64 + 4 * (kv_dtype == "int8"))


def test_it_answers_in_a_conversation(llm: LLM) -> None:
    question = "What is the capital of Italy? Answer in one word."
    answer = llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=40))
    assert "Rome" in answer.text
    assert answer.finish_reason == "stop" and answer.token_ids[-1] in llm.tokenizer.end_ids
    assert "<|" not in answer.text


def test_render_is_the_template_as_token_ids(llm: LLM) -> None:
    ids = llm.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert llm.tokenizer.decode(ids, skip_special=False) == expected
    assert ids.count(llm.tokenizer.encode("<|im_start|>")[0]) == 3


@pytest.mark.parametrize("prompt", [CAPITAL, "🌊🎡👩‍👩‍👧 é 水車 🌊🎡👩‍👩‍👧 é 水車 🌊", "Emoji: 😀😃😄😁😆😅"])
def test_pieces_are_the_text_and_never_half_a_character(llm: LLM, prompt: str) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.2, seed=5)
    stream = llm.stream(prompt, params)
    pieces = list(stream)
    whole = llm.tokenizer.decode(stream.completion.token_ids)
    assert "".join(piece.text for piece in pieces) == stream.completion.text == whole
    assert [piece.token_id for piece in pieces] == stream.completion.token_ids
    assert sum(piece.text.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


def test_a_character_of_several_tokens_appears_with_its_last(llm: LLM) -> None:
    """The model repeats what it saw; each emoji is several tokens, of which only the last shows anything."""
    stream = llm.stream("🌊🎡🌊🎡🌊🎡🌊🎡🌊🎡🌊🎡🌊🎡🌊🎡", SamplingParams(max_tokens=24, ignore_eos=True))
    pieces = [piece.text for piece in stream]
    assert any(text == "" for text in pieces)
    shown = "".join(pieces[:-1])
    assert any(unicodedata.category(letter) == "So" for letter in shown)
    assert "\ufffd" not in shown


def test_generate_is_the_stream_read_to_its_end(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    forget(llm)
    streamed = "".join(piece.text for piece in llm.stream(CAPITAL, params))
    forget(llm)
    assert llm.generate(CAPITAL, params).text == streamed


def forget(llm: LLM) -> None:
    """Empties the cache: a prompt that is cached is computed by another kernel, and rounded another way."""
    llm.logits([0])


def test_streams_begin_before_they_end(llm: LLM) -> None:
    stream = llm.stream(CAPITAL, SamplingParams(max_tokens=1000, ignore_eos=True))
    first = next(iter(stream))
    assert first.text.startswith(" Paris")
    assert len(stream.completion.token_ids) == 1


def test_stop_strings_end_the_text_and_are_not_shown(llm: LLM) -> None:
    whole = llm.generate(CAPITAL, SHORT).text
    for stop in (whole[4:9], whole[3:5], whole[-1]):
        stream = llm.stream(CAPITAL, dataclasses.replace(SHORT, stop=("never seen", stop)))
        text = "".join(piece.text for piece in stream)
        assert text == whole[: whole.index(stop)] == stream.completion.text
        assert stream.completion.finish_reason == "stop"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens_is_exact(llm: LLM, count: int) -> None:
    answer = llm.generate(CAPITAL, SamplingParams(max_tokens=count, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (count, "length")


def test_the_end_token_ends_unless_ignored(llm: LLM) -> None:
    prompt = llm.render([{"role": "user", "content": "What is 2+2?"}])
    forget(llm)
    ended = llm.generate(prompt, SamplingParams(max_tokens=60))
    forget(llm)
    longer = llm.generate(prompt, SamplingParams(max_tokens=len(ended.token_ids) + 3, ignore_eos=True))
    assert ended.finish_reason == "stop"
    assert longer.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert len(longer.token_ids) == len(ended.token_ids) + 3


def test_timings_and_figures_agree(llm: LLM) -> None:
    answer = llm.generate("Once upon a time, " * 9, SamplingParams(max_tokens=9, ignore_eos=True))
    timings = answer.timings
    assert all(value > 0 for value in dataclasses.astuple(timings))
    assert timings.decode_tokens_per_s == pytest.approx(8 / timings.decode_s)
    assert timings.prefill_tokens_per_s * timings.prefill_s <= len(answer.prompt_token_ids) + 1e-6
    depth = len(answer.prompt_token_ids) + len(answer.token_ids) / 2
    read_bytes = answer.bytes_per_token + llm.kv_bytes_per_token * depth
    assert answer.gb_per_s == pytest.approx(read_bytes * timings.decode_tokens_per_s / 1e9)
    assert 0.9 < answer.bytes_per_token / os.path.getsize(llm.path) < 1.1
    assert answer.roof_fraction is None or answer.roof_fraction > 0
    assert len(bytes.fromhex(answer.logits_hash)) == 8
    json.dumps(dataclasses.asdict(answer))


def test_one_token_has_no_decode_speed(llm: LLM) -> None:
    timings = llm.generate(CAPITAL, SamplingParams(max_tokens=1)).timings
    assert timings.decode_s == timings.decode_tokens_per_s == 0 < timings.prefill_s


def test_one_seed_one_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=11, ignore_eos=True)
    texts = []
    for seed in (11, 12, 13, 11):
        forget(llm)
        texts.append(llm.generate(CAPITAL, dataclasses.replace(params, seed=seed)).text)
    assert texts[3] == texts[0]
    assert len(set(texts)) == 3
    unseeded = {llm.generate(CAPITAL, dataclasses.replace(params, seed=None)).text for _ in range(4)}
    assert len(unseeded) > 1


def test_a_second_turn_computes_its_new_tokens_alone(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 2+2?"}]
    first = llm.chat(messages, SamplingParams(max_tokens=60))
    assert first.finish_reason == "stop"
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And 3+3?"}]
    stream = llm.chat_stream(messages, SamplingParams(max_tokens=30))
    assert "".join(piece.text for piece in stream)
    reused = stream._request.reused_len
    assert reused >= len(first.prompt_token_ids) + len(first.token_ids) - 1
    assert len(stream.completion.prompt_token_ids) - reused < 30
    assert stream.completion.timings.prefill_tokens_per_s * stream.completion.timings.prefill_s == pytest.approx(
        len(stream.completion.prompt_token_ids) - reused
    )


def test_logits_say_what_generate_says(llm: LLM) -> None:
    ids = llm.tokenizer.encode(CAPITAL)
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.tokenizer.vocab_size) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert llm.generate(ids, SHORT).token_ids[0] == int(logits[-1].argmax())
    before = logits.copy()
    llm.logits(ids[::-1])
    np.testing.assert_array_equal(logits, before)


def test_the_tokenizer_comes_back(llm: LLM) -> None:
    for text in (CAPITAL, "naïve café 🌊", "def f(x):\n\treturn x\n", "水車"):
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
    assert llm.config.vocab_size == llm.tokenizer.vocab_size == 49152


# Memory and start.

ONE_TOKEN = """
import json, sys
from pathlib import Path
import headrace
llm = headrace.LLM(sys.argv[1])
text = llm.generate("The capital of France is", headrace.SamplingParams(max_tokens=1)).text
# getrusage would count what the process that started this one had in memory.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"text": text, "peak": peak, "torch": "torch" in sys.modules, "jinja2": "jinja2" in sys.modules}))
"""


def test_a_first_token_needs_no_torch_and_little_memory(default_model_path: Path) -> None:
    command = [sys.executable, "-c", ONE_TOKEN, str(default_model_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    said = json.loads(ended.stdout)
    assert said["text"] == " Paris"
    assert not said["torch"] and not said["jinja2"]
    assert said["peak"] < default_model_path.stat().st_size + PEAK_BEYOND_FILE_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_closing_gives_the_memory_back(default_model_path: Path) -> None:
    llm = LLM(default_model_path)
    stream = llm.stream(CAPITAL, SHORT)
    llm.generate(CAPITAL, SHORT)
    before = resident_bytes()
    llm.close()
    llm.close()
    gc.collect()
    assert before - resident_bytes() > llm.bytes_per_token // 2
    for use in (lambda: llm.generate(CAPITAL), lambda: llm.logits([1]), lambda: list(stream)):
        with pytest.raises(ArgumentError, match="closed"):
            use()
    assert llm.tokenizer.encode(CAPITAL)


# Mistakes.


def test_a_prompt_that_cannot_be_answered_is_refused(llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="at least one token"):
        llm.generate("")
    with pytest.raises(PromptTooLongError, match="fewer than 8192 tokens, got 8192"):
        llm.generate([1] * 8192)
    with pytest.raises(ArgumentError, match="in 0..49151, got 49152"):
        llm.stream([49152])
    with pytest.raises(ArgumentError, match="text"):
        llm.generate("\ud800")
    with pytest.raises(PromptTooLongError):
        llm.logits([1] * 9000)
    for messages in (["hi"], [{"content": "hi"}], [{"role": "user"}], 7, "hi"):
        with pytest.raises((ArgumentError, TemplateError)):
            llm.chat(messages)  # type: ignore[arg-type]
    assert llm.generate(CAPITAL, SHORT).text.startswith(" Paris")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("smollm3", str(tmp_path / "none.gguf"), str(tmp_path), ""):
        with pytest.raises((SourceError, ArgumentError, ModelFileError)) as caught:
            LLM(name, offline=True)
        assert name in str(caught.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(SourceError, match=r"tiny\.gguf"):
        LLM(path)


@pytest.fixture(scope="module")
def damaged(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """Opens the default model with some of its bytes replaced, or cut off."""
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    shutil.copy(default_model_path, path)

    def open_with(changes: dict[int, bytes]) -> LLM:
        with open(path, "r+b") as file:
            kept = {}
            for offset, new in changes.items():
                file.seek(offset)
                kept[offset] = file.read(len(new))
                file.seek(offset)
                file.write(new)
            file.flush()
            try:
                return LLM(path, threads=1)
            finally:
                for offset, old in reversed(kept.items()):
                    file.seek(offset)
                    file.write(old)

    return open_with


@pytest.mark.parametrize("kept", [0, 3, 24, 1000, 0.01, 0.5, 0.999, -1])
def test_a_truncated_file_is_refused(default_model_path: Path, tmp_path: Path, kept: float) -> None:
    whole = default_model_path.stat().st_size
    path = tmp_path / "cut.gguf"
    shutil.copy(default_model_path, path)
    os.truncate(path, whole + kept if kept < 0 else kept if kept >= 1 else int(whole * kept))
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        LLM(path)


def use(llm: LLM) -> None:
    llm.generate(CAPITAL, SamplingParams(max_tokens=2, temperature=0.7))
    llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2))


@pytest.fixture(scope="module")
def layout(default_model_path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of every tensor."""
    with open_gguf(default_model_path) as file:
        return {name: (info.offset, info.num_bytes) for name, info in file.tensors.items()}


BIT_FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6)
FEW = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@FEW
@given(flips=BIT_FLIPS, part=st.sampled_from(["numbers", "directory", "all"]))
def test_a_flipped_header_runs_or_ends_in_one_clear_error(default_model_path, layout, damaged, flips, part) -> None:
    end = min(offset for offset, _ in layout.values())
    first, last = {"numbers": (0, 2500), "directory": (end - 18000, end), "all": (0, end)}[part]
    raw = default_model_path.open("rb").read(end)
    places = {first + int(where * (last - first)): bits for where, bits in flips}
    try:
        use(damaged({place: bytes([raw[place] ^ bits]) for place, bits in places.items()}))
    except HeadraceError as error:
        assert str(error)


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_flipped_weights_run_or_end_in_one_clear_error(layout, damaged, data) -> None:
    changes = {}
    for name in data.draw(st.lists(st.sampled_from(sorted(layout)), min_size=1, max_size=4)):
        offset, num_bytes = layout[name]
        where = data.draw(st.integers(0, num_bytes - 20))
        changes[offset + where] = data.draw(st.binary(min_size=1, max_size=20))
    try:
        use(damaged(changes))
    except HeadraceError as error:
        assert "nan" in str(error) or "inf" in str(error)


WITH_NAN = {  # tensor and byte: the first block's scale or minimum
    "token_embd": 0,
    "blk.0.attn_q": 0,
    "blk.3.ffn_up": 2,
    "blk.5.attn_k": 40,
    "blk.9.attn_v": 20,
    "blk.29.ffn_down": 0,
}


@pytest.mark.parametrize("name", WITH_NAN)
def test_weights_that_are_no_numbers_are_noticed(damaged, layout, name: str) -> None:
    """A scale or a minimum that is NaN reaches the logits, whatever is rounded to integers on the way."""
    llm = damaged({layout[f"{name}.weight"][0] + WITH_NAN[name]: np.float16(np.nan).tobytes()})
    with pytest.raises(HeadraceError, match="nan"):
        llm.generate([0, 0, 1, 2, 3], SHORT)
