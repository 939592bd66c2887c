"""`bench serving` from the command line to the document: a server of its own or another, a load, turns with peers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import cli
from headrace.bench import serving_turns
from headrace.bench.peer_answers import answer, answer_async
from headrace.bench.serving import bench_serving, serve_arguments
from headrace.bench.serving_client import Asked, Load, Target
from headrace.bench.serving_host import target_of
from headrace.bench.serving_load import ServingOptions
from headrace.bench.serving_turns import Sample, taken
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import ArgumentError, HeadraceError
from headrace.llm import LLM
from headrace.machine import Machine
from headrace.options import LoadOptions
from headrace.talk import ProgressLine

LOADING = LoadOptions(threads=1)
MACHINE = Machine(
    {}, measured=True, cpu_name="some CPU", reads={1: {1000: 8e9, 10**9: 1e9}}, products={"fp32": {1: 1e10}}
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel(context_len=1024))


def bench(model: str | None, **given: Any) -> dict[str, Any]:
    return bench_serving(model, ServingOptions(**given), LOADING, json_only=True, progress=ProgressLine())


class Silent:
    """A server that says what it is told to, as often as it is told to, and then nothing more."""

    def __init__(self, said: bytes, most: int = 10**9) -> None:
        self.port, self._said, self._left = 0, said, most
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(main())
        self._loop.run_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if self._left:
            self._left -= 1
            writer.write(self._said)
            writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent(b"HTTP/1.1 503 No\r\nContent-Length: 29\r\n\r\n" + b'{"error": {"code": "loading"}}', most=1)
    yield server
    server.stop()


def test_the_command_measures_a_server_that_it_starts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn.svg"
    given = ["-m", str(path), "--requests", "6", "--concurrency", "3", "--prompt-len", "5", "--answer-len", "400"]
    monkeypatch.setattr(sys, "argv", ["headrace", "bench", "serving", *given, "--threads", "1", "--plot", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    *said, last = capsys.readouterr().out.splitlines()
    data = json.loads(last)
    assert (data["model"], data["requests"], data["whole"], data["errors"]) == ("tiny", 6, 6, {})
    assert data["tokens_out"] == 2400 and data["tokens_in"] > 6 * 5
    assert set(data["latencies"]) == {"ttft", "tpot", "gap", "end_to_end"}
    parts = data["parts"]
    assert parts["steps"] >= 1 and 0 < parts["native_s"] < parts["wall_s"] and parts["loop_s"] > 0
    assert any(line.startswith("TTFT") for line in said) and "of a step of" in said[-1]
    assert out.exists() and data["options"]["api_key"] is None


def test_an_open_loop_with_mixed_lengths(path: Path) -> None:
    data = bench(str(path), rate=200.0, requests=8, prompt_len=4, answer_len=6, lengths="uniform", chat=True)
    assert data["whole"] == 8 and data["options"]["rate"] == 200.0


def test_turns_with_our_own_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_turns, "measured_machine", lambda num_bytes, threads: MACHINE)
    data = bench(str(path), peer="engine,async", repeat=1, concurrency=3, prompt_len=5, answer_len=12)
    names = [row["name"] for row in data["rows"]]
    assert names == ["server, 3 streams", "server, 1 stream", "engine alone", "AsyncLLM"]
    assert all(row["tokens_per_s"]["median"] > 0 and row["tokens_per_s"]["count"] == 1 for row in data["rows"])
    alone = data["rows"][2]["parts"]
    assert alone["steps"] == 11 and alone["loop_s"] == 0 and alone["native_s"] > 0
    assert data["ceiling_tokens_per_s"] > 0


def test_each_takes_its_turn_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def sampler(name: str) -> Any:
        return lambda: calls.append(name) or Sample(len(calls), 6)

    samples = taken({name: sampler(name) for name in "ab"}, 2)
    assert calls == list("ababba") and {name: len(each) for name, each in samples.items()} == {"a": 2, "b": 2}
    assert samples["a"][0].seconds == 3


@pytest.mark.parametrize("ask", [answer, answer_async])
def test_prompts_answered_without_a_server(path: Path, ask: Any) -> None:
    llm = LLM(path, threads=1, max_requests=4)
    for _ in range(2):  # a model is as good as new afterwards
        found = ask(llm, [[40 + i] * 3 for i in range(4)], 300)
        assert found["seconds"] > 0 and 1 <= found["parts"]["steps"] <= 300
        assert not llm.engine.has_work
        llm.engine.clear()
        assert llm.engine.pool.num_free == llm.engine.pool.num_pages


def test_steps_are_counted_and_computing_is_a_part_of_them(path: Path) -> None:
    llm = LLM(path, threads=1)
    answer(llm, [[40, 41]], 5)
    engine = llm.engine
    assert engine.num_steps == 5 and 0 < engine.runner.native_s < engine.busy_s


def test_what_goes_wrong_is_counted_by_kind(silent: Silent) -> None:
    async def main(count: int, timeout_s: float) -> list[str]:
        run = await Load(Target("127.0.0.1", silent.port, timeout_s=timeout_s)).run([Asked(b"{}")] * count, count)
        return sorted(outcome.error for outcome in run.outcomes)

    assert asyncio.run(main(2, 2.0)) == ["503 loading", "no answer in time"]
    silent.stop()


def test_nobody_there_is_no_connection() -> None:
    async def main() -> str:
        return (await Load(Target("127.0.0.1", 1)).run([Asked(b"{}")], 1)).outcomes[0].error

    assert asyncio.run(main()).startswith("no connection: ")


def test_a_request_is_sent_when_it_is_due_whether_others_have_ended_or_not(silent: Silent) -> None:
    async def main() -> list[Any]:
        target = Target("127.0.0.1", silent.port, timeout_s=0.4)
        return (await Load(target).run([Asked(b"{}", due) for due in (0.0, 0.1, 0.2)], 1)).outcomes

    outcomes = asyncio.run(main())
    assert [outcome.due_s for outcome in outcomes] == pytest.approx([0.0, 0.1, 0.2])
    assert all(outcome.started_s >= outcome.due_s for outcome in outcomes)
    assert outcomes[2].started_s < outcomes[1].ended_s


def test_addresses() -> None:
    target = target_of("https://host.example/some/v1/", ServingOptions(api_key="k", timeout=3.0))
    assert target == Target("host.example", 443, "/some", True, "k", 3.0)
    assert b"Authorization: Bearer k\r\n" in target.post(b"{}")
    for wrong in ("host:80", "ftp://host", "http://"):
        with pytest.raises(ArgumentError, match="url: expected"):
            target_of(wrong, ServingOptions())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"peer": "vllm"}, r"peer: expected some of engine, async, llama\.cpp"),
        ({"peer": "engine", "rate": 1.0}, "peer: expected no url, rate or plot"),
        ({"plot": Path("x.txt")}, "plot: expected a file"),
        ({"url": "http://127.0.0.1:1"}, "does not list models"),
        ({}, "headrace serve does not come up"),
    ],
)
def test_what_cannot_be_measured_is_said(given: dict[str, Any], error: str) -> None:
    with pytest.raises(HeadraceError, match=error):
        bench("no/such/model.gguf" if not given else None, **given)


def test_a_server_is_told_how_to_load_its_model() -> None:
    loading = LoadOptions(threads=3, batch_invariant=True)
    told = serve_arguments(ServingOptions(concurrency=5, requests=9), loading)
    assert told[:6] == ["--max-concurrency", "5", "--max-queue", "9", "--threads", "3"]
    assert "--batch-invariant" in told and "True" not in told and "--context-len" not in told
