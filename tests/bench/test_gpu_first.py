"""First calls in `bench gpu`: in processes of their own, caches cold, then warm; and the named cases of regret."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from headrace.bench import gpu_first, gpu_regret
from headrace.bench.gpu_rows import FIRST, regret_rows, target_rows
from headrace.bench.gpu_work import build
from headrace.ops.explanation import explain_request


def test_every_first_call_has_sizes() -> None:
    assert set(FIRST) == set(gpu_first.SIZES) == {row.sizes["op"] for row in target_rows() if row.work == "first"}


def test_a_first_call_is_timed_from_inside() -> None:
    told = gpu_first.first_call("dense", "cpu")
    assert told["chosen"] and told["next_s"] > 0 and told["first_s"] > 0 and told["import_s"] > 0


def test_the_middle_of_the_warm_processes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, folders = iter([9.0, 0.3, 0.1, 0.2]), set()

    def process(op: str, device: str, environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
        folder = Path(environment["TRITON_CACHE_DIR"]) / "some"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.cubin").write_bytes(bytes(1000))
        folders.add(str(folder))
        return {"chosen": "k", "first_s": next(seconds), "import_s": 1.0, "next_s": 1e-4}

    monkeypatch.setattr(gpu_first, "_process", process)
    found = gpu_first.measure_first("paged", "cuda", 10.0)
    assert (found["cold_first_s"], found["first_s"]) == (9.0, 0.2)
    assert (found["cache_files"], found["cache_bytes"]) == (1, 1000) and len(folders) == 1
    assert not Path(folders.pop()).exists()


def test_a_process_that_fails_or_hangs_is_said() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such op'"):
        gpu_first._process("no such op", "cpu", {}, 60.0)
    with pytest.raises(RuntimeError, match="no first result in 0 s"):
        gpu_first._process("dense", "cpu", {}, 0.01)


# The named cases


@pytest.mark.parametrize("name", ["regret_decode_long_bfloat16", "regret_dense_cross_float32"])
def test_a_named_case_is_work_for_every_kernel(name: str) -> None:
    assert name in gpu_regret.case_names()
    work = build("case", {"name": name}, "cpu")
    told = explain_request(work.kernels, work.request)
    assert told.chosen and work.call(told.chosen.kernel, 0).out.isfinite().all()
    assert work.num_bytes == work.request.traffic.num_bytes and work.check is None


def test_named_cases_are_rows_in_their_order() -> None:
    assert [row.sizes["name"] for row in regret_rows()] == gpu_regret.case_names()
    assert len(gpu_regret.case_names()) > 50
