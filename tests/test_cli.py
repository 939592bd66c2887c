"""The command line: what goes to stdout, what to stderr, and with which exit code it ends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fake_llm
import pytest

from headrace import cli, machine
from headrace.check.fakes import write_tiny_model
from headrace.config import SamplingParams
from headrace.options import LEFT_OUT

JSON_FIELDS = [
    "model",
    "text",
    "token_ids",
    "prompt_token_ids",
    "finish_reason",
    "timings",
    "bytes_per_token",
    "gb_per_s",
    "roof_fraction",
    "logits_hash",
]
ANSWER_FIELDS = ["logprobs", "prompt_logprobs", "choices"]
TIMINGS_FIELDS = ["load_s", "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"]
AS_FAKE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import fake_llm
sys.modules["headrace.llm"] = fake_llm
from headrace.cli import main
main()
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Headrace = Callable[..., Ended]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    for known in (machine._kept_roofs, machine._kept_calibration, machine.this_machine):
        known.cache_clear()
    yield
    for known in (machine._kept_roofs, machine._kept_calibration, machine.this_machine):
        known.cache_clear()


@pytest.fixture
def headrace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Headrace:
    """Runs the command line in this process, with the stand-in for the model."""
    monkeypatch.setitem(sys.modules, "headrace.llm", fake_llm)

    def run(*arguments: str, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(ended.value.code if isinstance(ended.value.code, int) else 0, out, err)

    return run


def start(*arguments: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
    """The command line as a process of its own, with the stand-in for the model.

    It hears Ctrl-C, which who is started in the background inherits as ignored.
    """
    command = [sys.executable, "-c", AS_FAKE, str(Path(__file__).parent), *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **pipes)
    finally:
        signal.signal(signal.SIGINT, heard)


def assert_mistake(ended: Ended, *texts: str) -> None:
    assert ended.code == 2 and ended.out == ""
    assert "Traceback" not in ended.err
    assert all(text in ended.err for text in texts), ended.err


def test_run_prints_the_answer_and_talks_on_stderr(headrace: Headrace) -> None:
    ended = headrace("run", "two words")
    assert (ended.code, ended.out) == (0, "[<USER>TWO WORDS]\n")
    last = ended.err.splitlines()[-1]
    assert all(text in last for text in ("prefill", "decode", "GB/s", "% of the", "roof", "logits 0123abcd"))


def test_raw_sends_the_prompt_as_it_is(headrace: Headrace) -> None:
    assert headrace("run", "--raw", "two words").out == "TWO WORDS\n"
    assert headrace("run", "--raw", "-", stdin=b"two words\n").out == "TWO WORDS\n\n"


def test_dash_reads_stdin(headrace: Headrace) -> None:
    assert headrace("run", "-", stdin="schön\n".encode()).out == "[<USER>SCHÖN]\n"


def test_json_has_exactly_the_promised_fields(headrace: Headrace) -> None:
    ended = headrace("run", "--json", "two words")
    found = json.loads(ended.out)
    assert ended.out.count("\n") == 1
    assert list(found) == JSON_FIELDS and list(found["timings"]) == TIMINGS_FIELDS
    assert found["text"] == "[<USER>TWO WORDS]" and found["finish_reason"] == "stop"
    assert found["roof_fraction"] > 0


def test_the_roof_of_the_models_size_is_measured_once(headrace: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.kernels.cpu import roof

    headrace("run", "x")
    assert machine.this_machine().read_roof_at(fake_llm.LLM.bytes_per_token, 1) is not None
    monkeypatch.setattr(roof, "measure_read", lambda *_: pytest.fail("measured again"))
    assert "roof" in headrace("run", "two words").err


def test_every_sampling_field_is_an_option(headrace: Headrace) -> None:
    helped = headrace("run", "--help").out
    for field in fields(SamplingParams):
        option = "  --" + field.name.replace("_", "-") + " "
        assert (option in helped) == (field.name not in LEFT_OUT), option


def test_options_reach_the_model(headrace: Headrace) -> None:
    assert headrace("run", "--raw", "--max-tokens", "2", "a b c d").out == "A B\n"
    options = ["--raw", "--json", "--max-tokens", "2", "--stop", "x", "--stop", "y", "--threads", "1"]
    assert json.loads(headrace("run", *options, "a b c").out)["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(headrace: Headrace, prompt: str) -> None:
    assert_mistake(headrace("run", prompt), "prompt", "hint")
    assert_mistake(headrace("run", "-", stdin=prompt.encode()), "prompt", "hint")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "x", "--temperature", "nan"], "temperature"),
        (["run", "x", "--max-tokens", "0"], "max_tokens"),
        (["run", "x", "--max-tokens", "many"], "--max-tokens"),
        (["run", "x", "--top-p", "1.5"], "top_p"),
        (["run", "x", "--no-such"], "--no-such"),
        (["run", "x", "-m", "missing"], "no known model"),
        (["run", "long"], "at most 3 tokens"),
        (["run"], "prompt"),
        (["nothing"], "nothing"),
        (["bench", "model", "--depth", "1,x"], "--depth"),
        (["explain", "no_such_op"], "no_such_op"),
        (["explain", "rms_norm", "--dim", "0"], "--dim"),
        (["pull", "no-such-model"], "no known model"),
        (["quantize", "/nowhere.gguf", "out.gguf", "--type", "q4_0"], "/nowhere.gguf"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(headrace: Headrace, arguments: list[str], text: str) -> None:
    assert_mistake(headrace(*arguments), text)


def test_stdin_that_is_no_text_is_refused(headrace: Headrace) -> None:
    assert_mistake(headrace("run", "-", stdin=b"abc\xff"), "UTF-8", "byte 3")


def test_arguments_that_are_no_text_are_refused() -> None:
    out, err = start("run", b"abc\xff").communicate(timeout=300)
    assert out == b"" and b"not UTF-8" in err and b"Traceback" not in err


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    process = start("run", "slow")
    assert process.stdout and process.stdout.read(5) == b"word0"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.endswith(b"\ninterrupted\n") and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("run", "slow")
    assert process.stdout and process.stdout.read(5) == b"word0"
    process.stdout.close()
    assert process.stderr and process.stderr.read() == b""
    assert process.wait(timeout=300) == 141


def test_chat_keeps_the_conversation_and_computes_only_what_is_new() -> None:
    lines = b"first\nsecond\n/reset\nthird\n/exit\nnever\n"
    out, err = start("chat").communicate(lines, timeout=300)
    answers = out.decode().splitlines()
    assert answers[0] == "[<USER>FIRST]"
    assert answers[1] == "[<USER>FIRST<ASSISTANT>[<USER>FIRST]<USER>SECOND]"
    assert answers[2:] == ["[<USER>THIRD]"]
    speeds = [line for line in err.decode().splitlines() if line.startswith("prefill")]
    new = len("<user>first"), len("<assistant>[<USER>FIRST]<user>second"), len("<user>third")
    assert [line.split()[1] for line in speeds] == [f"{length / 0.5:.1f}" for length in new]


def test_chat_commands() -> None:
    lines = b"/system be brief\nhi\n/help\n/no such\n\n/system\nlong\nhi\n"
    out, err = start("chat").communicate(lines, timeout=300)
    assert out.decode().splitlines() == ["[<SYSTEM>BE BRIEF<USER>HI]", "[<USER>HI]"]
    assert b"/reset" in err and b"unknown: /no" in err
    assert b"error: prompt: expected at most 3 tokens" in err and b"Traceback" not in err


def test_a_prompt_cache_is_gone_on_from_and_kept(headrace: Headrace, tmp_path: Path) -> None:
    file = tmp_path / "prompt.cache"
    first, second = (headrace("run", "two words", "--prompt-cache", str(file), "--json") for _ in range(2))
    tokens = len("[<user>two words]") + 2
    kept = f"{tokens} tokens kept in {file}, 0.0 MB"
    assert kept in first.err and f"tokens from {file}" not in first.err
    assert kept in second.err and f"{tokens} tokens from {file}" in second.err
    assert headrace("run", "two words", "--prompt-cache", str(file), "--context-len", "8").code == 0
    assert len(file.read_bytes()) == 7


def test_a_conversation_is_kept_when_it_is_left(headrace: Headrace, tmp_path: Path) -> None:
    file = tmp_path / "prompt.cache"
    assert headrace("chat", "--prompt-cache", str(file), stdin=b"/exit\n").code == 0 and not file.exists()
    ended = headrace("chat", "--prompt-cache", str(file), stdin=b"hi\nyou\n")
    kept = len("[<user>hi<assistant>[<USER>HI]<user>you]") + 1
    assert file.stat().st_size == kept and f"{kept} tokens kept" in ended.err


def test_a_model_can_be_told_to_answer_the_same_in_any_company(headrace: Headrace) -> None:
    for verb in (["run", "hi"], ["chat"]):
        assert headrace(*verb, "--batch-invariant").code == 0 and fake_llm.LLM.made[-1].batch_invariant
        assert headrace(*verb).code == 0 and not fake_llm.LLM.made[-1].batch_invariant


def test_ctrl_c_in_chat_ends_the_answer_and_not_the_program() -> None:
    process = start("chat")
    assert process.stdin and process.stdout
    process.stdin.write(b"slow\n")
    process.stdin.flush()
    assert process.stdout.read(5) == b"word0"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    out, err = process.communicate(b"/reset\nhi\n", timeout=300)
    assert process.returncode == 0
    assert out.decode().splitlines()[-1] == "[<USER>HI]"
    assert b"interrupted" in err and b"Traceback" not in err


def test_models_lists_the_default(headrace: Headrace) -> None:
    ended = headrace("models")
    assert ended.code == 0 and "smollm2" in ended.out and "pull" in ended.out


def test_packed_weights_are_written_listed_and_removed(headrace: Headrace, tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "tiny.gguf"))
    packed = headrace("pack", model, "--threads", "1")
    assert packed.code == 0 and Path(packed.out.strip()).is_file() and "--remove" in packed.err
    assert f"{model}" in headrace("models").out
    Path(model).unlink()
    assert "its model is gone" in headrace("models").out
    assert headrace("pack", model, "--remove").code == 0
    assert model not in headrace("models").out and not Path(packed.out.strip()).exists()
    assert headrace("pack", model, "--remove").code == 2


def test_explain_names_the_kernel_it_would_take(headrace: Headrace) -> None:
    for op in ("rms_norm", "linear"):
        ended = headrace("explain", op, "--tokens", "1", "--dim", "576")
        assert ended.code == 0 and ended.out.startswith(op) and ended.out.count("chosen") == 1


EXPLAIN_ATTENTION = ["--head-dim", "128", "--query-len", "1", "--kv-len", "32768", "--kv-heads", "8"]
EXPLAIN_ATTENTION += ["--query-heads", "32", "--dtype", "bf16"]


@pytest.mark.parametrize("op", ["attention", "paged_attention"])
def test_explain_attention_is_a_table_of_every_kernel(headrace: Headrace, op: str) -> None:
    from headrace.ops.call_request import kernels_of

    ended = headrace("explain", op, *EXPLAIN_ATTENTION)
    assert ended.code == 0 and ended.err == "" and ended.out.startswith(f"{op}: query bfloat16")
    assert "134.2 MB" in ended.out and "predicted" in ended.out and ended.out.count("chosen") == 1
    assert all(kernel.name in ended.out for kernel in kernels_of(op))


def test_explain_tells_of_a_gpu_that_is_not_here(headrace: Headrace) -> None:
    ended = headrace("explain", "attention", *EXPLAIN_ATTENTION, "--device", "cuda", "--arch", "sm_90")
    assert ended.code == 0 and "NVIDIA H200" in ended.out and "array.cpu()" in ended.out
    assert_mistake(headrace("explain", "attention", "--device", "tpu"), "device: expected cpu, cuda or hip", "'tpu'")


@pytest.mark.parametrize("command", [["run", "hi"], ["chat"]])
def test_the_type_of_the_cache_can_be_chosen(
    headrace: Headrace, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[fake_llm.LLM] = []
    monkeypatch.setattr(fake_llm.LLM, "made", made)
    assert headrace(*command, "--kv-dtype", "int8", stdin=b"hi\n").code == 0
    assert headrace(*command, stdin=b"hi\n").code == 0
    assert [llm.kv_dtype for llm in made] == ["int8", "float16"]
    wrong = headrace(*command, "--kv-dtype", "fp8")
    assert_mistake(wrong, "kv_dtype: expected float32, float16, bfloat16, float8_e4m3fn, int8 or int4, got 'fp8'")


@pytest.mark.parametrize(
    "dtype,kv_dtype", [("fp64", ""), ("bf16", "int4"), ("fp32", "int8"), ("fp16", "fp8"), ("fp32", "")]
)
@pytest.mark.parametrize("op", ["attention", "paged_attention", "mla_attention"])
def test_explain_knows_every_kv_format(headrace: Headrace, op: str, dtype: str, kv_dtype: str) -> None:
    kv = ("--kv-dtype", kv_dtype) if kv_dtype else ()
    ended = headrace("explain", op, "--dtype", dtype, *kv, "--batch", "3", "--query-len", "5", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["request"]["op"] == op and found["chosen"]["arithmetic"] == ("fp64" if dtype == "fp64" else "fp32")


def test_explain_shows_why_nothing_has_what_is_required(headrace: Headrace) -> None:
    ended = headrace("explain", "attention", "--require", "batch_invariant")
    assert ended.code == 0 and "no kernel can run this" in ended.out and "deterministic=True" in ended.out
    ended = headrace("explain", "attention", "--deterministic", "--require", "batch_invariant")
    assert ended.out.count("chosen") == 1


def test_mistakes_of_explain_are_named(headrace: Headrace) -> None:
    assert_mistake(headrace("explain", "softmax"), "op: expected one of attention, linear", "'softmax'")
    assert_mistake(headrace("explain", "attention", "--kv-heads", "0"), "--kv-heads", ">= 1", "0")
    assert_mistake(headrace("explain", "attention", "--dtype", "bf17"), "dtype: expected", "bf16", "'bf17'")
    assert_mistake(headrace("explain", "attention", "--query-heads", "7"), "multiple of 8 heads", "7")
    assert_mistake(headrace("explain", "linear", "--weight", "Q9"), "Q9")
    assert_mistake(headrace("explain", "attention", "--require", "speed"), "require", "'speed'")


def test_doctor_measures_and_reports(headrace: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.kernels import cpu
    from headrace.kernels.cpu import roof

    monkeypatch.setattr(roof, "_READ_BUDGET_S", 0.01)
    monkeypatch.setattr(roof, "_MULTIPLY_BUDGET_S", 0.01)
    ended = headrace("doctor")
    assert ended.code == 0
    assert all(text in ended.out for text in ("cores", "caches", "(memory)", "(cache)", "fp32", "bf16", "int8"))
    assert ["kernels", cpu.isa()] in [line.split() for line in ended.out.splitlines()]
    assert machine.this_machine().measured


def test_the_start_imports_nothing_heavy() -> None:
    code = "import sys, headrace.cli; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(found.stdout.split())
    assert "typer" in imported and not imported & {"numpy", "torch", "tokenizers", "rich", "jinja2", "headrace.llm"}


def test_the_default_model_answers(default_model_path: Path) -> None:
    arguments = ["run", "-m", str(default_model_path), "--max-tokens", "8", "--json", "hi"]
    found = subprocess.run([sys.executable, "-m", "headrace", *arguments], capture_output=True, text=True, check=True)
    answer = json.loads(found.stdout)
    assert list(answer) == [*JSON_FIELDS, *ANSWER_FIELDS] and list(answer["timings"]) == TIMINGS_FIELDS
    assert len(answer["token_ids"]) <= 8 and answer["text"] and answer["roof_fraction"] > 0
