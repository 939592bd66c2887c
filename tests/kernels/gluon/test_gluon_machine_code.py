"""What the compiler makes of the kernels for Hopper: what their protocol and their speed stand on, read in the PTX.

Nothing is run: compiled ahead of time, in a process without Triton's interpreter, kept in Triton's cache.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import importlib, json, sys
from headrace.check.compiled import compiled, resources, waits_added
found = {}
for name in ("mla_attention", "attention"):
    variant = importlib.import_module(f"headrace.kernels.gluon.{name}").variants()[-1]
    binary = compiled(variant, "sm_90")
    found[name] = [binary.asm["ptx"], *resources(binary), waits_added(binary), binary.metadata.shared]
json.dump(found, sys.stdout)
"""
# Of a whole kernel: what is peeled off the loop or stands in a masked one is there twice, and in both warpgroups.
SCORES, PRODUCTS = 64 * 576 // (64 * 16), 64 // 16
MLA_PRODUCTS = 2 * 2 * (SCORES + 2 * PRODUCTS)
ATTENTION_PRODUCTS = 2 * (3 * 8 + 3 * 8)


@pytest.fixture(scope="module")
def kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("name", ["mla_attention", "attention"])


@BOTH
def test_nothing_is_spilled_and_products_run_on(kernels, name):
    _, registers, spilled, added, shared = kernels[name]
    assert (registers, spilled, added) == (168, 0, 0)
    assert shared <= 232448


@pytest.mark.parametrize("name,number", [("mla_attention", MLA_PRODUCTS), ("attention", ATTENTION_PRODUCTS)])
def test_there_are_as_many_products_as_the_schedule_has(kernels, name, number):
    assert kernels[name][0].count("wgmma.mma_async") == number


@BOTH
def test_registers_go_from_the_loader_to_the_warpgroups(kernels, name):
    numbers = re.findall(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)", kernels[name][0])
    assert ("inc", "240") in numbers and ("dec", "24") in numbers


@BOTH
def test_a_warpgroup_meets_before_one_of_it_arrives(kernels, name):
    """An arrival speaks for four warps: the simulator takes it for granted that all of them are there."""
    told = [line.strip() for line in kernels[name][0].splitlines()]
    lines = [
        line for line in told if line and not line.startswith(("//", ".loc", "$", "add.", "setp.", "and.", "mov."))
    ]
    arrivals = [n for n, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(arrivals) >= 10
    for n in arrivals:
        assert any("bar" in line and "sync" in line for line in lines[max(n - 4, 0) : n]), lines[n - 6 : n + 1]
