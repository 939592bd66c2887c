"""Instructions per weight of the linear kernel, counted in what the compiler makes for a chip.

python -m headrace.check.linear_instructions                 one row of x in bfloat16 against each kind of weight
python -m headrace.check.linear_instructions Q4_K int4 x2    of these, with two rows of x

Those of one thread in the loop over columns, addresses and the loop itself included, over the weights it handles in a
turn. What is issued twice, or waits, is not seen. No GPU is needed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from headrace.check.compiled import compiled, dumped, nvidia_resources

FLOATS, BYTES, TABLES = ("BF16", "F16"), ("int8", "Q8_0", "fp8"), ("IQ4_NL", "IQ4_XS")
FORMATS = (*FLOATS, *BYTES, "int4", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q2_K", "Q3_K", *TABLES)
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);")


def longest_loop(sass: str) -> list[str]:
    """The instructions from the target of a jump backwards to the jump, where there are most."""
    lines = [(int(place, 16), text) for place, text in _LINE.findall(sass)]
    number = {place: index for index, (place, _) in enumerate(lines)}
    longest: list[str] = []
    for index, (place, text) in enumerate(lines):
        target = re.match(r"BRA\S* .*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < place:
            found = [each for _, each in lines[number[int(target[1], 16)] : index + 1]]
            longest = max(longest, found, key=len)
    return longest


def weights_of_turn(variant: Any) -> float:
    """Weights that one thread handles in a turn of the loop."""
    constants = variant.constants
    values = constants["CHUNK"] * (32 // constants["LOW"] if constants["LOW"] else 1)
    return float(constants["BN"] * constants["CHUNKS"] * values / (32 * variant.num_warps))


def told(name: str, tokens: int, chip: str = "sm_90") -> str:
    """A row: per weight, registers, and the most frequent instructions."""
    import torch

    from headrace.kernels.triton.linear import variant_of

    variant = variant_of(name, tokens, torch.bfloat16, "auto")
    cubin = compiled(variant, chip).asm["cubin"]
    loop, (registers, spilled) = longest_loop(dumped(cubin, "-sass")), nvidia_resources(cubin)
    counted = Counter(text.split()[0].split(".")[0] for text in loop).most_common(8)
    kinds = " ".join(f"{kind} {count}" for kind, count in counted)
    per_weight = len(loop) / weights_of_turn(variant)
    return f"{name:7} x{tokens} {per_weight:5.2f} a weight, {registers} registers, {spilled} spilled: {kinds}"


def main(arguments: Sequence[str]) -> int:
    """Prints a row for each kind of weight."""
    tokens = [int(word[1:]) for word in arguments if re.fullmatch(r"x\d+", word)]
    names = [word for word in arguments if not re.fullmatch(r"x\d+", word)]
    for name in names or FORMATS:
        for count in tokens or [1]:
            print(told(name, count), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
