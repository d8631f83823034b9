"""Cases that prove families: one file per file of caravan/model/families, each with `CASES: list[Case]`.

tests/contracts/test_family_parity.py runs every check over every case; `python -m tests.families.table` makes
docs/families.md of them. Sizes are awkward on purpose (three query heads per key head, a prime vocabulary,
four layers so that patterns over layers show, windows shorter than the text), and every parameter is moved
away from its initial value, so that a mapping which drops a bias or swaps two gains cannot pass.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 101
LAYERS = 4
LENGTH = 21
"""Tokens of a test row: longer than every window and every original context below."""
TOLERANCE = 5e-5
"""Of max|difference| / std in fp32: the customary 1e-3 accepts the wrong GELU."""

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
"""Keys that the Llama line shares."""

Oracle = Callable[[Mapping[str, Any], Mapping[str, Tensor], Tensor], Tensor]
"""(config.json, tensors of the file, ids [B, T]) -> logits [B, T, V], written apart from our model."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model and what is checked with it. A flag that is a string is off, and says why."""

    name: str
    hf: Callable[[], Any] | None = None
    """Builds a transformers model, randomised and in eval mode."""
    oracle: Oracle | None = None
    """For families without a class: a slow model of its own; needs `config` and `tensors`."""
    config: Mapping[str, Any] | None = None
    tensors: Callable[[], dict[str, Tensor]] | None = None
    """Weights under the names of the family's files (oracle only)."""
    disguise: Callable[[Path], None] | None = None
    """Rewrites what transformers saved into the family's own layout, for layouts without a class."""
    written: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """What export gives for the tensors of the files, where it is not the same bytes."""
    wrong: Callable[[Any], Any]
    """The Spec with one knob turned the wrong way: must be noticed."""
    tolerance: float = TOLERANCE
    decode: bool | str = True
    """Token by token through the engine gives what one pass gives."""
    left_pad: bool | str = True
    """transformers on left-padded rows and we on ragged segments agree."""
    packing: bool | str = True
    """Segments laid end to end change nothing."""
    reload: bool | str = True
    """transformers opens our export."""
    legacy: bool | str = True
    """config.json in the spelling of transformers 4 gives the same Spec."""
    compile: bool | str = True
    """torch.compile(fullgraph=True) takes it and changes nothing."""
    gradients: bool = False
    """Also compare gradients (one case per mixer is enough)."""
    run: Callable[[Any, Tensor], Tensor] | None = None
    """Ours: (loaded model, ids [B, T]) -> what is compared; default: logits of segments."""
    run_hf: Callable[[Any, Tensor], Tensor] | None = None
    """Theirs; default: model(ids).logits."""
    load: Callable[[Path], Any] | None = None
    """Default: checkpoint.load_model."""
    save: Callable[[Any, Path], None] | None = None
    """Default: checkpoint.save_model in fp32."""
    rebuild: Callable[[Any, Any], Any] | None = None
    """(loaded model, wrong Spec) -> a fresh module to take the weights; default: Decoder(spec, family)."""
    ids: Callable[[], Tensor] | None = None
    """[B, T] test ids; default: two rows of `LENGTH` seeded ids."""


def names() -> list[str]:
    """Families that have a file of cases."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("table",))


def cases() -> list[tuple[str, Case]]:
    """(family, case) of everything there is."""
    return [(name, case) for name in names() for case in importlib.import_module(f"{__name__}.{name}").CASES]


def ids() -> Tensor:
    """Two rows of seeded ids; the first three are left out, some classes read them as padding."""
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ tiny models


DELICATE = ("A_log", "D", "dt_bias", "time_decay", "time_first", "time_mix_key", "time_mix_value",
            "time_mix_receptance")  # fmt: skip
"""Parameters that are exponentiated or used as mixing weights: moved a little only."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and every saved float buffer by seeded noise of a sane size."""
    draw = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    moved: set[int] = set()
    for name, tensor in saved.items():
        if not tensor.is_floating_point() or id(tensor) in moved:
            continue
        moved.add(id(tensor))  # tied ones once
        noise = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        leaf = name.rpartition(".")[2]
        if leaf in DELICATE:
            tensor.add_(noise, alpha=0.1)
        elif tensor.dim() < 2:
            tensor.add_(noise, alpha=0.2)
        else:
            table = "embed" in name or leaf in ("wte", "wpe")
            tensor.copy_(noise * (0.5 if table else tensor.shape[-1] ** -0.5))
    return model


def tiny(
    config_class: str, model_class: str, arguments: Mapping[str, Any], attention: str = "eager"
) -> Callable[[], Any]:
    """A builder of a randomised transformers model for `Case.hf`."""

    def build() -> Any:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**json.loads(json.dumps(arguments)))
        config._attn_implementation = attention
        return randomise(getattr(transformers, model_class)(config)).eval()

    build.reference = model_class  # type: ignore[attr-defined]
    return build


def causal(stem: str, arguments: Mapping[str, Any], attention: str = "eager") -> Callable[[], Any]:
    """`tiny` of {stem}Config and {stem}ForCausalLM."""
    return tiny(f"{stem}Config", f"{stem}ForCausalLM", arguments, attention)


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights for an oracle: gains near 1 (names with "norm" or "ln"), everything else of a sane size."""
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        gain = len(shape) < 2 and ("norm" in name or "ln" in name) and not name.endswith("bias")
        scale = 0.2 if len(shape) < 2 else 0.5 if "embed" in name else shape[-1] ** -0.5
        result[name] = noise * scale + (1.0 if gain else 0.0)
    return result


def rewrite(
    folder: Path,
    config: Callable[[dict[str, Any]], dict[str, Any]],
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda t: t,
) -> None:
    """What a `disguise` does: other keys in config.json, other names and shapes of tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    path.write_text(json.dumps(config(json.loads(path.read_text()))))
    new = {name: t.contiguous() for name, t in tensors(load_file(folder / "model.safetensors")).items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with parts of their names replaced, longest first."""
    result = {}
    for name, tensor in tensors.items():
        for old in sorted(names, key=len, reverse=True):
            name = name.replace(old, names[old])
        result[name] = tensor
    return result


def theta(config: Mapping[str, Any]) -> float:
    """The rotary base of a config.json as transformers 5 writes it."""
    return float(config["rope_parameters"]["rope_theta"])


# ------------------------------------------------------------------------------------------ wrong knobs


def wrong_attn(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every layer's Attn."""
    return lambda spec: change(spec, "attn", **values)


def wrong_ffn(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every layer's FFN."""
    return lambda spec: change(spec, "ffn", **values)


def wrong_norm(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every layer's Norm."""
    return lambda spec: change(spec, "norm", **values)


def wrong_layer(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every Layer."""
    return lambda spec: replace(spec, layers=tuple(replace(layer, **values) for layer in spec.layers))


def wrong_spec(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of the Spec itself."""
    return lambda spec: replace(spec, **values)


def wrong_rope(**values: Any) -> Callable[[Any], Any]:
    """A Spec -> Spec that sets values of every Rope."""

    def turned(layer: Any) -> Any:
        if layer.attn is None or layer.attn.rope is None:
            return layer
        return replace(layer, attn=replace(layer.attn, rope=replace(layer.attn.rope, **values)))

    return lambda spec: replace(spec, layers=tuple(turned(layer) for layer in spec.layers))


def change(spec: Any, part: str, **values: Any) -> Any:
    """The Spec with values of one part of every layer that has it changed."""
    layers = tuple(
        layer
        if getattr(layer, part) is None
        else replace(layer, **{part: replace(getattr(layer, part), **values)})
        for layer in spec.layers
    )
    return replace(spec, layers=layers)
