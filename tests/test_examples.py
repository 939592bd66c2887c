"""Every example runs as it stands and prints what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SAYS = {
    "attention_explained.py": "cpu_portable",
    "chat.py": "Rome",
    "complete.py": "The capital of France is Paris",
    "logits.py": "' lazy'",
    "packed_decode.py": "16 documents side by side",
    "structured.py": "{'name': ",
    "weights.py": "Q4_0  0.56 bytes/weight",
}
WITHOUT_A_MODEL = {"attention_explained.py", "packed_decode.py"}
MAX_LINES = 30


def test_every_example_is_run():
    assert sorted(path.name for path in FOLDER.glob("*.py")) == sorted(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(request, name):
    if name not in WITHOUT_A_MODEL:
        request.getfixturevalue("default_model_path")
    if name == "structured.py":
        pytest.importorskip("llguidance")
    path = FOLDER / name
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert SAYS[name] in ended.stdout
    assert "Traceback" not in ended.stderr
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES
