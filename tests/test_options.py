"""A field of a dataclass is an option: its type, its default, and nothing else to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from headrace.errors import ArgumentError
from headrace.options import begun_with, with_options


@dataclass(frozen=True)
class Settings:
    long_name: int = 3
    ratio: float | None = None
    loud: bool = False
    words: tuple[str, ...] = ()


def _given(*arguments: str) -> tuple[str, Settings]:
    seen: list[tuple[str, Settings]] = []
    app = typer.Typer()

    @with_options
    def verb(text: Annotated[str, typer.Argument()], settings: Settings) -> None:
        seen.append((text, settings))

    app.command()(verb)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return seen[0]


def test_defaults_are_those_of_the_class() -> None:
    text, settings = _given("hello")
    assert text == "hello"
    assert (settings.long_name, settings.ratio, settings.loud, tuple(settings.words)) == (3, None, False, ())


def test_every_kind_of_field_can_be_given() -> None:
    _, settings = _given("x", "--long-name", "5", "--ratio", "0.5", "--loud", "--words", "a", "--words", "b c")
    assert (settings.long_name, settings.ratio, settings.loud, tuple(settings.words)) == (5, 0.5, True, ("a", "b c"))


def test_names_are_chosen_by_their_beginnings() -> None:
    names = ["decode_1", "decode_2", "prefill"]
    assert begun_with("--cases", (), names) == set(names) == begun_with("--cases", ("dec", "prefill"), names)
    assert begun_with("--cases", ("decode_2",), names) == {"decode_2"}
    with pytest.raises(ArgumentError, match="--cases: expected some of decode_1, .* got 'x'"):
        begun_with("--cases", ("x",), names)


def test_a_long_list_of_names_is_not_shown_whole() -> None:
    with pytest.raises(ArgumentError, match="name0, .*name23, ..., got 'x'"):
        begun_with("--rows", ("x",), [f"name{i}" for i in range(100)])
