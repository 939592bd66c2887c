"""The repository keeps its own rules: layers, sizes, names, purposes, and a map that is true."""

import subprocess
import sys
from collections import Counter

import pytest

from headrace.check import layout, rules
from headrace.check.rules import Source


@pytest.fixture(scope="module")
def sources():
    if not (layout.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return rules.read_sources(layout.ROOT, layout.tracked_files(layout.ROOT))


def test_the_repository_keeps_its_rules(sources):
    assert len(sources) > 100
    assert rules.broken_rules(sources) == []


def test_functions_are_short(sources):
    lengths = rules.function_lines(sources)
    assert len(lengths) > 200
    assert rules.broken_distribution(lengths) == []


def test_every_layer_is_walked(sources):
    imports = {name for source in sources if source.path.startswith("headrace/") for _, name in layers_of(source)}
    assert {
        "errors",
        "config",
        "machine",
        "kernels",
        "ops",
        "kv_cache",
        "models",
        "weights",
        "text",
        "engine",
    } <= imports


def layers_of(source):
    if source.path.endswith(".py"):
        for line, name in rules.imported_modules(source):
            if name.startswith("headrace."):
                yield line, name.split(".")[1]


def test_no_two_test_files_have_one_name():
    names = Counter(path.name for path in (layout.ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == [], "pytest imports them by name"


def test_the_map_in_the_readme_is_true(sources):
    readme = (layout.ROOT / "README.md").read_text(encoding="utf-8")
    section = layout.readme_section(readme)
    assert section == layout.map_section(layout.ROOT), "bring it up to date with: make map"


CHECK_MODULES = """
import sys
for name in sys.argv[2:]:
    __import__(name)
print(*sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""
EXTRAS = "torch,triton,transformers,gguf,llama_cpp,huggingface_hub,matplotlib,fastapi,uvicorn,ray,scipy,pandas,jax"


def loaded(watched, *modules):
    command = [sys.executable, "-c", CHECK_MODULES, watched, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_headrace_loads_next_to_nothing():
    assert loaded(EXTRAS + ",numpy,tokenizers,jinja2,typer,rich,headrace.llm", "headrace") == []


def test_the_command_line_loads_no_extras():
    assert loaded(EXTRAS, "headrace.cli") == []


def test_nothing_in_headrace_loads_an_extra(sources):
    optional = "headrace.server."  # a package that the extra [server] is for
    modules = [s.module for s in sources if s.path.startswith("headrace/") and s.path.endswith(".py")]
    modules = [name for name in modules if not name.startswith(optional) or name == optional + "settings"]
    modules = [name for name in modules if not rules.SPEAKS_TORCH.match(name)]
    assert loaded(EXTRAS, *(name for name in modules if not name.endswith("__main__"))) == []


ATTENTION_OF_NUMPY = """
import sys
import numpy as np
from headrace import ops
array = np.ones((1, 3, 2, 8), np.float32)
ops.merge_attention([ops.attention(array, array, array, causal=True)])
print(*sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""


def test_ops_of_numpy_arrays_load_no_extras():
    command = [sys.executable, "-c", ATTENTION_OF_NUMPY, EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_watch_sees_what_is_loaded():
    assert loaded("json,torch", "json") == ["json"]


# The checks themselves, on a repository that breaks every rule.


def long_function(lines):
    return '"""A file."""\n\ndef f():\n' + "    x = 1\n" * (lines - 1)


DOC = '"""A file."""\n'
BAD = {
    "headrace/ops/linear.py": (DOC + "from headrace.engine import engine\n", "ops imports engine, which lies above it"),
    "headrace/ops/late.py": (DOC + "def f():\n    import headrace.llm\n", "ops imports llm, which lies above it"),
    "headrace/ops/front.py": (DOC + "from headrace import LLM\n", "imports LLM, which lies above"),
    "headrace/errors.py": (
        DOC + "from headrace.kernels.cpu import roof\n",
        "errors imports kernels, which lies above it",
    ),
    "headrace/kernels/cpu/select.py": (DOC + "from headrace.ops.select import Kernel\n", "kernels imports ops"),
    "headrace/text/guarded.py": (
        DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headrace.llm import LLM\n",
        "text imports llm, which lies above it",
    ),
    "headrace/text/beside.py": (
        DOC + "from headrace.weights import gguf\n",
        "text imports weights, which lies beside it",
    ),
    "headrace/llm.py": (DOC + "from headrace.check import cases\n", "llm imports check, which lies above it"),
    "headrace/engine/near.py": (DOC + "from . import batch\n", "relative import"),
    "headrace/newcomer.py": (DOC, "'newcomer' has no layer"),
    "headrace/ops/heavy.py": (DOC + "import torch.nn\n", "imports torch at module level"),
    "headrace/ops/tried.py": (
        DOC + "try:\n    from triton import jit\nexcept ImportError:\n    pass\n",
        "imports triton at module level",
    ),
    "headrace/ops/through.py": (
        DOC + "from headrace.ops import torch_paged\n",
        "imports headrace.ops.torch_paged at module level",
    ),
    "headrace/models/theirs.py": (
        DOC + "import headrace.compat.sdpa\n",
        "imports headrace.compat.sdpa at module level",
    ),
    "headrace/compat/sdpa.py": (DOC + "import torch\nimport transformers\n", "imports transformers at module level"),
    "headrace/ops/in_class.py": (DOC + "class A:\n    import ray\n", "imports ray at module level"),
    "headrace/ops/long.py": (long_function(81), "f has 81 lines, more than 80"),
    "headrace/kernels/cpu/long.py": (long_function(151), "f has 151 lines, more than 150"),
    "headrace/kernels/cpu/long.h": ("// A file.\nvoid f() {\n" + "  g();\n" * 149 + "}\n", "has 151 lines"),
    "headrace/kernels/cpu/method.h": (
        "// A file.\nclass A {\n  void f() {\n" + "    g();\n" * 149 + "  }\n};\n",
        "'void f() {' has 151 lines",
    ),
    "headrace/ops/many.py": (DOC + "def f(a, b, c, d, e, g): ...\n", "f has 6 positional arguments"),
    "headrace/ops/large.py": (DOC + "\n" * 400, "401 lines, more than 400"),
    "tests/test_large.py": (DOC + "\n" * 400, "401 lines, more than 400"),
    "headrace/kernels/cpu/large.h": ("// A file.\n" * 701, "701 lines, more than 700"),
    "headrace/ops/norm_utils.py": (DOC, "named utils"),
    "headrace/common/norm.py": (DOC, "named common"),
    "headrace/ops/more/deep.py": (DOC, "lies deeper than 2 folders"),
    "headrace/ops/silent.py": ("x = 1\n", "does not say what it is for"),
    "headrace/kernels/cpu/silent.h": ("#pragma once\n", "does not say what it is for"),
    "headrace/ops/undone.py": (DOC + "x = 1  # TO" + "DO: two\n", "line 2: something is left undone"),
    "headrace/kernels/cpu/undone.cpp": ("// A file.\n// FIX" + "ME\n", "line 2: something is left undone"),
    "docs/log.md": ("# Log\n\nSee issue " + "#12.\n", "means nothing to a reader"),
    "Makefile": ("# Builds\ncd /wor" + "k/main\n", "means nothing to a reader"),
}


@pytest.mark.parametrize("path", BAD)
def test_each_rule_is_seen_to_be_broken(path):
    text, expected = BAD[path]
    [problem] = [
        line
        for line in rules.broken_rules([Source(path, text)])
        if "has no layer" in expected or "no layer" not in line
    ]
    assert problem.startswith(f"{path}: ") and expected in problem


GOOD = {
    "headrace/ops/norm.py": "from headrace.kernels import cpu\nfrom headrace.ops import select\n",
    "headrace/ops/late.py": "def f():\n    import torch\n    from headrace.kernels.cpu import norm\n",
    "headrace/compat/flash_attn/layers/rotary.py": "import torch\n",
    "headrace/compat/flash_mla.py": "def f(a, b, c, d, e, g): ...\n",
    "headrace/ops/lazy.py": "def f():\n    from headrace.ops import torch_paged\n",
    "headrace/ops/torch_paged.py": "import torch\nfrom headrace.ops import torch_attention\n",
    "headrace/compat/transformers.py": "import torch\nimport transformers\nfrom headrace.compat import sdpa\n",
    "headrace/machine.py": "from headrace.kernels.cpu import _native\nimport numpy as np\nimport os\n",
    "headrace/weights/load.py": "def f(a, b, c, d, e, *, g):\n    def h(self, a, b, c, d, e): ...\n",
    "headrace/kernels/cpu/linear.py": "def run(a, b, c, d, e, f, g): ...\n",
    "headrace/bench/model.py": "from headrace.llm import LLM\nfrom headrace.talk import say\n",
    "headrace/cli.py": "from headrace.bench import model\nfrom headrace import doctor\n",
    "headrace/text/stream.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
}


@pytest.mark.parametrize("path", GOOD)
def test_what_is_allowed_passes(path):
    assert rules.broken_rules([Source(path, DOC + GOOD[path])]) == []


def test_long_functions_show_in_the_distribution():
    sources = [Source("headrace/ops/a.py", DOC + ("def f():\n" + "    x = 1\n" * 12) * 3)]
    assert rules.broken_distribution(rules.function_lines(sources)) == [
        "50% of all functions have up to 13 lines, more than 12"
    ]
    assert rules.broken_distribution([1] * 89 + [36] * 11) == ["90% of all functions have up to 36 lines, more than 35"]
    assert rules.broken_distribution([12] * 90 + [35] * 10) == []


def test_a_map_line_is_a_file_and_its_purpose(tmp_path):
    texts = {
        "a.py": '"""What a does.\n\nMore."""\n',
        "b.h": "// What b does. When it\n// wins.\n",
        "c.md": "# What c tells\n\nText.\n",
        "d.toml": "# What d sets.\n[x]\n",
        "LICENSE": "\n   What it grants\n",
        ".gitignore": "# What is ignored.\nx\n",
        "run": "#!/bin/bash\n# What run runs.\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.bin").write_bytes(bytes(range(256)))
    assert layout.map_lines(tmp_path, [*sorted(texts), "data/x.bin"]) == [
        ".gitignore  What is ignored.",
        "LICENSE     What it grants",
        "a.py        What a does.",
        "b.h         What b does.",
        "c.md        What c tells",
        "d.toml      What d sets.",
        "run         What run runs.",
        "data/",
        "  x.bin  read by the tests",
    ]


def test_a_stale_map_is_replaced(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "README.md").write_text(f"# Title\n\n{layout.BEGIN}\nold\n{layout.END}\n\nend\n")
    (tmp_path / "a.py").write_text('"""What a does."""\n')
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    layout.write_map(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert layout.readme_section(readme) == layout.map_section(tmp_path)
    assert "a.py       What a does." in readme and "old" not in readme and readme.endswith("\n\nend\n")
