"""Compiling ahead of time: what a kernel takes is read off, and one that breaks a limit or a promise is named."""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.bench.asked_process import module_command
from headrace.check import compiled
from headrace.check.compiled import Compiled, table
from headrace.kernels.triton import variants

# A process of its own: in this one Triton's kernels are for its interpreter.
PROGRAM = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from headrace.check.compiled import compile_all
print(json.dumps([dataclasses.asdict(each) for each in compile_all(["made_up_kernels"], 1)]))
"""


@pytest.fixture(scope="module")
def found():
    command, environment = module_command(str(Path(__file__).parent), code=PROGRAM)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {(each["name"], each["chip"]): each for each in json.loads(done.stdout)}


def broken(found, name):
    return found[name, "sm_90"]["broken"]


def test_a_portable_kernel_is_compiled_for_every_chip(found):
    chips = {chip for name, chip in found if name == "portable"}
    assert chips == set(variants.CHIPS)
    for chip in chips:
        each = found["portable", chip]
        assert each["registers"] > 0 and each["spilled"] == each["shared"] == 0 and each["broken"] == []


def test_kernels_in_gluon_are_compiled(found):
    assert broken(found, "gluon") == [] and found["gluon", "sm_90"]["registers"] > 0


def test_a_promised_instruction_is_looked_for(found):
    assert broken(found, "with_wgmma") == []
    assert broken(found, "without_wgmma") == ["has no wgmma.mma_async"]


def test_spills_are_counted_and_told_unless_they_are_allowed(found):
    spilled = found["spills", "sm_90"]["spilled"]
    assert spilled > 0 and broken(found, "spills") == [f"spills {spilled} bytes"]
    assert found["may_spill", "sm_90"]["spilled"] == spilled and broken(found, "may_spill") == []


@pytest.mark.parametrize(
    "name,text", [("wrong_signature", "do not fit the kernel's arguments"), ("does_not_compile", "missing")]
)
def test_what_does_not_compile_says_why(found, name, text):
    [why] = broken(found, name)
    assert why.startswith("does not compile: ") and text in why


def test_shared_memory_beyond_the_chips_is_told(monkeypatch):
    monkeypatch.setitem(variants.SHARED_BYTES, "sm_90", 99)

    binary = SimpleNamespace(asm={"ptx": "ret;"})
    row = Compiled("module", "name", "sm_90", 4, 3, registers=8, shared=100)
    variant = variants.Variant("name", None, {}, {})
    assert list(compiled._broken(variant, row, binary)) == ["takes 100 bytes of shared memory, the chip has 99"]


def test_the_table_has_a_row_for_each():
    row = Compiled("paged_attention", "bf16_d128", "sm_90", 4, 3, 168, 0, 65536)
    *_, heads, line, last = table([row]).splitlines()
    assert last == "| paged_attention | bf16_d128 | sm_90 | 4 | 3 | 168 | 0 | 65536 |"
    assert heads.count("|") == line.count("|") == last.count("|") == 1 + len(dataclasses.fields(row)) - 1


def test_modules_with_variants_are_found_and_chosen_by_words(monkeypatch, tmp_path):
    for name, text in (
        ("__init__", ""),
        ("product", "def variants(): ..."),
        ("sum", "def variants(): ..."),
        ("names", ""),
    ):
        (tmp_path / "some_kernels").mkdir(exist_ok=True)
        (tmp_path / "some_kernels" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compiled, "PACKAGES", ("some_kernels",))
    assert compiled.modules() == ["some_kernels.product", "some_kernels.sum"]
    assert compiled.modules(["prod", "no such"]) == ["some_kernels.product"]


def test_broken_limits_end_with_one(monkeypatch, capsys):
    bad = Compiled("module", "name", "sm_90", 4, 3, broken=("spills 8 bytes", "has no wgmma"))
    monkeypatch.setattr(compiled, "modules", lambda words: [])
    for rows, code in (([bad], 1), ([dataclasses.replace(bad, broken=())], 0)):
        monkeypatch.setattr(compiled, "compile_all", lambda names, processes, rows=rows: rows)
        assert compiled.main([]) == code
        said = capsys.readouterr()
        assert said.out == table(rows)
        assert said.err == ("module name on sm_90: spills 8 bytes; has no wgmma\n" if code else "")
