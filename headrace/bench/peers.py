"""Which engines `bench versus` knows, and the small interface behind which each of them stands.

Each engine runs in a process of its own (`peer_process`), which imports the module named here. Optional packages are
imported there only. What an engine's Python package adds around the engine is not timed, except for its start.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

FEWEST_STEPS = 3  # decoded in a sample, however long they take


@dataclass(frozen=True)
class Opening:
    """What an engine is opened with. `isa`: the instruction set it is held to, empty for the machine's best."""

    path: str
    threads: int
    context_len: int = 512
    sequences: int = 1  # contexts of that length
    kv_dtype: str = "float16"
    isa: str = ""


class Peer(Protocol):
    """An engine with a model in it, run in one way. Speeds are in tokens/s of all sequences together."""

    def arrange(self, context_len: int, sequences: int) -> None:
        """Make room for so many sequences of this length; nothing is cached afterwards."""

    def hold(self, ids: list[int]) -> None:
        """Cache exactly these tokens. Of what is cached, a common beginning is kept."""

    def prefill(self, ids: list[int]) -> float:
        """Speed of computing these in one go behind what is cached, which stays as it was."""

    def decode(self, ids: list[int], limit_s: float) -> float:
        """The same, one by one; ends early after so many seconds."""

    def fill(self, ids: list[int], sequences: int) -> None:
        """Cache these tokens in each of so many sequences."""

    def decode_batch(self, sequences: int, steps: int, limit_s: float) -> float:
        """Speed of giving each of the first sequences one token per step; ends early after so many seconds."""

    def divergence(self, exact: str, ids: list[int]) -> list[float]:
        """KL(exact || its own) at every position of a text; `exact` is a .npy file of logits."""


@dataclass(frozen=True)
class PeerKind:
    """An engine: the packages it needs, where its Peer is, and what it asks of memory.

    `module` has `open_peers(opening) -> {way: Peer}` and `start_code(opening) -> str`, a program that prints a first
    token as its users would get it; its arguments are the file and the number of threads. `memory` is the least that
    opening a file takes, from its bytes and its number of weights. `reads_file`: decoding reads the file's bytes.
    """

    packages: tuple[str, ...]
    module: str
    memory: Callable[[int, int], int]
    reads_file: bool = True
    distributions: tuple[str, ...] = ()


# llama.cpp maps the file and keeps a repacked copy of some formats. transformers holds all weights in float32 before
# it rounds them to 16 bits.
KINDS: Mapping[str, PeerKind] = {
    "headrace": PeerKind(
        ("headrace.llm",), "headrace.bench.peer_headrace", lambda file, weights: int(1.1 * file), True, ("headrace",)
    ),
    "llama.cpp": PeerKind(
        ("llama_cpp",), "headrace.bench.peer_llama_cpp", lambda file, weights: file, True, ("llama-cpp-python",)
    ),
    "transformers": PeerKind(
        ("transformers", "torch", "gguf", "accelerate"),
        "headrace.bench.peer_transformers",
        lambda file, weights: 6 * weights,
        False,
        ("transformers", "torch"),
    ),
    "plain read": PeerKind(("headrace.kernels.cpu.roof",), "headrace.bench.peer_read", lambda file, weights: 0),
}
PEERS = ("llama.cpp", "transformers")


def missing_packages(name: str) -> list[str]:
    """What an engine needs and this Python does not have."""
    return [package for package in KINDS[name].packages if importlib.util.find_spec(package) is None]


def peer_environment(name: str, isa: str, llama_lib: Path | None) -> dict[str, str]:
    """What an engine's process finds in its environment, beyond ours: how peers are told an instruction set."""
    if name == "llama.cpp" and llama_lib:
        return {"LLAMA_CPP_LIB_PATH": str(llama_lib)}
    if name == "transformers" and isa:
        return _TORCH_ISAS[isa]
    return {}


# PyTorch's own kernels and those of oneDNN are limited apart.
_TORCH_ISAS = {
    isa: {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    for isa, aten, onednn in (
        ("portable", "default", "SSE41"),
        ("avx2", "avx2", "AVX2"),
        ("avx512", "avx512", "AVX512_CORE_VNNI"),
        ("avx512_bf16", "avx512", "AVX512_CORE_BF16"),
        ("amx", "avx512", "AVX512_CORE_AMX"),
    )
}


def steps_per_s(step: Callable[[], object], most: int, limit_s: float) -> float:
    """Steps per second: of `most` steps, or of as many as begin within the limit."""
    started = perf_counter()
    for done in range(1, most + 1):
        step()
        seconds = perf_counter() - started
        if seconds >= limit_s and done >= FEWEST_STEPS:
            break
    return done / seconds
