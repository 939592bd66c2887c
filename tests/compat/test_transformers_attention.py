"""Models of transformers with attn_implementation="headrace": what "eager" says, and no further from the truth."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from formula import formula
from transformers import masking_utils

from headrace.check.compare import assert_within_budget
from headrace.compat.transformers import register

PAD, VOCAB, WINDOW = 0, 97, 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
KINDS = ["full_attention", "sliding_attention"]
# Experts are all asked: which of them are is a choice that the last bit of a number may turn.
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": WINDOW, "layer_types": KINDS, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
    ),
    "gpt_oss": ("GptOss", {"sliding_window": WINDOW, "layer_types": KINDS, **EXPERTS}),
}
DTYPES = ("float32", "bfloat16")
EXACT_AND_PLAIN = [("float64", "formula"), ("float32", "eager")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's: for arrays this small its threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _random_model(family: str) -> Any:
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):  # as large as scores are
                parameter.normal_(0, 2)
    return model


def model_of(family: str, dtype: str, attention: str) -> Any:
    """The family's random model; the numbers of its weights are the same in every type."""
    model = copy.deepcopy(_random_model(family)).to(torch.bfloat16).to(getattr(torch, dtype))
    model.set_attn_implementation(attention)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the other ways have no float64
    return model


def _every_mask(**said: Any) -> Any:
    return masking_utils.sdpa_mask(**said | {"allow_is_causal_skip": False})


register()
transformers.AttentionInterface.register("formula", formula)
transformers.AttentionMaskInterface.register("formula", _every_mask)


def padded(lens: list[int], side: str) -> dict[str, Any]:
    """Random sequences of these lengths in one batch."""
    torch.manual_seed(1)
    ids, mask = torch.full((len(lens), max(lens)), PAD), torch.zeros(len(lens), max(lens), dtype=torch.long)
    for row, length in enumerate(lens):
        own = slice(length) if side == "right" else slice(max(lens) - length, None)
        ids[row, own], mask[row, own] = torch.randint(2, VOCAB, (length,)), 1
    return {"input_ids": ids, "attention_mask": mask}


def whole(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": padded([length] * batch, "right")["input_ids"]}


BATCHES = {
    "whole": whole(2, 17),
    "one token": whole(2, 1),
    "padded right": padded([17, 5, 11], "right"),
    "padded left": padded([17, 5, 11], "left"),
}


def logits(model: Any, batch: dict[str, Any], **more: Any) -> Any:
    """Of the tokens that are none of padding."""
    with torch.no_grad():
        found = model(**batch, **more).logits
    return found[batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()].double().numpy()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_near_to_the_exact_ones_as_those_of_eager(family, dtype, batch):
    exact, straightforward, got = (
        logits(model_of(family, *how), BATCHES[batch])
        for how in [("float64", "formula"), (dtype, "eager"), (dtype, "headrace")]
    )
    assert_within_budget(got, exact, straightforward, dtype)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_says_what_eager_says(family, side, cache):
    batch = whole(2, 9) if side is None else padded([9, 3, 7], side)
    said = [
        model_of(family, "float32", attention).generate(
            **batch, max_new_tokens=8, do_sample=False, cache_implementation=None if cache == "dynamic" else cache
        )
        for attention in ("eager", "headrace")
    ]
    assert said[0].tolist() == said[1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_come_in_pieces(family):
    batch = whole(2, 23)
    exact, straightforward = (logits(model_of(family, *how), batch) for how in EXACT_AND_PLAIN)
    model, pieces = model_of(family, "float32", "headrace"), []
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in batch["input_ids"].split([5, 1, 12, 5], dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
    got = torch.cat(pieces, 1).flatten(0, 1).double().numpy()
    assert_within_budget(got, exact, straightforward, "float32")


def gradients(model: Any, batch: dict[str, Any]) -> Any:
    """Of the mean loss, by the names of the parameters."""
    model.train()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == PAD, -100)
    model(**batch, labels=labels).loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def _in_one(found: dict[str, Any], exact: dict[str, Any]) -> Any:
    """One behind the other, each over the largest element of the exact one: one maximum of errors is then of all."""
    return torch.cat([(found[name] / each.abs().max()).flatten() for name, each in exact.items() if each.any()]).numpy()


@pytest.mark.parametrize("batch", ["whole", "padded right", "padded left"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_parameters_are_within_the_budget(family, dtype, batch):
    exact, straightforward, got = (
        gradients(model_of(family, *how), BATCHES[batch])
        for how in [("float64", "formula"), (dtype, "eager"), (dtype, "headrace")]
    )
    assert got.keys() == exact.keys()
    assert_within_budget(_in_one(got, exact), _in_one(exact, exact), _in_one(straightforward, exact), dtype)


def test_checkpointing_changes_no_bit_of_a_gradient():
    plain, checkpointed = (model_of("mistral", "float32", "headrace") for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    found = [gradients(model, BATCHES["padded right"]) for model in (plain, checkpointed)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("family,told_by", [(name, how) for name in FAMILIES for how in ("positions", "lengths")])
def test_packed_sequences_say_what_they_say_alone(family, told_by):
    if (family, told_by) == ("gpt_oss", "positions"):
        pytest.skip("the model makes its masks without looking at positions")
    lens = [9, 1, 13]
    ids = whole(1, sum(lens))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lens])[None]
    alone = [{"input_ids": part} for part in ids.split(lens, dim=1)]
    exact, straightforward = (
        torch.cat([torch.from_numpy(logits(model, part)) for part in alone]).numpy()
        for model in (model_of(family, *how) for how in EXACT_AND_PLAIN)
    )
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0)
    more = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts} if told_by == "lengths" else {}
    model = model_of(family, "float32", "headrace")
    got = logits(model, {"input_ids": ids}, position_ids=positions, use_cache=False, **more)
    assert_within_budget(got, exact, straightforward, "float32")


def test_autocast_computes_in_its_type():
    model, batch = model_of("llama", "float32", "headrace"), BATCHES["padded right"]
    exact = logits(model_of("llama", *EXACT_AND_PLAIN[0]), batch)
    with torch.autocast("cpu", torch.bfloat16):
        got, straightforward = logits(model, batch), logits(model_of("llama", "float32", "eager"), batch)
    assert_within_budget(got, exact, straightforward, "bfloat16")


@pytest.mark.slow
def test_a_model_compiles_without_a_graph_break():
    model, batch = model_of("gemma2", "float32", "headrace"), whole(2, 17)
    exact, straightforward = (logits(model_of("gemma2", *how), batch) for how in EXACT_AND_PLAIN)
    compiled = torch.compile(model, fullgraph=True)
    assert_within_budget(logits(compiled, batch, use_cache=False), exact, straightforward, "float32")


def test_dropout_is_refused_by_its_name():
    model = model_of("llama", "float32", "headrace")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    logits(model, BATCHES["whole"])  # none when not training
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        model.train()(**BATCHES["whole"])


@pytest.mark.slow
def test_a_real_model_says_what_it_said(default_model_path):
    folder, name = default_model_path.parent, default_model_path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    prompts = ["The capital of France is", "Water boils at a temperature of one hundred degrees, and it freezes at"]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch, said = tokenizer(prompts, return_tensors="pt", padding=True), []
    for attention in ("eager", "headrace"):
        model.set_attn_implementation(attention)
        said.append(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=12, do_sample=False)))
    assert said[0] == said[1]
    assert "Paris" in said[1][0]
