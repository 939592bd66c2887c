"""Which format each tensor of a quantized model gets.

Not all tensors are equally sensitive, so the usual mixtures (named as in the GGUF world: `q4_k_m` = K formats of
4 bits, medium) spend more bits where it pays: on the output head, on the values of attention and on the
down projections, and there on the first, the last and every third layer in between.

A recipe is data: a format for all matrices, one for the head, and rules for some. Vectors stay F32. Formats of
256-value blocks do not fit every row length; then a format of 32-value blocks with at least as many bits steps in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from headrace.errors import ArgumentError
from headrace.ops.formats import FORMATS


@dataclass(frozen=True)
class Place:
    """Where a matrix sits: its layer of how many, and how many query heads share a key head."""

    layer: int
    num_layers: int
    query_group: int


Condition = Callable[[Place], bool]


@dataclass(frozen=True)
class Rule:
    """Matrices whose name begins with `role`, in places where `when` holds, get `format`."""

    role: str
    format: str
    when: Condition = lambda place: True


@dataclass(frozen=True)
class Recipe:
    """`file_type` is the number GGUF gives the mixture; the first rule that fits wins over `base`."""

    file_type: int
    base: str
    head: str = "Q6_K"
    rules: tuple[Rule, ...] = ()


def _first(numerator: int, denominator: int) -> Condition:
    """The first numerator/denominator of the layers."""
    return lambda place: place.layer < numerator * place.num_layers // denominator


def _first_layers(number: int) -> Condition:
    return lambda place: place.layer < number


def _sensitive(place: Place) -> bool:
    """The first and the last eighth, and every third layer between them."""
    eighth = place.num_layers // 8
    return place.layer < eighth or place.layer >= 7 * place.num_layers // 8 or (place.layer - eighth) % 3 == 2


def _wide_group(place: Place) -> bool:
    """Few value heads: the matrix is small and matters to many."""
    return place.query_group >= 4


_MORE_BITS = (Rule("attn_v", "Q6_K", _sensitive), Rule("ffn_down", "Q6_K", _sensitive))
_IQ4 = (Rule("attn_v", "Q5_K", _wide_group), Rule("ffn_down", "Q5_K", _first(1, 8)))

RECIPES: dict[str, Recipe] = {
    "f32": Recipe(0, "F32", head="F32"),
    "f16": Recipe(1, "F16", head="F16"),
    "bf16": Recipe(32, "BF16", head="BF16"),
    "q8_0": Recipe(7, "Q8_0", head="Q8_0"),
    "q4_0": Recipe(2, "Q4_0"),
    "q4_1": Recipe(3, "Q4_1"),
    "q5_0": Recipe(8, "Q5_0"),
    "q5_1": Recipe(9, "Q5_1"),
    "q2_k": Recipe(10, "Q2_K", rules=(
        Rule("attn_v", "Q4_K", _wide_group), Rule("attn_v", "Q3_K"), Rule("ffn_down", "Q3_K"),
        Rule("attn_output", "Q3_K"))),
    "q3_k_s": Recipe(11, "Q3_K"),
    "q3_k_m": Recipe(12, "Q3_K", rules=(
        Rule("attn_v", "Q5_K", _first_layers(2)), Rule("attn_v", "Q4_K"), Rule("ffn_down", "Q5_K", _first(1, 16)),
        Rule("ffn_down", "Q4_K"), Rule("attn_output", "Q4_K"), Rule("attn_qkv", "Q4_K"))),
    "q3_k_l": Recipe(13, "Q3_K", rules=(
        Rule("attn_v", "Q5_K"), Rule("ffn_down", "Q5_K"), Rule("attn_output", "Q5_K"), Rule("attn_qkv", "Q4_K"))),
    "q4_k_s": Recipe(14, "Q4_K", rules=(
        Rule("attn_v", "Q5_K", _first_layers(4)), Rule("ffn_down", "Q5_K", _first(1, 8)))),
    "q4_k_m": Recipe(15, "Q4_K", rules=(*_MORE_BITS, Rule("attn_qkv", "Q5_K"))),
    "q5_k_s": Recipe(16, "Q5_K"),
    "q5_k_m": Recipe(17, "Q5_K", rules=(*_MORE_BITS, Rule("attn_qkv", "Q6_K"))),
    "q6_k": Recipe(18, "Q6_K"),
    "iq4_nl": Recipe(25, "IQ4_NL", rules=_IQ4),
    "iq4_xs": Recipe(30, "IQ4_XS", rules=_IQ4),
}  # fmt: skip

# For rows that are not whole blocks of 256 values.
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`, in any case of letters."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise ArgumentError(f"recipe: {name!r} is not known", hint=f"recipes: {', '.join(RECIPES)}")
    return recipe


def choose_formats(recipe: Recipe, shapes: dict[str, tuple[int, ...]], query_group: int = 1) -> dict[str, str]:
    """The format of each tensor of a model, by name; `shapes` has rows first."""
    num_layers = 1 + max((int(match[1]) for match in map(_LAYER_NAME.fullmatch, shapes) if match), default=0)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    formats = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith(".weight") or "ffn_gate_inp" in name:
            formats[name] = "F32"  # vectors, and the small matrix that routes to experts
            continue
        wanted = recipe.head if name == head else _by_rules(recipe, name, num_layers, query_group)
        formats[name] = _fitting(wanted, shape[-1])
    return formats


def _by_rules(recipe: Recipe, name: str, num_layers: int, query_group: int) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match:
        place = Place(int(match[1]), num_layers, query_group)
        for rule in recipe.rules:
            if match[2].startswith(rule.role) and rule.when(place):
                return rule.format
    return recipe.base


def _fitting(wanted: str, row_len: int) -> str:
    """The wanted format, or the nearest that rows of this length fit."""
    if row_len % FORMATS[wanted].block_len:
        wanted = _FALLBACK.get(wanted, wanted)
    return wanted if row_len % FORMATS[wanted].block_len == 0 else "F16"
