"""Typed reading of a config.json: every value is checked where it is read, every complaint names its key.

A key may have several spellings (`n_embd`, `hidden_size`); the first that is present and not null counts.
Without a default, a value that is absent is an error: an adapter never guesses a size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from caravan.model.spec import Rope
from caravan.types import UserError

Config = Mapping[str, Any]
MISSING: Any = object()
MOST = 2**31 - 1
MOST_LAYERS = 9999
"""Layers are made one by one before any tensor is looked at."""


def wrong(key: str, value: object, wanted: str) -> UserError:
    """The error for a value of config.json that is not what it should be."""
    return UserError(f"config.json: '{key}' is {value!r}, wanted {wanted}", "the file was edited or damaged")


def unsupported(key: str, value: object, known: Collection[object]) -> UserError:
    """The error for a value that is well formed and asks for something we do not have."""
    return UserError(
        f"config.json: '{key}': {value!r} is not supported", f"known: {', '.join(map(str, known))}"
    )


def find(config: Config, names: tuple[str, ...], default: Any = MISSING) -> tuple[str, Any]:
    """(spelling, value) of the first spelling present; the default under the first spelling otherwise."""
    for name in names:
        if config.get(name) is not None:
            return name, config[name]
    if default is MISSING:
        more = f" (nor {' nor '.join(map(repr, names[1:]))})" if len(names) > 1 else ""
        raise UserError(
            f"config.json has no '{names[0]}'{more}", "is this the config.json of a Hugging Face model?"
        )
    return names[0], default


def size(config: Config, *names: str, default: Any = MISSING) -> int:
    """A whole number of at least 1, below what a made-up config would fill the memory with."""
    name, value = find(config, names, default)
    most = MOST_LAYERS if "layer" in name else MOST
    if type(value) is not int or not 1 <= value <= most:
        raise wrong(name, value, f"a whole number from 1 to {most}")
    return value


def token(config: Config, name: str, rows: int) -> int | None:
    """The id of one of `rows` words; None when absent or null."""
    value = config.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < rows):
        raise wrong(name, value, f"a token id below {rows}")
    return value


def real(config: Config, *names: str, default: Any = MISSING) -> float:
    """A finite number."""
    name, value = find(config, names, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise wrong(name, value, "a number")
    return float(value)


def positive(config: Config, *names: str, default: Any = MISSING) -> float:
    """A finite number above 0."""
    value = real(config, *names, default=default)
    if value <= 0:
        raise wrong(find(config, names, default)[0], value, "a number above 0")
    return value


def flag(config: Config, *names: str, default: Any = MISSING) -> bool:
    """true or false."""
    name, value = find(config, names, default)
    if type(value) is not bool:
        raise wrong(name, value, "true or false")
    return value


def table(config: Config, name: str) -> Config:
    """A nested object; {} when absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(name, value, "an object")
    return value or {}


def word(config: Config, *names: str, known: Mapping[str, Any], default: Any = MISSING) -> Any:
    """What `known` says about a word; an unknown word is an error that lists the known ones."""
    name, value = find(config, names, default)
    if not isinstance(value, str):
        raise wrong(name, value, "a word")
    if value not in known:
        raise unsupported(name, value, sorted(known))
    return known[value]


def refuse(config: Config, name: str, *fine: object) -> None:
    """An error unless the key is absent, null or one of the `fine` values: a switch we do not have."""
    value = config.get(name)
    if value is not None and not any(type(value) is type(v) and value == v for v in fine):
        raise unsupported(name, value, [json_word(v) for v in fine] or ["null"])


def json_word(value: object) -> str:
    """A plain value as config.json spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "quick_gelu": "quick_gelu",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def activation(config: Config, *names: str, default: Any = MISSING, **other: str) -> Any:
    """Our name of an activation; `other` overrides what a family means by a word."""
    return word(config, *names, known=ACTIVATIONS | other, default=default)


def untied(config: Config) -> bool:
    """False, from `tie_word_embeddings`: a head with a bias is a matrix of its own."""
    if flag(config, "tie_word_embeddings", default=False):
        raise unsupported("tie_word_embeddings", True, ("false, for the head has a bias",))
    return False


def head_dim(d: int, heads: int, name: str) -> int:
    """Width of a head when the heads share d evenly; `name` is the key that says how many there are."""
    if d % heads:
        raise wrong(name, heads, f"a divisor of the width {d}")
    return d // heads


def groups(config: Config, heads: int) -> int:
    """Key/value heads of `heads` query heads, from `num_key_value_heads`; as many when the key is absent."""
    value = size(config, "num_key_value_heads", default=heads)
    if heads % value:
        raise wrong("num_key_value_heads", value, f"a divisor of the {heads} query heads")
    return value


def share(dim: int, width: int) -> float:
    """The smallest share of `width` that int(width * share) turns into `dim` again."""
    result = dim / width
    return result if int(width * result) == dim else math.nextafter(result, 2.0)


def even(rope: Rope, name: str) -> Rope:
    """The same Rope, refused when it turns an odd number of dimensions."""
    if rope.dim < 2 or rope.dim % 2:
        raise UserError(f"config.json: '{name}' turns {rope.dim} dimensions of a head, wanted an even number")
    return rope
