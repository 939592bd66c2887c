"""Gluon kernels for Hopper run without a GPU: their own source, in NumPy, with every race and deadlock made an error.

Gluon has no interpreter. Here a kernel's functions are called as the Python they are, with the words of the language
meaning this: the partitions of a warp_specialize are threads of which one runs at a time, chosen at random by a seed; a
TMA copy arrives at a random later moment; a matrix product is computed at a random moment between its issue and the
wait that covers it; barriers count arrivals and bytes in phases. So the protocol that is proved is the one that is
compiled, and its arithmetic is that of the kernel: 16-bit operands, float32 sums.

Whether an access is safe does not hang on the luck of the order: vector clocks (gluon_memory.py) tell for each read and
write whether the barriers order it behind what it must follow. Not modelled: layouts, banks, registers, instructions.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from headrace.check.gluon_memory import Barriers, Clocks, Memory, Shared
from headrace.check.gluon_values import Descriptor, Tensor, raw, wrapped


class Deadlock(AssertionError):
    """No partition can go on and no copy is under way."""


class Product:
    """A product under way: `value` once it is computed."""

    def __init__(self, before: Any, left: Any, right: Shared, accumulate: bool) -> None:
        self.before, self.left, self.right, self.accumulate = before, left, right, accumulate
        self.value: np.ndarray | None = None

    def compute(self) -> None:
        """Now at the latest: what shared memory holds at this moment is what is multiplied."""
        if self.value is not None:
            return
        before: Any = self.before.value if isinstance(self.before, Product) else raw(self.before)
        left = self.left.numbers() if isinstance(self.left, Shared) else raw(self.left)
        product = left.astype(np.float32) @ self.right.numbers().astype(np.float32)
        self.value = product + before if self.accumulate else product


class Partition:
    """A thread of the simulation: what it runs, which products it has under way."""

    def __init__(self, number: int, run: Callable[[], None]) -> None:
        self.number, self.run = number, run
        self.products: list[tuple[Product, int]] = []  # with their place in the order of groups
        self.groups = 0
        self.go = threading.Semaphore(0)
        self.blocked: Callable[[], bool] | None = None
        self.waits_for = ""
        self.over = False
        self.error: BaseException | None = None


class Simulation:
    """One program of a kernel."""

    def __init__(self, seed: int, place: Sequence[int], grid: Sequence[int], eagerness: float = 0.5) -> None:
        self.random = random.Random(seed)
        self.place, self.grid, self.eagerness = place, grid, eagerness
        self.clocks = Clocks()
        self.memory = Memory(self.clocks)
        self.barriers = Barriers(self.clocks)
        self.copies: list[Callable[[], None]] = []
        self.control = threading.Semaphore(0)
        self.current = Partition(0, lambda: None)
        self.memory.current = lambda: self.current.number
        self.alone = True
        self.steps = 0

    # Partitions

    def specialize(self, work: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        """Runs the partitions to their end. The first takes over what was done before."""
        partitions = [Partition(n, functools.partial(f, *a)) for n, (f, a) in enumerate(work)]
        self.clocks.fork(len(partitions))
        self.alone = False
        threads = [threading.Thread(target=self._main, args=(each,), daemon=True) for each in partitions]
        for thread in threads:
            thread.start()
        while not all(each.over for each in partitions):
            self._advance(partitions)
        for thread in threads:
            thread.join()

    def _main(self, partition: Partition) -> None:
        partition.go.acquire()
        try:
            partition.run()
            if any(product.value is None for product, _ in partition.products):
                raise AssertionError(f"partition {partition.number} ends with products under way")
        except BaseException as error:  # handed to the thread that drives the simulation
            partition.error = error
        partition.over = True
        self.control.release()

    def _advance(self, partitions: Sequence[Partition]) -> None:
        able = [each for each in partitions if not each.over and (each.blocked is None or each.blocked())]
        if self.copies and (not able or self.random.random() < self.eagerness / 4):
            self.copies.pop(self.random.randrange(len(self.copies)))()
            return
        if not able:
            told = "; ".join(
                f"partition {each.number} waits for {each.waits_for}" for each in partitions if not each.over
            )
            raise Deadlock(told)
        self.current = self.random.choice(able)
        self.current.blocked = None
        self.current.go.release()
        self.control.acquire()
        if self.current.error:
            raise self.current.error

    def _yield(self, until: Callable[[], bool] | None = None, waits_for: str = "") -> None:
        """Lets others run; until: and does not go on before."""
        if self.alone:
            return
        self.steps += 1
        mine = self.current
        mine.blocked, mine.waits_for = until, waits_for
        self.control.release()
        mine.go.acquire()

    def perhaps_yield(self) -> None:
        """At a point where others may be faster."""
        if self.random.random() < 0.2:
            self._yield()

    # Barriers

    def wait(self, bar: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if not raw(pred):
            return
        number, parity = self.barriers.number(bar), int(raw(phase))
        if not self.barriers.passed(number, parity):
            self._yield(lambda: self.barriers.passed(number, parity), f"barrier {number}, parity {parity}")
        self.barriers.acquire(number, self.current.number)

    def arrive(self, bar: Shared, count: int = 1, pred: Any = True) -> None:
        self.perhaps_yield()
        self.memory.synchronized(self.current.number)
        if raw(pred):
            self.barriers.arrive(self.barriers.number(bar), self.current.number, count)

    def expect(self, bar: Shared, num_bytes: int, pred: Any = True) -> None:
        if raw(pred):
            number = self.barriers.number(bar)
            self.barriers.expect(number, int(raw(num_bytes)))
            self.barriers.arrive(number, self.current.number, 1)

    # What is asynchronous

    def copy(self, source: Descriptor, place: Sequence[Any], bar: Shared, to: Shared, pred: Any = True) -> None:
        """A TMA copy: lands at some later moment, and tells the barrier its bytes."""
        self.perhaps_yield()
        if not raw(pred):
            return
        assert list(to.shape) == list(source.block_shape), f"box {source.block_shape} into memory {to.shape}"
        number = self.barriers.number(bar)
        self.memory.copied(to, self.current.number, number, self.barriers.phase(number))
        values = source.box([int(raw(at)) for at in place])

        def land() -> None:
            to.put(values)
            self.barriers.landed(number, values.nbytes)

        to.put(np.full(values.shape, np.nan))
        self.copies.append(land)

    def multiply(self, a: Any, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False, **_: Any) -> Any:
        """A matrix product: one group, the fewest there can be; with more, a wait that leaves some is for more."""
        self.perhaps_yield()
        mine = self.current
        mine.groups += 1
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.memory.read(operand, mine.number, product=mine.groups)
        product = Product(acc, a, b, bool(raw(use_acc)))
        mine.products.append((product, mine.groups))
        if self.random.random() < self.eagerness:
            self._compute(mine.groups)
        return product if is_async else self.wait_products(0, [product])

    def _compute(self, upto: int) -> None:
        for product, place in self.current.products:
            if place <= upto:
                product.compute()

    def wait_products(self, num_outstanding: Any = 0, deps: Sequence[Any] = ()) -> Any:
        """What is under way but for the last groups is complete; the dependencies as numbers where they are."""
        self.perhaps_yield()
        mine, done = self.current, self.current.groups - int(raw(num_outstanding))
        self._compute(done)
        mine.products = [(product, place) for product, place in mine.products if place > done]
        self.clocks.products_done(mine.number, done)
        running = {id(product) for product, _ in mine.products}
        found = [Tensor(each.value) if isinstance(each, Product) and id(each) not in running else each for each in deps]
        return found[0] if len(found) == 1 else tuple(found)

    def fence(self, cluster: bool = False) -> None:
        self.memory.fence(self.current.number)

    def block_barrier(self) -> None:
        self.memory.synchronized(self.current.number)


def simulate(
    kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], *, seed: int = 0, eagerness: float = 0.5
) -> int:
    """Runs all programs of a kernel, one after the other; the number of steps in which partitions took turns.

    arguments: by the kernel's names: arrays (one-dimensional, written in place), Descriptors, numbers, constants.
    """
    given = {name: wrapped(value) for name, value in arguments.items()}
    steps = 0
    for number in range(int(np.prod(grid))):
        place = np.unravel_index(number, grid, order="F")
        simulation = Simulation(seed + number, [int(n) for n in place], grid, eagerness)
        _as_python(kernel, _language(simulation))(**given)
        steps += simulation.steps
    return steps


def _as_python(kernel: Any, language: Mapping[str, Any]) -> Callable[..., Any]:
    """A kernel's function, and those it calls, with the simulation's words in place of the language's."""
    modules: dict[int, dict[str, Any]] = {}

    def rebuilt(function: Any) -> FunctionType:
        code = function.fn
        names = modules.get(id(code.__globals__))
        if names is None:
            names = modules[id(code.__globals__)] = dict(code.__globals__)
            names.update({name: meaning(name, value) for name, value in code.__globals__.items()})
        return FunctionType(code.__code__, names, code.__name__, code.__defaults__)

    def meaning(name: str, value: Any) -> Any:
        if name in language:
            return language[name]
        if type(value).__name__ == "constexpr":
            return value.value
        return rebuilt(value) if type(value).__name__ == "GluonJITFunction" else value

    return rebuilt(kernel)


def _language(simulation: Simulation) -> dict[str, Any]:
    from headrace.check import gluon_values as values

    gl = SimpleNamespace(
        program_id=lambda axis: Tensor(np.int64(simulation.place[axis])),
        num_programs=lambda axis: Tensor(np.int64(simulation.grid[axis])),
        allocate_shared_memory=simulation.memory.allocate,
        thread_barrier=simulation.block_barrier,
        warp_specialize=lambda work, warps, registers: simulation.specialize(work),
        **values.FUNCTIONS,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda bar, count: simulation.barriers.init(bar, int(raw(count))),
        wait=simulation.wait,
        arrive=lambda bar, *, count=1, pred=True: simulation.arrive(bar, count, pred),
        expect=simulation.expect,
    )
    return {
        "gl": gl,
        "mbarrier": mbarrier,
        "tma": SimpleNamespace(async_copy_global_to_shared=simulation.copy),
        "fence_async_shared": simulation.fence,
        "warpgroup_mma": simulation.multiply,
        "warpgroup_mma_init": lambda value: value,
        "warpgroup_mma_wait": simulation.wait_products,
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
    }


class Simulated:
    """A kernel that is launched as Triton's are, with tensors of the CPU, and simulated: to be put in its place."""

    def __init__(self, kernel: Any, seed: int = 0, eagerness: float = 0.5) -> None:
        self.kernel, self.seed, self.eagerness = kernel, seed, eagerness
        self.steps = 0

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            given = dict(zip(names, arguments, strict=False)) | {n: v for n, v in named.items() if n in names}
            found = {name: _as_numpy(value) for name, value in given.items()}
            self.steps += simulate(self.kernel, grid, found, seed=self.seed, eagerness=self.eagerness)

        return launch


def _as_numpy(value: Any) -> Any:
    """An argument of a launch as `simulate` takes it, in the same memory."""
    if type(value).__name__ == "TensorDescriptor":
        memory = _line(value.base)
        strides = [stride * memory.itemsize for stride in value.strides]
        return Descriptor(np.lib.stride_tricks.as_strided(memory, value.shape, strides), value.block_shape)
    return _line(value) if hasattr(value, "data_ptr") else value


def _line(tensor: Any) -> np.ndarray:
    """A tensor's memory from its first element to its last."""
    import torch

    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    line = torch.as_strided(tensor, (length if tensor.numel() else 0,), (1,))
    if tensor.dtype == torch.bfloat16:
        return line.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found: np.ndarray = line.numpy()
    return found
