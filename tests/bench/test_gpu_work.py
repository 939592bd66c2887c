"""The work of `bench gpu` on the CPU, small: it is counted right, a right result passes and a wrong one does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from headrace.bench import gpu_clock, gpu_experts, gpu_measure, gpu_roofs, gpu_work  # noqa: E402
from headrace.bench.gpu_decode import make_pages  # noqa: E402
from headrace.bench.gpu_measure import Asking, measure, warm  # noqa: E402
from headrace.bench.gpu_work import GpuWork, Margin, build  # noqa: E402

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
LATENT = {"heads": 4, "head_dim": 48, "value_dim": 32, "dtype": "bfloat16"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "paged": ("paged", {"key_lens": [64, 64, 64], "page_size": 16, **HEADS}),
    "ragged": ("paged", {"key_lens": [130, 7, 20], "page_size": 16, **HEADS}),
    "latent": ("latent", {"key_lens": [70, 5], "page_size": 16, **LATENT}),
    "dense": ("dense", {"batch": 2, "tokens": 40, **HEADS}),
    "exact": ("dense", {"batch": 1, "tokens": 40, **HEADS, "dtype": "float32", "precision": "exact"}),
    "dense_decode": ("dense", {"batch": 2, "tokens": 40, "queries": 1, **HEADS}),
    "backward": ("backward", {"batch": 2, "tokens": 40, **HEADS}),
    "norm": ("norm", {"tokens": 9, "dim": 64, "dtype": "bfloat16"}),
    "rope": ("rope", {"tokens": 9, "head_dim": 32}),
    "rotate": ("rotate", {"tokens": 9, "heads": 3, "head_dim": 32, "dtype": "bfloat16"}),
    "append": ("append", {"tokens": 21, "page_size": 16, **HEADS}),
    "linear": ("linear", {"weight": "BF16", "shapes": [[96, 256], [48, 256]], "tokens": 1}),
    "linear_int4": ("linear", {"weight": "INT4", "shapes": [[96, 256]], "tokens": 1}),
    "linear_int8": ("linear", {"weight": "INT8", "shapes": [[96, 256]], "tokens": 8}),
    "linear_fp8": ("linear", {"weight": "FP8", "shapes": [[96, 256]], "tokens": 1}),
    "linear_q4_k": ("linear", {"weight": "Q4_K", "shapes": [[96, 256]], "tokens": 1}),
    "moe": ("moe", {"tokens": 3, "experts": 4, "chosen": 2, "dim": 32, "inner": 48, "dtype": "bfloat16"}),
    "sample": ("sample", {"rows": 6, "vocab": 300}),
    "logprobs": ("logprobs", {"rows": 6, "vocab": 300, "top": 5}),
    "merge": ("merge", {"parts": 3, "tokens": 5, "heads": 4, "head_dim": 32, "dtype": "bfloat16"}),
}
EACH = pytest.mark.parametrize("name", ROWS)
# Weights that are packed for a GPU are nothing for the CPU's kernels.
ON_CPU = pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("linear")])


def made(name: str) -> GpuWork:
    work, sizes = ROWS[name]
    return build(work, sizes, "cpu")


def notes(work: GpuWork, **asked: Any) -> tuple[dict[str, Any], list[Any]]:
    heard: list[Any] = []
    return measure(work, Asking("cpu", repeat=5, **asked), heard.append), heard


@pytest.mark.costly
@ON_CPU
def test_every_row_is_measured_and_right(name: str) -> None:
    found, heard = notes(made(name))
    assert found["chosen"] in found["by"], found["failed"]
    ours = found["by"][found["chosen"]]
    assert ours["n"] == 5 and 0 < ours["min_s"] <= ours["median_s"] <= ours["max_s"] and ours["way"] == "wall"
    assert 0 <= ours["error"] <= ours["allowed"]
    assert heard[0] == {"at": found["chosen"]} and heard[-1] == {"at": ""}
    assert found["num_bytes"] > 0 and found["flops"] > 0
    assert set(found["cannot"]) <= {kernel.name for kernel in made(name).kernels}


@pytest.mark.costly
@pytest.mark.parametrize("name", [name for name in ROWS if name != "sample"])
def test_a_wrong_result_is_not_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = made(name)
    assert work.check
    for module in _modules():
        margin = module.margin
        monkeypatch.setattr(
            module, "margin", lambda got, *rest, margin=margin: margin([_spoiled(g) for g in got], *rest)
        )
    assert work.check(_chosen(work)).wrong


@pytest.mark.slow
@EACH
def test_the_kernels_of_gpus_pass_the_check_of_their_row(name: str) -> None:
    """In the interpreter, where they take arrays of the CPU."""
    work = made(name)
    ours = _of_gpus(work)
    for kernel in ours:
        assert work.check and not work.check(kernel).wrong, kernel
    if not ours:
        pytest.skip("none takes it here")


def _modules() -> list[Any]:
    from headrace.bench import gpu_decode, gpu_experts, gpu_linear, gpu_prefill, gpu_small

    return [gpu_decode, gpu_experts, gpu_linear, gpu_prefill, gpu_small]


def _spoiled(got: Any) -> Any:
    wrong = got.clone()
    wrong[-1] += 1
    return wrong


def _chosen(work: GpuWork) -> str:
    from headrace.ops.explanation import explain_request

    told = explain_request(work.kernels, work.request)
    return told.chosen.kernel if told.chosen else _of_gpus(work)[0]


def _of_gpus(work: GpuWork) -> list[str]:
    """Kernels that take the work's tensors in the interpreter."""
    return [each.name for each in work.kernels if "cuda" in each.devices and not each.why_not(work.request)]


def test_a_token_that_cannot_have_been_drawn_is_wrong() -> None:
    logits = torch.arange(100.0).repeat(4, 1)  # greedy, drawn, greedy, drawn; the top 50 are 50 .. 99
    for tokens, misses in (([99, 50, 99, 99], 0), ([98, 49, 99, 60], 2), ([-1, 100, 99, 99], 2)):
        assert gpu_experts._misses(torch.tensor(tokens, dtype=torch.int32), logits) == misses


def test_a_result_that_was_not_written_is_wrong() -> None:
    nothing = torch.full((3,), torch.nan)
    assert gpu_work.margin([nothing], [torch.ones(3)], [torch.ones(3)], "float32").wrong


@pytest.mark.parametrize("name", ["paged", "ragged", "latent"])
def test_what_must_not_be_read_is_nan(name: str) -> None:
    work, sizes = ROWS[name]
    shapes = [(2, 8)] if name != "latent" else [(8,)]
    (pool,), tables = make_pages(sizes["key_lens"], 16, shapes, "float32", "cpu")
    assert len(tables) == 2 and not set(tables[0].flatten().tolist()) & set(tables[1].flatten().tolist()) - {0}
    assert pool[0].isnan().all()
    for table in tables:
        for row, length in zip(table, sizes["key_lens"], strict=True):
            keys = pool[row.long()].flatten(0, 1)
            assert not keys[:length].isnan().any() and keys[length:].isnan().all()


def test_decode_is_counted_by_its_true_lengths() -> None:
    work = made("ragged")
    keys = 130 + 7 + 20
    assert work.num_bytes == 2 * (keys * 2 * 64 + 3 * 4 * 64)
    assert work.flops == 2 * keys * 4 * 64 and work.sets == 2


def test_sets_of_buffers_are_several_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 60 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert gpu_work.num_sets(16 << 20, "cuda") == 15 and gpu_work.num_sets(1 << 40, "cuda") == 1


# What a candidate may do


def with_peers(**peers: Any) -> GpuWork:
    return replace(made("norm"), peers={name: (lambda call=call: call) for name, call in peers.items()})


def test_a_candidate_that_raises_is_said_and_the_others_go_on() -> None:
    def raises(number: int) -> None:
        raise ValueError("no such thing")

    found, heard = notes(with_peers(bad=raises, good=lambda number: None))
    assert found["failed"] == {"bad": "ValueError: no such thing"} and "good" in found["by"]
    assert {"failed": "bad", "why": "ValueError: no such thing"} in heard


def test_a_peer_that_is_not_installed_says_so() -> None:
    def ready() -> Any:
        import no_such_package  # noqa: F401

    found, _ = notes(replace(made("norm"), peers={"another": ready}))
    assert found["failed"] == {"another": "not installed: no_such_package"}


def test_peers_can_be_named() -> None:
    calls = {"flashinfer": print, "flash_attn 3": print, "torch SDPA": print, "SDPA flash": print}
    peers = gpu_measure.wanted_peers(calls, ("flash_attn",))  # type: ignore[arg-type]
    assert list(peers) == ["flash_attn 3", "torch SDPA", "SDPA flash"]
    assert list(gpu_measure.wanted_peers(calls, ())) == list(calls)  # type: ignore[arg-type]


def test_a_wrong_kernel_is_not_timed() -> None:
    found, _ = notes(replace(made("norm"), check=lambda kernel: Margin(0.5, 0.1)))
    assert list(found["by"]) == ["torch rms_norm"] and found["regret"] is None
    assert all("the result is wrong" in why for why in found["failed"].values())


def test_what_is_left_out_keeps_its_reason_and_time_ends() -> None:
    chosen = _chosen(made("norm"))
    found, _ = notes(made("norm"), without={chosen: "it hung"})
    assert found["failed"] == {chosen: "it hung"} and chosen not in found["by"]
    found, _ = notes(made("norm"), seconds=-1.0)
    assert set(found["failed"].values()) == {"out of time"} and found["by"] == {}


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def raises(number: int) -> None:
        monkeypatch.setattr(gpu_measure, "synchronize", lost)
        raise ValueError

    with pytest.raises(SystemExit, match="the device is lost after bad: RuntimeError: CUDA error"):
        notes(with_peers(bad=raises))


def test_what_cannot_be_captured_ends_the_process_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(call: Any, sets: int, device: str, *, eager: bool) -> gpu_clock.Timed:
        if not eager:
            raise gpu_clock.CaptureFailed("operation not permitted when stream is capturing")
        return gpu_clock.Timed(lambda: 1.0, "eager")

    monkeypatch.setattr(gpu_measure, "timed", timed)
    work, heard = made("norm"), []
    chosen = _chosen(work)
    with pytest.raises(SystemExit, match=f"{chosen} cannot be captured: CaptureFailed: operation"):
        measure(work, Asking("cpu", repeat=5), heard.append)
    assert heard == [{"at": chosen}, {"eager": chosen}]
    names = (*(kernel.name for kernel in work.kernels), "torch rms_norm")
    found, _ = notes(work, eager=names)
    assert found["by"][chosen]["way"] == "eager" and found["by"][chosen]["median_s"] == 1.0


def test_the_far_behind_are_measured_once() -> None:
    seconds = {"quick": 1.0, "near": 2.0, "far": 20.0}
    ready = {name: gpu_clock.Timed(lambda each=each: each, "wall") for name, each in seconds.items()}
    assert gpu_measure._samples(ready, 5) == {"quick": [1.0] * 5, "near": [2.0] * 5, "far": [20.0]}
    assert gpu_measure._samples(ready, 5, chosen="far")["far"] == [20.0] * 5


def test_regret_is_among_our_own_kernels_alone() -> None:
    found, _ = notes(with_peers(instant=lambda number: None))
    ours = [name for name in found["by"] if name != "instant"]
    assert found["fastest"] in ours and found["regret"] >= 1.0
    assert found["by"]["instant"]["error"] is None


def test_warming_up_runs_every_kernel() -> None:
    assert warm(made("norm"), "cpu")[0] == _chosen(made("norm"))


# The device


def test_the_roofs_of_a_device_are_measured() -> None:
    found = gpu_roofs.measure("cpu")
    assert {"copy", "read", "bf16", "fp32", "fp64"} <= set(found["roofs"])
    assert all(rate > 0 for rate in found["roofs"].values()) and found["launch_s"] > 0
    assert set(found["failed"]) <= {"fp8", "int8", "fp16"}


def test_measured_roofs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(gpu_roofs, "keep_gpu", kept.append)
    device = {"name": "NVIDIA H200", "arch": "sm_90", "multiprocessors": 132, "memory_bytes": 1 << 37}
    gpu_roofs._keep(device, {"copy": 4.3e12, "read": 4.4e12, "bf16": 7.9e14}, {"graph_launch_s": 1e-6})
    assert kept[0].roofs == {"copy": 4.3e12, "bf16": 7.9e14} and kept[0].launch_s == 1e-6
