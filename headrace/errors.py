"""The exceptions headrace raises for mistakes that are not its own.

    HeadraceError
    ├── ArgumentError          a value passed in is wrong (also a ValueError)
    │   └── PromptTooLongError the prompt does not fit the context
    ├── ModelFileError         a file is damaged, truncated or lies about its contents
    ├── UnsupportedError       well-formed, but of a kind headrace does not do
    ├── SourceError            a model cannot be found or fetched
    ├── CapacityError          out of pages, memory or disk
    ├── KernelError            a kernel asked for by name cannot run (its reasons are in the text)
    ├── NotFiniteError         a model computed NaN or infinity where numbers to go on with should be
    └── TemplateError          a chat template is broken or refuses the conversation

Each text names the argument, what was expected and what came; `hint` says what to do.
Mistakes of headrace itself are asserts, never one of these.
"""

from __future__ import annotations


class HeadraceError(Exception):
    """The root: catch this to catch everything headrace raises on purpose."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ArgumentError(HeadraceError, ValueError):
    """A value passed in is wrong."""


class PromptTooLongError(ArgumentError):
    """The prompt does not fit the context."""


class ModelFileError(HeadraceError):
    """A file is damaged, truncated or lies about its contents."""


class UnsupportedError(HeadraceError):
    """Well-formed, but of a kind headrace does not do."""


class SourceError(HeadraceError):
    """A model cannot be found or fetched."""


class CapacityError(HeadraceError):
    """Out of pages, memory or disk."""


class KernelError(HeadraceError):
    """A kernel asked for by name cannot run."""


class NotFiniteError(HeadraceError):
    """A model computed NaN or infinity where numbers to go on with should be."""


class TemplateError(HeadraceError):
    """A chat template is broken or refuses the conversation."""
