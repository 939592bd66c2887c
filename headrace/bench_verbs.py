"""The verbs of `headrace bench`: one function each, which says what it takes and hands it to headrace.bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.bench.serving_load import ServingOptions
from headrace.config import EngineConfig
from headrace.options import Json, KVDtype, LoadOptions, Model, Threads, numbers, words
from headrace.talk import ProgressLine
from headrace.verbs import verb

bench = typer.Typer(
    help="Measure speed against the machine's limits, and beside other engines.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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


@verb(bench, "gpu")
def bench_gpu(
    *,
    rows: Annotated[str, typer.Option(help="Which rows: a list of names, or of their beginnings, with commas.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="One row of each kind.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the rows and their targets; needs no GPU.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where results go; docs/results when not given.")] = None,
    peers: Annotated[str, typer.Option(help="flash_attn, flashinfer, flash_mla, vllm: those installed.")] = "",
    repeat: Annotated[int, typer.Option(help="Measurements of each candidate.")] = 7,
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 460.0,
    cold: Annotated[bool, typer.Option("--cold", help="Compile each kernel when its turn comes.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Keep how fast kernels were: later choices.")] = False,
) -> None:
    """The GPU kernels, row by row: checked, timed beside others and the device's roofs, judged by their targets."""
    from headrace.bench.gpu import GpuBench, bench_gpu, list_rows

    wanted = (words(rows), quick, json, words(peers))
    plan = GpuBench(*wanted, repeat=repeat, seconds=budget, warm=not cold, calibrate=calibrate)
    if listed:
        print(list_rows(plan))
        return
    with ProgressLine() as progress:
        bench_gpu(plan, progress=progress)
