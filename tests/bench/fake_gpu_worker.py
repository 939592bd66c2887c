"""A worker of `bench gpu` without a GPU: what its rows are called says how their kernels behave."""

from __future__ import annotations

import os
import time
from typing import Any

from headrace.bench.asked_process import Note, serve

ROOFS = {"copy": 4e12, "bf16": 8e14}


def answer(request: dict[str, Any], note: Note) -> Any:
    call = request["call"]
    if call == "describe":
        if request["device"] == "no GPU":
            raise RuntimeError("torch sees no GPU")
        return {"name": "Paper GPU", "arch": "sm_0", "torch": "0", "triton": "0"}
    if call == "roofs":
        return {"roofs": ROOFS, "launch_s": 5e-6, "graph_launch_s": 1e-6, "failed": {"fp8": "no such type"}}
    sizes = request["row"]["sizes"]
    if call == "warm":
        return ["one"]
    without = request["asking"]["without"]
    if sizes.get("raises"):
        raise ValueError("this row cannot be built")
    if sizes.get("dies_at") and sizes["dies_at"] not in without:
        note({"at": sizes["dies_at"]})
        os.write(2, b"an illegal memory access\n")
        os._exit(3)
    if sizes.get("hangs_at") and sizes["hangs_at"] not in without:
        note({"at": sizes["hangs_at"]})
        time.sleep(600)
    if sizes.get("breaks_at") and sizes["breaks_at"] not in without:
        note({"at": sizes["breaks_at"]})
        note({"failed": sizes["breaks_at"], "why": "the first error"})
        os._exit(3)
    if sizes.get("not_captured") and sizes["not_captured"] not in request["asking"]["eager"]:
        note({"at": sizes["not_captured"]})
        note({"eager": sizes["not_captured"]})
        raise SystemExit("it cannot be captured")
    return row(sizes, without)


def row(sizes: dict[str, Any], without: dict[str, str]) -> dict[str, Any]:
    """Kernel "one" takes 1 ms, "two" 2 ms, unless they are left out."""
    by = {name: one(seconds) for name, seconds in {"one": 1e-3, "two": 2e-3}.items() if name not in without}
    chosen = sizes.get("chosen", "one")
    known = chosen in by and len(by) > 1
    return {
        "num_bytes": 3_600_000_000,
        "flops": 400_000_000_000,
        "unit": "bf16",
        "sets": 1,
        "chosen": chosen,
        "predicted_s": {"one": 1e-3, "two": 2e-3},
        "predictions": {name: prediction(name) for name in by},
        "by": by,
        "cannot": {"three": "GPU generation: needs sm_90, got sm_0"},
        "failed": dict(without),
        "regret": by[chosen]["median_s"] / 1e-3 if known else None,
        "fastest": "one",
        "beyond_noise": known and chosen != "one",
    }


def prediction(name: str) -> dict[str, Any]:
    counts = {"memory_s": 9e-4, "compute_s": 5e-4, "tiles": 0.0, "segments": 0.0, "merges": 0.0}
    return {"key": f"paged_attention/{name}/bf16", **counts}


def one(seconds: float) -> dict[str, Any]:
    times = {"median_s": seconds, "min_s": 0.9 * seconds, "max_s": 1.1 * seconds, "n": 7, "way": "graph"}
    return {**times, "ready_s": 1.0, "error": 0.001, "rms_error": 0.0005, "allowed": 0.01}


if __name__ == "__main__":
    serve(answer)
