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
import importlib, json, re, sys
from headrace.check.compiled import compiled, dumped, resources, waits_added
letters = {"HGMMA": "P", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "E"}
found = {}
for name, wanted in (
    ("mla_attention", "fp16"),
    ("attention", "bf16 d128 ragged packed 4 window"),
    ("attention", "fp16 d128 lens"),
):
    variants = importlib.import_module(f"headrace.kernels.gluon.{name}").variants()
    variant = next(each for each in variants if each.name == wanted)
    binary = compiled(variant, "sm_90")
    order = re.findall("HGMMA|WARPGROUP.DEPBAR|MUFU.EX2", dumped(binary.asm["cubin"], "-sass"))
    found[wanted if "window" in wanted else name] = made = []
    made += [binary.asm["ptx"], *resources(binary), waits_added(binary), binary.metadata.shared]
    made.append("".join(letters[each] for each in order))
json.dump(found, sys.stdout)
"""
# Whole calls, on a GPU that takes no launches: what they hand to the compiler, and how many binaries it makes.
CALLS = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from headrace.kernels.gluon import attention, mla_attention, mla_merge, mla_plan

class Driver:
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Compiles:
    def __init__(self, kernel):
        self.kernel, self.made = kernel, []
    def __getitem__(self, grid):
        return lambda *a, **k: self.made.append(self.kernel.run(*a, grid=grid, warmup=True, **k))

triton.runtime.driver.set_active(Driver())
kernels = {"_mla_kernel": mla_attention, "_plan_kernel": mla_plan, "_merge_kernel": mla_merge,
           "_attention_kernel": attention}
for name, module in kernels.items():
    setattr(module, name, Compiles(getattr(module, name)))
options = {"scale": 0.1, "window_right": 0, "window_left": -1, "top_left": False, "softcap": 0.0}
integers = lambda *shape: torch.zeros(*shape, dtype=torch.int32)
numbers = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
for tokens, requests, pages in ((5, 5, 80), (32, 16, 33)):
    mla_attention.run({"query": numbers(tokens, 16, 576), "key": numbers(pages, 64, 1, 576),
        "page_table": integers(requests, 3), "key_lens": integers(requests), "query_starts": integers(requests + 1),
        "out": numbers(tokens, 16, 512), "lse": torch.zeros(tokens, 16)}, options)
for batch, rows, keys, heads, kv_heads in ((1, 1, 7, 1, 1), (2, 500, 1024, 8, 2)):
    attention.run({"query": numbers(batch, rows, heads, 64), "key": numbers(batch, keys, kv_heads, 64),
        "value": numbers(batch, keys, kv_heads, 64), "out": numbers(batch, rows, heads, 64),
        "lse": torch.zeros(batch, rows, heads)}, options)
for tokens, requests, heads in ((7, 1, 8), (300, 5, 16)):
    attention.run({"query": numbers(tokens, heads, 64), "key": numbers(tokens, heads // 4, 64),
        "value": numbers(tokens, heads // 4, 64), "out": numbers(tokens, heads, 64), "lse": torch.zeros(tokens, heads),
        "query_starts": integers(requests + 1), "key_starts": integers(requests), "key_lens": integers(requests)},
        options)
found = {}
for name, module in kernels.items():
    made = getattr(module, name).made
    found[name] = [len(made), len({each.hash for each in made}), made[0].metadata.launch_pdl]
json.dump(found, sys.stdout)
"""
# Of a whole kernel: what is peeled off the loop or stands in a masked one is there twice, and in both warpgroups.
SCORES, PRODUCTS = 64 * 576 // (64 * 16), 64 // 16
MLA_PRODUCTS = 2 * 2 * (SCORES + 2 * PRODUCTS)
ATTENTION_PRODUCTS = 2 * (3 * 8 + 3 * 8)


def told_by(program):
    """What a program prints, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kernels():
    return told_by(COMPILE)


pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("name", ["mla_attention", "attention"])


@BOTH
def test_nothing_is_spilled_and_products_run_on(kernels, name):
    _, registers, spilled, added, shared, _ = kernels[name]
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


@pytest.mark.parametrize("name,loops", [("attention", 2), ("bf16 d128 ragged packed 4 window", 3)])
def test_the_softmax_stands_between_the_waits_for_scores_and_output(kernels, name, loops):
    """ptxas puts the second wait in front of it, and products beside nothing, unless something holds it back."""
    order = kernels[name][-1]
    assert len(re.findall("PWE{64,}W", order)) == 2 * loops, "masked tiles and others, in both warpgroups"


def test_calls_compile_and_one_binary_serves_many_sizes():
    """Calls, binaries, launched while the kernel before still runs."""
    pytest.importorskip("torch")
    assert told_by(CALLS) == {
        "_plan_kernel": [2, 2, False],  # for 8 and for 16 requests
        "_mla_kernel": [2, 1, True],
        "_merge_kernel": [2, 1, True],
        "_attention_kernel": [4, 2, False],  # dense and ragged
    }
