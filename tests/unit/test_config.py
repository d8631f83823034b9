"""Configs to data, flags and back; and which settings a key hashes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan import config
from caravan.types import UserError


class Mode(enum.Enum):
    FAST = 1
    EXACT = 2


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two
    moments."""


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0
    """Seed of every draw."""


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    size: str
    """Name of a size."""
    steps: int = 100
    """Optimiser steps."""
    ramp: int | None = None
    """Steps of warm-up; none for a tenth."""
    ratio: float | None = 0.5
    """A share."""
    shuffle: bool = True
    """Whether to shuffle."""
    kind: Literal["adamw", "muon"] = "adamw"
    """Which optimiser."""
    tasks: tuple[str, ...] = ("a", "b")
    """Tasks."""
    mode: Mode = Mode.FAST
    """How."""
    folder: Path = Path("here")
    """Where."""
    mix: dict[str, float] = field(default_factory=dict)
    """Shares."""
    optim: Optim = Optim(lr=0.5)


def test_round_trip_through_data() -> None:
    cfg = Config(size="tiny", ramp=3, mode=Mode.EXACT, mix={"x": 1.0}, optim=Optim(lr=2.0), tasks=())
    plain = config.to_dict(cfg)
    assert (
        plain["tasks"] == []
        and plain["optim"] == {"lr": 2.0, "betas": [0.9, 0.95]}
        and plain["mode"] == "EXACT"
    )
    assert config.from_dict(Config, plain) == cfg


configs = st.builds(
    Config,
    size=st.text(),
    steps=st.integers(),
    ramp=st.none() | st.integers(),
    ratio=st.none() | st.floats(allow_nan=False),
    tasks=st.lists(st.text()).map(tuple),
    shuffle=st.booleans(),
    optim=st.builds(Optim, lr=st.floats(allow_nan=False)),
)


@given(configs)
def test_round_trip_of_any_config(cfg: Config) -> None:
    assert config.from_dict(Config, config.to_dict(cfg)) == cfg


@given(configs, configs)
def test_two_configs_share_a_key_only_if_they_are_equal(a: Config, b: Config) -> None:
    assert (config.non_default(a) == config.non_default(b)) == (a == b)


def test_only_what_differs_from_the_default_is_asked() -> None:
    assert config.non_default(Config(size="tiny")) == {"size": "tiny"}
    chosen = config.non_default(Config(size="tiny", steps=7, optim=Optim()))
    assert chosen == {"size": "tiny", "steps": 7, "optim": {"lr": 1e-3}}, (
        "against the parent's default instance"
    )


def test_a_number_is_the_same_question_however_it_is_written() -> None:
    assert config.non_default(Config(size="x", ratio=1)) == config.non_default(Config(size="x", ratio=1.0))
    assert type(config.non_default(Config(size="x", ratio=1))["ratio"]) is float
    assert config.non_default(Config(size="x", steps=100.0)) == {"size": "x"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "words", "hint"),
    [
        ({"size": "x", "step": 3}, "no setting `step`", "did you mean `steps`?"),
        ({"size": "x", "optim": {"lrr": 1}}, "`optim.lrr`", "did you mean `optim.lr`?"),
        ({"size": "x", "steps": "many"}, "`steps` cannot be 'many'", "expected int"),
        ({"size": "x", "steps": True}, "`steps` cannot be True", "expected int"),
        ({"size": "x", "steps": 1.5}, "`steps` cannot be 1.5", "expected int"),
        ({"size": "x", "steps": None}, "`steps` cannot be None", "expected int"),
        ({"size": "x", "kind": "sgd"}, "`kind` cannot be 'sgd'", "one of: adamw, muon"),
        ({"size": "x", "mode": "SLOW"}, "`mode` cannot be 'SLOW'", "one of: FAST, EXACT"),
        ({"size": "x", "shuffle": 1}, "`shuffle` cannot be 1", "expected bool"),
        ({"size": "x", "tasks": "a"}, "`tasks` cannot be 'a'", "tuple"),
        ({"size": "x", "optim": {"betas": [1]}}, "`optim.betas` cannot be", "tuple"),
        ({"size": "x", "optim": 3}, "`optim` cannot be 3", "Optim"),
        ({"steps": 3}, "setting `size` is needed", "Name of a size."),
    ],
)
def test_unfit_data_is_refused_with_a_hint(raw: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        config.from_dict(Config, raw)
    assert words in str(refused.value) and hint in str(refused.value.hint)


def test_documentation_of_fields() -> None:
    docs = config.field_docs(Config)
    assert docs["steps"] == "Optimiser steps."
    assert docs["seed"] == "Seed of every draw."
    assert docs["optim.betas"] == "Decay of the two moments."
    assert "optim" not in docs


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ([], {}),
        (["--steps", "1e3"], {"steps": 1000}),
        (["--steps=1_000"], {"steps": 1000}),
        (["--steps", "-5"], {"steps": -5}),
        (["--ramp", "2.5e2"], {"ramp": 250}),
        (["--ramp", "none"], {}),
        (["--ratio", "None"], {"ratio": None}),
        (["--ratio", "1"], {"ratio": 1.0}),
        (["--optim.lr", "1e-4"], {"optim": Optim(lr=1e-4)}),
        (["--optim.betas", "0.5", "0.6"], {"optim": Optim(lr=0.5, betas=(0.5, 0.6))}),
        (["--shuffle", "false"], {"shuffle": False}),
        (["--no-shuffle"], {"shuffle": False}),
        (["--shuffle", "--steps", "3"], {"steps": 3}),
        (["--shuffle"], {}),
        (["--tasks", "x", "y", "z"], {"tasks": ("x", "y", "z")}),
        (["--tasks"], {"tasks": ()}),
        (["--kind", "muon"], {"kind": "muon"}),
        (["--mode", "EXACT"], {"mode": Mode.EXACT}),
        (["--folder", "/a/b"], {"folder": Path("/a/b")}),
    ],
)
def test_flags(words: list[str], change: dict[str, Any]) -> None:
    assert config.from_flags(Config, ["--size", "tiny", *words]) == Config(size="tiny", **change)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--stepz", "3"], "unknown flag `--stepz`", "did you mean `--steps`?"),
        (["--optim.rl", "3"], "unknown flag `--optim.rl`", "did you mean `--optim.lr`?"),
        (["--lr", "3"], "unknown flag `--lr`", "did you mean `--optim.lr`?"),
        (["--storre", "3"], "unknown flag `--storre`", "did you mean `--store`?"),
        (["--steps", "many"], "many", "--help"),
        (["--steps", "1.5"], "1.5", "--help"),
        (["--steps"], "--steps", "--help"),
        (["--kind", "sgd"], "'adamw', 'muon'", "--help"),
        (["--steps", "3", "4"], "4", "--help"),
        (["stray"], "`stray` stands alone", "--name value"),
    ],
)
def test_flags_that_cannot_be_read(words: list[str], message: str, hint: str) -> None:
    head = [] if words == ["stray"] else ["--size", "tiny"]
    with pytest.raises(UserError) as refused:
        config.from_flags(Config, [*head, *words], "caravan test", also=["store"])
    assert message in str(refused.value) and hint in str(refused.value.hint)
    assert not set("─│╭╰") & set(str(refused.value)), "no boxes in a sentence"


def test_a_needed_flag_is_named_with_its_meaning() -> None:
    with pytest.raises(UserError, match="caravan test needs --size") as refused:
        config.from_flags(Config, [], "caravan test")
    assert refused.value.hint == "Name of a size."
