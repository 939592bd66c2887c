"""The language of chat templates: Jinja with the functions Hugging Face adds, and with limits.

Jinja's sandbox keeps a template from Python's internals, but lets it loop and grow as it likes: two nested loops over
`range(99999)` take hours, doubling a text forty times takes all memory. Here every turn of a loop and every call of a
macro counts as a step, a rendering may take only so many, and the operators that build texts refuse enormous ones.

Only `chat` imports this module, when a template is first used: starting up should not load Jinja.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

MAX_STEPS = 1_000_000
MAX_VALUE_LEN = 1 << 24
MAX_POWER_BITS = 1 << 12


def build_environment() -> Environment:
    """What one chat template is compiled in."""
    extensions = [GenerationTag, jinja2.ext.loopcontrols]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=Namespace
    )
    del environment.globals["lipsum"]  # Jinja's random filler text, of any length asked for
    return environment


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with limits on steps and on the size of what operators build.

    NOTE: the count of steps is the environment's: renderings of one template at the same time share it.
    """

    intercepted_binops = frozenset(["+", "*", "**"])
    steps_left = MAX_STEPS

    def begin_rendering(self) -> None:
        """Give the next rendering all its steps."""
        self.steps_left = MAX_STEPS

    def take_step(self) -> None:
        """Count one turn of a loop or one call of a macro."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise OverflowError(f"more than {MAX_STEPS} steps")

    def join_texts(self, *values: Any) -> str:
        """The operator `~`, limited."""
        texts = [str(value) for value in values]
        _check_len(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply +, * or ** if the result has a reasonable size."""
        if operator == "+":
            _check_len(_len(left) + _len(right))
        elif operator == "*":
            _check_len(max(_len(left) * _as_count(right), _len(right) * _as_count(left)))
        elif _as_count(left).bit_length() * _as_count(right) > MAX_POWER_BITS:
            raise OverflowError("a power beyond any use")
        return super().call_binop(context, operator, left, right)

    def _parse(self, *args: Any) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Limiter().visit(super()._parse(*args))
        tree.set_environment(self)
        return tree


class _Limiter(jinja2.visitor.NodeTransformer):
    """Puts `take_step` into every loop and macro, and `join_texts` in the place of `~`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        """Count the turns of a loop."""
        return self._count(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        """Count the calls of a macro."""
        return self._count(node)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Limit `~`, which the sandbox lets nobody intercept."""
        self.generic_visit(node)
        return _call_environment("join_texts", node.nodes).set_lineno(node.lineno)

    def _count(self, node: jinja2.nodes.For | jinja2.nodes.Macro) -> jinja2.nodes.Node:
        self.generic_visit(node)
        count = jinja2.nodes.ExprStmt(_call_environment("take_step", []))
        node.body.insert(0, count.set_lineno(node.lineno))
        return node


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks the text a model is trained to write. When rendering it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block's contents, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore, which lead into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, fields = args[0], dict(*args[1:], **kwargs)
        for name in fields:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    """The time now, for templates that tell the model the date."""
    return datetime.now().strftime(format)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """What `dict(...)` calls in a template: a function, because the class has methods that change things."""
    return dict(*args, **kwargs)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    r"""The filter `tojson`. Jinja's own writes `<` as \u003c, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _call_environment(method: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    """A call, in the template's program, that no variable of the template can get in the way of."""
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have a field named {name!r}")


def _len(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _as_count(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _check_len(length: int) -> None:
    if length > MAX_VALUE_LEN:
        raise OverflowError(f"a value longer than {MAX_VALUE_LEN}")
