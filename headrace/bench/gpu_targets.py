"""What a row of `headrace bench gpu` shall reach, and whether it did: PASS, MISS, FAILED, or open with the reason.

A target is of a kernel: of the one that is chosen (by ""), or of the fastest whose name begins with `by`. Ratios only,
against what the same run measured: the roofs of the device, and what took turns with it. FAILED: our kernel computed
something wrong, raised, or took the process with it. Open: it cannot run there, or what it is compared with is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PASS, MISS, FAILED, OPEN = "PASS", "MISS", "FAILED", "open"
STATUSES = (PASS, MISS, FAILED, OPEN)
OUT_OF_TIME = "out of time"  # how errors begin that are nobody's fault

Row = Mapping[str, Any]  # a row's results, as the worker tells them
Roofs = Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """One number to reach. kind, with `least` or `most` as its bound:

    "copy"     bytes per second as a share of the measured copy bandwidth
    "tflops"   1e12 operations per second
    "times"    the time of the fastest whose name begins with `than`, over ours
    "error"    the root mean square of our errors over that of `than`, at most
    "seconds"  of a first call in a warm process, at most
    "regret"   the time of the chosen kernel over that of the fastest, at most
    """

    kind: str
    bound: float
    by: str = ""
    than: str = ""

    @property
    def at_most(self) -> bool:
        return self.kind in ("error", "seconds", "regret")

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        said = {
            "copy": f"{self.bound:.0%} of the copy bandwidth",
            "tflops": f"{self.bound:g} TFLOP/s",
            "times": f"{self.bound:g} x {self.than}",
            "error": f"the error of {self.than}",
            "seconds": f"{1e3 * self.bound:g} ms to a first result in a warm process",
            "regret": f"regret {self.bound:g}",
        }[self.kind]
        return f"{self.by or 'chosen'}: {sign} {said}"

    def reached_text(self, reached: float) -> str:
        """A number in the target's unit."""
        if self.kind == "copy":
            return f"{reached:.1%}"
        if self.kind == "tflops":
            return f"{reached:.0f} TFLOP/s"
        return f"{1e3 * reached:.0f} ms" if self.kind == "seconds" else f"{reached:.2f}"


@dataclass(frozen=True)
class Verdict:
    """What became of a target on a row."""

    row: str
    target: Target
    status: str
    reached: float | None = None
    why: str = ""  # it is open
    kernel: str = ""

    def cells(self) -> list[str]:
        reached = self.why if self.reached is None else self.target.reached_text(self.reached)
        return [self.row, str(self.target), self.status, reached, self.kernel]

    def data(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "target": str(self.target),
            "status": self.status,
            "reached": self.reached,
            "why": self.why,
            "kernel": self.kernel,
        }


class _NotKnown(Exception):
    """A target cannot be judged; the text says why, `status` whether that is a failure."""

    def __init__(self, why: str, status: str = OPEN) -> None:
        super().__init__(why)
        self.status = status


def judged(name: str, target: Target, row: Row, roofs: Roofs) -> Verdict:
    """The target's verdict by a row's results."""
    try:
        kernel, reached = _reached(target, row, roofs)
    except _NotKnown as unknown:
        return Verdict(name, target, unknown.status, why=str(unknown))
    met = reached <= target.bound if target.at_most else reached >= target.bound
    return Verdict(name, target, PASS if met else MISS, reached, kernel=kernel)


def _reached(target: Target, row: Row, roofs: Roofs) -> tuple[str, float]:
    if target.kind in ("seconds", "regret"):
        return _plain(target, row)
    kernel = _kernel(target.by, row)
    ours = row["by"][kernel]
    if target.kind == "copy":
        if "copy" not in roofs:
            raise _NotKnown("the copy bandwidth was not measured")
        return kernel, row["num_bytes"] / ours["median_s"] / roofs["copy"]
    if target.kind == "tflops":
        return kernel, row["flops"] / ours["median_s"] / 1e12
    theirs = row["by"][_fastest(target.than, row)]
    if target.kind == "times":
        return kernel, theirs["median_s"] / ours["median_s"]
    if not (ours.get("rms_error") and theirs.get("rms_error")):
        raise _NotKnown("errors were not measured")
    return kernel, ours["rms_error"] / theirs["rms_error"]


def _plain(target: Target, row: Row) -> tuple[str, float]:
    key = {"seconds": "first_s", "regret": "regret"}[target.kind]
    if row.get(key) is None:
        raise _whole_row(row)
    return row.get("chosen") or "", row[key]


def _kernel(by: str, row: Row) -> str:
    """The kernel that a target is of."""
    if "error" in row:
        raise _whole_row(row)
    if by:
        return _fastest(by, row, ours=True)
    chosen = row["chosen"]
    if not chosen:
        raise _NotKnown("no kernel can run it")
    if chosen not in row["by"]:
        raise _missing(chosen, row, ours=True)
    return str(chosen)


def _fastest(beginning: str, row: Row, *, ours: bool = False) -> str:
    found = [name for name in row["by"] if name.startswith(beginning)]
    if not found:
        raise _missing(beginning, row, ours=ours)
    return min(found, key=lambda name: float(row["by"][name]["median_s"]))


def _whole_row(row: Row) -> _NotKnown:
    """Why a row has no results."""
    error = row.get("error", "")
    failed = error and not error.startswith(OUT_OF_TIME)
    return _NotKnown(error or "it was not measured", FAILED if failed else OPEN)


def _missing(beginning: str, row: Row, *, ours: bool) -> _NotKnown:
    """Why nothing of that name has a time: it failed, cannot run, or was never there."""
    for name, why in row["failed"].items():
        if name.startswith(beginning):
            return _NotKnown(f"{name}: {why}", FAILED if ours and not why.startswith(OUT_OF_TIME) else OPEN)
    for name, why in row["cannot"].items():
        if name.startswith(beginning):
            return _NotKnown(f"{name}: {why}")
    return _NotKnown(f"there is no {beginning}")
