"""The map of the repository: every file with its purpose, as its first line says. README keeps a copy.

python -m headrace.check.layout           prints the map
python -m headrace.check.layout --write   puts it into README.md

A test compares the two, so the map cannot go stale, and a file cannot be without a purpose.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- map -->", "<!-- /map -->"


def tracked_files(root: Path) -> list[str]:
    """The files git knows below the root and that exist, sorted by folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    names = [name for name in listed.split("\0") if name and (root / name).is_file()]
    return sorted(names, key=lambda name: (Path(name).parent.parts, name))


def purpose(name: str, text: str) -> str:
    """The first line of a file that says what it is for; empty when there is none."""
    suffix = Path(name).suffix
    if Path(name).parent.name == "data":
        return "read by the tests"
    if suffix in (".py", ".pyi"):
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if suffix in (".cpp", ".h", ".js"):
        return _first(r"^// ?(.*?\.(?= )|.*)", text)
    if suffix == ".css":
        return _first(r"^/\* (.*) \*/$", text)
    if suffix == ".html":
        return _first(r"^<!-- (.*) -->$", text)
    if suffix == ".png":
        return "a picture"
    if suffix == ".json":
        return str(json.loads(text).get("what", ""))
    if suffix == ".md":
        return _first(r"^# (.*)", text)
    if name == "LICENSE":
        return _first(r"^ *(\S.*)", text)
    return _first(r"^# ?((?!!).*)", text)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def map_lines(root: Path, names: Iterable[str]) -> list[str]:
    """Folders, and below each its files with their purposes in one column."""
    lines = []
    for folder, group in groupby(names, key=lambda name: str(Path(name).parent)):
        files = list(group)
        indent = "" if folder == "." else "  "
        if indent:
            lines.append(f"{folder}/")
        width = max(len(Path(name).name) for name in files)
        for name in files:
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            lines.append(f"{indent}{Path(name).name:<{width}}  {purpose(name, text)}".rstrip())
    return lines


def map_section(root: Path) -> str:
    """The map as README.md holds it, markers included."""
    body = "\n".join(map_lines(root, tracked_files(root)))
    return f"{BEGIN}\n```\n{body}\n```\n{END}"


def readme_section(readme: str) -> str:
    """What stands between the markers of a README, markers included; empty when they are not there."""
    found = re.search(re.escape(BEGIN) + ".*?" + re.escape(END), readme, re.DOTALL)
    return found.group() if found else ""


def write_map(root: Path) -> None:
    """Brings the map in README.md up to date."""
    path = root / "README.md"
    readme = path.read_text(encoding="utf-8")
    path.write_text(readme.replace(readme_section(readme), map_section(root)), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write_map(ROOT)
    else:
        print(map_section(ROOT))
