"""The rows of `headrace bench gpu`: what is measured, what it shall reach, and what time is spent on first.

A row is data: which builder makes its tensors (`gpu_work.build`), the sizes it is given, and targets. Sizes of
decode: an 8-billion-parameter Llama's heads; of latent attention: DeepSeek's; of linear: a 7-billion-parameter
Llama's matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.gpu_targets import Target

K = 1024


@dataclass(frozen=True)
class GpuRow:
    """One line of the table. work: the builder's name. limit_s: after which it is given up."""

    name: str
    work: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    quick: bool = False
    limit_s: float = 40.0

    def __str__(self) -> str:
        return ", ".join([self.work, *(f"{name} {_text(value)}" for name, value in self.sizes.items())])


def _text(value: Any) -> str:
    if isinstance(value, tuple) and value and all(isinstance(one, int) for one in value):
        runs = [f"{value.count(n)} x {n}" if value.count(n) > 1 else str(n) for n in dict.fromkeys(value)]
        return " + ".join(runs)
    return str(value)


# Decode

_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
_DECODE_TARGETS = (
    Target("copy", 0.9),
    Target("times", 2.0, than="torch SDPA"),
    Target("times", 1.0, than="flashinfer"),
    Target("times", 1.0, than="flash_attn"),
)
_DECODE = ((1, 4 * K), (1, 32 * K), (1, 128 * K), (8, 4 * K), (8, 32 * K), (64, 4 * K), (64, 32 * K), (64, 128 * K))
_QUICK_DECODE = ((64, 1, 4 * K), (64, 8, 32 * K), (16, 64, 4 * K))


def _decode() -> Iterator[GpuRow]:
    for page_size in (64, 16):
        for batch, keys in _DECODE:
            name = f"decode_p{page_size}_b{batch}_{keys // K}k"
            sizes = {"key_lens": (keys,) * batch, "page_size": page_size, **_LLAMA}
            yield GpuRow(name, "paged", sizes, _DECODE_TARGETS, (page_size, batch, keys) in _QUICK_DECODE)


def _dense_decode() -> Iterator[GpuRow]:
    for batch in (1, 8):
        sizes = _dense(batch, 32, 8, 32 * K, "bfloat16", queries=1)
        yield GpuRow(f"dense_decode_b{batch}_32k", "dense", sizes)


def _ragged() -> Iterator[GpuRow]:
    lens = (128 * K, *(K,) * 31)
    for page_size in (64, 16):
        sizes = {"key_lens": lens, "page_size": page_size, **_LLAMA}
        yield GpuRow(f"ragged_p{page_size}", "paged", sizes, (Target("copy", 1 / 1.1),), page_size == 64)


# Latent attention

_LATENT = {"head_dim": 576, "value_dim": 512, "page_size": 64, "dtype": "bfloat16"}
_MEMORY_BOUND = (Target("copy", 0.9), Target("times", 1.0, than="flash_mla"))
_COMPUTE_BOUND = (
    Target("tflops", 400.0, by="triton_mla"),
    Target("tflops", 600.0, by="gluon_mla"),
    Target("times", 1.0, than="flash_mla"),
)


def _latent() -> Iterator[GpuRow]:
    for heads, targets in ((16, _MEMORY_BOUND), (128, _COMPUTE_BOUND)):
        for batch, keys in ((128, 4 * K), (128, 8 * K), (16, 32 * K), (1, 128 * K)):
            if (heads, batch) == (128, 1):
                continue  # one request has too few tiles of heads for its arithmetic to be the question
            sizes = {"key_lens": (keys,) * batch, "heads": heads, **_LATENT}
            name = f"mla{heads}_b{batch}_{keys // K}k"
            yield GpuRow(name, "latent", sizes, targets, (batch, keys) == (128, 4 * K))


# Prefill

_PREFILL = (
    Target("tflops", 450.0, by="triton_attention"),
    Target("tflops", 650.0, by="gluon_attention"),
    Target("times", 1.0, than="flash_attn"),
)
_BACKWARD = (Target("tflops", 400.0),)
_EXACT = (Target("times", 2.0, than="torch SDPA"), Target("error", 1.0, than="torch SDPA"))


def _dense(batch: int, heads: int, kv_heads: int, tokens: int, dtype: str, **rest: Any) -> dict[str, Any]:
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "dtype": dtype}
    return sizes | rest


def _prefill() -> Iterator[GpuRow]:
    ways = (("", 2, 16, 16), ("_gqa", 1, 32, 8))
    for mark, batch, heads, kv_heads in ways:
        sizes = _dense(batch, heads, kv_heads, 8 * K, "bfloat16")
        yield GpuRow(f"prefill_8k{mark}", "dense", sizes, _PREFILL, quick=not mark)
    for mark, batch, heads, kv_heads in ways:
        sizes = _dense(batch, heads, kv_heads, 8 * K, "bfloat16")
        yield GpuRow(f"backward_8k{mark}", "backward", sizes, _BACKWARD, quick=not mark)
    for mark, batch, heads, kv_heads in ways:
        sizes = _dense(batch, heads, kv_heads, 4 * K, "float32", precision="exact")
        yield GpuRow(f"prefill_exact_4k{mark}", "dense", sizes, _EXACT, quick=not mark)


# Linear: rows x columns

SHAPES = {
    "qkv": (12288, 4096),
    "out": (4096, 4096),
    "gate_up": (22016, 4096),
    "down": (4096, 11008),
    "head": (32000, 4096),
}
_LAYER = tuple(SHAPES[name] for name in ("qkv", "out", "gate_up", "down"))
_SHARES = {"BF16": 0.9, "INT8": 0.85, "INT4": 0.8}
_OTHER_FORMATS = ("F16", "FP8", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def _linear() -> Iterator[GpuRow]:
    for weight, share in _SHARES.items():
        targets = (Target("copy", share),)
        yield GpuRow(
            f"linear_{weight.lower()}_layer", "linear", _matrices(weight, _LAYER), targets, quick=weight == "BF16"
        )
        for name, shape in SHAPES.items():
            row = f"linear_{weight.lower()}_{name}"
            yield GpuRow(row, "linear", _matrices(weight, (shape,)), targets)
    for weight in _OTHER_FORMATS:
        yield GpuRow(f"linear_{weight.lower()}_gate_up", "linear", _matrices(weight, (SHAPES["gate_up"],)))
    for weight in ("BF16", "INT4"):
        for tokens in (8, 32):
            sizes = _matrices(weight, (SHAPES["gate_up"],), tokens)
            yield GpuRow(f"linear_{weight.lower()}_gate_up_x{tokens}", "linear", sizes)


def _matrices(weight: str, shapes: Sequence[tuple[int, int]], tokens: int = 1) -> dict[str, Any]:
    return {"weight": weight, "shapes": tuple(shapes), "tokens": tokens}


# The rest


def _small() -> Iterator[GpuRow]:
    for tokens in (1, 8 * K):
        yield GpuRow(f"rms_norm_x{tokens}", "norm", {"tokens": tokens, "dim": 4096, "dtype": "bfloat16"})
    yield GpuRow("rope_table_x8192", "rope", {"tokens": 8 * K, "head_dim": 128})
    yield GpuRow("rotate_x8192", "rotate", {"tokens": 8 * K, "heads": 40, "head_dim": 128, "dtype": "bfloat16"})
    for tokens in (64, 8 * K):
        yield GpuRow(f"append_x{tokens}", "append", {"tokens": tokens, "page_size": 64, **_LLAMA})
    yield GpuRow("merge_x4", "merge", {"parts": 4, "tokens": 4 * K, "heads": 32, "head_dim": 128, "dtype": "bfloat16"})
    yield GpuRow("sample_x64", "sample", {"rows": 64, "vocab": 128 * K})
    yield GpuRow("logprobs_x64", "logprobs", {"rows": 64, "vocab": 128 * K, "top": 20})
    for tokens in (1, 64):
        sizes = {"tokens": tokens, "experts": 64, "chosen": 6, "dim": 2048, "inner": 1408, "dtype": "bfloat16"}
        yield GpuRow(f"moe_x{tokens}", "moe", sizes)


# First calls, each in processes of their own

FIRST = ("paged", "latent", "dense", "linear")


def _starts() -> Iterator[GpuRow]:
    for op in FIRST:
        yield GpuRow(f"first_{op}", "first", {"op": op}, (Target("seconds", 0.1),), quick=op == "paged", limit_s=90.0)


def target_rows() -> tuple[GpuRow, ...]:
    """Every row but those of regret, the most telling first: what time does not suffice for is at the end."""
    told = [*_decode(), *_ragged(), *_latent(), *_prefill(), *_linear(), *_starts()]
    found = [*told, *_dense_decode(), *_small()]
    return tuple(sorted(found, key=lambda row: not row.quick))


def regret_rows() -> tuple[GpuRow, ...]:
    """The named cases of headrace.check as rows, large ones first."""
    from headrace.bench.gpu_regret import case_names

    return tuple(GpuRow(name, "case", {"name": name}) for name in case_names())
