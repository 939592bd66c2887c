"""load: matrices come off the disk as the file has them, whatever their size, and a file that changes is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headrace.check.blocks import random_matrix
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import ModelFileError
from headrace.kernels.cpu import _native as native
from headrace.ops.formats import FORMATS, dequantize
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config, load_weights

# One panel and less; several to a piece; several pieces, the last panel and the last piece not full.
SHAPES = ((5, 256), (64, 512), (1000, 768))


def packed_from(path: Path, offset: int, format_name: str, shape: tuple[int, int]) -> np.ndarray:
    """The matrix at `offset` of the file, packed from there and unpacked again."""
    arena = native.Arena(native.packed_bytes(format_name, shape))
    with path.open("rb") as file:
        packed = native.pack_file(native.Pool(2), arena, format_name, shape, file.fileno(), offset)
    values = np.empty(shape, np.float32)
    packed.unpack(values)
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_matrix_read_in_pieces_is_the_files(tmp_path: Path, format_name: str, shape: tuple[int, int]) -> None:
    raw = random_matrix(format_name, *shape, np.random.default_rng(7))
    path = tmp_path / "matrix"
    path.write_bytes(b"before." + raw.tobytes())
    expected = dequantize(raw, format_name)
    np.testing.assert_array_equal(packed_from(path, 7, format_name, shape).view(np.uint32), expected.view(np.uint32))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "matrix"
    path.write_bytes(bytes(1000 * 768 * 4 - 1))
    with pytest.raises(ModelFileError, match="it ends there"):
        packed_from(path, 0, "F32", (1000, 768))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "matrix"
    with path.open("wb") as file, pytest.raises(ModelFileError, match="cannot be read at byte 0"):
        native.pack_file(native.Pool(1), native.Arena(4096), "F32", (16, 16), file.fileno(), 0)


@pytest.mark.parametrize("change", ["touched", "replaced", "removed"])
def test_a_file_that_changes_between_opening_and_loading_is_an_error(tmp_path: Path, change: str) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with open_gguf(path) as file:
        config = load_config(file)
        status = path.stat()
        if change == "touched":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        elif change == "replaced":
            other = write_tiny_model(tmp_path / "other.gguf", TinyModel(seed=1))
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
            other.replace(path)
        else:
            path.unlink()
        with pytest.raises(ModelFileError, match="tiny.gguf: (changed|cannot be read)"):
            load_weights(file, config, native.Pool(1))


PEAK = """
import sys
from pathlib import Path
from headrace.kernels.cpu import _native as native
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config, load_weights

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

pool = native.Pool(2)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmHWM")
with open_gguf(sys.argv[1]) as file:
    weights = load_weights(file, load_config(file), pool)
    print((kilobytes("VmHWM") - before) * 1024 / file.total_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
def test_the_peak_of_a_load_is_at_most_a_tenth_above_the_file(tmp_path: Path) -> None:
    model = TinyModel(num_layers=8, dim=512, num_heads=8, head_dim=64, ffn_dim=2048, matrix_format="Q8_0")
    path = write_tiny_model(tmp_path / "tiny.gguf", model)
    told = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert float(told.stdout) <= 1.1
