"""Pretraining text from what every Python installation carries: its docstrings, language topics and source.

Modules are read, not imported: `ast` gives classes, functions and docstrings without running anything. Only
a short list of harmless built-in (C) modules is imported, because their documentation exists nowhere else.
The order, and what fits into a limit, depend on the seed and the Python version alone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from caravan.synth import arithmetic, persona, qa
from caravan.synth.facts import TYPES, Fact, facts, public_names
from caravan.types import Document

__all__ = ["KINDS", "Fact", "documents", "facts"]

SOURCE_MODULES: tuple[str, ...] = (
    "textwrap", "posixpath", "genericpath", "json", "random", "re", "statistics", "shutil", "bisect",
    "heapq", "calendar", "fnmatch", "glob", "functools", "copy", "collections", "string", "html",
    "tempfile", "secrets", "operator", "difflib", "shlex", "urllib", "keyword", "linecache", "struct",
    "base64", "contextlib", "csv", "datetime", "dataclasses", "decimal", "enum", "fractions", "gzip",
    "hashlib", "hmac", "inspect", "io", "ipaddress", "locale", "logging", "mimetypes", "numbers", "os",
    "pathlib", "pickle", "platform", "pprint", "queue", "reprlib", "sched", "selectors", "shelve",
    "socket", "sqlite3", "stat", "subprocess", "tarfile", "threading", "timeit", "tokenize", "traceback",
    "types", "typing", "uuid", "warnings", "wave", "weakref", "xml", "zipfile", "argparse", "ast", "abc",
    "asyncio", "codecs", "concurrent", "configparser", "cmd", "code", "email", "filecmp", "fileinput",
    "getopt", "getpass", "graphlib", "http", "imaplib", "smtplib", "ftplib", "zipapp", "optparse", "pdb",
    "plistlib", "poplib", "sysconfig", "trace", "unittest", "wsgiref", "xmlrpc", "bz2", "lzma", "colorsys",
    "pstats", "profile", "gettext",
)  # fmt: skip
"""Modules (files or packages) of the standard library whose text is read. Packages count with their files."""

BUILTIN_MODULES: tuple[str, ...] = (
    "builtins", "math", "itertools", "time", "binascii", "zlib", "cmath", "unicodedata", "errno", "array",
    "gc", "marshal",
)  # fmt: skip
"""Modules written in C: imported, since their documentation is only in the running interpreter."""

SHARES: dict[str, float] = {
    "facts": 0.14, "dialogue": 0.16, "docstrings": 0.28, "topics": 0.1, "source": 0.14, "arithmetic": 0.18,
}  # fmt: skip
"""Part of the bytes given to each kind. What a kind cannot fill goes to nobody: the text is then shorter."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the written kinds are made of."""

    seed: int
    taught: tuple[Fact, ...]
    style: arithmetic.Style


PAGE_BYTES = 2400
"""Long docstrings, topics and sources are cut at paragraph ends into pages of about this many bytes."""


def _pages(text: str, limit: int = PAGE_BYTES) -> Iterator[str]:
    """`text` in pieces that end at an empty line where possible, each of about `limit` bytes."""
    page: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        length = len(paragraph.encode()) + 2
        if page and size + length > limit:
            yield "\n\n".join(page)
            page, size = [], 0
        page.append(paragraph)
        size += length
    if page:
        yield "\n\n".join(page)


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) for the read modules, sorted, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in SOURCE_MODULES:
        if (root / f"{name}.py").is_file():
            yield name, root / f"{name}.py"
        elif (root / name).is_dir():
            for path in sorted((root / name).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if not {"test", "tests", "idlelib", "__main__"} & set(parts):
                    yield ".".join(p for p in parts if p != "__init__"), path


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # an unreadable or oddly encoded library file is one page fewer
        return None


PUBLIC_NAMES = {"posixpath": "os.path", "genericpath": "os.path"}


def _docstrings_of(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(name, text) for the module and every public class, function and method that has a docstring."""
    module = PUBLIC_NAMES.get(module, module)

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if child.name.startswith("_"):
                    continue
                name = f"{prefix}.{child.name}"
                doc = ast.get_docstring(child)
                if doc:
                    head = name if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
                    yield name, f"{head}\n\n{doc.strip()}"
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, name)

    doc = ast.get_docstring(tree)
    if doc:
        yield module, f"Module {module}\n\n{doc.strip()}"
    yield from walk(tree, module)


def _docstrings(plan: Plan) -> Iterator[Document]:
    del plan
    for module, path in _stdlib_files():
        text = _read(path)
        if text is None:
            continue
        for name, body in _docstrings_of(ast.parse(text), module):
            for index, page in enumerate(_pages(body)):
                yield Document(f"doc/{name}/{index}", page, "docstrings", "en")
    owners: list[tuple[str, object]] = [(m, importlib.import_module(m)) for m in BUILTIN_MODULES]
    owners += [(kind.__name__, kind) for kind in TYPES]
    for owner, thing in owners:
        for name in public_names(thing):
            found = getattr(thing, name, None)
            if (inspect.isroutine(found) or inspect.isclass(found)) and (doc := inspect.getdoc(found)):
                full = name if owner == "builtins" else f"{owner}.{name}"
                yield Document(f"doc/{full}/c", f"{full}\n\n{doc.strip()}", "docstrings", "en")


def _topics(plan: Plan) -> Iterator[Document]:
    del plan
    from pydoc_data.topics import topics  # half a megabyte: loaded when asked for

    for name in sorted(topics):
        for index, page in enumerate(_pages(topics[name].strip())):
            yield Document(f"topic/{name}/{index}", page, "topics", "en")


def _source(plan: Plan) -> Iterator[Document]:
    del plan
    for module, path in _stdlib_files():
        text = _read(path)
        if text:
            for index, page in enumerate(_pages(text)):
                yield Document(f"source/{module}/{index}", f"# {module}\n{page}", "source", "en")


def _facts(plan: Plan) -> Iterator[Document]:
    """The taught lines, `name: summary`, in pages whose company changes: every line is met many times,
    never alike."""
    taught, seed = list(plan.taught), plan.seed
    by_module = {m: [f for f in taught if f.module == m] for m in sorted({f.module for f in taught})}
    for turn in itertools.count():
        rng = random.Random(f"{seed}:facts:{turn}")
        if turn == 0:  # once by module; shuffled module pages would be near duplicates of these
            for module, members in by_module.items():
                text = "\n".join([f"Functions of {module}", *(qa.answer(f) for f in members)])
                yield Document(f"facts/{turn}/{module}", text, "facts", "en")
            continue
        rng.shuffle(taught)
        for start in range(0, len(taught), 12):
            text = "\n".join(qa.answer(f) for f in taught[start : start + 12])
            yield Document(f"facts/{turn}/{start}", text, "facts", "en")


def _dialogue(plan: Plan) -> Iterator[Document]:
    """Questions and answers as plain text, in trained phrasings: where pretraining meets Chinese."""
    taught, seed = list(plan.taught), plan.seed
    talk = persona.conversations("train")
    for turn in itertools.count():
        rng = random.Random(f"{seed}:dialogue:{turn}")
        rng.shuffle(taught)
        for start in range(0, len(taught), 6):
            blocks = []
            for fact in taught[start : start + 6]:
                lang = "zh" if rng.random() < 0.35 else "en"
                question, reply = qa.ask(fact, "train", lang, rng)
                blocks.append(f"{question}\n{reply}")
            if rng.random() < 0.5:
                chat = rng.choice(talk)
                blocks.insert(rng.randrange(len(blocks)), "\n".join(m.content for m in chat.messages))
            yield Document(f"dialogue/{turn}/{start}", "\n\n".join(blocks), "dialogue", "mixed")


def _arithmetic(plan: Plan) -> Iterator[Document]:
    yield from arithmetic.documents(limit_bytes=1 << 40, seed=plan.seed, style=plan.style)


KINDS: dict[str, Callable[[Plan], Iterator[Document]]] = {
    "facts": _facts, "dialogue": _dialogue, "docstrings": _docstrings, "topics": _topics, "source": _source,
    "arithmetic": _arithmetic,
}  # fmt: skip
"""What `documents` is mixed from; facts, dialogue and arithmetic never end, the library does."""


def _spread(found: list[Document], limit_bytes: int, rng: random.Random) -> Iterator[Document]:
    """A seeded draw from a finite kind, at most `limit_bytes` of it: a share of every module, not the first
    ones."""
    rng.shuffle(found)
    written = 0
    for document in found:
        size = len(document.text.encode())
        if written + size <= limit_bytes:
            written += size
            yield document


def documents(
    *, limit_bytes: int = 3_000_000, seed: int = 0, shares: dict[str, float] | None = None,
    kinds: tuple[str, ...] | None = None, taught: Sequence[Fact] | None = None,
    style: arithmetic.Style = "steps",
) -> Iterator[Document]:  # fmt: skip
    """Documents of each kind up to its share of `limit_bytes`, kind after kind; ids are unique.

    `taught` are the facts of the written kinds (all by default), `style` that of worked sums.
    """
    plan = Plan(seed, tuple(facts() if taught is None else taught), style)
    shares = SHARES if shares is None else shares
    for kind in kinds or tuple(KINDS):
        budget = int(limit_bytes * shares.get(kind, 0.0))
        if budget <= 0:
            continue
        if kind in ("docstrings", "topics", "source"):
            yield from _spread(list(KINDS[kind](plan)), budget, random.Random(f"{seed}:{kind}"))
            continue
        written = 0
        for document in KINDS[kind](plan):
            yield document
            written += len(document.text.encode())
            if written >= budget:
                break
