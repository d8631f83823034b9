"""Configs are frozen dataclasses; this file turns one into plain data, into flags, and back.

A field's type is its parser, its default its default, and the string under it its help. Nested dataclasses
give dotted flags (`--optim.lr 3e-4`). Unknown names are errors that name the nearest field. tyro reads the
flags and is imported only then.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses as dc
import difflib
import enum
import inspect
import io
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from caravan.types import UserError

T = TypeVar("T")

_WHOLE = re.compile(r"[+-]?\d[\d_]*(\.\d+)?([eE][+-]?\d+)?")


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain data for JSON: tuples become lists, paths become text."""
    assert dc.is_dataclass(cfg) and not isinstance(cfg, type), f"{cfg!r} is not a config"
    return {f.name: _plain(getattr(cfg, f.name)) for f in dc.fields(cfg)}


def from_dict(cls: type[T], raw: Mapping[str, Any], where: str = "") -> T:
    """Build `cls` from plain data. Unknown names and unfit values raise UserError with the nearest field."""
    hints = typing.get_type_hints(cls)
    settable = [f.name for f in dc.fields(cls) if f.init]  # type: ignore[arg-type]
    for name in raw:
        if name not in settable:
            raise UserError(
                f"{cls.__module__} has no setting `{where}{name}`", nearest(name, settable, where)
            )
    values = {name: _value(hints[name], value, f"{where}{name}") for name, value in raw.items()}
    absent = [f.name for f in required(cls) if f.name not in values]
    if absent:
        raise UserError(f"setting `{where}{absent[0]}` is needed", field_docs(cls).get(absent[0]))
    return cls(**values)


def non_default(cfg: Any, default: Any = dc.MISSING) -> dict[str, Any]:
    """The settings that differ from their defaults, as plain data: what the key of a question hashes.

    A field added later at its default therefore leaves old keys alone. Numbers are brought to their field's
    type first, so that `lr=1` and `lr=1.0` are one question.
    """
    if default is dc.MISSING:
        cfg = from_dict(type(cfg), to_dict(cfg))
    out: dict[str, Any] = {}
    for f in dc.fields(cfg):
        value = getattr(cfg, f.name)
        usual = _default(f) if default is dc.MISSING else getattr(default, f.name)
        if dc.is_dataclass(value) and type(value) is type(usual):
            if inner := non_default(value, usual):
                out[f.name] = inner
        elif usual is dc.MISSING or _plain(value) != _plain(usual):
            out[f.name] = _plain(value)
    return out


def field_docs(cls: Any) -> dict[str, str]:
    """The string under each field, on one line; nested as `outer.inner`. A field without one is absent."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if dc.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(cast(type, base)))).body[0]
            assert isinstance(tree, ast.ClassDef)
            docs |= docs_in(tree)
    for name, hint in typing.get_type_hints(cls).items():
        if inner := _nested(hint):
            docs |= {f"{name}.{k}": v for k, v in field_docs(inner).items()}
    return docs


def docs_in(tree: ast.ClassDef) -> dict[str, str]:
    """The same for one class in parsed source, so that help can be written without importing the module."""
    docs = {}
    for field, doc in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
            and isinstance(doc.value.value, str)
        ):
            docs[field.target.id] = " ".join(doc.value.value.split())
    return docs


def flags_of(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Each dotted flag name (with underscores) and its type."""
    out: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if inner := _nested(hint):
            out |= flags_of(inner, f"{prefix}{name}.")
        out[prefix + name] = hint
    return out


def from_flags(cls: type[T], argv: Sequence[str], prog: str = "caravan", also: Sequence[str] = ()) -> T:
    """Read `--field value` words into `cls`. Whole numbers may be written 1e6; `-` and `_` are the same.

    Raises UserError naming the nearest flag, of the config or of those in `also`, for an unknown one.
    """
    words = list(_tidy(cls, argv, prog, also))
    absent = [f.name for f in required(cls) if f"--{f.name}" not in words]
    if absent:
        flag = absent[0].replace("_", "-")
        raise UserError(f"{prog} needs --{flag}", field_docs(cls).get(absent[0], f"see `{prog} --help`"))
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(cls, args=words, prog=prog, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        raise UserError(_tyro_says(said.getvalue()), f"`{prog} --help` explains every setting") from stop


def nearest(name: str, among: Sequence[str], prefix: str = "") -> str:
    """A hint for a name that does not exist."""
    near = [a for a in among if a.endswith("." + name)] or difflib.get_close_matches(name, among, 1, 0.5)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    if not among:
        return "there are none"
    return (
        "there are: " + ", ".join(f"{prefix}{a}" for a in among) if len(among) <= 12 else "no name is near it"
    )


def _tidy(cls: Any, argv: Sequence[str], prog: str, also: Sequence[str]) -> Iterator[str]:
    """Check flag names and write numbers, truths and none the way tyro reads them."""
    known = flags_of(cls)
    flag, fresh = "", False
    for word in argv:
        if word.startswith("--"):
            if fresh and _may_be(known[flag], bool):
                yield "True"  # `--flag` alone
            head, equals, value = word.partition("=")
            flag = head[2:].replace("-", "_")
            if flag not in known and flag.startswith("no_") and _may_be(known.get(flag[3:]), bool):
                flag, equals, value = flag[3:], "=", "False"
            if flag not in known:
                hint = nearest(flag, [*known, *also], "--").replace("_", "-")
                raise UserError(f"unknown flag `{head}`", f"{hint} (`{prog} --help` explains every flag)")
            yield f"--{flag}"
            fresh = not equals
            if equals:
                yield _write(known[flag], value)
            continue
        if not flag:
            raise UserError(
                f"`{word}` stands alone",
                "settings are given as `--name value`"
                + (
                    ", several files as their folder or 'a/pattern/*' in quotes"
                    if os.path.exists(word)
                    else ""
                )
                + f"; see `{prog} --help`",
            )
        fresh = False
        yield _write(known[flag], word)
    if fresh and _may_be(known[flag], bool):
        yield "True"


def _write(hint: Any, word: str) -> str:
    if word.lower() == "none" and _may_be(hint, type(None)):
        return "None"
    if _may_be(hint, bool) and word.lower() in ("true", "false", "yes", "no", "on", "off"):
        return str(word.lower() in ("true", "yes", "on"))
    if (
        _may_be(hint, int)
        and not _may_be(hint, float)
        and _WHOLE.fullmatch(word)
        and float(word).is_integer()
    ):
        return word.replace("_", "") if "." not in word and "e" not in word.lower() else str(int(float(word)))
    return word


def _may_be(hint: Any, kind: type) -> bool:
    """Whether a value of this type hint can be a `kind`, looking into unions and sequences."""
    if hint is kind:
        return True
    return typing.get_origin(hint) is not typing.Literal and any(
        _may_be(a, kind) for a in typing.get_args(hint)
    )


def _tyro_says(text: str) -> str:
    """tyro's complaint itself: the first paragraph in its box, without frame, title and help text."""
    lines = [re.sub(r"[\u2500-\u257f]", " ", line).strip(" |") for line in text.splitlines()]
    blocks = re.split(r"\n[-+\s]*-{5,}[-+]*\n|\n\s*\n", "\n".join(lines))
    said = [" ".join(b.split()) for b in blocks if b.strip(" -+\n")]
    return " ".join(said[1:2] or said) or "the flags cannot be read"


def _plain(value: Any) -> Any:
    if dc.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} has no place in a config"
    return value


def _default(f: dc.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dc.MISSING else f.default


def required(cls: Any) -> list[dc.Field[Any]]:
    """Fields without a default."""
    return [
        f for f in dc.fields(cls) if f.init and f.default is dc.MISSING and f.default_factory is dc.MISSING
    ]


def _nested(hint: Any) -> Any:
    """The dataclass inside a hint (`X` or `X | None`), else None."""
    for option in (hint, *(typing.get_args(hint) if _is_union(hint) else ())):
        if isinstance(option, type) and dc.is_dataclass(option):
            return option
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _value(hint: Any, raw: Any, where: str) -> Any:
    """Bring plain data to the type of its field, or say what was expected."""
    if hint is Any:
        return raw
    if _is_union(hint):
        if raw is None and type(None) in typing.get_args(hint):
            return None
        options = [o for o in typing.get_args(hint) if o is not type(None)]
        exact = [o for o in options if isinstance(o, type) and type(raw) is o]
        for option in [*exact, *options]:
            with contextlib.suppress(UserError):
                return _value(option, raw, where)
        raise _unfit(hint, raw, where)
    if dc.is_dataclass(hint):
        if not isinstance(raw, Mapping):
            raise _unfit(hint, raw, where)
        return from_dict(hint, raw, where + ".")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if raw not in args:
            raise UserError(f"`{where}` cannot be {raw!r}", "one of: " + ", ".join(map(str, args)))
        return raw
    if origin in (tuple, list, set, frozenset, Sequence):
        return _sequence(hint, raw, where)
    if origin in (dict, Mapping):
        if not isinstance(raw, Mapping):
            raise _unfit(hint, raw, where)
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in raw.items()}
    return _scalar(hint, raw, where)


def _sequence(hint: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(raw, list | tuple):
        raise _unfit(hint, raw, where)
    fixed = origin is tuple and not (len(args) == 2 and args[1] is ...)
    if fixed and len(raw) != len(args):
        raise _unfit(hint, raw, where)
    kinds = args if fixed else [args[0]] * len(raw)
    values = [_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, raw, strict=True))]
    return values if origin is list else (set(values) if origin is set else tuple(values))


def _scalar(hint: Any, raw: Any, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if raw not in hint.__members__:
            raise UserError(f"`{where}` cannot be {raw!r}", "one of: " + ", ".join(hint.__members__))
        return hint[raw]
    if hint is Path and isinstance(raw, str):
        return Path(raw)
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if hint is float and number:
        return float(raw)
    if hint is int and number and float(raw).is_integer():
        return int(raw)
    if hint in (bool, str, type(None)) and type(raw) is hint:
        return raw
    raise _unfit(hint, raw, where)


def _unfit(hint: Any, raw: Any, where: str) -> UserError:
    wanted = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
    return UserError(f"`{where}` cannot be {raw!r}", f"expected {wanted.replace('typing.', '')}")
