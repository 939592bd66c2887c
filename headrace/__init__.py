"""headrace: run open-weight language models at the speed the hardware allows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.async_llm import AsyncLLM, AsyncStream, Update
    from headrace.completion import Choice, Completion, Piece, Timings
    from headrace.config import EngineConfig, ModelConfig, SamplingParams
    from headrace.errors import HeadraceError
    from headrace.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "Choice",
    "Completion",
    "EngineConfig",
    "HeadraceError",
    "ModelConfig",
    "Piece",
    "SamplingParams",
    "Timings",
    "Update",
    "__version__",
]

# Where each public name lives: imported when first asked for, so that `import headrace` costs nothing.
_HOMES = {
    "LLM": "headrace.llm",
    "AsyncLLM": "headrace.async_llm",
    "AsyncStream": "headrace.async_llm",
    "Choice": "headrace.completion",
    "Completion": "headrace.completion",
    "EngineConfig": "headrace.config",
    "HeadraceError": "headrace.errors",
    "ModelConfig": "headrace.config",
    "Piece": "headrace.completion",
    "SamplingParams": "headrace.config",
    "Timings": "headrace.completion",
    "Update": "headrace.async_llm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
