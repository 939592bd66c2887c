"""Every GPU kernel compiles for every chip within its limits, and the table that says so is that of these kernels."""

import subprocess
import sys

import pytest

from headrace.bench.asked_process import module_command
from headrace.check.compiled import TABLE

pytestmark = pytest.mark.slow
# What may differ between two compilers of one version: registers, spilled and shared bytes are what is looked up.
_CELLS = 5  # kernel, configuration, chip, warps, stages


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton", reason="compiling needs Triton")
    command, environment = module_command("headrace.check.compiled")
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def rows(text):
    """The configurations of a table: kernel, configuration, chip, warps, stages."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| kernel ")]
    return [tuple(cell.strip() for cell in line.split("|")[1 : 1 + _CELLS]) for line in lines]


def test_every_configuration_compiles_within_the_limits_of_its_chip(compiled):
    assert compiled.returncode == 0, compiled.stderr[-4000:]


def test_the_table_has_every_configuration(compiled):
    found = rows(compiled.stdout)
    assert len(found) == len(set(found)) > 50
    assert rows(TABLE.read_text(encoding="utf-8")) == found, f"{sys.executable} -m headrace.check.compiled --write"


def test_the_chips_of_each_kernel_are_those_it_promises(compiled):
    chips = {}
    for kernel, _, chip, *_ in rows(compiled.stdout):
        chips.setdefault(kernel, set()).add(chip)
    portable = [kernel for kernel, found in chips.items() if "gfx942" in found]
    assert len(portable) >= 5 and all("sm_90" in found for found in chips.values())
