"""The runtime: every chunk once, failures reach Python, idle threads sleep, programs plan and replay."""

import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ArgumentError, CapacityError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu import linear
from headrace.kernels.cpu.arrays import as_tensor

THREADS = pytest.mark.parametrize("threads", [1, 2, 3, 4])
DIM = 8
# In place this is not idempotent: a row computed twice is not the row computed once.
EPS = 3.0


def norm(runner, out, x):
    weight = np.full(x.shape[1], 2.0, np.float32)
    native.rms_norm(runner, "portable", as_tensor(out, "out"), as_tensor(x, "x"), as_tensor(weight, "weight"), EPS)


def norm_of(x):
    x = x.astype(np.float64)
    return (2 * x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)).astype(np.float32)


def numbers(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def table_of(values):
    return linear.pack(np.ascontiguousarray(values).view(np.uint8).ravel(), "F32", *values.shape)


def embed(runner, out, ids, table):
    native.embedding(runner, as_tensor(out, "out"), as_tensor(ids, "ids"), table)


@THREADS
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 17, 24, 25, 33, 1000])
def test_every_chunk_runs_exactly_once(threads, rows):
    pool = native.Pool(threads)
    for _ in range(20):
        x = numbers(rows, DIM)
        expected = norm_of(x)
        norm(pool, x, x)
        np.testing.assert_allclose(x, expected, rtol=1e-5)


@THREADS
@pytest.mark.parametrize("place", [0, 1, 2, 3, 50, 98, 99])
def test_a_failure_in_any_chunk_reaches_python_and_the_pool_goes_on(threads, place):
    pool, table = native.Pool(threads), table_of(numbers(10, DIM))
    for bad in (10, -1, 2**31 - 1, -(2**31)):
        ids = np.arange(100, dtype=np.int32) % 10
        ids[place] = bad
        out = np.empty((100, DIM), np.float32)
        with pytest.raises(ArgumentError, match=f"ids: expected 0 to 9, got {bad}"):
            embed(pool, out, ids, table)
        ids[place] = 3
        embed(pool, out, ids, table)
        assert np.array_equal(out, numbers(10, DIM)[ids])


@THREADS
def test_failures_in_every_chunk_are_one_failure(threads):
    pool = native.Pool(threads)
    for _ in range(50):
        with pytest.raises(ArgumentError):
            embed(pool, np.empty((64, DIM), np.float32), np.full(64, 99, np.int32), table_of(numbers(10, DIM)))


@pytest.mark.parametrize("pause_s", [0.0, 0.0005, 0.002, 0.01])
def test_sleeping_threads_wake(pause_s):
    pool = native.Pool(4)
    for _ in range(30):
        x = numbers(100, DIM)
        expected = norm_of(x)
        norm(pool, x, x)
        np.testing.assert_allclose(x, expected, rtol=1e-5)
        time.sleep(pause_s)


def test_idle_threads_take_no_time():
    pool = native.Pool(4)
    norm(pool, numbers(100, DIM), numbers(100, DIM))
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    # Three threads that spin would take 0.5 s or more, whatever the number of cores.
    assert time.process_time() - before < 0.25


def test_pools_come_and_go():
    for threads in itertools.islice(itertools.cycle([1, 2, 5]), 60):
        native.Pool(threads)


def test_one_pool_serves_several_callers():
    pool, wrong = native.Pool(3), []

    def call():
        for _ in range(50):
            x = numbers(65, DIM)
            expected = norm_of(x)
            norm(pool, x, x)
            if not np.allclose(x, expected, rtol=1e-5):
                wrong.append(x)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert not wrong


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_pool_has_threads(threads):
    with pytest.raises(ArgumentError, match=f"threads: expected 1 to 1024, got {threads}"):
        native.Pool(threads)


FORK = """
import os, sys
import numpy as np
from headrace.errors import HeadraceError
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
def norm(pool):
    x = np.ones((100, 8), np.float32)
    t = [as_tensor(a, "a") for a in (x, x, np.ones(8, np.float32))]
    native.rms_norm(pool, "portable", *t, 1e-6)
pool = native.Pool(2)
norm(pool)
child = os.fork()
if child == 0:
    try:
        norm(pool)
    except HeadraceError as error:
        print(error, flush=True)
    norm(native.Pool(2))
    del pool
    print("child done", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
norm(pool)
print("parent done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_to_make_its_own_pool():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told, *rest = done.stdout.splitlines()
    assert told.startswith("threads: this process was forked after the pool was made")
    assert rest[-2:] == ["child done", "parent done"]


def test_memory_that_does_not_exist_is_a_capacity_error():
    with pytest.raises(CapacityError, match="memory"):
        native.Pool(1).buffer("uint8", "fixed", [2**50])


# Programs


class Recorded:
    """A program of norms from buffer to buffer, and what Python knows of it: who is alive when."""

    def __init__(self, steps, widths, *, kept=(), tokens=16, threads=2):
        self.program = native.Program(native.Pool(threads), native.Sizes(tokens, 1, 1))
        self.input = np.zeros((tokens, DIM), np.float32)
        source = as_tensor(self.input, "x").follow("tokens")
        self.buffers = [self.program.buffer("float32", "tokens", [0, width * DIM]) for width in widths]
        self.lives = {}
        self._norm(self.buffers[0], source, 0)
        for step, (target, origin) in enumerate(steps, 1):
            self._norm(self.buffers[target], self.buffers[origin], step)
        for index in kept:
            self.program.keep(self.buffers[index])
            self.lives[index] = (0, len(steps) + 1)
        self.program.finish()

    def _norm(self, target, origin, step):
        width = origin.shape[1]
        weight = np.ones(width, np.float32)
        native.rms_norm(self.program, "portable", target, origin, as_tensor(weight, "weight"), EPS)
        for index, buffer in enumerate(self.buffers):
            if buffer is target or buffer is origin:
                first, _ = self.lives.get(index, (step, step))
                self.lives[index] = (first, step)

    def range_of(self, index):
        memory = self.buffers[index].numpy()
        start = memory.ctypes.data
        return start, start + memory.nbytes


CHAINS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(CHAINS, st.sets(st.integers(0, 7), max_size=3))
def test_buffers_alive_together_lie_apart(steps, kept):
    recorded = Recorded(steps, [1] * 8, kept=kept)
    for a, b in itertools.combinations(recorded.lives, 2):
        (a_first, a_last), (b_first, b_last) = recorded.lives[a], recorded.lives[b]
        (a_start, a_end), (b_start, b_end) = recorded.range_of(a), recorded.range_of(b)
        if a_first <= b_last and b_first <= a_last:
            assert a_end <= b_start or b_end <= a_start, f"buffers {a} and {b} share memory while alive"
        assert a_start % 64 == 0 and b_start % 64 == 0


def test_a_chain_needs_the_memory_of_two_buffers():
    recorded = Recorded([(i + 1, i) for i in range(7)], [1] * 8)
    one = 16 * DIM * 4
    assert recorded.program.arena_bytes == 2 * one
    assert recorded.program.op_names == ["rms_norm"] * 8


@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_computes_any_number_of_tokens_up_to_its_capacity(threads):
    recorded = Recorded([(i + 1, i) for i in range(7)], [1] * 8, kept=[7], threads=threads)
    for tokens in (16, 1, 0, 7, 9, 16, 3):
        recorded.input[:] = numbers(16, DIM) + tokens
        result = recorded.buffers[7].numpy()
        result[:] = np.nan
        recorded.program.run(native.Sizes(tokens, 1, 1))
        expected = recorded.input
        for _ in range(8):
            expected = norm_of(expected) / 2
        np.testing.assert_allclose(result[:tokens], expected[:tokens], rtol=1e-4)
        assert np.isnan(result[tokens:]).all()


def test_steps_are_timed_one_by_one():
    recorded = Recorded([(1, 0), (2, 1)], [1] * 8)
    seconds = recorded.program.run_timed(native.Sizes(16, 1, 1))
    assert len(seconds) == 3 and all(s > 0 for s in seconds)


@pytest.mark.parametrize("sizes,text", [((17, 1, 1), "tokens: expected 0 to 16, got 17"), ((-1, 1, 1), "tokens"),
                                        ((1, 2, 1), "requests: expected 0 to 1"), ((1, 1, 9), "outputs")])  # fmt: skip
def test_sizes_beyond_the_capacity_are_refused(sizes, text):
    with pytest.raises(ArgumentError, match=text):
        Recorded([(1, 0)], [1] * 2).program.run(native.Sizes(*sizes))


def test_a_program_is_finished_once_and_then_runs():
    program = native.Program(native.Pool(1), native.Sizes(4, 1, 1))
    with pytest.raises(ArgumentError, match="call finish"):
        program.run(native.Sizes(1, 1, 1))
    buffer = program.buffer("float32", "tokens", [0, DIM])
    with pytest.raises(ArgumentError, match="no memory before its program is finished"):
        buffer.numpy()
    program.finish()
    with pytest.raises(ArgumentError, match="nothing more can be recorded"):
        norm(program, np.zeros((4, DIM), np.float32), np.zeros((4, DIM), np.float32))


@THREADS
def test_after_a_failure_nothing_more_runs_and_the_program_can_run_again(threads):
    table, ids = table_of(numbers(10, DIM)), np.zeros(16, np.int32)
    rows, after = np.empty((16, DIM), np.float32), np.full((16, DIM), np.nan, np.float32)
    program = native.Program(native.Pool(threads), native.Sizes(16, 1, 1))
    embed(program, rows, ids, table)
    norm(program, after, rows)
    program.finish()
    ids[5] = 10
    with pytest.raises(ArgumentError, match="got 10"):
        program.run(native.Sizes(16, 1, 1))
    assert np.isnan(after).all()
    ids[5] = 9
    program.run(native.Sizes(16, 1, 1))
    np.testing.assert_allclose(after, norm_of(numbers(10, DIM)[ids]), rtol=1e-5)


def test_a_program_keeps_the_arrays_it_reads_alive():
    def record():
        program = native.Program(native.Pool(2), native.Sizes(64, 1, 1))
        x, out = numbers(64, DIM), np.zeros((64, DIM), np.float32)
        norm(program, out, x)
        program.finish()
        return program, out

    program, out = record()
    clutter = [np.full((64, DIM), 1e9, np.float32) for _ in range(100)]
    program.run(native.Sizes(64, 1, 1))
    np.testing.assert_allclose(out, norm_of(numbers(64, DIM)), rtol=1e-5)
    del clutter


# Instruction sets


def test_limits_nest_and_end():
    best = cpu.isa()
    with cpu.limit_isa("portable"):
        assert cpu.isa() == "portable"
        with cpu.limit_isa("amx"):
            assert cpu.isa() == best
        assert cpu.isa() == "portable"
    assert cpu.isa() == best == cpu.best_isa()


def test_a_limit_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), cpu.limit_isa("portable"):
        raise ZeroDivisionError
    assert cpu.isa() == cpu.best_isa()


def test_an_unknown_level_is_refused():
    levels = "portable, avx2, avx512, avx512_bf16, amx"
    with pytest.raises(ArgumentError, match=f"level: expected one of {levels}, got 'sse'"):
        cpu.limit_isa("sse")
    assert cpu.isa() == cpu.best_isa()
