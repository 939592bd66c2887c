"""The rules the code keeps, as numbers and names: layers, sizes, purposes, words. Each break is one line of text.

Everything is read from the source: what is checked need not be importable. The numbers are those of CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from headrace.check.layout import purpose

# From the bottom up. Those of one line stand side by side: packages among them do not import each other.
LAYERS = (
    ("errors", "config", "machine", "gpu_machine", "token_rules"),
    ("kernels",),
    ("ops",),
    ("kv_cache", "compat"),
    ("models",),
    ("weights", "text"),
    ("engine",),
    ("completion", "talk"),
    ("llm",),
    ("async_llm",),
    ("server",),
    ("options",),
    ("verbs",),
    ("check",),
    ("bench",),
    ("cli", "bench_verbs", "conversation", "doctor", "explained", "prompt_cache", "__main__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGES = {"kernels", "ops", "kv_cache", "compat", "models", "weights", "text", "engine", "server", "check", "bench"}
NATIVE = "headrace.kernels.cpu._native"  # imports nothing of ours: below everything
PAGE = "headrace/server/page/"  # no modules: files for browsers
COMPAT = "headrace/compat/"  # folders and signatures as others have them: programs name them

# What a plain install brings; anything else is imported inside the function that needs it.
INSTALLED = {"headrace", "numpy", "ml_dtypes", "tokenizers", "jinja2", "typer", "rich", "click"}
# Files that speak torch: they import it at module level, and nobody else imports them there, so that all the rest
# starts without it. Code for another library's models may need that one too.
SPEAKS_TORCH = re.compile(r"headrace\.(ops\.torch_|compat\.|kernels\.(triton|gluon|torch)\.)")
# Of these, the ones that are written in Triton.
SPEAKS_TRITON = re.compile(r"headrace\.kernels\.(triton|gluon)\.")
THEIR_LIBRARIES = {"headrace.compat.transformers": "transformers"}
# What the extra [server] brings: a server is nothing without it, and nobody else imports its package at module level.
SERVER = {"fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client", "llguidance"}

MEDIAN_LINES, MOST_LINES, LONGEST_LINES, LONGEST_KERNEL_LINES = 12, 35, 80, 150
FILE_LINES, KERNEL_FILE_LINES = 400, 700
POSITIONAL = 5
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "base"}
# Spelled so that this file does not hold them.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
PRIVATE = re.compile(r"(?i)\bissues? #?\d|/wor" r"k/|/tmp/h" r"r\b|\bsession \d|pull request #?\d")


@dataclass(frozen=True)
class Source:
    """One file of the repository: its path from the root, with slashes, and its text."""

    path: str
    text: str

    @property
    def in_kernels(self) -> bool:
        return self.path.startswith("headrace/kernels/")

    @property
    def is_python(self) -> bool:
        return self.path.endswith((".py", ".pyi"))

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def read_sources(root: Path, names: Iterable[str]) -> list[Source]:
    """The text files among these names."""
    sources = []
    for name in names:
        try:
            sources.append(Source(name, (root / name).read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return sources


def broken_rules(sources: Iterable[Source]) -> list[str]:
    """Every rule broken by a single file, as "path: what"."""
    found = []
    for source in sources:
        checks = [check_words, check_file_size, check_names, check_purpose]
        if source.path.startswith("headrace/") and source.path.endswith(".py"):
            checks += [check_layers, check_optional, check_functions]
        elif source.in_kernels:
            checks += [check_native_functions]
        found += [f"{source.path}: {problem}" for check in checks for problem in check(source)]
    return found


# Imports


def imported_modules(source: Source, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported; with `module_level`, of what importing the file imports."""
    nodes = _module_level_nodes(source.tree) if module_level else ast.walk(source.tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _module_level_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _module_level_nodes(child)


def check_layers(source: Source) -> Iterator[str]:
    """Imports go down; guarded and late ones too."""
    here = _top(source.module)
    if source.module == "headrace":
        return
    if here not in RANK:
        yield f"{here!r} has no layer; give it one in check/rules.py"
        return
    for line, name in imported_modules(source):
        if name.startswith("."):
            yield f"line {line}: relative import"
        elif name.partition(".")[0] == "headrace" and not name.startswith(NATIVE):
            there = _top(name)
            if RANK.get(there, RANK["llm"]) > RANK[here]:  # `from headrace import LLM` is the front door itself
                yield f"line {line}: {here} imports {there}, which lies above it"
            elif there != here and RANK.get(there) == RANK[here] and PACKAGES & {here, there}:
                yield f"line {line}: {here} imports {there}, which lies beside it"


def _top(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def check_optional(source: Source) -> Iterator[str]:
    """Importing a file imports nothing that a plain install lacks, itself or through a file that speaks torch."""
    there = INSTALLED | _extras_of(source)
    for line, name in imported_modules(source, module_level=True):
        top = name.partition(".")[0]
        if top and top not in there and top not in sys.stdlib_module_names and top != "__future__":
            yield f"line {line}: imports {top} at module level; import it inside the function that needs it"
        if SPEAKS_TORCH.match(name) and "torch" not in there:
            yield f"line {line}: imports {name} at module level, which imports torch; import it inside the function"


def _extras_of(source: Source) -> set[str]:
    """What else importing a file may import."""
    if source.path.startswith("headrace/server/"):
        return SERVER
    if not SPEAKS_TORCH.match(source.module):
        return set()
    triton = {"triton"} if SPEAKS_TRITON.match(source.module) else set()
    return {"torch", THEIR_LIBRARIES.get(source.module, "torch"), *triton}


# Sizes


def functions(source: Source) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function of a file with its lines, docstring included."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def check_functions(source: Source) -> Iterator[str]:
    """No function too long, none with too many positional arguments."""
    longest = LONGEST_KERNEL_LINES if source.in_kernels else LONGEST_LINES
    for node, lines in functions(source):
        if lines > longest:
            yield f"{node.name} has {lines} lines, more than {longest}"
        names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > POSITIONAL and not source.in_kernels and not source.path.startswith(COMPAT):
            yield f"{node.name} has {count} positional arguments, more than {POSITIONAL}"


def function_lines(sources: Iterable[Source]) -> list[int]:
    """Lines of all functions outside `kernels/`, sorted."""
    ours = [s for s in sources if s.path.startswith("headrace/") and s.path.endswith(".py") and not s.in_kernels]
    return sorted(lines for source in ours for _, lines in functions(source))


def broken_distribution(lengths: list[int]) -> list[str]:
    """The median and the 90th percentile, where they are too high."""
    found = []
    for share, limit in ((0.5, MEDIAN_LINES), (0.9, MOST_LINES)):
        lines = lengths[int(share * len(lengths))]
        if lines > limit:
            found.append(f"{share:.0%} of all functions have up to {lines} lines, more than {limit}")
    return found


def check_native_functions(source: Source) -> Iterator[str]:
    """The same for C++, by its layout: a function begins and ends at the indentation of its namespace or class."""
    opened: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(source.text.splitlines(), 1):
        opening = re.match(r"( {0,2})(?!namespace|struct|class|enum|extern|#)\S.*\{$", line)
        if opening and opening.group(1) not in opened:
            opened[opening.group(1)] = (number, line.strip())
        closing = re.match(r"( {0,2})\}", line)
        if closing and closing.group(1) in opened:
            first, head = opened.pop(closing.group(1))
            if number - first + 1 > LONGEST_KERNEL_LINES:
                yield f"{head!r} has {number - first + 1} lines, more than {LONGEST_KERNEL_LINES}"


def check_file_size(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    limit = KERNEL_FILE_LINES if source.in_kernels else FILE_LINES
    if source.path.startswith(("headrace/", "tests/")) and lines > limit:
        yield f"{lines} lines, more than {limit}"


# Names and words


def check_names(source: Source) -> Iterator[str]:
    """No vague names, no folders in folders."""
    path = Path(source.path)
    vague = VAGUE_NAMES & {word for part in (*path.parts[:-1], path.stem) for word in part.lower().split("_")}
    if vague:
        yield f"named {', '.join(sorted(vague))}: shared code has a name of its own"
    deepest = 4 if source.in_kernels or source.path.startswith(PAGE) else 3
    if source.path.startswith(COMPAT):
        deepest = 5
    if path.parts[0] == "headrace" and len(path.parts) > deepest:
        yield f"lies deeper than {deepest - 1} folders"


def check_purpose(source: Source) -> Iterator[str]:
    if not purpose(source.path, source.text):
        yield "its first line does not say what it is for"


def check_words(source: Source) -> Iterator[str]:
    """Nothing left undone, nothing that only its authors understand."""
    for number, line in enumerate(source.text.splitlines(), 1):
        private = PRIVATE.search(line)
        if private:
            yield f"line {number}: {private.group()!r} means nothing to a reader of the repository"
        if not source.is_python and UNFINISHED.search(line):
            yield f"line {number}: something is left undone"
    if source.is_python:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and UNFINISHED.search(token.string):
                yield f"line {token.start[0]}: something is left undone"
