"""Named cases of every op but attention (attention_cases.py): one list for tests and benchmarks.

Sizes include 1, primes, and one off each width a kernel steps by (16 lanes, 32 columns, 8 rows, 256-column groups).
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import SamplingParams


@dataclass(frozen=True)
class NormCase:
    name: str
    tokens: int
    dim: int
    scale: float = 1.0


NORM = (
    NormCase("one", 1, 1),
    NormCase("below_lanes", 3, 15),
    NormCase("lanes", 8, 16),
    NormCase("prime", 7, 17),
    NormCase("two_steps", 9, 33),
    NormCase("default_model_decode", 1, 576),
    NormCase("default_model_prefill", 512, 576),
    NormCase("llama_8b", 4, 4096),
    NormCase("tiny_values", 5, 127, 1e-6),
    NormCase("huge_values", 5, 127, 1e4),
    NormCase("no_tokens", 0, 64),
)


@dataclass(frozen=True)
class LinearCase:
    """Columns are rounded up to the format's block."""

    name: str
    tokens: int
    rows: int
    cols: int


LINEAR = (
    LinearCase("one", 1, 1, 1),
    LinearCase("below_panel", 1, 15, 32),
    LinearCase("panel", 2, 16, 64),
    LinearCase("over_panel", 3, 17, 96),
    LinearCase("prime_tokens", 7, 48, 256),
    LinearCase("tile", 8, 33, 512),
    LinearCase("over_tile", 9, 31, 288),
    LinearCase("default_model_output", 1, 576, 576),
    LinearCase("prefill", 29, 80, 1536),
    LinearCase("no_tokens", 0, 16, 32),
)


@dataclass(frozen=True)
class SamplingCase:
    """A row of normal logits; `levels` per unit makes equal ones, `excluded` is the share that is -infinity."""

    name: str
    vocab: int
    spread: float = 2.0
    levels: int = 0
    excluded: float = 0.0


SAMPLING = (
    SamplingCase("one", 1),
    SamplingCase("below_lanes", 15),
    SamplingCase("lanes", 16),
    SamplingCase("prime", 251),
    SamplingCase("equals", 300, levels=2),
    SamplingCase("all_equal", 100, spread=0.0),
    SamplingCase("excluded", 333, excluded=0.7),
    SamplingCase("peaked", 500, spread=30.0),
    SamplingCase("block", 1024),
    SamplingCase("over_block", 2049, levels=4),
    SamplingCase("large_vocabulary", 150_001, levels=64),
)


@dataclass(frozen=True)
class SamplingParamsCase:
    name: str
    params: SamplingParams


SAMPLING_PARAMS = (
    SamplingParamsCase("greedy", SamplingParams()),
    SamplingParamsCase("plain", SamplingParams(temperature=1.0)),
    SamplingParamsCase("cold", SamplingParams(temperature=0.2)),
    SamplingParamsCase("freezing", SamplingParams(temperature=1e-30)),
    SamplingParamsCase("hot", SamplingParams(temperature=1e30)),
    SamplingParamsCase("top_k", SamplingParams(temperature=1.0, top_k=7)),
    SamplingParamsCase("top_k_all", SamplingParams(temperature=1.0, top_k=10**9)),
    SamplingParamsCase("top_p", SamplingParams(temperature=0.9, top_p=0.83)),
    SamplingParamsCase("top_p_one_token", SamplingParams(temperature=1.0, top_p=1e-9)),
    SamplingParamsCase("min_p", SamplingParams(temperature=1.1, min_p=0.037)),
    SamplingParamsCase("typical", SamplingParams(temperature=0.9, typical_p=0.61)),
    SamplingParamsCase("typical_one_token", SamplingParams(temperature=1.0, typical_p=1e-9)),
    SamplingParamsCase("typical_cold", SamplingParams(temperature=1e-3, typical_p=0.7)),
    SamplingParamsCase("typical_of_filtered", SamplingParams(temperature=1.2, top_k=50, min_p=0.011, typical_p=0.43)),
    SamplingParamsCase("all_filters", SamplingParams(temperature=1.3, top_k=90, top_p=0.87, min_p=0.021)),
    SamplingParamsCase("repetition", SamplingParams(repetition_penalty=1.3)),
    SamplingParamsCase("presence", SamplingParams(temperature=1.0, presence_penalty=1.5)),
    SamplingParamsCase("frequency", SamplingParams(temperature=1.0, top_k=40, frequency_penalty=-0.7)),
    SamplingParamsCase(
        "everything",
        SamplingParams(
            temperature=0.8,
            top_k=60,
            top_p=0.9,
            min_p=0.013,
            typical_p=0.8,
            repetition_penalty=0.8,
            presence_penalty=-0.3,
            frequency_penalty=0.45,
        ),
    ),
)


@dataclass(frozen=True)
class AppendCase:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    page_size: int
    tokens: int


APPEND = (
    AppendCase("one", 1, 1, 2, 2, 1, 1, 1),
    AppendCase("default_model_decode", 9, 3, 64, 64, 64, 64, 1),
    AppendCase("default_model_prefill", 9, 3, 64, 64, 64, 64, 70),
    AppendCase("partial_below_lanes", 4, 2, 80, 20, 80, 16, 5),
    AppendCase("odd_widths", 6, 2, 34, 34, 33, 3, 9),
    AppendCase("llama_8b", 32, 8, 128, 128, 128, 64, 6),
    AppendCase("no_tokens", 2, 1, 64, 64, 64, 16, 0),
)


@dataclass(frozen=True)
class AppendLatentCase:
    name: str
    heads: int
    latent_dim: int
    rope_dim: int
    page_size: int
    tokens: int


APPEND_LATENT = (
    AppendLatentCase("one", 1, 1, 2, 1, 1),
    AppendLatentCase("deepseek_decode", 16, 512, 64, 64, 3),
    AppendLatentCase("odd_widths", 3, 45, 6, 5, 17),
    AppendLatentCase("no_tokens", 2, 32, 16, 16, 0),
)


@dataclass(frozen=True)
class MoeCase:
    """`elsewhere`: the share of a token's experts that live on another device."""

    name: str
    tokens: int
    dim: int
    ffn_dim: int
    experts: int
    top_k: int
    elsewhere: float = 0.0


MOE = (
    MoeCase("one", 1, 1, 1, 1, 1),
    MoeCase("one_token", 1, 72, 40, 8, 2),
    MoeCase("few_tokens", 4, 33, 65, 5, 3, elsewhere=0.3),
    MoeCase("more_tokens", 5, 70, 48, 6, 2),
    MoeCase("all_experts", 9, 40, 24, 4, 4),
    MoeCase("many_experts", 13, 32, 16, 60, 4, elsewhere=0.2),
    MoeCase("tile", 16, 64, 32, 1, 1),
    MoeCase("over_tile", 17, 64, 32, 1, 1),
    MoeCase("crowded", 150, 24, 17, 3, 2),
    MoeCase("nothing_here", 6, 16, 16, 2, 1, elsewhere=1.0),
    MoeCase("no_tokens", 0, 32, 16, 4, 2),
)


@dataclass(frozen=True)
class RouteCase:
    name: str
    tokens: int
    experts: int
    top_k: int
    scores: str = "softmax"
    bias: bool = False
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


ROUTE = (
    RouteCase("one", 1, 1, 1),
    RouteCase("mixtral", 37, 8, 2),
    RouteCase("all", 5, 7, 7, normalize=False),
    RouteCase("qwen3", 19, 128, 8),
    RouteCase("deepseek_v3", 9, 256, 8, "sigmoid", True, True, 2.5, 8, 4),
    RouteCase("groups_of_one", 6, 5, 2, "sigmoid", True, False, 0.5, 5, 3),
    RouteCase("odd_groups", 4, 21, 3, "softmax", False, True, 1.0, 7, 2),
    RouteCase("no_tokens", 0, 16, 2),
)
