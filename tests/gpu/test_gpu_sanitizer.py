"""NVIDIA's sanitizer watches one call of each kernel: nothing beside its arrays, no races in shared memory."""

import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.bench.asked_process import module_command

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CALLS = (
    ("paged", "triton_paged"),
    ("latent", "triton_mla"),
    ("latent", "gluon_mla"),
    ("dense", "triton_attention"),
    ("dense", "gluon_attention"),
    ("ragged", "gluon_attention"),
    ("backward", "triton_attention_backward"),
    ("backward", "triton_attention_backward_atomic"),
)
FOUND = 9  # exit code of the sanitizer where it found something
_TIMEOUT_S = 300


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("kind,kernel", CALLS)
def test_nothing_is_found(tool, kind, kernel):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        pytest.skip("compute-sanitizer is not there")
    program = str(Path(__file__).with_name("sanitized.py"))
    (python, *_), environment = module_command(program)
    # Without torch's cache every array has memory of its own: what is read beside it is seen.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), python, program, kind, kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("the sanitizer does not know this device")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    said = [line for line in done.stdout.splitlines() if not line.startswith("=")]
    if said[-1] != "ran":
        pytest.skip(said[-1])
