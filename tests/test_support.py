"""The table of what attention does: true to the kernels, the same on every machine, and the one in the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.check import support
from headrace.check.layout import ROOT
from headrace.check.support import ELSEWHERE, FEATURES, YES, cell
from headrace.kernels import cpu
from headrace.ops import call_request
from headrace.ops.select import Kernel, Reason


def test_the_table_in_the_readme_is_true() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert support.readme_section(readme) == support.support_section(), "bring it up to date with: make map"


@pytest.mark.parametrize("level", cpu.ISAS)
def test_the_table_is_the_same_on_every_machine(level: str) -> None:
    with cpu.limit_isa(level):
        limited = support.support_lines()
    assert limited == support.support_lines()


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_a_kernel(feature: str) -> None:
    asked, require = FEATURES[feature]
    marks = [cell(name, asked, require).mark for name in support.kernel_names()]
    assert YES in marks and set(marks) <= {YES, ELSEWHERE, "no"}


def test_a_refusal_shows_with_its_reason_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Reason("softcap", "30", "none")

    def why_not(request: object) -> list[Reason]:
        return [refusing]

    kernel = Kernel("cpu_new", why_not, lambda *_: 1.0, print)
    monkeypatch.setattr(support, "kernels_of", lambda op: (*call_request.kernels_of(op), kernel))
    lines = support.support_lines()
    assert lines[0].endswith("| new |")
    rows = [line for line in lines if line.startswith("| ") and line != lines[0]]
    number = next(line.partition(":")[0] for line in lines if line.endswith(f": {refusing}."))
    assert all(row.endswith(f"| no ({number}) |") for row in rows) and len(rows) == len(FEATURES)


def test_what_the_op_does_not_take_is_a_no() -> None:
    found = cell("cpu_float64", support.attention(dtype="float64", kv="int8"))
    assert found.mark == "no" and "float64 for all or none" in found.why


def test_a_stale_table_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"# Title\n\n{support.BEGIN}\nold\n{support.END}\n\nend\n")
    support.write_support(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert support.readme_section(readme) == support.support_section() and "old" not in readme
    assert readme.startswith("# Title") and readme.endswith("end\n")
