"""The house holds together: who may import whom, what every stage must offer. Read from source with `ast`."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from caravan import config, stage
from caravan.cli import help as pages

PACKAGE = stage.PACKAGE
GROUPS: tuple[tuple[str, ...], ...] = (
    ("types", "disk", "artefact", "outside", "provenance", "config", "store", "stage", "progress"),
    ("kernels", "algos"),
    ("data", "model"),
    ("systems",),
    ("engine", "compress"),
    ("evals", "synth"),
    ("stages",),
    ("serve", "report"),
    ("refs",),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: place for place, group in enumerate(GROUPS) for name in group}
LIGHT = {"torch", "numpy", "tokenizers", "transformers", "tyro", "rich", "pyarrow", "safetensors", "fastapi"}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, everywhere: bool = True) -> Iterator[tuple[str, bool]]:
    """Dotted names a file imports, and whether at its head; imports for type checking do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("caravan", *path.relative_to(PACKAGE).parent.parts)

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.If) and "TYPE_CHECKING" in ast.unparse(inner.test):
                continue
            if isinstance(inner, ast.Import):
                yield from ((alias.name, top) for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                base = list(package[: len(package) - inner.level + 1]) if inner.level else []
                head = ".".join([*base, *([inner.module] if inner.module else [])])
                yield from ((f"{head}.{alias.name}", top) for alias in inner.names)
            else:
                function = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(inner, top and not function)

    return ((name, top) for name, top in walk(tree, True) if top or everywhere)


def test_every_file_has_its_place() -> None:
    strangers = {room(p) for p in FILES} - PLACE.keys() - {"__init__"}
    assert not strangers, f"say in GROUPS who may import {strangers}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        return
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "caravan" or len(parts) < 2 or parts[1] in (mine, "__version__"):
            continue
        theirs = parts[1]
        assert theirs in PLACE, f"{path} imports {name}, which is no room"
        left = PLACE[theirs] < PLACE[mine]
        if PLACE[theirs] == PLACE[mine] == 0:
            left = GROUPS[0].index(theirs) < GROUPS[0].index(mine)
        assert left, f"{path.relative_to(PACKAGE)} imports {name}: {mine} must not know {theirs}"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) == "algos"], ids=lambda p: p.stem)
def test_algorithms_know_tensors_only(path: Path) -> None:
    import sys

    for name, _ in imports(path):
        head = name.split(".")[0]
        fine = head == "torch" or head in sys.stdlib_module_names
        fine = fine or name.startswith(("caravan.types", "caravan.algos"))
        assert fine, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("name", ["engine/scheduler.py", "engine/blocks.py"])
def test_scheduling_needs_no_torch(name: str) -> None:
    if not (PACKAGE / name).exists():
        pytest.skip(f"{name} is not there")
    assert not [n for n, _ in imports(PACKAGE / name) if n.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(p) in (*GROUPS[0], "refs", "cli", "__main__")], ids=lambda p: p.stem
)
def test_the_command_line_starts_light(path: Path) -> None:
    for name, top in imports(path):
        assert not (top and name.split(".")[0] in LIGHT), f"{path.name} imports {name} at its head"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nothing_unsafe_and_no_vague_names(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert path.stem not in ("utils", "helpers", "manager", "common"), "name it after what it holds"
    for name, _ in imports(path):
        assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib"), "pickles run code"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            raise AssertionError(f"{path} opens a pickle")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, "no remote code"
        if isinstance(node, ast.ExceptHandler) and all(isinstance(x, ast.Pass) for x in node.body):
            raise AssertionError(f"{path}:{node.lineno} swallows an error")


STAGES = stage.names("stages")


@pytest.mark.parametrize("name", STAGES or [pytest.param("", marks=pytest.mark.skip("no stages yet"))])
def test_every_stage_keeps_the_protocol(name: str) -> None:
    path = stage.source("stages", name)
    assert stage.summary(path), "the first line of the docstring is the help"
    inputs, output = stage.literal(path, "INPUTS"), stage.literal(path, "OUTPUT")
    assert isinstance(inputs, dict) and isinstance(output, str), (
        "INPUTS and OUTPUT are literals: help reads them"
    )
    assert isinstance(stage.literal(path, "VERSION"), int)
    module = stage.load("stages", name)
    shares = "runtime.setup(" in path.read_text(encoding="utf-8")
    assert getattr(module, "RANKS", False) == shares, "ranks that meet must all be there"
    assert inputs == module.INPUTS and output == module.OUTPUT and callable(module.run)
    cls = module.Config
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(f.kw_only for f in dataclasses.fields(cls))
    flags = config.flags_of(cls)
    for field, folder in module.USES.items():
        assert field in flags and (PACKAGE / folder).is_dir(), f"USES {field}: {folder}"
    leaves = {f for f in flags if not any(other.startswith(f + ".") for other in flags)}
    assert not leaves - config.field_docs(cls).keys(), "a sentence under each field"
    taken = (set(inputs) | set(pages.RUNTIME)) & {f.split(".")[0] for f in flags}
    assert not taken, f"{taken} is already a flag"
    assert not set(inputs) & set(pages.RUNTIME)
    assert leaves == {s.flag for s in pages.settings(path, "Config")}, "help and flags agree"
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if not required:
        assert config.from_dict(cls, config.to_dict(cls())) == cls()
        assert config.non_default(cls()) == {}
    text = pages.page(name, path)
    assert all(f"--{f.replace('_', '-')}" in text for f in [*leaves, *inputs])


@pytest.mark.parametrize("command", pages.PROGRAMS)
def test_every_program_keeps_the_protocol(command: str) -> None:
    path = PACKAGE / pages.PROGRAMS[command]
    if not path.exists():
        pytest.skip(f"{pages.PROGRAMS[command]} is not there")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert stage.summary(path)
    assert any(isinstance(n, ast.ClassDef) and n.name == "Config" for n in tree.body)
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert [a.arg for a in main.args.args] == ["cfg", "store", "rt"]
    for s in pages.settings(path, "Config"):
        assert s.doc, f"{command}: a sentence under {s.flag}"


def registries() -> list[str]:
    uses = [stage.literal(stage.source("stages", name), "USES") or {} for name in STAGES]
    return sorted({folder for fields in uses for folder in fields.values()})


@pytest.mark.parametrize("folder", registries())
def test_every_module_of_a_registry_has_a_version(folder: str) -> None:
    for name in stage.names(folder):
        path = stage.source(folder, name)
        assert isinstance(stage.literal(path, "VERSION"), int), f"{path} needs VERSION"
        assert stage.summary(path), f"{path} needs a docstring"


def test_type_hints_of_stage_configs_resolve() -> None:
    for name in STAGES:
        assert typing.get_type_hints(stage.load("stages", name).Config)
