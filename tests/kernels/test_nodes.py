"""NUMA nodes, simulated: every strip has one owner, shares are fair, and no topology changes a bit of a result."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import llm
from headrace.check.blocks import random_matrix
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.kernels.cpu.nodes import listed, make_pool, share_threads, usable_nodes
from headrace.ops.formats import dequantize
from headrace.ops.linear import pack

TOPOLOGIES = ([1], [2], [5], [1, 1], [2, 1], [1, 3], [2, 3], [1, 1, 1], [1, 2, 2], [3, 1, 1])
SOME = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def borders_of_nodes(nodes: native.Nodes, things: int) -> list[int]:
    return [nodes.begin(things, node) for node in range(nodes.count + 1)]


@given(threads=SOME, things=st.integers(0, 10_000))
def test_every_thing_has_one_owner_and_shares_are_fair(threads: list[int], things: int) -> None:
    nodes = native.Nodes(threads)
    borders = borders_of_nodes(nodes, things)
    assert (borders[0], borders[-1]) == (0, things)
    thread = 0
    for node, of_node in enumerate(threads):
        first, end = borders[node], borders[node + 1]
        assert abs((end - first) * sum(threads) - things * of_node) < sum(threads)  # less than one strip off
        for _ in range(of_node):
            assert nodes.of_thread(thread) == node
            begin, after = (of(borders[node], end, thread) for of in (nodes.thread_begin, nodes.thread_end))
            assert begin == first
            assert abs((after - begin) * of_node - (end - borders[node])) < of_node
            first, thread = after, thread + 1
        assert first == end


@given(threads=st.integers(1, 64), things=st.integers(0, 10_000))
def test_one_node_is_a_run_per_thread(threads: int, things: int) -> None:
    nodes = native.Nodes([threads])
    starts = [nodes.thread_begin(0, things, thread) for thread in range(threads)]
    assert starts == [-(-things * thread // threads) for thread in range(threads)]


@given(threads=st.integers(1, 64), cores=SOME)
def test_threads_are_shared_out_by_cores(threads: int, cores: list[int]) -> None:
    shared = share_threads(threads, cores)
    assert sum(shared) == threads
    assert all(abs(got * sum(cores) - threads * has) < sum(cores) for got, has in zip(shared, cores, strict=True))
    if threads <= sum(cores):
        assert all(got <= has for got, has in zip(shared, cores, strict=True))


@pytest.mark.parametrize("threads", [[], [0], [2, 0], [1024, 1], [-1]])
def test_nodes_have_threads(threads: list[int]) -> None:
    with pytest.raises(ArgumentError, match="threads: expected 1 to 1024"):
        native.Pool(threads)


def test_each_node_has_its_list_of_cores() -> None:
    with pytest.raises(ArgumentError, match="a list for each of 2 nodes"):
        native.Pool([1, 1], [[0]])


def products(pool: native.Pool, tokens: int, format_name: str) -> list[np.ndarray]:
    """Three matrices of one input, the last with fewer strips than there are threads, packed and multiplied."""
    random = np.random.default_rng(5)
    x = random.standard_normal((tokens, 256)).astype(np.float32)
    outs, parts = [], []
    for rows in (200, 72, 16):
        weight = pack(random_matrix(format_name, rows, 256, random), format_name, (rows, 256), pool)
        outs.append(np.full((tokens, rows), np.nan, np.float32))
        parts.append(native.LinearPart(weight, as_tensor(outs[-1], "out"), None, None))
    native.linear(pool, cpu.isa(), native.LinearInput(as_tensor(x, "x"), 1, None, 0.0), parts)
    return outs


@pytest.mark.parametrize("format_name", ["F32", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_no_topology_changes_a_product(tokens: int, format_name: str) -> None:
    expected = products(native.Pool(1), tokens, format_name)
    for threads in TOPOLOGIES:
        for found, right in zip(products(native.Pool(threads), tokens, format_name), expected, strict=True):
            np.testing.assert_array_equal(found, right, err_msg=str(threads))


@pytest.mark.parametrize("threads", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 33, 100, 1000])
def test_a_matrix_in_pieces_is_the_files(rows: int, threads: list[int], tmp_path: Path) -> None:
    raw = random_matrix("Q8_0", rows, 256, np.random.default_rng(rows))
    (tmp_path / "matrix").write_bytes(raw.tobytes())
    pool = native.Pool(threads)
    arena = native.Arena(native.packed_bytes("Q8_0", (rows, 256)))
    with (tmp_path / "matrix").open("rb") as file:
        read = native.pack_file(pool, arena, "Q8_0", (rows, 256), file.fileno(), 0)
    for weight in (read, pack(raw, "Q8_0", (rows, 256), pool)):
        values = np.empty((rows, 256), np.float32)
        weight.unpack(values)
        np.testing.assert_array_equal(values, dequantize(raw, "Q8_0"))
        if len(threads) > 1:
            with pytest.raises(ArgumentError, match="one piece"):
                weight.panels()


def test_no_topology_changes_a_models_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(matrix_format="Q8_0"))

    def logits(threads: list[int]) -> np.ndarray:
        monkeypatch.setattr(llm, "make_pool", lambda _: native.Pool(threads))
        loaded = llm.LLM(model, threads=sum(threads))
        assert loaded.pool.num_nodes == len(threads)
        return np.concatenate([loaded.logits(list(range(1, 40))), loaded.logits([3])])

    expected = logits([1])
    for threads in TOPOLOGIES:
        np.testing.assert_array_equal(logits(threads), expected, err_msg=str(threads))


def test_threads_kept_to_cores_compute_and_the_caller_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    pool = native.Pool([1, 1], [[one], sorted(before)])
    for found, right in zip(products(pool, 3, "Q4_0"), products(native.Pool(1), 3, "Q4_0"), strict=True):
        np.testing.assert_array_equal(found, right)
    assert os.sched_getaffinity(0) == before


def write_nodes(folder: Path, lists: dict[int, str]) -> Path:
    for node, cores in lists.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}" / "cpulist").write_text(cores + "\n")
    return folder


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({0: "0-1", 1: "2-3"}, [[0, 1], [3]]),
        ({0: "0-3"}, [[0, 1, 3]]),
        ({0: "2", 1: "0-1,3"}, [[0, 1, 3]]),
        ({10: "3", 2: "0-1"}, [[0, 1], [3]]),
        ({}, [[0, 1, 3]]),
        ({0: "0"}, [[0, 1, 3]]),  # the rest is nowhere: not to be believed
        ({0: "junk"}, [[0, 1, 3]]),
        ({0: "", 1: "0-9"}, [[0, 1, 3]]),
    ],
)
def test_only_usable_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: dict[int, str], expected: list[list[int]]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 3})
    assert usable_nodes(write_nodes(tmp_path / "node", lists)) == expected


def test_lists_of_cores() -> None:
    assert listed("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]


def test_a_pool_takes_the_nodes_it_has_threads_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.kernels.cpu.nodes.usable_nodes", lambda: [[0], [1]])
    assert [make_pool(threads).num_nodes for threads in (1, 2, 3)] == [1, 2, 2]
    assert make_pool(3).num_threads == 3
