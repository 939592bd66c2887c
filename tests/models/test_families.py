"""Families: what a file says about its model is what runs. The oracle is transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace import LLM
from headrace.check.fakes import TinyModel, metadata_of, tensors_of
from headrace.ops.formats import dequantize
from headrace.weights.gguf_writer import write_gguf

PROMPT = [int(i) for i in np.random.default_rng(5).integers(0, 300, 150)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@dataclass(frozen=True)
class Case:
    """One tiny model, and what transformers calls it."""

    peer: str
    model: TinyModel
    rope: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("Llama", TinyModel()),
    "llama tied": Case("Llama", TinyModel(tied_head=True, seed=1)),
    "llama wide heads": Case("Llama", TinyModel(head_dim=40, seed=2)),
    "llama one kv head": Case("Llama", TinyModel(num_heads=5, num_kv_heads=1, head_dim=12, dim=60, seed=3)),
    "llama equal heads": Case("Llama", TinyModel(num_kv_heads=4, num_layers=3, seed=4)),
    "llama other theta": Case("Llama", TinyModel(extra={"rope.freq_base": 5e5}, seed=5), {"rope_theta": 5e5}),
    "llama other eps": Case(
        "Llama", TinyModel(extra={"attention.layer_norm_rms_epsilon": 0.1}, seed=5), options={"rms_norm_eps": 0.1}
    ),
    "llama linear": Case(
        "Llama",
        TinyModel(extra={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, seed=6),
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama linear, as old files say it": Case(
        "Llama", TinyModel(extra={"rope.scale_linear": 2.0}, seed=7), {"rope_type": "linear", "factor": 2.0}
    ),
    "llama yarn": Case("Llama", TinyModel(extra=YARN_KEYS, head_dim=32, seed=8), YARN),
    "llama yarn, other betas": Case(
        "Llama",
        TinyModel(extra=YARN_KEYS | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}, seed=8),
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "llama 3": Case("Llama", TinyModel(head_dim=32, seed=9), LLAMA3),
    "mistral": Case("Mistral", TinyModel(seed=10)),
    "mistral window": Case("Mistral", TinyModel(sliding_window=13, seed=11), options={"sliding_window": 13}),
    "mistral window of one": Case("Mistral", TinyModel(sliding_window=1, seed=12), options={"sliding_window": 1}),
    "mistral wide window": Case("Mistral", TinyModel(sliding_window=500, seed=13), options={"sliding_window": 500}),
    "qwen2": Case("Qwen2", TinyModel("qwen2", seed=14)),
    "qwen2 tied": Case("Qwen2", TinyModel("qwen2", tied_head=True, seed=15)),
    "qwen2 yarn": Case("Qwen2", TinyModel("qwen2", extra=YARN_KEYS, seed=16), YARN),
    "qwen3": Case("Qwen3", TinyModel("qwen3", seed=17)),
    "qwen3 tied, wide heads": Case("Qwen3", TinyModel("qwen3", tied_head=True, head_dim=32, seed=18)),
    "qwen3 yarn": Case("Qwen3", TinyModel("qwen3", head_dim=32, extra=YARN_KEYS, seed=19), YARN),
}

PEER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def peer_model(case: Case) -> Any:
    """The model as transformers builds it from a configuration, with the same weights."""
    model = case.model
    config = getattr(transformers, f"{case.peer}Config")(
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.context_len,
        tie_word_embeddings=model.tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | case.rope,
        **({"rms_norm_eps": 1e-5, "sliding_window": None} | case.options),
        attn_implementation="eager",
    )
    peer = getattr(transformers, f"{case.peer}ForCausalLM")(config).float().eval()
    peer.load_state_dict(peer_weights(model), strict=not model.tied_head)
    return peer


def peer_weights(model: TinyModel) -> dict[str, torch.Tensor]:
    """The tensors under transformers' names, with llama's pairs of rows put back in their halves."""
    weights = {}
    for name, (form, shape, raw) in tensors_of(model).items():
        values = dequantize(raw.reshape(shape[0], -1) if len(shape) == 2 else raw, form).reshape(shape)
        if model.interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            values = values.reshape(-1, model.head_dim // 2, 2, model.dim).swapaxes(1, 2).reshape(shape)
        weights[peer_name(name)] = torch.from_numpy(np.array(values, np.float32))
    return weights


def peer_name(name: str) -> str:
    if not name.startswith("blk."):
        return PEER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{PEER_NAMES[rest]}"


def rope_factors(peer: Any, theta: float = 10000.0) -> np.ndarray:
    """What transformers divides each plain frequency by: what a converter writes as rope_freqs.weight."""
    frequencies = peer.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    plain = theta ** (-np.arange(len(frequencies)) / len(frequencies))
    return (plain / frequencies).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.costly
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    peer = peer_model(case)
    tensors = dict(tensors_of(case.model))
    if case.rope.get("rope_type") == "llama3":
        factors = rope_factors(peer)
        assert factors.max() > 2 > factors.min()
        tensors["rope_freqs.weight"] = ("F32", factors.shape, factors.view(np.uint8))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata_of(case.model), [(key, *rest) for key, rest in tensors.items()])
    with torch.no_grad():
        expected = peer(torch.tensor([PROMPT])).logits[0].numpy()
    got = LLM(path, kv_dtype="float32").logits(PROMPT)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-3


def test_the_cases_differ() -> None:
    """A scaling or a window that did nothing would pass for one that is right."""
    plain = peer_model(CASES["llama"])
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for name in ("llama linear", "llama yarn", "llama 3", "mistral window"):
            case = CASES[name]
            without = peer_model(Case("Llama", replace(case.model, extra={}, sliding_window=None)))
            assert (peer_model(case)(ids).logits - without(ids).logits).abs().max() > 0.1, name
        assert plain(ids).logits.std() > 0.5
