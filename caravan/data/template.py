"""Chat templates: jinja text that comes with a checkpoint, run in a sandbox.

A template is somebody else's program. It runs in jinja's immutable sandbox (no attribute access to Python
internals, no mutation of what we pass in), and every `for` loop draws on one budget per call, so that a
template cannot hang us. Names that checkpoints expect are there: `raise_exception`, `strftime_now`, `tojson`,
loop controls and the `generation` block.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from caravan.types import UserError

LOOP_BUDGET = 1_000_000
"""Loop passes of one rendering, all loops together."""
TEXT_BUDGET = 64 << 20
"""Characters one expression may make, and one rendering."""
WIDTH_BUDGET = 100_000
"""Largest number that a text method or a filter is given."""


FOLDER = Path(__file__).parent / "templates"
"""Built-in templates, one file each; the name is the file's."""


@dataclass(frozen=True, slots=True)
class Header:
    """The comment that a built-in template begins with. It stays in the template, wherever that is copied."""

    source: str = ""
    """Who published the format."""
    needs: tuple[str, ...] = ()
    """Special tokens without which it makes no sense."""
    stop: str | None = None
    """Text that ends an answer, where no special token does."""


def names() -> list[str]:
    """The built-in templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def builtin(name: str) -> str:
    """Source of a built-in template. Raises UserError for an unknown name."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {close[0]}?" if close else "they are: " + ", ".join(names())
        raise UserError(f"there is no chat template {name!r}", hint)
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def header(source: str) -> Header:
    """What the first comment of a template says about it; empty for a template of another make."""
    comment = re.match(r"\{#-\n(.*?)-#\}", source, re.DOTALL)
    said = (
        dict(line.split(": ", 1) for line in comment.group(1).splitlines() if ": " in line) if comment else {}
    )
    stop = said.get("stop")
    return Header(
        said.get("source", ""), tuple(said.get("needs", "").split()), json.loads(stop) if stop else None
    )


CHATML = builtin("chatml")
PLAIN = builtin("plain")


class TemplateRefusal(Exception):
    """The template itself called raise_exception: these messages are not for it."""


class _Budget:
    """Counts loop passes of one rendering."""

    def __init__(self) -> None:
        self.left = LOOP_BUDGET

    def take(self, items: Iterable[Any]) -> list[Any]:
        taken = []
        for item in items:
            self.left -= 1
            if self.left < 0:
                raise jinja2.TemplateRuntimeError(f"loops more than {LOOP_BUDGET:,} times")
            taken.append(item)
        return taken


@jinja2.pass_context
def _bounded(context: jinja2.runtime.Context, items: Iterable[Any]) -> list[Any]:
    return context["__budget__"].take(items)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text elsewhere; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call(  # type: ignore[override]
        self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        method = getattr(function, "__wrapped__", function)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = _modest(method.__name__, text, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise jinja2.TemplateRuntimeError("power too large")
        if operator == "%" and isinstance(left, str):
            _modest("%", left, right if isinstance(right, tuple) else (right,), {})
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            size = len(left) + len(right)
        elif operator == "*":
            size = max(
                (
                    len(a) * b
                    for a, b in ((left, right), (right, left))
                    if isinstance(a, str | list | tuple) and isinstance(b, int)
                ),
                default=0,
            )
        else:
            size = 0
        _fits(size)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "__bounded__", [], [], None, None, lineno=loop.lineno)
        return _Joins().visit(tree)  # type: ignore[no-any-return]


class _Joins(NodeTransformer):
    """`a ~ b` is joined by a filter that looks at the lengths first."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        pair = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pair, "__joined__", [], [], None, None, lineno=node.lineno)


def _joined(parts: list[Any]) -> Any:
    _fits(sum(len(part) for part in parts if isinstance(part, str)))
    return jinja2.runtime.str_join(parts)


def _fits(size: int) -> None:
    if size > TEXT_BUDGET:
        raise jinja2.TemplateRuntimeError("makes too much text")


_WIDE = re.compile(r"(%[^a-zA-Z%]*|\{[^{}]*)[0-9]{6}")
"""A place of a format that is wider than any text needs."""


def _modest(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a method of texts or of a filter, looked through: a width, a count or a piece of text
    could ask for more memory than there is."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, int) and abs(given) > WIDTH_BUDGET:
            raise jinja2.TemplateRuntimeError(f"'{name}' with the number {given}")
    if name in ("format", "format_map", "%") and _WIDE.search(str(value)):
        raise jinja2.TemplateRuntimeError("formats to a width of six digits")
    if name == "replace" and len(args) > 1:
        text, old, new = str(value), str(args[0]), str(args[1])
        _fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    if name == "join" and isinstance(value, str) and args:
        items = list(islice(args[0], LOOP_BUDGET + 1))
        if len(items) > LOOP_BUDGET:
            raise jinja2.TemplateRuntimeError(f"joins more than {LOOP_BUDGET:,} pieces")
        _fits(sum(len(item) if isinstance(item, str) else 0 for item in items) + len(value) * len(items))
        return (items, *args[1:])
    return args


def _modest_filter(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter behind `_modest`. Some take the context or the environment before the value."""
    first = 1 if hasattr(filter, "jinja_pass_arg") else 0

    @wraps(filter)
    def looked(*args: Any, **kwargs: Any) -> Any:
        if name == "join" and len(args) > first and not isinstance(args[first], str):
            items = list(islice(args[first], LOOP_BUDGET + 1))
            between = args[first + 1] if len(args) > first + 1 else kwargs.get("d", "")
            _modest(name, str(between), (items,), {})
            args = (*args[:first], items, *args[first + 1 :])
        _modest(name, args[first] if name != "join" else None, args[first + 1 :], kwargs)
        return filter(*args, **kwargs)

    return looked


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter of that name: jinja's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict` for templates: makes one, and has no attributes of the type."""

    def __call__(self, *pairs: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*pairs, **entries)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*given: Any, **entries: Any) -> None:
        self, pairs = given[0], dict(*given[1:], **entries)
        for name in pairs:
            _public(name)
        jinja2.utils.Namespace.__init__(self, pairs)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


TODAY = datetime(2024, 7, 26)
"""The day every template is told (Llama 3.1's own default). The real one would change what is trained from
day to day, part the served prompt from the trained one, and break exact resume over midnight."""


def _today(form: str) -> str:
    return TODAY.strftime(form)


def _at_most(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a rendering, up to the budget of one expression."""
    size = 0
    for piece in pieces:
        size += len(piece)
        _fits(size)
        yield piece


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters |= {name: _modest_filter(name, f) for name, f in environment.filters.items()}
    environment.filters |= {"__bounded__": _bounded, "__joined__": _joined}
    environment.globals.pop("lipsum")  # text by the gigabyte, and no use
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _today
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template does not parse: line {error.lineno}: {error.message}",
            "look at chat_template.jinja in the model folder",
        ) from error


@lru_cache(maxsize=32)
def knows(source: str) -> tuple[bool, bool]:
    """Whether a template reads `tools`, and whether it reads the `tool_calls` of an answer."""
    try:
        tree = _environment().parse(source)
        return "tools" in meta.find_undeclared_variables(tree), "tool_calls" in source
    except jinja2.TemplateSyntaxError:  # filling it will say so
        return False, False


def fill(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    generation_prompt: bool,
    tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The text a template makes of `messages` (dicts with role and content, and tool_calls where there are).

    `tokens` are the special-token texts it may name (bos_token, eos_token, …), `tools` JSON schemas,
    `documents` dicts with title and text, `settings` whatever else it reads (enable_thinking, …); a setting
    `strftime_now` takes the place of the fixed day. Raises UserError with the template's own words when it
    refuses the messages, or when it fails.
    """
    try:
        pieces = _compiled(source).generate(
            messages=list(messages),
            add_generation_prompt=generation_prompt,
            tools=list(tools) if tools is not None else None,
            documents=list(documents) if documents is not None else None,
            **{**tokens, **(settings or {}), "__budget__": _Budget()},
        )
        return "".join(_at_most(pieces))
    except TemplateRefusal as error:
        raise UserError(
            f"the chat template refuses these messages: {error}",
            "roles: " + ", ".join(m["role"] for m in messages),
        ) from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        OverflowError,
        MemoryError,
        ZeroDivisionError,
        RecursionError,
    ) as error:
        raise UserError(
            f"the chat template fails: {type(error).__name__}: {error}",
            "look at chat_template.jinja in the model folder",
        ) from error
