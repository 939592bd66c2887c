"""What all drawings of benches share: the kinds of file there are, and a figure without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.errors import ArgumentError, HeadraceError
from headrace.weights.whole_file import whole_file

FORMATS = ("svg", "png", "pdf")


def check_target(out: Path, option: str = "out") -> None:
    """Raises where nothing could be drawn to this file, before anything is measured: ArgumentError for another ending
    or a folder that is not there, HeadraceError without matplotlib."""
    if out.suffix[1:].lower() not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ArgumentError(f"{option}: expected a file that ends in one of {endings}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise ArgumentError(f"{option}: there is no folder {str(out.parent)!r}")
    _figure_class()


def new_figure(**options: Any) -> Any:
    """A matplotlib figure."""
    return _figure_class()(layout="constrained", **options)


def save(figure: Any, out: Path) -> None:
    """Writes it; the kind of file is that of its ending."""
    with whole_file(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower())


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HeadraceError(
            "matplotlib is not installed: nothing can be drawn", 'pip install "headrace[plot]"'
        ) from error
    return Figure
