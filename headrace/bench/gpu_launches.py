"""The rows of `headrace bench gpu` on a GPU that is not there: what each of our kernels would launch for them.

python -m headrace.bench.gpu_launches sm_90 [row ...]    one line of JSON a row

Rows are cut to what is made in a moment; see check/pretend_gpu.py for what is real.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from headrace.bench.gpu_rows import target_rows
from headrace.bench.gpu_work import build
from headrace.check.pretend_gpu import Launch, no_waiting, pretend
from headrace.ops.select import reasons_against

_MOST = {"key_lens": 600, "tokens": 256, "batch": 2, "experts": 8}  # of sizes; of key_lens the first few


def small(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A row's sizes cut to what is made in a moment: kernels and their configurations stay what they are."""
    found = dict(sizes)
    for name, most in _MOST.items():
        if isinstance(found.get(name), int):
            found[name] = min(found[name], most)
        elif name in found:
            found[name] = tuple(min(number, most) for number in found[name][:3])
    return found


def launched(work: str, sizes: Mapping[str, Any], launches: list[Launch]) -> dict[str, list[Launch]]:
    """What each of our kernels that can serve a row launches for it; an error where one waits for the GPU."""
    made, found = build(work, small(sizes), "cpu"), {}
    for kernel in made.kernels:
        if kernel.name.startswith(("triton_", "gluon_")) and not reasons_against(kernel, made.request):
            first = len(launches)
            with no_waiting():
                made.call(kernel.name, 0)
            found[kernel.name] = launches[first:]
    return found


def main(arguments: Sequence[str]) -> None:
    """One line for each row: what its kernels launched, or the error."""
    launches = pretend(arguments[0])
    for row in target_rows():
        if row.work == "first" or not (row.name in arguments[1:] or len(arguments) == 1):
            continue
        told: dict[str, Any] = {"row": row.name}
        try:
            found = launched(row.work, row.sizes, launches)
            told["kernels"] = {name: [asdict(each) for each in made] for name, made in found.items()}
        except Exception as error:  # whatever it is, it would have happened on the GPU
            told["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
