"""`headrace doctor`: what this machine is, what it can do (measured now), and what is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from headrace.bench.report import table
from headrace.machine import Machine, cache_dir
from headrace.talk import ProgressLine

# What is worth having, and how to get it: (module, what for, extra).
_OPTIONAL = (
    ("huggingface_hub", "models by hf:owner/repo/file", "pip install 'headrace[hub]'"),
    ("matplotlib", "bench roofline", "pip install 'headrace[plot]'"),
    ("llama_cpp", "bench versus llama.cpp", "pip install llama-cpp-python"),
    ("transformers", "bench versus transformers", "pip install transformers torch gguf"),
)


def examine(progress: ProgressLine) -> str:
    """The report, after measuring every roof anew."""
    from headrace.kernels.cpu import isa, roof

    machine = roof.measure(progress)
    sections = [
        table(["machine", ""], _facts(machine, isa())),
        table(["read, GB/s", *_thread_heads(machine)], list(_read_rows(machine))),
        table(["multiply, GFLOP/s", *_thread_heads(machine)], list(_product_rows(machine))),
        "\n".join(_advice(machine)) or "nothing is missing",
    ]
    return "\n\n".join(sections)


def _facts(machine: Machine, isa: str) -> list[list[str]]:
    from headrace.kernels.cpu.nodes import usable_nodes

    nodes = usable_nodes()
    caches = (
        f"L{cache.level} {cache.kind} {_size(cache.num_bytes)}" + (f" for {cache.shared_by}" * (cache.shared_by > 1))
        for cache in machine.caches
    )
    return [
        ["processor", machine.cpu_name],
        ["cores", str(machine.cores)],
        ["instruction sets", " ".join(machine.flags) or "unknown"],
        ["kernels", isa],
        ["NUMA nodes", f"{len(nodes)}, with {' + '.join(str(len(cores)) for cores in nodes)} cores"],
        ["caches", ", ".join(caches) or "unknown"],
        ["memory", f"{machine.memory_bytes / 2**30:.1f} GiB, 2 MiB pages: {machine.huge_pages}"],
    ]


def _thread_heads(machine: Machine) -> list[str]:
    return [f"{threads} thread{'s' * (threads > 1)}" for threads in machine.reads]


def _read_rows(machine: Machine) -> Iterator[list[str]]:
    sizes = sorted({size for points in machine.reads.values() for size in points})
    for size in sizes:
        where = "memory" if size == sizes[-1] else "cache" if size <= machine.last_cache_bytes else "edge"
        rates = [points.get(size) for points in machine.reads.values()]
        yield [f"{_size(size)} ({where})", *(f"{rate / 1e9:.1f}" if rate else "" for rate in rates)]


def _product_rows(machine: Machine) -> Iterator[list[str]]:
    for unit, by_threads in machine.products.items():
        yield [unit, *(f"{rate / 1e9:.0f}" for rate in by_threads.values())]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes / 2**10:.0f} KiB"


def _advice(machine: Machine) -> Iterator[str]:
    if machine.huge_pages == "never":
        yield "2 MiB pages are off: weights read slower. echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    if machine.isa == "portable" and os.uname().machine == "x86_64":
        yield "this processor has no AVX2: everything runs, slowly"
    if not _writable_cache():
        yield f"{cache_dir()} cannot be written: nothing measured or downloaded is kept. Set HEADRACE_CACHE"
    for module, purpose, remedy in _OPTIONAL:
        if importlib.util.find_spec(module) is None:
            yield f"{module} is not installed ({purpose}): {remedy}"


def _writable_cache() -> bool:
    existing = cache_dir()
    while not existing.exists():
        existing = existing.parent
    return os.access(existing, os.W_OK)
