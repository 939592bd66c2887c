"""Synthetic models: the sizes and formats asked for, weights as spread as they should be, whole or absent."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

import headrace
from headrace.bench import synth
from headrace.bench.synth import SHAPES, WEIGHT_STD, Shape, tensor_shapes, write_shape, write_synthetic
from headrace.errors import ArgumentError, CapacityError
from headrace.ops.formats import FORMATS, dequantize
from headrace.weights.gguf import open_gguf
from headrace.weights.recipes import choose_formats, get_recipe

SMALL = Shape(2, 256, 4, 2, 64, 512, 400, False, 1e4, context_len=128)
TYPES = ("f16", "q8_0", "q4_0", "q4_k_m")


@pytest.mark.parametrize("recipe", TYPES)
@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, dim=96, ffn_dim=160, tied_head=True)], ids=["256", "96"])
def test_a_small_one_answers_and_the_reference_package_reads_it(shape: Shape, recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_shape(path, shape, recipe)
    names = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in gguf.GGUFReader(path).tensors}
    assert names == tensor_shapes(shape)
    llm = headrace.LLM(path, threads=1)
    prompt = llm.tokenizer.encode("Any text: \u00e9\u4e2d\n", add_special=False)
    assert llm.tokenizer.decode(prompt) == "Any text: \u00e9\u4e2d\n"
    assert np.isfinite(llm.logits(prompt)).all()
    assert len(llm.generate(prompt, headrace.SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3


@pytest.mark.parametrize("recipe", TYPES)
def test_weights_are_normal_and_no_two_tensors_alike(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_shape(path, SMALL, recipe, seed=3)
    with open_gguf(path) as file:
        matrices = {name: info for name, info in file.tensors.items() if len(info.shape) == 2}
        raw = {name: bytes(file.data(name)) for name in matrices}
        values = np.concatenate(
            [dequantize(np.frombuffer(raw[n], np.uint8), i.format).reshape(-1) for n, i in matrices.items()]
        )
    assert len(set(raw.values())) == len(raw)
    assert len({piece for data in raw.values() for piece in (data[:64], data[-64:])}) == 2 * len(raw)
    # Five standard errors, and the step of the coarsest format used: a 16th of the range of a block.
    error, step = 5 / np.sqrt(values.size), 1 / 16
    assert abs(values.mean()) < error * WEIGHT_STD * 2
    assert abs(values.std() / WEIGHT_STD - 1) < error + step


def test_one_seed_gives_one_file_and_another_another(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(files, (7, 7, 8), strict=True):
        write_shape(path, SMALL, "q4_0", seed=seed)
    first, same, other = (path.read_bytes() for path in files)
    assert first == same != other and len(first) == len(other)


def test_known_shapes_have_the_sizes_of_the_models_they_are_named_after() -> None:
    num_weights = {
        name: sum(int(np.prod(sizes)) for sizes in tensor_shapes(shape).values()) for name, shape in SHAPES.items()
    }
    assert num_weights == {
        "135m": 134_515_008,
        "1b": 1_235_814_400,
        "3b": 3_212_749_824,
        "7b": 7_241_732_096,
        "8b": 8_030_261_248,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_known_shapes_fit_every_type(name: str) -> None:
    shape = SHAPES[name]
    for recipe in TYPES:
        shapes = tensor_shapes(shape)
        formats = choose_formats(get_recipe(recipe), shapes, shape.num_heads // shape.num_kv_heads)
        assert all(sizes[-1] % FORMATS[formats[tensor]].block_len == 0 for tensor, sizes in shapes.items())


def test_mistakes_are_named(tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(ArgumentError, match=r"shape: expected one of 135m, 1b, .*, got '13b'"):
        write_synthetic(target, "13b", "q4_0")
    with pytest.raises(ArgumentError, match="recipe: 'q4' is not known"):
        write_synthetic(target, "1b", "q4")
    with pytest.raises(ArgumentError, match="seed"):
        write_synthetic(target, "1b", "q4_0", seed=-1)
    with pytest.raises(ArgumentError, match=r"nowhere/out.gguf: cannot be written"):
        write_synthetic(tmp_path / "nowhere" / "out.gguf", "1b", "q4_0")
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(CapacityError, match=r"expected 14\.5 GB of free space, got 1\.0 GB"):
        write_synthetic(tmp_path / "out.gguf", "7b", "f16")
    assert not list(tmp_path.iterdir())


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def stop(message: str, done: int, total: int | None) -> None:
        if total and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shape(tmp_path / "out.gguf", SMALL, "q8_0", progress=stop)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_all_of_it_and_pieces_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "_WRITE_BYTES", 4096)
    seen: list[tuple[int, int | None]] = []
    write_shape(tmp_path / "out.gguf", SMALL, "q8_0", progress=lambda message, done, total: seen.append((done, total)))
    done = [0, *(count for count, _ in seen)]
    assert done[-1] == seen[-1][1]
    assert max(after - before for before, after in pairwise(done)) <= 4096
