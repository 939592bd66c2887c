"""How long a first call takes: where nothing is compiled yet, and in a new process whose caches on disk are warm.

python -m headrace.bench.gpu_first OP DEVICE    is such a process: one call, timed from inside, a line of JSON

torch and Triton are imported and the device is in use before the clock starts; headrace's own kernel modules are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from headrace.bench.asked_process import module_command
from headrace.bench.gpu_work import build

# Small: what is compiled is what counts.
_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "paged": {"key_lens": (1000, 300), "page_size": 64, **_LLAMA},
    "latent": {
        "key_lens": (1000, 300),
        "page_size": 64,
        "heads": 16,
        "head_dim": 576,
        "value_dim": 512,
        "dtype": "bfloat16",
    },
    "dense": {"batch": 1, "tokens": 300, **_LLAMA},
    "linear": {"weight": "BF16", "shapes": ((4096, 4096),), "tokens": 1},
}
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_WARM = 3  # warm processes, of which the median counts


def measure_first(op: str, device: str, limit_s: float) -> dict[str, Any]:
    """Seconds of a first call, compiling and warm. RuntimeError with a process's last words where it fails."""
    end = monotonic() + limit_s

    def told() -> dict[str, Any]:
        return _process(op, device, environment, max(0.0, end - monotonic()))

    with tempfile.TemporaryDirectory() as folder:
        environment = {name: f"{folder}/{name.lower()}" for name in _CACHES}
        cold = told()
        warm = sorted((told() for _ in range(_WARM)), key=lambda each: float(each["first_s"]))
        files = [path for path in Path(environment[_CACHES[0]]).rglob("*") if path.is_file()]
        sizes = {"cache_files": len(files), "cache_bytes": sum(path.stat().st_size for path in files)}
    return {**warm[_WARM // 2], "cold_first_s": cold["first_s"], **sizes}


def _process(op: str, device: str, environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    command, inherited = module_command("headrace.bench.gpu_first", op, device)
    begin = perf_counter()
    try:
        done = subprocess.run(
            command, env={**inherited, **environment}, capture_output=True, text=True, timeout=limit_s, check=True
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip().rpartition("\n")[2][:300]) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no first result in {limit_s:.0f} s") from error
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": perf_counter() - begin}


def first_call(op: str, device: str) -> dict[str, Any]:
    """Seconds of this process's first call of an op, and of the next one."""
    from headrace.bench.gpu_clock import synchronize
    from headrace.ops.explanation import explain_request

    begin = perf_counter()
    _import_others()
    work = build(op, SIZES[op], device)
    synchronize(device)
    import_s = perf_counter() - begin
    told = explain_request(work.kernels, work.request).chosen
    kernel = told.kernel if told else ""
    seconds = []
    for _ in range(2):
        begin = perf_counter()
        work.call(kernel, 0)
        synchronize(device)
        seconds.append(perf_counter() - begin)
    return {"chosen": kernel, "import_s": import_s, "first_s": seconds[0], "next_s": seconds[1]}


def _import_others() -> None:
    import contextlib

    import torch

    del torch
    with contextlib.suppress(ModuleNotFoundError):
        import triton

        del triton


if __name__ == "__main__":
    print(json.dumps(first_call(*sys.argv[1:3])))
