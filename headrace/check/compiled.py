"""Every GPU kernel compiled ahead of time for every chip, and what came out: registers, spills, shared memory.

python -m headrace.check.compiled                  prints the table, and on stderr what breaks a limit
python -m headrace.check.compiled --write          puts it into docs/results/compile.md
python -m headrace.check.compiled paged_attention  of modules with these words in their names alone

No GPU is needed: the compilers are part of Triton. Compiled kernels are kept in Triton's cache.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "docs" / "results" / "compile.md"
PACKAGES = ("headrace.kernels.triton", "headrace.kernels.gluon")
_HEAD = """# Compiled GPU kernels

Each configuration that can be chosen, compiled ahead of time for each chip. `python -m headrace.check.compiled --write`
writes this table. Registers are those of one thread, on AMD vector registers; shared memory and spills are in bytes.

| kernel | configuration | chip | warps | stages | registers | spilled | shared |
|---|---|---|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Compiled:
    """One configuration on one chip. `broken`: which limits or promises it does not keep."""

    module: str
    name: str
    chip: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    broken: tuple[str, ...] = ()

    def row(self) -> str:
        cells = (self.module, self.name, self.chip, self.num_warps, self.num_stages)
        return f"| {' | '.join(map(str, (*cells, self.registers, self.spilled, self.shared)))} |"


def modules(words: Sequence[str] = ()) -> list[str]:
    """The modules of GPU kernels that have variants, of those with one of the words in their name."""
    found = []
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        found += [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]
    able = [name for name in found if hasattr(importlib.import_module(name), "variants")]
    return [name for name in able if not words or any(word in name for word in words)]


def compile_all(names: Iterable[str], processes: int = 2) -> list[Compiled]:
    """All variants of these modules for all their chips, in their order."""
    jobs = [
        (name, number, chip)
        for name in names
        for number, variant in enumerate(importlib.import_module(name).variants())
        for chip in variant.chips
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile, jobs, chunksize=4))


def _compile(job: tuple[str, int, str]) -> Compiled:
    module, number, chip = job
    variant = importlib.import_module(module).variants()[number]
    made = (".".join(module.split(".")[-2:]), variant.name, chip, variant.num_warps, variant.num_stages)
    try:
        binary = compiled(variant, chip)
    except Exception as error:  # whatever the compiler says is the result
        return Compiled(*made, broken=(f"does not compile: {type(error).__name__}: {str(error)[-2000:]}",))
    registers, spilled = resources(binary)
    found = Compiled(*made, registers, spilled, binary.metadata.shared)
    return Compiled(*made, registers, spilled, found.shared, broken=tuple(_broken(variant, found, binary)))


def compiled(variant: Any, chip: str) -> Any:
    """The variant's binary for a chip."""
    import triton
    from triton.backends.compiler import GPUTarget

    from headrace.kernels.triton.variants import CHIPS

    source = _source(variant)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget(*CHIPS[chip]), options=options)


def _source(variant: Any) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = variant.kernel.arg_names
    missing = set(names) ^ (set(variant.types) | set(variant.constants))
    if missing:
        raise ValueError(f"{variant.name}: types and constants do not fit the kernel's arguments: {sorted(missing)}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    attributes = {place: [["tt.divisibility", 16]] for place in _aligned(signature, variant.aligned)}
    kind = GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource
    return kind(variant.kernel, signature, dict(variant.constants), attributes)


def _aligned(signature: Mapping[str, Any], aligned: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The places of pointers and of numbers known to be multiples of 16; those inside tuples have two."""
    for number, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple) and name in aligned:
            yield from ((number, inner) for inner in range(len(kind)))
        elif not isinstance(kind, tuple) and (kind.startswith("*") or name in aligned):
            yield (number,)


def resources(binary: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes it spills."""
    if "cubin" in binary.asm:
        return nvidia_resources(binary.asm["cubin"])
    text = binary.asm["amdgcn"]
    numbers = {
        name: int(found) for name, found in re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text)
    }
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    text = dumped(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump tells no resources: {text[:200]}")
    return int(found[1]), int(found[2])


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump tells of a binary: "-res-usage", "-sass"."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def waits_added(binary: Any) -> int:
    """Waits for products of warpgroups that ptxas put in besides those it was given: behind each, where it gives up."""
    return dumped(binary.asm["cubin"], "-sass").count("WARPGROUP.DEPBAR") - binary.asm["ptx"].count("wgmma.wait_group")


def _broken(variant: Any, found: Compiled, binary: Any) -> Iterable[str]:
    from headrace.kernels.triton.variants import SHARED_BYTES

    if found.spilled > variant.spills.get(found.chip, 0):
        yield f"spills {found.spilled} bytes"
    if found.shared > SHARED_BYTES[found.chip]:
        yield f"takes {found.shared} bytes of shared memory, the chip has {SHARED_BYTES[found.chip]}"
    assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
    for text in variant.instructions.get(found.chip, ()):
        if text not in assembly:
            yield f"has no {text}"
    if variant.overlapping and "cubin" in binary.asm and (added := waits_added(binary)):
        yield f"has {added} waits behind products that were to run on"


def table(found: Iterable[Compiled]) -> str:
    """The table as Markdown."""
    return _HEAD + "\n".join(each.row() for each in found) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Compiles, prints or writes; 1 where a limit is broken."""
    words = [word for word in arguments if not word.startswith("-")]
    found = compile_all(modules(words), min(os.cpu_count() or 1, 8))
    if "--write" in arguments:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(table(found))
    else:
        print(table(found), end="")
    broken = [each for each in found if each.broken]
    for each in broken:
        print(f"{each.module} {each.name} on {each.chip}: {'; '.join(each.broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
