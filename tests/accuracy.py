"""How far a model's answers are from exact ones: texts, the divergence, and what others give for the same file.

Run as a program where llama-cpp-python and transformers are installed, it records llama.cpp's figures for the tests:

    python tests/accuracy.py MODEL.gguf "how it was built"  > tests/data/accuracy_llama_cpp.json
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.accuracy import divergence
from headrace.bench.accuracy_texts import TEXTS

DATA = Path(__file__).parent / "data"


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "batch 512": {},
    "batch 1": {"n_batch": 1, "n_ubatch": 1},
    "flash attention": {"flash_attn": True},
    "fp32 cache": {"type_k": 0, "type_v": 0},
    "Q8_0 cache": {"type_k": 8, "type_v": 8, "flash_attn": True},
    "Q4_0 cache": {"type_k": 2, "type_v": 2, "flash_attn": True},
}
"""Ways to run llama.cpp. Those without a quantized cache should give the same: that they do not shows how much of a
figure is chance."""


def figures(divergences: np.ndarray) -> dict[str, float]:
    return {"mean": float(divergences.mean()), "worst": float(divergences.max())}


def load_exact(path: Path) -> Any:
    """The file in transformers, its weights dequantized to float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def exact_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def llama_cpp_logits(path: Path, prompts: list[list[int]], **options: Any) -> list[np.ndarray]:
    """Logits at every position of each prompt as llama.cpp computes them."""
    from llama_cpp import Llama

    options = {"n_ctx": max(map(len, prompts)) + 8, "n_batch": 512, "n_threads": 2} | options
    llama = Llama(str(path), **options, logits_all=True, verbose=False)
    results = []
    for ids in prompts:
        llama.reset()
        llama.eval(ids)
        results.append(np.array(llama.scores[: len(ids)], np.float32))
    return results


def record(path: Path, how: str) -> dict[str, Any]:
    """llama.cpp's figures for every text, and where they come from."""
    from headrace.kernels import cpu
    from headrace.text.tokenizer import Tokenizer
    from headrace.weights.gguf import open_gguf

    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    prompts = {name: tokenizer.encode(text) for name, text in TEXTS.items()}
    exact = load_exact(path)
    logits = {name: exact_logits(exact, ids) for name, ids in prompts.items()}
    measured = {}
    for arrangement, options in ARRANGEMENTS.items():
        others = dict(zip(prompts, llama_cpp_logits(path, list(prompts.values()), **options), strict=True))
        measured[arrangement] = {name: divergence(logits[name], others[name]) for name in prompts}
    return {
        "model": path.name,
        "made_with": "python tests/accuracy.py MODEL.gguf HOW",
        "how": how,
        "versions": {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "transformers", "torch")},
        "cpu": f"x86-64, best instruction set {cpu.best_isa()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "unit": "KL(fp32 || llama.cpp) in nats per position",
        "figures": {way: {name: figures(kl) for name, kl in texts.items()} for way, texts in measured.items()},
        "per_position": {name: [float(f"{x:.4g}") for x in kl] for name, kl in measured["batch 512"].items()},
    }


if __name__ == "__main__":
    text = json.dumps(record(Path(sys.argv[1]), sys.argv[2]), indent=1)
    print(re.sub(r"\n\s+(?=[-\d])", " ", text))  # lists of numbers on one line
