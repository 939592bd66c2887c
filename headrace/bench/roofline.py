"""The most a machine allows for a model: what must be read and multiplied, over the measured roofs.

Decode reads every weight and the keys and values so far, once per token; of many sequences at once it reads the weights
once for all. Prefill multiplies every weight with every token; it reads the weights once. The slower of the two sides
binds. Of a prompt the head counts once: only the last token needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.config import ModelConfig
from headrace.machine import Machine
from headrace.ops import linear
from headrace.weights.gguf import GGUFFile


@dataclass(frozen=True)
class ModelWork:
    """What a model costs, per token and per key. `flops` by number type: fp32, bf16 or int8."""

    weight_bytes: int  # read per step
    kv_bytes_per_token: int
    layer_flops: Mapping[str, int]  # per token
    head_flops: Mapping[str, int]  # per token whose logits are wanted
    attention_flops: int  # fp32, per query token and key


@dataclass(frozen=True)
class Ceiling:
    """The least time for some tokens, or for one call, and what it is made of."""

    tokens: int
    num_bytes: float
    flops: float
    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def rate_text(self, tokens_per_s: float) -> str:
        """What a speed means in the unit of the roof that binds."""
        per_token = tokens_per_s / self.tokens
        if self.bound == "memory":
            return f"{self.num_bytes * per_token / 1e9:.1f} GB/s"
        return f"{self.flops * per_token / 1e12:.3f} TFLOP/s"


def model_work(file: GGUFFile, config: ModelConfig, weight_bytes: int, kv_bytes_per_token: int) -> ModelWork:
    """The work of a model, from the matrices in its file."""
    layers: Counter[str] = Counter()
    head: Counter[str] = Counter()
    head_name = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    for name, info in file.tensors.items():
        if len(info.shape) == 2 and (name == head_name or name.startswith("blk.")):
            rows, cols = info.shape
            unit = linear.request(512, [(info.format, rows, cols)]).traffic.unit  # what its products are done in
            (head if name == head_name else layers)[unit] += 2 * rows * cols
    value_dim = config.value_head_dim or config.head_dim
    attention = 2 * config.num_layers * config.num_heads * (config.head_dim + value_dim)
    return ModelWork(weight_bytes, kv_bytes_per_token, dict(layers), dict(head), attention)


def decode_ceiling(work: ModelWork, machine: Machine, depth: int, threads: int, *, batch: int = 1) -> Ceiling:
    """One token after `depth` others, in each of `batch` sequences at once."""
    keys = batch * (depth + 1)
    return _ceiling(work, machine, threads, _Step(batch, batch, keys, keys))


def prefill_ceiling(work: ModelWork, machine: Machine, depth: int, tokens: int, threads: int) -> Ceiling:
    """`tokens` of a prompt at once, after `depth` others."""
    pairs = depth * tokens + tokens * (tokens + 1) // 2
    return _ceiling(work, machine, threads, _Step(tokens, 1, depth + tokens, pairs))


@dataclass(frozen=True)
class _Step:
    """Counts of a step: new tokens, rows of logits, keys it reads, and pairs of a query token and a key it sees."""

    tokens: int
    outputs: int
    keys: int
    pairs: int


def _ceiling(work: ModelWork, machine: Machine, threads: int, step: _Step) -> Ceiling:
    num_bytes = work.weight_bytes + work.kv_bytes_per_token * step.keys
    flops = Counter({unit: step.tokens * amount for unit, amount in work.layer_flops.items()})
    flops.update({unit: step.outputs * amount for unit, amount in work.head_flops.items()})
    flops["fp32"] += work.attention_flops * step.pairs
    compute_s = sum(amount / _product_roof(machine, unit, threads) for unit, amount in flops.items())
    memory_s = num_bytes / _read_roof(machine, work.weight_bytes, threads)
    return Ceiling(step.tokens, num_bytes, sum(flops.values()), memory_s, compute_s)


def _read_roof(machine: Machine, num_bytes: int, threads: int) -> float:
    roof = machine.roof_for(num_bytes, threads)
    assert roof is not None, "the machine is measured before ceilings are asked for"
    return roof


def _product_roof(machine: Machine, unit: str, threads: int) -> float:
    roof = machine.product_roof(unit, threads)
    assert roof is not None, "the machine is measured before ceilings are asked for"
    return roof


def measured_machine(num_bytes: int, threads: int) -> Machine:
    """This machine with all its roofs, measured if they never were; that of a working set of this size always is."""
    from headrace.kernels.cpu import roof
    from headrace.machine import this_machine

    if not this_machine().measured:
        roof.measure()
    roof.measure_read(num_bytes, threads)
    return this_machine()
