"""Chat templates: jinja text that comes with a checkpoint, run in a sandbox.

A template is somebody else's program. It runs in jinja's immutable sandbox (no attribute access to Python
internals, no mutation of what we pass in), and every `for` loop draws on one budget per call, so that a
template cannot hang us. Names that checkpoints expect are there: `raise_exception`, `strftime_now`, `tojson`,
loop controls and the `generation` block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from caravan.types import UserError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Turns between <|im_start|> and <|im_end|>; needs a tokenizer that has both."""

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% elif message['role'] == 'system' %}{{ '### System:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '### Tool:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### User:\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For checkpoints that have an end-of-text token and nothing else."""

LOOP_BUDGET = 1_000_000
"""Loop passes of one rendering, all loops together."""
TEXT_BUDGET = 64 << 20
"""Characters one expression may make."""


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
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise jinja2.TemplateRuntimeError("power too large")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
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
        if size > TEXT_BUDGET:
            raise jinja2.TemplateRuntimeError("makes too much text")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "__bounded__", [], [], None, None, lineno=loop.lineno)
        return tree


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


TODAY = datetime(2024, 7, 26)
"""The day every template is told (Llama 3.1's own default). The real one would change what is trained from
day to day, part the served prompt from the trained one, and break exact resume over midnight."""


def _today(form: str) -> str:
    return TODAY.strftime(form)


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["__bounded__"] = _bounded
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _today
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template does not parse: line {error.lineno}: {error.message}",
            "look at chat_template.jinja in the model folder",
        ) from error


def fill(
    source: str, messages: Sequence[Mapping[str, str]], generation_prompt: bool, tokens: Mapping[str, str]
) -> str:
    """The text a template makes of `messages` (dicts with role and content).

    `tokens` are the special-token texts it may name (bos_token, eos_token, …). Raises UserError with the
    template's own words when it refuses the messages, or when it fails.
    """
    try:
        return _compiled(source).render(
            messages=list(messages),
            add_generation_prompt=generation_prompt,
            tools=None,
            documents=None,
            __budget__=_Budget(),
            **tokens,
        )
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
        ZeroDivisionError,
        RecursionError,
    ) as error:
        raise UserError(
            f"the chat template fails: {type(error).__name__}: {error}",
            "look at chat_template.jinja in the model folder",
        ) from error
