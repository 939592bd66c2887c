"""A conversation in the terminal, or with a pipe: one line in, one answer out.

The whole conversation is rendered anew each turn; the engine computes only what the cache does not hold yet. Ctrl-C
ends an answer and keeps what there is of it. Lines are edited with readline where Python has it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from headrace.config import SamplingParams
from headrace.errors import HeadraceError
from headrace.talk import say, speed_line

if TYPE_CHECKING:
    from headrace.llm import LLM, Stream

HELP = """\
/reset        forget the conversation
/system TEXT  begin anew with this system prompt; without TEXT: with none
/exit         leave (so does Ctrl-D)
/help         this
Ctrl-C        end the answer"""


def converse(llm: LLM, params: SamplingParams) -> list[int]:
    """Reads lines and answers until /exit or the end of the input; the tokens of the last turn, with all before it."""
    conversation = Conversation(llm, params)
    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
        say(f"{llm.config.name or llm.path.name}: /help says what can be done, Ctrl-D leaves")
    while True:
        try:
            line = _read_line(terminal)
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D leaves")
            continue
        if line is None or not conversation.take(line):
            return conversation.token_ids


class Conversation:
    """The messages so far, and what a line does to them."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self._system: list[dict[str, str]] = []
        self.messages: list[dict[str, str]] = []
        self.token_ids: list[int] = []

    def take(self, line: str) -> bool:
        """Does what a line asks for; False when it asks to leave."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(*line.partition(" ")[::2])
        if line:
            self._turn(line)
        return True

    def _command(self, name: str, text: str) -> bool:
        if name == "/exit":
            return False
        if name == "/reset":
            self.messages = []
            say("the conversation is forgotten")
        elif name == "/system":
            self._system = [{"role": "system", "content": text.strip()}] if text.strip() else []
            self.messages = []
            say("the conversation begins anew" + (" with this system prompt" if self._system else ""))
        elif name == "/help":
            say(HELP)
        else:
            say(f"unknown: {name}\n{HELP}")
        return True

    def _turn(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = self._answer([*self._system, *asked])
        except HeadraceError as error:
            say(f"error: {error}")
            return
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]]) -> str:
        """Prints the answer as it comes; what there is of it when Ctrl-C ends it."""
        shown: list[str] = []
        stream = self._llm.chat_stream(messages, self._params)
        try:
            for piece in stream:
                shown.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            print(flush=True)
            say("interrupted")
            self._note(stream)
            return "".join(shown)
        print(flush=True)
        say(speed_line(stream.completion))
        self._note(stream)
        return "".join(shown)

    def _note(self, stream: Stream) -> None:
        completion = stream.completion
        self.token_ids = [*completion.prompt_token_ids, *completion.token_ids]


def _edit_lines() -> None:
    """Cursor keys and the lines of this session, where Python was built with readline."""
    try:
        import readline  # noqa: F401 - importing it is what changes input()
    except ImportError:
        return


def _read_line(terminal: bool) -> str | None:
    """The next line; None at the end of the input."""
    if terminal:
        try:
            return input("> ")
        except EOFError:
            say("")
            return None
    line = sys.stdin.buffer.readline()
    return line.decode(errors="replace") if line else None
