"""Every op's own way to its GPU kernels ends in launches that Triton accepts: on a GPU that is not there."""

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed: pip install 'headrace[torch]'")

from headrace.check.pretend_gpu import no_waiting  # noqa: E402

ROWS = {
    "decode_p64_b1_4k": {"triton_paged"},
    "decode_p16_b1_4k": {"triton_paged"},
    "mla128_b128_4k": {"triton_mla", "gluon_mla"},
    "prefill_8k": {"triton_attention", "gluon_attention"},
    "backward_8k_gqa": {"triton_attention_backward", "triton_attention_backward_atomic"},
    "linear_bf16_out": {"triton_linear"},
    "linear_q4_k_gate_up": {"triton_linear"},
}


def launches(chip, rows):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "headrace.bench.gpu_launches", chip, *rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("chip,rows", [("sm_90", list(ROWS)), ("sm_80", ["decode_p64_b1_4k", "prefill_8k"])])
def test_a_row_s_kernels_are_launched(chip, rows):
    found = launches(chip, rows)
    assert {each["row"] for each in found} == set(rows)
    for each in found:
        assert "error" not in each, each
        hopper = {name for name in ROWS[each["row"]] if chip == "sm_90" or not name.startswith("gluon_")}
        assert hopper <= set(each["kernels"]), each
        for made in each["kernels"].values():
            assert made and all(min(one["grid"]) > 0 and one["registers"] > 0 for one in made), each


def test_who_waits_for_the_gpu_is_told():
    numbers = torch.arange(3)
    with no_waiting():
        for waits in (numbers.sum().item, numbers.tolist, numbers.numpy, numbers.cpu, lambda: bool(numbers[0])):
            with pytest.raises(RuntimeError, match="waits for the GPU"):
                waits()
        assert (numbers + 1).shape == (3,)
    assert numbers.tolist() == [0, 1, 2] and int(numbers[1]) == 1 and numbers.numpy().sum() == 3
