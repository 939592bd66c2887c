"""How ops see devices: kernels of GPUs beside those of the CPU, priced and explained without a GPU, and run by name."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import gpu_machine, ops
from headrace.errors import ArgumentError, KernelError
from headrace.gpu_machine import Gpu, gpu_of, keep_gpu, keep_gpu_speeds, known_gpu
from headrace.kernels import arrays
from headrace.machine import KernelSpeed, this_machine
from headrace.ops import per_gpu
from headrace.ops.call_request import requests_of
from headrace.ops.explanation import explain_request
from headrace.ops.per_gpu import arithmetic_of, gpu_kernel, roof_seconds, tiled_plan
from headrace.ops.per_isa import per_isa
from headrace.ops.select import Plan, Reason, Request, Traffic, choose, machine_of

PREFILL = ((1, 256, 8, 64), (1, 256, 2, 64), (1, 256, 2, 64))


def request(device: str = "cuda", arch: str = "sm_90", **options: Any) -> Request:
    traffic = Traffic(10**9, 10**12, "bf16")
    return Request("op", {"x": (1,)}, {"x": "bfloat16"}, traffic, options, device, arch)


def kernel(name: str = "triton_x", **options: Any) -> Any:
    return gpu_kernel(name, "headrace.kernels.triton.launch", lambda asked: [], **options)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cache directory with nothing in it, and none of what this process has kept."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_machine, "_in_process", {})
    for known in (gpu_machine.known_gpu, gpu_machine._gpu_of):
        known.cache_clear()
    yield tmp_path
    for known in (gpu_machine.known_gpu, gpu_machine._gpu_of):
        known.cache_clear()


# Where kernels run


def test_each_kind_of_kernel_refuses_the_others_arrays(no_interpreter: None) -> None:
    ours, theirs = per_isa(print, ("portable",))[0], kernel()
    for found, device, refused in ((ours, "cuda", "cuda"), (ours, "hip", "hip"), (theirs, "cpu", "cpu")):
        [reason] = found.why_not(request(device))
        assert (reason.predicate, reason.observed) == ("device", refused)
    assert ours.why_not(request("cpu", "")) == [] == theirs.why_not(request()) == theirs.why_not(request("hip"))


def test_the_interpreter_is_never_chosen_but_runs_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    both = (kernel(), *per_isa(print, ("portable",)))
    asked = request("cpu", "")
    assert choose(both, asked).name == "cpu_portable"
    assert choose(both, asked, "triton_x").name == "triton_x"
    with pytest.raises(KernelError, match="no kernel can run this"):
        choose(both[:1], asked)
    told = explain_request(both, asked)
    assert told.chosen and (told.chosen.kernel, [found.kernel for found in told.able]) == ("cpu_portable", ["triton_x"])
    assert explain_request(both[:1], asked).chosen is None


def test_a_kernel_for_one_generation_needs_it_and_has_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = kernel(arches=("sm_90",))
    assert hopper.why_not(request()) == [] and hopper.isa == "sm_90"
    [reason] = hopper.why_not(request(arch="sm_80"))
    assert (reason.predicate, reason.required) == ("GPU generation", "sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert hopper.why_not(request("cpu", ""))[0].predicate == "device"


@pytest.mark.parametrize(
    "arch,able", [("sm_75", False), ("sm_80", True), ("sm_90a", True), ("sm_120", True), ("gfx942", True)]
)
def test_gpus_without_bfloat16_products_are_refused(arch: str, able: bool) -> None:
    assert (kernel().why_not(request(arch=arch)) == []) == able


def test_missing_libraries_are_a_reason_beside_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Reason("head_dim", "7", "8")
    found = gpu_kernel("triton_x", "headrace.kernels.triton.launch", lambda asked: [own])
    monkeypatch.setattr("headrace.ops.per_gpu._installed", lambda library: library != "triton")
    reasons = found.why_not(request())
    assert [reason.predicate for reason in reasons] == ["library", "head_dim"] and "triton" in reasons[0].observed
    assert gpu_kernel("torch_x", "headrace.kernels.torch.x", lambda asked: []).why_not(request()) == []


@pytest.mark.parametrize(
    "name,version,told",
    [
        ("triton", "3.5.1", "triton 3.5.1"),
        ("pytorch-triton-rocm", "3.3.0+git", "triton 3.3.0+git"),
        ("triton", "3.6.0", ""),
        ("triton", "3.10.0", ""),
        ("somebody's", "1.0", ""),  # by a name that we do not know: it is tried
    ],
)
def test_an_old_library_is_a_reason(name: str, version: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(per_gpu, "version", version_of)
    monkeypatch.setattr(per_gpu, "_outdated", per_gpu._outdated.__wrapped__)
    assert [reason.observed for reason in per_gpu.why_not_installed(["triton"])] == ([told] if told else [])


def test_a_kernel_is_imported_by_its_first_run() -> None:
    found = gpu_kernel("triton_x", "headrace.kernels.triton.nothing_there", lambda asked: [])
    assert found.why_not(request()) == []
    with pytest.raises(ModuleNotFoundError, match="nothing_there"):
        found.run()


# What they cost


def test_the_cost_is_that_of_the_roof_which_binds_on_that_gpu() -> None:
    found = kernel(speed=KernelSpeed(1e-6, 0.5, 0.8))
    h200, a100 = (gpu_of(arch) for arch in ("sm_90", "sm_80"))
    assert machine_of(request(arch="sm_80")) is a100 and machine_of(request("cpu", "")) is this_machine()
    for gpu in (h200, a100):
        compute_s = 10**12 / gpu.roofs["bf16"] / 0.5
        assert found.cost(request(arch=gpu.arch), gpu) == pytest.approx(compute_s * 1.001 + 1e-6)


def test_a_launch_takes_what_was_measured_of_that_gpu() -> None:
    gpu, found = gpu_of("sm_90"), kernel()
    slow = replace(gpu, launch_s=gpu.launch_s + 1.0)
    assert found.cost(request(), slow) == pytest.approx(found.cost(request(), gpu) + 1.0)


def test_few_programs_get_a_part_of_the_roofs_and_empty_rows_cost_as_full_ones_do() -> None:
    gpu, asked = gpu_of("sm_90"), request()
    whole = roof_seconds(asked, gpu, Plan(workers=gpu.multiprocessors))
    few = roof_seconds(asked, gpu, Plan(workers=gpu.multiprocessors // 4, padding=3.0))
    assert whole == gpu.seconds(asked.traffic.num_bytes, asked.traffic.flops, "bf16")
    assert few[0] == pytest.approx(whole[0] / 1.5 * 4) and few[1] == pytest.approx(whole[1] * 3 * 4)
    assert roof_seconds(asked, gpu, Plan(workers=10**6)) == whole


@pytest.mark.parametrize(
    "shapes,packed,workers,padding",
    [
        (((2, 1, 32, 64), (2, 900, 8, 64)), False, 64, 128.0),
        (((2, 1, 32, 64), (2, 900, 8, 64)), True, 16, 32.0),
        (((1, 130, 4, 64), (1, 130, 4, 64)), False, 8, 256 / 130),
        (((4, 4096, 32, 64), (4, 4096, 32, 64)), False, 132, 1.0),
        (((60, 32, 64), (60, 8, 64), {"query_starts": (4,)}), True, 24, 128 / 80),
    ],
)
def test_a_tile_of_rows_is_a_program(shapes, packed, workers, padding) -> None:
    *arrays, starts = shapes if isinstance(shapes[-1], dict) else (*shapes, {})
    [asked] = requests_of("attention", *arrays, arrays[-1], device="cuda", arch="sm_90", **starts)
    plan = tiled_plan(asked, gpu_of("sm_90"), rows=128, packed=packed)
    assert (plan.workers, plan.padding) == (workers, pytest.approx(padding))


def test_the_plan_is_the_gpus_and_in_the_arithmetic_that_is_asked_for() -> None:
    gpu = gpu_of("sm_90")
    plan = kernel().planned(request(precision="auto", deterministic=True), gpu)
    assert (plan.workers, plan.arithmetic, plan.batch_invariant) == (gpu.multiprocessors, "bf16", True)
    own = kernel(plan=lambda asked, gpu: Plan(splits=7, arithmetic="tf32")).planned(request(), gpu)
    assert (own.splits, own.arithmetic) == (7, "tf32")


@pytest.mark.parametrize(
    "dtype,precision,device,expected",
    [
        ("bfloat16", "exact", "cuda", "bf16"),
        ("float16", "auto", "hip", "fp16"),
        ("float32", "auto", "cuda", "tf32x3"),
        ("float32", "exact", "hip", "fp32"),
        ("float32", "fast", "cuda", "tf32"),
        ("float32", "fast", "hip", "bf16"),
        ("float64", "auto", "cuda", "fp64"),
    ],
)
def test_arithmetic_is_never_quietly_less_than_the_types(dtype, precision, device, expected) -> None:
    assert arithmetic_of({"query": dtype}, precision, device) == expected


def test_exact_is_given_by_three_products_of_tf32_parts() -> None:
    asked = Request("op", {}, {"query": "float32"}, Traffic(1, 1, "tf32x3"), {"precision": "exact"}, "cuda", "sm_90")
    assert choose([kernel()], asked, require=("exact",)).name == "triton_x"
    with pytest.raises(KernelError, match="bf16 arithmetic"):
        choose([kernel()], request(precision="auto"), require=("exact",))


# GPUs


def test_every_sheet_makes_a_gpu_that_prices_every_unit() -> None:
    for name, (arch, *_) in gpu_machine._SHEETS.items():
        gpu = known_gpu(name)
        assert (gpu.arch, gpu.measured) == (arch, False)
        assert min(*(gpu.arithmetic_roof(unit) for unit in (*gpu_machine.UNITS, "tf32x3")), gpu.roofs["copy"]) > 1e11
        assert gpu.roofs["tf32"] <= gpu.roofs["bf16"]
    assert known_gpu("a GPU of tomorrow", "sm_90").roofs == known_gpu("NVIDIA H200").roofs
    assert gpu_of("sm_200").arch == "sm_200"


def test_what_is_measured_is_kept_and_the_rest_stays_the_data_sheets(own_cache: Path) -> None:
    sheet = known_gpu("NVIDIA H200")
    measured = Gpu("NVIDIA H200", "sm_90", {"copy": 4.1e12, "bf16": 7e14}, 131, launch_s=3e-6, memory_bytes=140)
    speeds = {"attention/triton_x/bf16": KernelSpeed(2e-6, 0.7)}
    assert keep_gpu(measured).measured and keep_gpu_speeds("NVIDIA H200", speeds).calibration == speeds
    gpu_machine._in_process.clear()  # as another process sees it
    gpu_machine.known_gpu.cache_clear()
    found = known_gpu("NVIDIA H200", "sm_90")
    assert (found.measured, found.multiprocessors, found.launch_s, found.memory_bytes) == (True, 131, 3e-6, 140)
    assert (found.roofs["copy"], found.roofs["bf16"], found.roofs["fp8"]) == (4.1e12, 7e14, sheet.roofs["fp8"])
    assert found.calibration == speeds and keep_gpu(measured).calibration == speeds


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "measured": {"roofs": {"copy": -1}}, "speeds": {}}'])
def test_a_file_that_is_not_ours_counts_as_none(own_cache: Path, text: str) -> None:
    (own_cache / "gpu-nvidia-h200.json").write_text(text)
    assert not known_gpu("NVIDIA H200").measured


def test_kept_speeds_price_the_kernel(own_cache: Path) -> None:
    before = kernel().cost(request(), gpu_of("sm_90"))
    keep_gpu_speeds("NVIDIA H200", {"op/triton_x/bf16": KernelSpeed(5.0, 1.0)})
    assert before < 1 and kernel().cost(request(), gpu_of("sm_90")) > 5


# Arrays


def test_arrays_of_the_cpu_lie_on_the_cpu() -> None:
    for array in (np.zeros(3), torch.zeros(3)):
        assert (arrays.device_of(array), arrays.arch_of(array)) == ("cpu", "")
    assert arrays.device_of(torch.zeros(3, device="meta")) == "meta"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float16", "int32", "bool", "uint8"])
def test_an_array_is_a_tensor_without_a_copy(dtype: str) -> None:
    array = np.ones((2, 3), arrays.numpy_dtype(dtype))
    tensor = arrays.as_torch(array, "x")
    assert arrays.dtype_name(tensor) == dtype and tensor.data_ptr() == array.ctypes.data
    assert arrays.as_torch(tensor, "x") is tensor


def test_arrays_in_two_places_are_named() -> None:
    here, there = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8, device="meta")
    with pytest.raises(ArgumentError, match="value: expected an array on the CPU, got Tensor on meta"):
        ops.attention(here, here, there)
    with pytest.raises(ArgumentError, match="query: expected an array on the CPU or a GPU"):
        ops.attention(there, there, there)
    with pytest.raises(ArgumentError, match="out: expected an array on the CPU"):
        ops.attention(here, here, here, out=there)
    with pytest.raises(ArgumentError, match=r"parts\[0\].lse: expected an array on the CPU"):
        ops.merge_attention([(here, there[..., 0])])


# Explained from shapes


def test_a_call_is_explained_for_a_gpu_that_is_not_here() -> None:
    told = ops.explain("attention", *PREFILL, dtype="bfloat16", device="cuda", arch="sm_90")
    assert (told.request.device, told.request.arch, told.gpu) == ("cuda", "sm_90", "NVIDIA H200")
    refused = {rejected.kernel: rejected.predicate for rejected in told.rejected}
    assert refused["cpu_float64"] == refused["cpu_portable"] == "device"
    assert "NVIDIA H200" in str(told) and told.as_dict()["request"]["arch"] == "sm_90"
    assert told.compute_s == pytest.approx(told.request.traffic.flops / gpu_of("sm_90").roofs["bf16"])


@pytest.mark.parametrize(
    "op,shapes,options",
    [
        ("paged_attention", ((4, 8, 64), (9, 16, 2, 64), (9, 16, 2, 64), (2, 3), (2,)), {"query_starts": (3,)}),
        ("attention_backward", (PREFILL[0], *PREFILL, PREFILL[0]), {"lse": (1, 256, 8)}),
        ("rms_norm", ((4, 64), (64,)), {}),
        ("append_pages", ((4, 2, 64), (4, 2, 64), (9, 16, 2, 64), (9, 16, 2, 64)), {"slots": (4,)}),
    ],
)
def test_every_op_is_explained_for_a_gpu(op: str, shapes: Any, options: Any) -> None:
    for device, arch in (("cuda", "sm_80"), ("hip", "gfx942"), ("cpu", "")):
        asked = requests_of(op, *shapes, device=device, arch=arch, **options)
        assert {(each.device, each.arch) for each in asked} == {(device, arch)}


def test_the_generation_is_by_default_the_usual_one_and_mistakes_are_named() -> None:
    assert requests_of("attention", *PREFILL, device="cuda")[0].arch == "sm_90"
    assert requests_of("attention", *PREFILL, device="hip")[0].arch == "gfx942"
    with pytest.raises(ArgumentError, match="device: expected cpu, cuda or hip"):
        ops.explain("attention", *PREFILL, device="tpu")
    with pytest.raises(ArgumentError, match="arch: expected none without a GPU"):
        ops.explain("attention", *PREFILL, arch="sm_90")
    for device, arch in (("cuda", "gfx942"), ("hip", "sm_90"), ("cuda", "hopper"), ("cuda", "90")):
        with pytest.raises(ArgumentError, match=f"arch: expected a generation of {device}, got '{arch}'"):
            ops.explain("attention", *PREFILL, device=device, arch=arch)


def test_a_mask_on_a_gpu_is_not_looked_at() -> None:
    mask = np.tri(256, dtype=bool)
    [seen] = requests_of("attention", *PREFILL, mask=mask)
    [unseen] = requests_of("attention", *PREFILL, mask=mask, device="cuda")
    assert "mask" not in seen.shapes and unseen.shapes["mask"] == (1, 1, 256, 256)


# Without native code

WITHOUT_NATIVE = """
import sys
sys.modules["headrace.kernels.cpu._native"] = None  # as where it was never built
import numpy as np
from headrace import ops
from headrace.errors import KernelError
told = ops.explain("attention", (1, 64, 4, 32), (1, 64, 2, 32), (1, 64, 2, 32), device="cuda", arch="sm_90")
assert {found.predicate for found in told.rejected if found.kernel.startswith("cpu")} == {"device"}, told
array = np.ones((1, 3, 2, 8), np.float32)
for name in ops.__all__:
    getattr(ops, name)
try:
    ops.attention(array, array, array)
except KernelError as error:
    assert "native extension" in str(error) and "not built" in str(error), error
else:
    raise SystemExit("it ran")
"""


def without_native(program: str, **environment: str) -> None:
    """Runs a program in a process of its own that finds this very tree."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = {"PYTHONPATH": os.pathsep.join([str(Path(ops.__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, env=clean | here | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_ops_are_there_without_the_native_extension() -> None:
    without_native(WITHOUT_NATIVE)


TENSORS_WITHOUT_NATIVE = """
import sys
sys.modules["headrace.kernels.cpu._native"] = None
import torch
from headrace import ops
array = torch.randn(1, 5, 2, 8)
mine = ops.attention(array, array, array, causal=True, kernel="torch_math")
theirs = torch.nn.functional.scaled_dot_product_attention(*[array.transpose(1, 2)] * 3, is_causal=True)
torch.testing.assert_close(mine.out, theirs.transpose(1, 2))
pages = torch.cat([array[0], torch.full((3, 2, 8), torch.nan)]).reshape(2, 4, 2, 8)  # 5 keys in pages of 4
table = {"page_table": torch.tensor([[0, 1]], dtype=torch.int32), "sequence_lens": torch.tensor([5], dtype=torch.int32)}
starts = torch.tensor([0, 5], dtype=torch.int32)
paged = ops.paged_attention(array[0], pages, pages, **table, query_starts=starts, kernel="triton_paged")
torch.testing.assert_close(paged.out, mine.out[0])
options = {"value_dim": 6, "scale": 1.0, "kernel": "triton_mla"}
latent = ops.mla_attention(array[0], pages[:, :, 0], **table, query_starts=starts, **options)
assert latent.out.isfinite().all()
assert not any(kernel.startswith("cpu") for _, kernel in ops.choices())
assert sys.modules["headrace.kernels.cpu._native"] is None
"""


def test_kernels_over_torch_serve_without_the_native_extension() -> None:
    without_native(TENSORS_WITHOUT_NATIVE, TRITON_INTERPRET="1")


def test_explanations_of_kernels_on_a_gpu_are_a_table() -> None:
    told = explain_request([kernel(), kernel("triton_y", arches=("gfx942",))], request())
    assert told.chosen is not None and told.chosen.workers == gpu_of("sm_90").multiprocessors
    assert "triton_y" in str(told) and "GPU generation" in str(told)
