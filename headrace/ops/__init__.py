"""WHAT is computed: one file per operation, each with its reference, checks, traffic and kernels.

The names below are the library on its own, without the engine: attention in all its forms, what else a layer and a
draw are made of, and what tells why a kernel was chosen. They are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

# Where each public name lives. NOTE: no module here may have the name of a function: once imported, it would hide it.
_HOMES = {
    "AttentionGradients": "headrace.ops.attention_gradients",
    "AttentionResult": "headrace.ops.attention_options",
    "Logprobs": "headrace.ops.logprobs",
    "QuantizedRows": "headrace.ops.norm",
    "Routing": "headrace.ops.moe",
    "append_latent_pages": "headrace.ops.page_append",
    "append_pages": "headrace.ops.page_append",
    "attention": "headrace.ops.attention_dense",
    "attention_backward": "headrace.ops.attention_gradients",
    "choices": "headrace.ops.select",
    "explain": "headrace.ops.call_request",
    "merge_attention": "headrace.ops.attention_merge",
    "mixture_of_experts": "headrace.ops.moe",
    "mla_attention": "headrace.ops.attention_latent",
    "paged_attention": "headrace.ops.attention_paged",
    "reset_choices": "headrace.ops.select",
    "rms_norm": "headrace.ops.norm",
    "rms_norm_quantized": "headrace.ops.norm",
    "rope_table": "headrace.ops.rope",
    "rotate": "headrace.ops.rope",
    "route": "headrace.ops.moe",
    "sample": "headrace.ops.sampling",
    "token_logprobs": "headrace.ops.logprobs",
}

__all__ = [
    "AttentionGradients",
    "AttentionResult",
    "Logprobs",
    "QuantizedRows",
    "Routing",
    "append_latent_pages",
    "append_pages",
    "attention",
    "attention_backward",
    "choices",
    "explain",
    "merge_attention",
    "mixture_of_experts",
    "mla_attention",
    "paged_attention",
    "reset_choices",
    "rms_norm",
    "rms_norm_quantized",
    "rope_table",
    "rotate",
    "route",
    "sample",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace.ops' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
