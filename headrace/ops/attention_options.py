"""What every attention returns, and the options all of them share, checked in one place.

own(i), the key that query i of a request stands at: key_len - query_len + i with align="bottom_right", else i
causal: it sees keys up to its own       window=(left, right): from own - left to own + right; None: no bound
softcap: scores become softcap * tanh(score / softcap)                   scale: of query . key, head_dim ** -0.5
precision: "auto": float32 arithmetic, bfloat16 products where query and keys both are; "exact": float32 always
    (float64 for float64); "fast": bfloat16 products for any type
deterministic: a sequence's bits depend neither on its neighbours nor on chunking or threads
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from headrace.errors import ArgumentError

ALIGNS = ("bottom_right", "top_left")
PRECISIONS = ("auto", "exact", "fast")
Window = tuple[int | None, int | None]

_LARGEST_WINDOW = 2**40  # the native side counts keys in 64 bits


@dataclass(frozen=True)
class AttentionResult:
    """out: like the query, with the values' last dimension. lse: natural log of each row's sum of exp(score), without
    sinks, [tokens, heads] or [batch, tokens, heads]. A row that sees no key: out 0, lse -inf."""

    out: Any
    lse: Any


@dataclass(frozen=True)
class AttentionOptions:
    """Checked options of one call; make them with `checked_options`."""

    causal: bool = False
    align: str = "bottom_right"
    window: Window = (None, None)
    softcap: float | None = None
    scale: float = 1.0
    precision: str = "auto"
    deterministic: bool = False

    @property
    def left(self) -> int | None:
        """Keys seen before a query's own; None: all."""
        return self.window[0]

    @property
    def right(self) -> int | None:
        """Keys seen after a query's own; None: all. Causal is none."""
        return 0 if self.causal else self.window[1]

    def native(self) -> dict[str, Any]:
        """As the native side takes them: -1 for no bound, 0 for no cap."""
        return {
            "top_left": self.align == "top_left",
            "window_left": -1 if self.left is None else self.left,
            "window_right": -1 if self.right is None else self.right,
            "scale": self.scale,
            "softcap": self.softcap or 0.0,
            "batch_invariant": self.deterministic,
        }


def checked_options(
    head_dim: int,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    window: Window = (None, None),
    softcap: float | None = None,
    scale: float | None = None,
    precision: str = "auto",
    deterministic: bool = False,
) -> AttentionOptions:
    """The options of a call, from its keyword arguments. Raises ArgumentError that names the one that is wrong."""
    return AttentionOptions(
        causal=_flag("causal", causal),
        align=one_of("align", align, ALIGNS),
        window=_checked_window(window),
        softcap=None if softcap is None else _positive("softcap", softcap),
        scale=head_dim**-0.5 if scale is None else _positive("scale", scale),
        precision=one_of("precision", precision, PRECISIONS),
        deterministic=_flag("deterministic", deterministic),
    )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value, if it is allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def _flag(name: str, value: bool) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's spells itself either way
        raise ArgumentError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _checked_window(window: Window) -> Window:
    try:
        left, right = window
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"window: expected (left, right), got {window!r}", "None for no bound") from error
    return _bound(left, window), _bound(right, window)


def _bound(keys: int | None, window: Window) -> int | None:
    if keys is None:
        return None
    try:
        count = operator.index(keys)
    except TypeError:
        count = -1
    if isinstance(keys, bool) or count < 0:
        raise ArgumentError(f"window: expected whole numbers >= 0 or None, got {window!r}", "None for no bound")
    return min(count, _LARGEST_WINDOW)


def _positive(name: str, value: float) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ArgumentError(f"{name}: expected a finite number > 0, got {value!r}")
    return number
