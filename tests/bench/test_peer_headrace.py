"""headrace as a peer: it computes only behind what it holds, alone and in a batch; float32 all through is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.bench.peer_headrace import open_peers
from headrace.bench.peer_read import PlainRead
from headrace.bench.peers import FEWEST_STEPS, Opening, steps_per_s
from headrace.check.fakes import write_tiny_model
from headrace.engine import runner


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_it_computes_only_behind_what_it_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = open_peers(Opening(str(path), 1, 128)).values()
    engine.hold(list(range(20)))
    asked: list[int] = []
    step = runner.Runner.run
    monkeypatch.setattr(runner.Runner, "run", lambda self: (asked.append(self.batch.num_tokens), step(self))[1])
    assert engine.prefill([30, 31, 32]) > 0 and asked == [3]
    asked.clear()
    assert engine.decode([0] * 6, 10.0) > 0 and asked == [1] * 7  # the prompt's last token, and six more
    asked.clear()
    engine.decode([0] * 50, 0.0)
    assert asked == [1] * (1 + FEWEST_STEPS)


def test_a_batch_is_left_as_it_was(path: Path) -> None:
    (engine,) = open_peers(Opening(str(path), 1, 128)).values()
    engine.arrange(64, 3)
    engine.fill(list(range(9)), 3)
    for sequences in (1, 3):
        assert engine.decode_batch(sequences, 4, 10.0) > 0
        assert [sequence.ids for sequence in engine._sequences] == [list(range(9))] * 3
    engine.fill(list(range(30, 35)), 2)
    assert [len(sequence.ids) for sequence in engine._sequences] == [5, 5]


def test_float32_weights_and_cache_are_exact(path: Path, tmp_path: Path) -> None:
    opening = Opening(str(path), 1, 128, kv_dtype="float32")
    (engine,) = open_peers(opening).values()
    ids, target = list(range(7)), str(tmp_path / "exact.npy")
    engine.save_logits(ids, target)
    assert np.load(target).shape == (7, 300)
    assert engine.divergence(target, ids) == [0.0] * 7
    assert engine.work()["weight_bytes"] > 0


def test_steps_end_after_their_number_or_their_time() -> None:
    taken: list[int] = []
    assert steps_per_s(lambda: taken.append(1), 20, 10.0) > 0 and len(taken) == 20
    steps_per_s(lambda: taken.append(1), 20, 0.0)
    assert len(taken) == 20 + FEWEST_STEPS


def test_a_plain_read_reads() -> None:
    assert 1e8 < PlainRead(1).read(1 << 20) < 1e13
