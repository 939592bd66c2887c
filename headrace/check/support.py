"""What attention can be asked for and which kernels do it, as the kernels' own `why_not` says. README keeps the table.

python -m headrace.check.support           prints the table
python -m headrace.check.support --write   puts it into README.md

A test compares the two. The machine it is made on does not matter: a missing instruction set, library or GPU is no
reason here, and kernels of GPUs are asked about arrays on one. A kernel has a feature when it takes it in one of the
types bfloat16, float32 and float64; rows of a type ask for that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.check.layout import ROOT
from headrace.errors import ArgumentError
from headrace.ops.call_request import kernels_of, requests_of
from headrace.ops.per_gpu import LIBRARY
from headrace.ops.per_isa import INSTRUCTION_SET, NATIVE_EXTENSION
from headrace.ops.select import Kernel, Reason, Request, reasons_against

BEGIN, END = "<!-- support -->", "<!-- /support -->"
TYPES = ("bfloat16", "float32", "float64")
YES, ELSEWHERE = "yes", "·"

# Requests that a kernel must all serve, made for a type.
Asked = Callable[[str], list[Request]]


def attention(
    *,
    queries: int = 40,
    heads: tuple[int, int] = (8, 2),
    dims: tuple[int, int] = (64, 64),
    kv: str = "",
    dtype: str = "",
    **options: Any,
) -> Asked:
    """Dense attention, kv: the type of keys and values; dtype: where it is not the kernel's."""

    def asked(own: str) -> list[Request]:
        own = dtype or own
        cached = kv or own
        shapes = [(2, queries, heads[0], dims[0])]
        shapes += [(2, 300, heads[1], dim // 2 if cached == "uint8" else dim) for dim in dims]
        scales: dict[str, Any] = (
            {"key_scales": (2, 300, heads[1]), "value_scales": (2, 300, heads[1])} if cached in SCALED else {}
        )
        types = {"query": own, "key": cached, "value": cached, "mask": options.get("mask_dtype", "bool")}
        rest = {name: value for name, value in options.items() if name != "mask_dtype"}
        return requests_of("attention", *shapes, dtype=types, **scales, **rest)

    return asked


SCALED = ("int8", "uint8")


def paged(page_size: int = 16, **options: Any) -> Asked:
    """A ragged batch over pages."""

    def asked(own: str) -> list[Request]:
        pages = (64, page_size, 2, 64)
        given: dict[str, Any] = {"query_starts": (4,), **options}
        return requests_of("paged_attention", (9, 8, 64), pages, pages, (3, 4), (3,), dtype=own, **given)

    return asked


def ragged(own: str) -> list[Request]:
    """Requests of different lengths, self attention."""
    return requests_of("attention", (90, 8, 64), (90, 2, 64), (90, 2, 64), dtype=own, query_starts=(5,))


def latent(own: str) -> list[Request]:
    """DeepSeek's absorbed form."""
    options: dict[str, Any] = {"query_starts": (4,), "value_dim": 512, "scale": 0.1}
    return requests_of("mla_attention", (9, 128, 576), (64, 64, 576), (3, 8), (3,), dtype=own, **options)


def gradients(own: str) -> list[Request]:
    """Of dense attention with sinks, and of a ragged batch."""
    dense: list[tuple[int, ...]] = [(2, 40, 8, 64), (2, 40, 8, 64), *[(2, 300, 2, 64)] * 2, (2, 40, 8, 64)]
    ragged: list[tuple[int, ...]] = [(90, 8, 64), (90, 8, 64), *[(90, 2, 64)] * 2, (90, 8, 64)]
    found = requests_of("attention_backward", *dense, dtype=own, lse=(2, 40, 8), sinks=(8,))
    return found + requests_of("attention_backward", *ragged, dtype=own, lse=(90, 8), query_starts=(5,))


def every(*parts: Asked) -> Asked:
    """All of these together."""
    return lambda own: [request for part in parts for request in part(own)]


def appended(own: str) -> list[Request]:
    """Rotated and quantized on the way into the pages."""
    shapes: dict[str, Any] = {"slots": (9,), "query": (9, 8, 64), "table": (9, 64)}
    shapes |= dict.fromkeys(("key_scales", "value_scales"), (64, 16, 2))
    types = {"key": own, "value": own, "query": own, "key_pages": "int8", "value_pages": "int8"}
    pages = (64, 16, 2, 64)
    return requests_of("append_pages", (9, 2, 64), (9, 2, 64), pages, pages, dtype=types, **shapes)


def merged(own: str) -> list[Request]:
    """Two partial results."""
    return requests_of("merge_attention", [(9, 8, 64), (9, 8, 64)], dtype=own)


FEATURES: dict[str, tuple[Asked, tuple[str, ...]]] = {
    "bfloat16": (attention(dtype="bfloat16"), ()),
    "float16": (attention(dtype="float16"), ()),
    "float32, float32 arithmetic": (attention(dtype="float32", precision="exact"), ("exact",)),
    'float32, `precision="fast"`': (attention(dtype="float32", precision="fast"), ()),
    "float64, float64 arithmetic": (attention(dtype="float64"), ("exact",)),
    "float8 e4m3 keys and values": (attention(kv="float8_e4m3fn", precision="fast"), ()),
    "int8, int4 keys and values": (
        every(attention(kv="int8", precision="fast"), attention(kv="uint8", precision="fast")),
        (),
    ),
    "float32 out of 16-bit in": (attention(dtype="bfloat16", out_dtype="float32"), ()),
    "causal, bottom right and top left": (
        every(attention(causal=True), attention(causal=True, align="top_left")),
        (),
    ),
    "window, left and right": (attention(window=(7, 3)), ()),
    "softcap": (attention(softcap=30.0), ()),
    "ALiBi": (attention(alibi_slopes=(8,)), ()),
    "sinks": (attention(sinks=(8,)), ()),
    "dense mask, bool and float": (
        every(attention(mask=(2, 8, 40, 300)), attention(mask=(2, 8, 40, 300), mask_dtype="float32")),
        (),
    ),
    "tree mask over pages": (paged(mask=(9, 3)), ()),
    "ragged batch": (ragged, ()),
    "pages of any size": (every(*(paged(size) for size in (1, 3, 16, 256))), ()),
    "any ratio of heads": (every(*(attention(heads=(2 * n, 2)) for n in (1, 5, 7, 16, 71))), ()),
    "any head_dim, another value_dim": (
        every(*(attention(dims=dims) for dims in ((1, 1), (17, 31), (80, 80), (192, 128), (576, 512)))),
        (),
    ),
    "latent attention (MLA), absorbed": (latent, ()),
    "latent attention, un-absorbed": (attention(heads=(16, 16), dims=(192, 128), causal=True), ()),
    "top-k by keys and by pages": (every(paged(indices=(9, 5)), paged(page_indices=(9, 2))), ()),
    "batch-invariant": (attention(deterministic=True), ("batch_invariant",)),
    "log-sum-exp": (attention(), ()),
    "merge of partial results": (merged, ()),
    "append, rope and quantize in one": (appended, ()),
    "gradients, dense and ragged, sinks too": (gradients, ("deterministic", "batch_invariant")),
}


def kernel_names() -> list[str]:
    """The columns: every kernel of attention for the CPU, and what those for GPUs are written in, together."""
    found = dict.fromkeys(map(_column_of, kernels_of("attention")))
    return [name for name in found if name != "torch"]


def _column_of(kernel: Kernel) -> str:
    return kernel.name if "cpu" in kernel.devices else kernel.name.partition("_")[0]


@dataclass(frozen=True)
class Cell:
    """What a kernel says of a feature: yes, "·" of an op it is not of, or no and why."""

    mark: str
    why: str = ""
    of_type: bool = False  # whether it only says that another type is another kernel's


def cell(kernel: str, asked: Asked, require: Sequence[str] = ()) -> Cell:
    """The best that it says of one of the types; of refusals, rather one that is not about the type."""
    found = [_said(kernel, asked, own, require) for own in TYPES]
    return min(found, key=lambda each: (each.mark != YES, each.mark != ELSEWHERE, each.of_type))


def _said(name: str, asked: Asked, own: str, require: Sequence[str]) -> Cell:
    try:
        requests = asked(own)
    except ArgumentError as error:  # the op itself does not take it
        return Cell("no", error.message)
    for request in requests:
        kernels = [kernel for kernel in kernels_of(request.op) if _column_of(kernel) == name]
        against = [_reasons(kernel, request, require) for kernel in kernels]
        if not kernels:
            return Cell(ELSEWHERE)
        if all(against):
            reason = min((reasons[0] for reasons in against), key=lambda each: each.predicate in _OF_ANOTHER)
            return Cell("no", str(reason), reason.predicate == "dtype of query")
    return Cell(YES)


_OF_ANOTHER = ("op", "layout", "query rows")  # predicates of a kernel that is for other calls


def _reasons(kernel: Kernel, request: Request, require: Sequence[str]) -> list[Reason]:
    """Against it on a machine that has its instruction set, or its GPU."""
    request = request if "cpu" in kernel.devices else replace(request, device="cuda", arch=_arch_for(kernel))
    own = [reason for reason in kernel.why_not(request) if reason.predicate not in OF_MACHINE]
    return own or reasons_against(_anywhere(kernel), request, require)


OF_MACHINE = (INSTRUCTION_SET, NATIVE_EXTENSION, LIBRARY)


def _arch_for(kernel: Kernel) -> str:
    return kernel.isa if kernel.isa.startswith("sm_") else "sm_90"


def _anywhere(kernel: Kernel) -> Kernel:
    return replace(kernel, why_not=lambda request: [])


def support_lines() -> list[str]:
    """The table in Markdown, its reasons numbered below."""
    names, notes = kernel_names(), dict[str, int]()
    lines = [f"| | {' | '.join(name.removeprefix('cpu_') for name in names)} |", f"|---|{'---|' * len(names)}"]
    for feature, (asked, require) in FEATURES.items():
        cells = [_numbered(cell(name, asked, require), notes) for name in names]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{ELSEWHERE}: an op that is memory's alone; the kernel of the instruction set below, or of the GPU, does it.",
    ]
    return lines + [f"{number}: {text}." for text, number in notes.items()]


def _numbered(found: Cell, notes: dict[str, int]) -> str:
    return f"no ({notes.setdefault(found.why, len(notes) + 1)})" if found.why else found.mark


def support_section() -> str:
    """The table as README.md holds it, markers included."""
    return "\n".join([BEGIN, *support_lines(), END])


def readme_section(readme: str) -> str:
    """What stands between the markers of a README, markers included; empty when they are not there."""
    found = re.search(re.escape(BEGIN) + ".*?" + re.escape(END), readme, re.DOTALL)
    return found.group() if found else ""


def write_support(root: Path) -> None:
    """Brings the table in README.md up to date."""
    path = root / "README.md"
    readme = path.read_text(encoding="utf-8")
    path.write_text(readme.replace(readme_section(readme), support_section()), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write_support(ROOT)
    else:
        print(support_section())
