"""Every example runs as it stands and prints what it promises."""

import itertools
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
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
SAYS_OF_A_SERVER = {
    "serve_agent.py": "of them computed before",
    "serve_curl.sh": "data: [DONE]",
    "serve_openai.py": "call: weather",
}
WITHOUT_A_MODEL = {"attention_explained.py", "packed_decode.py"}
WITH_TORCH = {"torch_decoder.py", "train_packed.py"}
IMPORTED = {"small_llama.py"}
MAX_LINES, MAX_LINES_WITH_TORCH = 30, 160


def test_every_example_is_run():
    known = {*SAYS, *SAYS_OF_A_SERVER, *WITH_TORCH, *IMPORTED}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == known
    importing = [(FOLDER / name).read_text(encoding="utf-8") for name in WITH_TORCH]
    assert all(f"from {Path(name).stem} import" in text for name in IMPORTED for text in importing)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(request, name):
    if name not in WITHOUT_A_MODEL:
        request.getfixturevalue("default_model_path")
    if name == "structured.py":
        pytest.importorskip("llguidance")
    path = FOLDER / name
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert SAYS[name] in ended.stdout
    assert "Traceback" not in ended.stderr
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def printed_by(name: str, *arguments: str) -> str:
    path = FOLDER / name
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # of torch: arrays as small as these are soon waited for
    ended = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, timeout=300, env=alone)
    assert ended.returncode == 0, ended.stderr
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES_WITH_TORCH
    return ended.stdout


@pytest.mark.slow
def test_all_compiled_decoders_draw_the_same_tokens():
    printed = printed_by("torch_decoder.py", "--quick")
    for name in ("headrace", "SDPA", "FlexAttention"):
        drawn = re.search(rf"^{name}: (\d+) of (\d+) tokens", printed, re.MULTILINE)
        assert drawn and drawn[1] == drawn[2] != "0", printed
        assert re.search(rf"^{name} +\d+\.\d+ +\d+\.\d+$", printed, re.MULTILINE), printed


@pytest.mark.slow
def test_training_on_packed_documents_learns_as_with_sdpa():
    printed = printed_by("train_packed.py", "--tokens", "512")
    assert "loss and gradients, furthest from float64's" in printed
    learned = re.findall(r"^(\w+) .* loss from ([\d.]+) to ([\d.]+)$", printed, re.MULTILINE)
    assert [name for name, *_ in learned] == ["headrace", "SDPA"], printed
    assert all(float(last) < 0.8 * float(first) for _, first, last in learned), printed


@pytest.fixture(scope="module")
def server_url(default_model_path, tmp_path_factory):
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "headrace", "serve", "-m", f"smollm2={default_model_path}", "--port", url[17:]]
    with log.open("wb") as written, subprocess.Popen(command, stderr=written) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(url + "/health").close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield url
        finally:
            server.terminate()


@pytest.mark.parametrize("name", SAYS_OF_A_SERVER)
def test_an_example_of_a_client_runs(server_url, name):
    path = FOLDER / name
    command = ["sh" if name.endswith(".sh") else sys.executable, path]
    environment = {**os.environ, "HEADRACE_URL": server_url}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert SAYS_OF_A_SERVER[name] in ended.stdout
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES
    if name == "serve_agent.py":  # a turn computes its own tokens, not those before it
        turns = re.findall(r"(\d+) tokens of prompt, (\d+) of them", ended.stdout)
        assert all(int(cached) >= int(before) - 1 for (before, _), (_, cached) in itertools.pairwise(turns))
