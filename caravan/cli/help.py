"""Help pages written from source: docstrings and Config fields are read with `ast`; nothing is imported."""

from __future__ import annotations

import ast
import operator
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caravan import stage
from caravan.config import docs_in, nearest
from caravan.types import UserError

PROGRAMS = {
    "quickstart": "recipes/quickstart.py",
    "prepare": "recipes/corpus.py",
    "serve": "serve/run.py",
    "chat": "serve/terminal.py",
    "feedback": "serve/collect.py",
    "report": "report/passport.py",
}
"""Commands that are no stage: their module offers Config and main(cfg, store, rt) -> exit code."""

DIRECT = {"data": "cli/data.py"}
"""Commands that need no artefact: their module offers Config, USAGE and main(words) -> exit code."""

SHOWING = {
    "ls": ("[KIND]", "List the artefacts in the store, oldest first."),
    "show": ("REF [--json]", "Show what an artefact is, what it was made from, with which settings."),
    "lineage": ("REF", "Draw everything an artefact was made from, down to the raw files."),
    "verify": ("[REF ...]", "Re-hash an artefact (or all) and say what is wrong."),
    "inspect": (
        "FOLDER|hf:ORG/NAME|REF [--json]",
        "Say what a model is: spec, parameters, memory, template, special tokens, licence.",
    ),
    "gc": (
        "[--older-than-days 7] [--unnamed] [--dry-run]",
        "Remove runs left unpublished that long; with --unnamed also artefacts that no name needs.",
    ),
}

SHOWING_FLAGS = {
    "show": {"json": ("", "The whole record as JSON, with every setting and fact.")},
    "inspect": {"json": ("", "The same as JSON.")},
    "gc": {
        "older_than_days": (
            "DAYS",
            "Leave runs that were written to within so many days; 0.5 is a number. (default: 7)",
        ),
        "unnamed": (
            "",
            "Also remove artefacts that have no name and that nothing with a name was made from.",
        ),
        "dry_run": ("", "Say what would be removed, and how large it is, and remove nothing."),
    },
}
"""What the flags of these commands do."""

RUNTIME = {
    "store": ("DIR", "Folder of all artefacts. (default: $CARAVAN_STORE, else .caravan here)"),
    "device": ("auto|cpu|cuda", "Where tensors are computed. (default: auto)"),
    "threads": ("INT", "Threads for tensor work. (default: torch's choice)"),
    "save_seconds": ("FLOAT", "Seconds between checkpoints. (default: 60)"),
    "save_steps": ("INT", "Steps between checkpoints, instead of seconds."),
    "engine": ("processes|ray", "Who works on batches of data: processes here, or a Ray cluster."),
    "strict": ("", "Stop at the first malformed line instead of putting it into quarantine."),
    "output": ("DIR", "Copy the result to this new folder as well."),
    "name": ("NAME", "Give the result a name that serves as its reference."),
}


_SUMS = {ast.LShift: operator.lshift, ast.Mult: operator.mul, ast.Add: operator.add, ast.Sub: operator.sub}


@dataclass(frozen=True)
class Setting:
    """One flag of a Config, as its source says it."""

    flag: str
    hint: str
    default: str | None
    doc: str


def file_of(command: str) -> Path:
    """The file behind a command; UserError with the nearest one if there is none."""
    if command in PROGRAMS and (stage.PACKAGE / PROGRAMS[command]).exists():
        return stage.PACKAGE / PROGRAMS[command]
    if command in DIRECT and (stage.PACKAGE / DIRECT[command]).exists():
        return stage.PACKAGE / DIRECT[command]
    if command in SHOWING:
        return Path(__file__)
    if command in stage.names("stages") or "." in command:
        return stage.source("stages", command)
    every = [
        *stage.names("stages"),
        *(c for c, file in (PROGRAMS | DIRECT).items() if (stage.PACKAGE / file).exists()),
        *SHOWING,
    ]
    hint = nearest(command, every) if not command.startswith("-") else "a command comes first"
    raise UserError(f"there is no command `{command}`", f"{hint} (`caravan --help` shows all)")


def overview() -> str:
    """All commands, the road in order."""
    programs = {c: stage.PACKAGE / f for c, f in (PROGRAMS | DIRECT).items() if (stage.PACKAGE / f).exists()}
    text = ["caravan: from raw text to your own ChatGPT, stage by stage.", ""]
    text += ["usage: caravan COMMAND [--flag value ...]     caravan COMMAND --help explains every flag", ""]
    text += ["the road, in order"]
    text += [_row(n, stage.summary(stage.source("stages", n))) for n in stage.road()]
    text += ["", "programs"] + [_row(c, stage.summary(f)) for c, f in programs.items()]
    text += ["", "the store"] + [_row(c, doc) for c, (_, doc) in SHOWING.items()]
    text += ["", "Results (references such as model/1a2b3c4d5e6f) go to stdout, words to stderr."]
    text += ["The same command twice gives the same artefact; an interrupted one goes on where it was."]
    return "\n".join(text)


def page(command: str, path: Path) -> str:
    """The help of one command: what it does, inputs, settings, run flags."""
    if command in SHOWING:
        words, doc = SHOWING[command]
        lines = [f"usage: caravan {command} {words} [--store DIR]", "", doc, "", "settings"]
        flags = SHOWING_FLAGS.get(command, {}) | {"store": RUNTIME["store"]}
        return "\n".join([*lines, *(row for flag, said in flags.items() for row in _flag(flag, *said))])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roles = {} if command in PROGRAMS | DIRECT else stage.literal(path, "INPUTS") or {}
    config = list(settings(path, "Config"))
    needs = [f"--{r} REF" for r, spec in roles.items() if not stage.optional(spec)]
    needs += [f"--{_dashed(s.flag)} {s.hint.upper()}" for s in config if s.default is None]
    positional = (
        ["[REF]"] if command in PROGRAMS and any(s.flag in ("model", "models") for s in config) else []
    )
    shape = [*positional, *needs, "[--flag value ...]"]
    if command in DIRECT:
        shape = [str(stage.literal(path, "USAGE"))]
    lines = ["usage: " + " ".join(["caravan", command, *shape]), ""]
    lines += [(ast.get_docstring(tree) or "").strip(), ""]
    if roles:
        lines += ["inputs: a reference, a name, a path or hf:ORG/NAME"]
        for role, spec in roles.items():
            kinds = " or ".join(stage.kinds(spec)) + (" (optional)" if stage.optional(spec) else "")
            kinds += " (may be given more than once)" if stage.many(spec) else ""
            lines += _flag(role, "REF", f"{kinds}: {stage.how(spec)}.")
        lines += [f"output: {stage.literal(path, 'OUTPUT')}", ""]
    lines += ["settings"]
    for s in config:
        default = "required" if s.default is None else f"default: {s.default}"
        lines += _flag(s.flag, s.hint, f"{s.doc} ({default})".strip())
    if command in DIRECT:
        return "\n".join([*lines, *_flag("store", *RUNTIME["store"])])
    lines += ["", "how it runs (recorded, never part of the question)"]
    ours = {s.flag for s in config}
    hidden = ours | ({"output", "name"} if command in PROGRAMS else set())
    for flag, (hint, doc) in RUNTIME.items():
        if flag not in hidden:
            lines += _flag(flag, hint, doc)
    return "\n".join(lines)


def settings(path: Path, name: str, prefix: str = "", given: ast.expr | None = None) -> Iterator[Setting]:
    """The flags of dataclass `name` in a source file, nested and inherited ones too, in order.

    `given` is the default instance of the field that holds it; its keywords replace the class's defaults.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cls = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if cls is None:
        return
    for base in cls.bases:
        if found := _find_class(path, tree, base):
            yield from settings(*found, prefix, given)
    docs, over = docs_in(cls), _keywords(given)
    for node in cls.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        field, default = node.target.id, over.get(node.target.id, _unfold(node.value))
        options = _options(node.annotation)
        inner = next((f for o in options if (f := _find_class(path, tree, o))), None)
        if inner and _is_dataclass(*inner):
            yield from settings(*inner, f"{prefix}{field}.", default)
            continue
        hint = ", ".join(_hint(o, path, tree) for o in options)
        yield Setting(prefix + field, hint, _show(default, path), docs.get(field, ""))


def _find_class(path: Path, tree: ast.Module, node: ast.expr) -> tuple[Path, str] | None:
    """File and name of a class that `tree` names: its own, imported by name, or reached through a module."""
    if isinstance(node, ast.Name):
        if any(isinstance(n, ast.ClassDef) and n.name == node.id for n in tree.body):
            return path, node.id
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom):
                for alias in n.names:
                    if (alias.asname or alias.name) == node.id and (file := _module(path, n.module, n.level)):
                        return _find_class(
                            file, ast.parse(file.read_text(encoding="utf-8")), ast.Name(alias.name)
                        )
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom):
                for alias in n.names:
                    if (alias.asname or alias.name) == node.value.id:
                        dotted = f"{n.module}.{alias.name}" if n.module else alias.name
                        if file := _module(path, dotted, n.level):
                            return file, node.attr
    return None


def _module(path: Path, dotted: str | None, level: int) -> Path | None:
    """The source file of a module of this package (or of a relative import)."""
    if level:
        base = path.parents[level - 1]
    elif dotted and dotted.split(".")[0] == "caravan":
        base, dotted = stage.PACKAGE, dotted.partition(".")[2]
    else:
        return None
    for file in (
        base.joinpath(*dotted.split(".")).with_suffix(".py") if dotted else base,
        base / "__init__.py",
    ):
        if file.is_file():
            return file
    return None


def _is_dataclass(path: Path, name: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cls = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    return cls is not None and any("dataclass" in ast.unparse(d) for d in cls.decorator_list)


def _options(node: ast.expr) -> list[ast.expr]:
    """`A | None` gives both sides."""
    if isinstance(node, ast.BinOp):
        return _options(node.left) + _options(node.right)
    return [node]


def _unfold(node: ast.expr | None) -> ast.expr | None:
    """The default behind `field(default=...)` or `field(default_factory=...)`."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "field"):
        return node
    for word in node.keywords:
        if word.arg == "default":
            return word.value
        if word.arg == "default_factory":
            made = word.value.body if isinstance(word.value, ast.Lambda) else ast.Call(word.value, [], [])
            return made
    return None


def _keywords(node: ast.expr | None) -> dict[str, ast.expr]:
    return {w.arg: w.value for w in node.keywords if w.arg} if isinstance(node, ast.Call) else {}


def _show(node: ast.expr | None, path: Path) -> str | None:
    if node is None:
        return None
    if isinstance(node, ast.Name) and (value := stage.literal(path, node.id)) is not None:
        return repr(value)
    if isinstance(node, ast.Tuple):
        return " ".join(ast.unparse(e).strip("'") for e in node.elts) or "none"
    if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:  # 16 << 20
        sides = [_show(side, path) for side in (node.left, node.right)]
        if all(side and side.isdecimal() for side in sides):
            return str(_SUMS[type(node.op)](*(int(side) for side in sides if side)))
    text = ast.unparse(node)
    return "none" if text == "None" else text.strip("'") or "''"


def _hint(node: ast.expr, path: Path, tree: ast.Module) -> str:
    """A type as a reader of flags wants it: the choices of a Literal, `a b ...` for a sequence."""
    if isinstance(node, ast.Name):
        node = _defined(path, tree, node.id) or node
    elif isinstance(node, ast.Attribute) and (found := _find_class(path, tree, node)):
        node = _defined(found[0], ast.parse(found[0].read_text(encoding="utf-8")), found[1]) or node
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return "|".join(ast.unparse(i).strip("'") for i in items)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("tuple", "list", "Sequence"):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return " ".join(ast.unparse(i) for i in items)
    return ast.unparse(node).lower() if isinstance(node, ast.Constant) else ast.unparse(node)


def _defined(path: Path, tree: ast.Module, name: str) -> ast.expr | None:
    """What a type alias stands for, here or where it is imported from."""
    for n in tree.body:
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets):
            return n.value
        if isinstance(n, ast.ImportFrom) and any((a.asname or a.name) == name for a in n.names):
            original = next(a.name for a in n.names if (a.asname or a.name) == name)
            if file := _module(path, n.module, n.level):
                return _defined(file, ast.parse(file.read_text(encoding="utf-8")), original)
    return None


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def _row(name: str, doc: str) -> str:
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    return f"  {name:<14} {textwrap.shorten(doc, width - 17, placeholder=' ...')}"


def _flag(flag: str, hint: str, doc: str) -> list[str]:
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    head = f"  --{_dashed(flag)} {hint}".rstrip()
    body = textwrap.wrap(doc, width - 30) or [""]
    if len(head) > 28:
        return [head, *(" " * 30 + line for line in body)]
    return [f"{head:<30}{body[0]}", *(" " * 30 + line for line in body[1:])]
