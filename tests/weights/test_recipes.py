"""recipes: each tensor gets the format that the mixtures of the GGUF world give it."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest

from headrace.errors import ArgumentError
from headrace.ops.formats import FORMATS
from headrace.weights.recipes import RECIPES, choose_formats, get_recipe


def llama_shapes(num_layers: int, width: int, hidden: int, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (1000, width)
    for layer in range(num_layers):
        shapes[f"blk.{layer}.attn_norm.weight"] = (width,)
        shapes[f"blk.{layer}.attn_q.bias"] = (width,)
        for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{role}.weight"] = (256, width)
        shapes[f"blk.{layer}.ffn_down.weight"] = (width, hidden)
    return shapes


def layers_with(formats: dict[str, str], role: str, wanted: str) -> list[int]:
    return [layer for layer in range(32) if formats.get(f"blk.{layer}.{role}.weight") == wanted]


def test_q4_k_m_of_32_layers() -> None:
    formats = choose_formats(RECIPES["q4_k_m"], llama_shapes(32, 4096, 11008, tied=False))
    sensitive = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_with(formats, "attn_v", "Q6_K") == layers_with(formats, "ffn_down", "Q6_K") == sensitive
    assert layers_with(formats, "attn_q", "Q4_K") == list(range(32))
    assert (formats["output.weight"], formats["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert formats["blk.0.attn_norm.weight"] == formats["blk.0.attn_q.bias"] == "F32"


def test_rows_that_no_k_format_fits_get_the_next_larger() -> None:
    shapes = llama_shapes(30, 576, 1536, tied=True)
    assert Counter(choose_formats(RECIPES["q4_k_m"], shapes).values()) == {
        "Q5_0": 5 * 30 + 16, "Q8_0": 14 + 1, "Q4_K": 16, "Q6_K": 14, "F32": 2 * 30 + 1,
    }  # fmt: skip
    assert choose_formats(RECIPES["q4_1"], shapes)["token_embd.weight"] == "Q8_0"
    assert choose_formats(RECIPES["q8_0"], {"a.weight": (2, 33)}) == {"a.weight": "F16"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("query_group", [1, 8])
def test_every_recipe_gives_formats_that_rows_fit(recipe: str, query_group: int) -> None:
    for width, hidden in [(576, 1536), (4096, 11008), (96, 100), (33, 7)]:
        shapes = llama_shapes(5, width, hidden, tied=False)
        formats = choose_formats(get_recipe(recipe), shapes, query_group)
        assert formats.keys() == shapes.keys()
        for name, shape in shapes.items():
            assert FORMATS[formats[name]].row_bytes(shape[-1]) > 0


def test_rules_by_layer_and_group() -> None:
    shapes = llama_shapes(32, 4096, 11008, tied=False)
    assert layers_with(choose_formats(RECIPES["q4_k_s"], shapes), "attn_v", "Q5_K") == [0, 1, 2, 3]
    assert layers_with(choose_formats(RECIPES["q3_k_m"], shapes), "ffn_down", "Q5_K") == [0, 1]
    assert layers_with(choose_formats(RECIPES["q2_k"], shapes, 1), "attn_v", "Q3_K") == list(range(32))
    assert layers_with(choose_formats(RECIPES["q2_k"], shapes, 4), "attn_v", "Q4_K") == list(range(32))


def test_experts_follow_their_role_and_the_router_stays_exact() -> None:
    shapes = {"blk.0.ffn_down_exps.weight": (8, 64, 512), "blk.0.ffn_gate_inp.weight": (8, 512)}
    formats = choose_formats(RECIPES["q3_k_l"], shapes)
    assert formats == {"blk.0.ffn_down_exps.weight": "Q5_K", "blk.0.ffn_gate_inp.weight": "F32"}


def test_file_types_are_those_of_the_reference_package() -> None:
    for name, recipe in RECIPES.items():
        assert gguf.LlamaFileType(recipe.file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_") == name.upper()


def test_an_unknown_recipe_lists_all() -> None:
    with pytest.raises(ArgumentError, match=r"'q4_k_x' is not known\n.*q4_k_s, q4_k_m"):
        get_recipe("q4_k_x")
