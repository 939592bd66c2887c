"""`headrace bench versus`: the same file, tokens and threads beside other engines, with the roof beside both.

Every engine runs in a process of its own and is stopped while others are measured. Prompts are fresh random tokens each
time. A peer that is not installed, fails or has too little memory is said, not dropped. Decode at depth is the row that
tells: short contexts hide what attention costs. A peer's cache has the type nearest to ours, and its name says which.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.bench.peers import KINDS, PEERS, missing_packages
from headrace.bench.report import document
from headrace.bench.versus_file import Comparison, Versus
from headrace.bench.versus_rounds import REPEAT
from headrace.bench.versus_table import conditions_text, markdown_table, rows_data, text_table
from headrace.errors import ArgumentError
from headrace.kernels.cpu import ISAS, best_isa
from headrace.machine import this_machine
from headrace.talk import ProgressLine, say
from headrace.weights.quantize import quantize_file
from headrace.weights.sources import resolve

OUTPUTS = ("text", "json", "markdown")


def bench_versus(
    models: Sequence[str], plan: Versus, *, types: Sequence[str] = (), output: str = "text", progress: ProgressLine
) -> dict[str, Any]:
    """Prints a table per file, then the JSON document, which is also returned; or the document, or README tables."""
    _check(plan)
    plan = _with_those_here(plan)
    tables = []
    for path in _files(models, types, progress):
        comparison = Comparison.of(path, plan)
        comparison.run()
        tables.append({"conditions": comparison.conditions(), "rows": rows_data(comparison.results)})
        if output != "json":
            made = markdown_table if output == "markdown" else text_table
            print(f"{conditions_text(comparison.conditions())}\n\n{made(comparison.results)}\n", flush=True)
    data = {**_surroundings(plan), "tables": tables}
    if output == "markdown":
        print(conditions_text(_surroundings(plan)))
    else:
        print(document(data))
    return data


def _check(plan: Versus) -> None:
    for name in plan.peers:
        if name not in PEERS:
            raise ArgumentError(f"--peers: expected some of {', '.join(PEERS)}, got {name!r}")
    if plan.isa and plan.isa not in ISAS[: ISAS.index(best_isa()) + 1]:
        known = ", ".join(ISAS[: ISAS.index(best_isa()) + 1])
        raise ArgumentError(f"--isa: expected one of {known} on this machine, got {plan.isa!r}")
    if plan.llama_lib and not (plan.llama_lib / "libllama.so").is_file():
        raise ArgumentError(f"--llama-lib: expected a folder with libllama.so, got {str(plan.llama_lib)!r}")


def _with_those_here(plan: Versus) -> Versus:
    """The plan with the peers that are installed; what the others lack is said."""
    here = []
    for name in plan.peers:
        if missing := missing_packages(name):
            say(f"{name}: left out, not installed: {', '.join(missing)}")
        else:
            here.append(name)
    if plan.isa and "llama.cpp" in here and not plan.llama_lib:
        say(f"llama.cpp: as it is installed; --llama-lib names a folder where it is built for {plan.isa}")
    return Versus(plan.cases, tuple(here), plan.threads, plan.kv_dtype, plan.isa, plan.llama_lib)


def _files(models: Sequence[str], types: Sequence[str], progress: ProgressLine) -> Iterator[Path]:
    """The models' files; with types, each model in each of these formats, written for as long as it is measured."""
    for model in models:
        path = resolve(model, progress=progress)
        if not types:
            yield path
        for recipe in types:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / f"{path.stem}.{recipe}.gguf"
                quantize_file(path, target, recipe, progress=progress)
                yield target


def _surroundings(plan: Versus) -> dict[str, Any]:
    """The machine, the date, the versions: what is the same for all tables."""
    names = [name for peer in ("headrace", *plan.peers) for name in KINDS[peer].distributions]
    machine = this_machine()
    return {
        "CPU": machine.cpu_name,
        "instruction set": plan.isa or machine.isa,
        "threads": plan.threads,
        "repeat": REPEAT,
        "versions": " ".join(f"{name} {_version(name)}" for name in names),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"
