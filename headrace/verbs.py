"""What all verbs of the command line share: dataclasses become options, errors become messages and exit codes.

A HeadraceError is one message with a hint and exit code 2, Ctrl-C is 130, a reader that went away is 141.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from headrace.errors import HeadraceError
from headrace.options import with_options
from headrace.talk import say

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141


def verb(place: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a verb: dataclass parameters become options, errors become messages and exit codes."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        expanded = with_options(function)

        @functools.wraps(expanded)
        def guarded(**values: Any) -> None:
            code = _exit_code(expanded, values)
            if code:
                raise SystemExit(code)

        place.command(name)(guarded)
        return function

    return register


def _exit_code(function: Callable[..., None], values: dict[str, Any]) -> int:
    try:
        function(**values)
        sys.stdout.flush()
    except HeadraceError as error:
        say(f"error: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("\ninterrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return EXIT_NO_READER
    except OSError as error:
        say(f"error: {error.filename or 'system'}: {error.strerror or error}")
        return EXIT_MISTAKE
    except MemoryError:
        say("error: the system has no memory left for this\n  hint: a smaller model, or a smaller --context-len")
        return EXIT_MISTAKE
    return 0
