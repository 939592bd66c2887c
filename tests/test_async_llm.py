"""Many readers of one model on event loops: each gets what it gets alone, whoever leaves, dawdles or fails."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace import LLM, AsyncLLM, HeadraceError, SamplingParams
from headrace.check.fakes import write_tiny_model
from headrace.engine.worker import Ticket
from headrace.errors import ArgumentError, CapacityError, PromptTooLongError
from headrace.kv_cache.pages import PagePool

PROMPTS = ["a mill", "the water wheel turns", "x", "headrace " * 9, "tail and race", "the water was high"]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=3)
ENDLESS = SamplingParams(max_tokens=230, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(path: Path) -> list[str]:
    llm = LLM(path, kv_dtype="float32")
    answers = [llm.generate(prompt, PARAMS).text for prompt in PROMPTS]
    llm.close()
    return answers


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(path, kv_dtype="float32", **options) as llm:
        yield llm
        await until(lambda: not llm.worker.engine.has_work)
        pool = llm.worker.engine.pool
        await llm.worker.call(llm.worker.engine.prefixes.clear)
        assert pool.num_free == pool.num_pages


@contextmanager
def held(llm: AsyncLLM) -> Iterator[None]:
    """Keeps the engine from its next step, so that nothing ends before anyone looks."""
    gate = threading.Event()
    llm.worker.call(gate.wait)
    try:
        yield
    finally:
        gate.set()


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 60)


def test_readers_beside_each_other_get_what_they_get_alone(path: Path, alone: list[str]) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            completions = await asyncio.gather(*(llm.generate(prompt, PARAMS) for prompt in PROMPTS))
            assert [completion.text for completion in completions] == alone
            assert {completion.finish_reason for completion in completions} == {"length"}

    asyncio.run(main())


def test_updates_are_the_completion_piece_by_piece(path: Path, alone: list[str]) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            stream = llm.stream(PROMPTS[1], PARAMS)
            updates = [update async for update in stream]
            assert "".join(update.text for update in updates) == stream.text == alone[1]
            assert [token for update in updates for token in update.token_ids] == stream.completion.token_ids
            assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
            assert updates[-1].finish_reason == "length"

    asyncio.run(main())


def test_an_interval_makes_fewer_updates_of_the_same_answer(
    path: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, note = list[int](), Ticket.note  # a reader may see several at once

    def noted(ticket: Ticket) -> bool:
        makes_a_difference = note(ticket)
        if makes_a_difference:
            told.append(ticket.state[0])
        return makes_a_difference

    async def main() -> None:
        async with opened(path, stream_interval=7) as llm:
            updates = [update async for update in llm.stream(PROMPTS[1], PARAMS)]
            assert "".join(update.text for update in updates) == alone[1] and len(updates) <= len(told)
            assert told == [1, 8, 15, 22, 29, 36, PARAMS.max_tokens]  # the first at once
            told.clear()
            stopping = replace(PARAMS, stop=(alone[1][-9:],))
            stream = llm.stream(PROMPTS[1], stopping)
            async for _ in stream:
                pass
            assert told == list(range(1, len(told) + 1)) and len(told) > 7  # the engine must not go on for long
            assert stream.text == alone[1].partition(stopping.stop[0])[0]

    monkeypatch.setattr(Ticket, "note", noted)

    with pytest.raises(ArgumentError, match="stream_interval: expected 1 or more, got 0"):
        AsyncLLM(path, stream_interval=0)
    asyncio.run(main())


def test_answers_to_one_prompt_are_those_of_the_library(path: Path) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=3, n=2, best_of=4)
    llm = LLM(path, kv_dtype="float32")
    expected = llm.generate("a mill", params)
    llm.close()

    async def main() -> None:
        async with opened(path) as llm:
            found = await llm.generate("a mill", params)
            assert [choice.text for choice in found.choices] == [choice.text for choice in expected.choices]
            first, second = llm.choices([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True, n=2))
            with held(llm):
                task = asyncio.create_task(_read(second))
                await until(lambda: llm.num_requests == 2)
                first.cancel()  # the second would begin when the first's prompt was computed
            await task
            assert second.finish_reason == "cancelled"

    asyncio.run(main())


def test_a_chat_ends_at_its_stop_string(path: Path) -> None:
    messages = [{"role": "user", "content": "go on"}]
    llm = LLM(path, kv_dtype="float32")
    whole = llm.chat(messages, PARAMS).text
    llm.close()
    stop = whole[3:5]

    async def main() -> None:
        async with opened(path) as llm:
            stream = llm.chat_stream(messages, SamplingParams(**{**vars(PARAMS), "stop": (stop,)}))
            text = "".join([update.text async for update in stream])
            assert text == whole[: whole.index(stop)]
            assert (stream.finish_reason, stream.matched_stop) == ("stop", stop)
            assert (await llm.chat(messages, PARAMS)).text == whole

    asyncio.run(main())


def test_a_reader_that_dawdles_holds_up_nobody_and_misses_nothing(path: Path, alone: list[str]) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            slow = llm.stream(PROMPTS[0], PARAMS)
            updates = aiter(slow)
            first = await anext(updates)
            assert (await llm.generate(PROMPTS[1], PARAMS)).text == alone[1]
            await until(lambda: not llm.num_requests)
            rest = [update async for update in updates]
            assert first.text + "".join(update.text for update in rest) == alone[0]
            assert len(rest) <= 1  # the newest state is enough

    asyncio.run(main())


@pytest.mark.parametrize("leave", ["break", "aclose", "cancel", "at once"])
def test_who_leaves_gives_back_what_was_taken(path: Path, leave: str) -> None:
    async def read(stream: Any, started: asyncio.Event) -> None:
        async for _ in stream:
            started.set()
            if leave == "break":
                break

    async def main() -> None:
        async with opened(path) as llm:
            stream, started = llm.stream("a mill", ENDLESS), asyncio.Event()
            task = asyncio.create_task(read(stream, started))
            if leave != "at once":
                await started.wait()
            if leave == "aclose":
                stream.cancel()
            if leave in ("cancel", "at once", "aclose"):
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del stream, task
            gc.collect()
            await until(lambda: not llm.num_requests and not llm.worker.engine.has_work)

    asyncio.run(main())


def test_what_cannot_be_done_is_refused_when_it_is_asked_for(path: Path) -> None:
    async def main() -> None:
        async with opened(path, kv_cache_bytes=2 * 64 * 512) as llm:
            with pytest.raises(PromptTooLongError):
                llm.stream("x" * 300)
            with pytest.raises(CapacityError):
                await llm.stream("x" * 200).start()
            with pytest.raises(CapacityError):
                await llm.generate("x" * 200)
            assert (await llm.generate("x", SamplingParams(max_tokens=1))).finish_reason == "length"

    asyncio.run(main())


def test_an_error_of_the_engine_reaches_every_reader_and_the_next_is_served(
    path: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            streams, engine = [llm.stream(prompt, ENDLESS) for prompt in PROMPTS], llm.worker.engine
            allocate = PagePool.allocate

            def broken(pool: PagePool, *asked: Any) -> Any:
                if engine.num_steps > 20:  # all have begun, and none has the pages for its whole answer
                    raise RuntimeError("no such page")
                return allocate(pool, *asked)

            with monkeypatch.context() as patch:
                patch.setattr(PagePool, "allocate", broken)
                with held(llm):
                    reading = [asyncio.create_task(_read(stream)) for stream in streams]
                    await until(lambda: llm.num_requests == len(streams))
                ended = await asyncio.gather(*reading, return_exceptions=True)
            assert all(stream.text for stream in streams)
            assert [str(each) for each in ended] == ["no such page"] * len(streams)
            assert (await llm.generate(PROMPTS[0], PARAMS)).text == alone[0]

    asyncio.run(main())


def test_a_text_is_embedded_while_others_are_answered(path: Path, alone: list[str]) -> None:
    ids = list(range(200))
    llm = LLM(path, kv_dtype="float32")
    expected = llm.engine.embed(ids)
    llm.close()

    async def main() -> None:
        async with opened(path) as llm:
            answers = [asyncio.create_task(llm.generate(prompt, PARAMS)) for prompt in PROMPTS]
            vectors = await asyncio.gather(*(llm.embed(ids) for _ in range(3)))
            assert all((vector == expected).all() for vector in vectors)
            assert [(await answer).text for answer in answers] == alone
            left = asyncio.create_task(llm.embed(ids))
            await asyncio.sleep(0)
            left.cancel()
            assert ((await llm.embed(ids)) == expected).all()
            with pytest.raises(PromptTooLongError):
                await llm.embed(list(range(256)) * 2)
            assert llm.worker.num_calls == 0

    asyncio.run(main())


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


def test_draining_lets_those_end_that_run_and_takes_no_more(path: Path, alone: list[str]) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            with held(llm):
                task = asyncio.create_task(llm.generate(PROMPTS[0], PARAMS))
                await until(lambda: llm.num_requests == 1)
                drained = asyncio.create_task(llm.drain(60))
                await asyncio.sleep(0)  # it has begun
                assert not drained.done()
            assert await drained
            assert (await task).text == alone[0]
            with pytest.raises(HeadraceError, match="being closed"):
                await llm.generate("more")

    asyncio.run(main())


def test_draining_stops_what_takes_too_long(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            with held(llm):
                task = asyncio.create_task(llm.generate("x", ENDLESS))
                await until(lambda: llm.num_requests == 1)
                assert not await llm.drain(0)
            assert (await task).finish_reason == "cancelled"

    asyncio.run(main())


def test_closing_tells_those_who_wait(path: Path) -> None:
    async def main() -> None:
        llm = AsyncLLM(path)
        with held(llm):
            task = asyncio.create_task(llm.generate("x", ENDLESS))
            await until(lambda: llm.num_requests == 1)
            closing = asyncio.create_task(asyncio.to_thread(llm.close))
            await until(lambda: llm.worker._stopping)
        await closing
        assert (await task).finish_reason == "cancelled"
        llm.close()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("headrace engine") == 0, before


def test_a_beginning_is_saved_and_loaded_while_others_are_answered(
    path: Path, alone: list[str], tmp_path: Path
) -> None:
    async def main() -> None:
        async with opened(path) as llm:
            answers = asyncio.gather(*(llm.generate(prompt, PARAMS) for prompt in PROMPTS))
            num_bytes = await llm.save_cache(tmp_path / "saved", "the water wheel turns")
            assert num_bytes == (tmp_path / "saved").stat().st_size
            assert await llm.load_cache(tmp_path / "saved") == len(llm.llm.tokenizer.encode("the water wheel turns"))
            assert [completion.text for completion in await answers] == alone
            with pytest.raises(HeadraceError, match="cannot be read"):
                await llm.load_cache(tmp_path / "missing")

    asyncio.run(main())
