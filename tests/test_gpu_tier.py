"""The tests that need a GPU, without one: they are found, they skip with a reason, and their batches are right."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from headrace.bench.asked_process import module_command

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).with_name("gpu")
WITHOUT_NATIVE = (
    "import sys; sys.modules['headrace.kernels.cpu._native'] = None; import pytest; sys.exit(pytest.main())"
)


def run(*arguments):
    command, environment = module_command(*arguments, "-p", "no:cacheprovider", code=WITHOUT_NATIVE)
    environment.pop("TRITON_INTERPRET", None)
    root = FOLDER.parents[1]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_file_is_collected_without_native_code():
    """By the command of docs/gpu.md: files that import native code are no obstacle to the others."""
    done = run("-m", "gpu", "--collect-only", "-q", str(FOLDER), str(FOLDER.with_name("kernels")))
    assert done.returncode == 0, done.stdout + done.stderr
    for path in FOLDER.glob("test_gpu_*.py"):
        assert f"{path.name}: " in done.stdout or f"{path.name}::" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["gpu", "gpu and not slow"])
def test_without_a_gpu_they_are_skipped_and_say_why(asked):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("-m", asked, "-rs", str(FOLDER))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sees no GPU" in done.stdout and "passed" not in done.stdout


@pytest.mark.slow
def test_without_being_asked_for_they_do_not_run():
    done = run(str(FOLDER / "test_gpu_no_wait.py"))
    assert done.returncode == 5 and "deselected" in done.stdout, done.stdout + done.stderr


# The batches


@pytest.fixture
def batches(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import decode_batch

    return decode_batch


@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_other_lengths_fit_into_the_same_memory_and_are_right(batches, kind):
    first = batches.decode(kind, batches.LENGTHS[0], "float32")
    tensors = first.tensors("cpu")
    addresses = {name: one.data_ptr() for name, one in tensors.items() if hasattr(one, "data_ptr")}
    kernel = "cpu_portable"
    for seed, lens in enumerate(batches.LENGTHS[1:], 1):
        batch = batches.decode(kind, lens, "float32", seed)
        batches.refill(tensors, batch)
        assert tensors["sequence_lens"].tolist() == list(lens)
        found = batches.attend(batch, tensors, kernel=kernel)
        batches.assert_right(batch, found, kernel, tensors)
        found.out[0, 0, 0] += 1
        with pytest.raises(AssertionError):
            batches.assert_right(batch, found, kernel, tensors)
    assert addresses == {name: tensors[name].data_ptr() for name in addresses}


def test_bits_tell_apart_what_compares_equal(batches):
    result = batches.AttentionResult(torch.tensor([[[0.0]]]), torch.tensor([[0.0]]))
    other = batches.AttentionResult(-result.out, result.lse)
    assert not np.array_equal(batches.bits(result)[0], batches.bits(other)[0])


def test_kernels_say_why_they_cannot_take_a_batch(batches):
    tensors = batches.decode("latent", batches.LENGTHS[0]).tensors("cpu")
    found = batches.gpu_kernels("latent", tensors)
    assert found and not any(name.startswith("cpu_") for name in found)
