"""NUMA nodes: which of their cores this process may use, how threads are shared out, and the pool over them.

On a machine of several nodes a pool keeps its threads to the cores of their nodes, and the rows of every matrix lie in
the memory of the node whose threads multiply them (nodes.h). `Pool([2, 2])` is the same without the machine: two nodes
of two threads, on any cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from headrace.kernels.cpu import _native as native
from headrace.machine import usable_cores

_NODES = Path("/sys/devices/system/node")


def usable_nodes(folder: Path = _NODES) -> list[list[int]]:
    """The cores of each node that this process may use, if any; one list of all where nodes are unknown."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    nodes = []
    with suppress(OSError, ValueError):
        for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
            nodes.append(sorted(usable.intersection(listed((node / "cpulist").read_text()))))
    nodes = [cores for cores in nodes if cores]
    return nodes if sorted(core for cores in nodes for core in cores) == sorted(usable) else [sorted(usable)]


def listed(text: str) -> list[int]:
    """The numbers that a list such as 0-3,8 names."""
    ranges = [part.split("-") for part in text.split(",") if part.strip()]
    return [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]


def share_threads(num_threads: int, num_cores: Sequence[int]) -> list[int]:
    """Threads of each node, in proportion to its cores; who is owed the largest part of one gets those left over."""
    total = sum(num_cores)
    threads = [num_threads * cores // total for cores in num_cores]
    owed = sorted(range(len(threads)), key=lambda node: -(num_threads * num_cores[node] % total))
    for node in owed[: num_threads - sum(threads)]:
        threads[node] += 1
    return threads


def make_pool(num_threads: int | None = None) -> native.Pool:
    """A pool over this machine's nodes, with all usable cores unless told. With one node nobody is kept anywhere."""
    nodes = usable_nodes()
    threads = share_threads(num_threads or usable_cores(), [len(cores) for cores in nodes])
    used = [node for node in range(len(nodes)) if threads[node]]
    if len(used) < 2:
        return native.Pool(sum(threads))
    return native.Pool([threads[node] for node in used], [nodes[node] for node in used])
