"""A model folder in, a quantised model folder out: which weights, in which layout, and how far off they are.

The projections inside the blocks are quantised; embeddings, output head, norms and biases stay as they are,
byte for byte. A weight whose inputs do not divide into groups stays too and is named in `ignore`. Fused
projections are cut up again by the family's own weight rules, so the folder holds the usual names.

GPTQ goes block by block on activations of the already quantised prefix, and inside a block in the order
qkv, o, up, down, the block being run again in between ("true sequential").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caravan.compress import gptq, rtn
from caravan.kernels.attention import Segments
from caravan.kernels.quantized import QuantLinear, expand, pack, packed_names, read_integers, scheme
from caravan.model import checkpoint, families, fp8, rules, stored
from caravan.model.decoder import Decoder, prefixes
from caravan.types import UserError

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers of `bits` bits with one scale per `group` inputs (0: per output row), stored in `dtype`."""

    bits: int
    group: int
    dtype: torch.dtype

    def width(self, inputs: int) -> int:
        """Inputs per scale."""
        return self.group or inputs

    def fits(self, inputs: int) -> bool:
        return inputs % self.width(inputs) == 0


@dataclass(frozen=True, slots=True)
class Quantised:
    """One projection: q int8 [N, K], scale [N, G], and |W - q s| / |W| over the whole matrix."""

    q_NK: Tensor
    scale_NG: Tensor
    error: float


KEPT = ("router", "shared_gate", "dt")
"""Small maps that decide for many numbers at once (experts, time steps): not worth their rounding."""


def projections(model: Decoder) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, in the order in which a token passes them; those of KEPT are left
    out, and so are experts, which lie stacked in one tensor."""
    names = ("mix.qkv", "mix.o", "ffn.inp", "ffn.out")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in KEPT
    }
    result = {}
    for at, tower in towers(model).items():
        for i in range(len(tower.blocks)):
            own = [name for name in found if name.startswith(f"{at}blocks.{i}.")]
            rank = {f"{at}blocks.{i}.{name}": place for place, name in enumerate(names)}
            result.update({name: found[name] for name in sorted(own, key=lambda n: (rank.get(n, 99), n))})
    return result


def towers(model: nn.Module) -> dict[str, Any]:
    """Where blocks lie, by the beginning of their names, in the order in which a token passes them: in the
    model itself, or in its halves (bGPT)."""
    return {f"{at}.".lstrip("."): m for at, m in model.named_modules() if hasattr(m, "blocks")}


def _measured(weight_NK: Tensor, q_NK: Tensor, scale_NG: Tensor) -> Quantised:
    off = torch.linalg.vector_norm(weight_NK - expand(q_NK, scale_NG))
    return Quantised(q_NK, scale_NG, float(off / torch.linalg.vector_norm(weight_NK).clamp_min(1e-30)))


def round_to_nearest(model: Decoder, grid: Grid, report: Report) -> dict[str, Quantised]:
    """Every projection by itself."""
    todo = {name: layer for name, layer in projections(model).items() if grid.fits(layer.in_features)}
    result = {}
    for done, (name, layer) in enumerate(todo.items(), 1):
        weight = layer.weight.detach().float()
        q, scale = rtn.quantise(weight, grid.bits, grid.width(layer.in_features), grid.dtype)
        result[name] = _measured(weight, q, scale)
        report(done, len(todo))
    return result


@torch.no_grad()
def by_gptq(
    model: Decoder, grid: Grid, sequences: Sequence[Sequence[int]], report: Report
) -> dict[str, Quantised]:
    """Block by block on `sequences` of token ids; the model's own weights are replaced as it goes."""
    layers = projections(model)
    result: dict[str, Quantised] = {}
    for at, tower in towers(model).items():
        batches = [found for part in _batches(sequences, 4096) for found in _entering(model, tower, part)]
        if not batches:
            raise UserError("no calibration text is as long as one patch", "give longer conversations")
        for i, block in enumerate(tower.blocks):
            for name in [n for n in layers if n.startswith(f"{at}blocks.{i}.")]:
                layer = layers[name]
                if grid.fits(layer.in_features):
                    hessian = _second_moments(layer, block, i, batches)
                    weight = layer.weight.detach().float()
                    width = grid.width(layer.in_features)
                    q, scale = gptq.quantise(weight, hessian, grid.bits, width, grid.dtype)
                    result[name] = _measured(weight, q, scale)
                    layer.weight.copy_(expand(q, scale))
                report(len(result), len(layers))
            for batch in batches:
                batch.hidden_ND = block(batch.hidden_ND, i, batch.angles, batch.attend)
    return result


@dataclass(slots=True)
class _Activations:
    """Hidden states of one flat batch on their way through the blocks, and what goes with them."""

    hidden_ND: Tensor
    angles: Any
    attend: Any


def _entering(model: nn.Module, tower: Any, sequences: Sequence[Sequence[int]]) -> list[_Activations]:
    """What enters the first block, whatever the family adds to the embedding; nothing where no token gets
    that far (texts shorter than a patch)."""
    lengths = [len(s) for s in sequences]
    pos_N = torch.cat([torch.arange(n) for n in lengths])
    ids_N = torch.tensor([t for s in sequences for t in s])
    found: list[_Activations] = []
    handle = tower.blocks[0].register_forward_pre_hook(
        lambda _, args: found.append(_Activations(args[0], args[2], args[3]))
    )
    try:
        model(ids_N, pos_N, Segments(lengths, prefix=prefixes(model.spec, ids_N, lengths)))  # type: ignore[arg-type]
    finally:
        handle.remove()
    return found


def _batches(sequences: Sequence[Sequence[int]], tokens: int) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    size = tokens
    for sequence in sequences:
        if size + len(sequence) > tokens:
            groups.append([])
            size = 0
        groups[-1].append(sequence)
        size += len(sequence)
    return groups


def _second_moments(
    layer: nn.Linear, block: nn.Module, index: int, batches: Sequence[_Activations]
) -> Tensor:
    moments = gptq.Hessian()
    handle = layer.register_forward_pre_hook(lambda _, args: moments.add(args[0]))
    try:
        for batch in batches:
            block(batch.hidden_ND, index, batch.angles, batch.attend)
    finally:
        handle.remove()
    return moments.matrix()


# ---------------------------------------------------------------------------------------------------- folders


def load_source(folder: Path) -> Decoder:
    """The float model to quantise, in float32. Raises UserError when it already is in integers."""
    stored.weights(folder)
    return checkpoint.load_model(folder, torch.float32)


def write(source: Path, out: Path, model: Decoder, grid: Grid, weights: dict[str, Quantised]) -> list[str]:
    """Write `out` as `source` with `weights` (by canonical name) in packed form; returns the names of the
    projections left as they were."""
    config = checkpoint.read_config(source)
    originals = stored.weights(source)
    tensors: dict[str, Tensor] = {key: originals[key].to(originals.kind(key)) for key in originals}
    left: list[str] = []
    transposed = False
    table = rules.of(families.find(model.family)).spelled(model.spelling)
    for step in rules.plan(table, model.spec, [f"{name}.weight" for name in projections(model)]):
        names = [s.removeprefix(table.prefix) if model.bare else s for s in step.sources]
        names = [name.removesuffix(".weight") for name in names]
        done = weights.get(step.target.removesuffix(".weight"))
        if done is None:
            left += names
            continue
        transposed |= "T" in step.ops
        rows = _rows_only(step)
        parts = zip(
            names, rules.backwards(done.q_NK, rows), rules.backwards(done.scale_NG, rows), strict=True
        )
        for name, q, scale in parts:
            del tensors[f"{name}.weight"]
            tensors[f"{name}.weight_packed"] = pack(q, grid.bits)
            tensors[f"{name}.weight_scale"] = scale.contiguous()
            tensors[f"{name}.weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    config["quantization_config"] = quantization_config(grid, left, transposed)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors({key: t.contiguous() for key, t in tensors.items()}, out)
    checkpoint.write_json(out / "config.json", config)
    checkpoint.copy_tokenizer(source, out)
    generation = source / "generation_config.json"
    if generation.exists():
        (out / generation.name).write_bytes(generation.read_bytes())
    return left


def _rows_only(step: rules.Step) -> rules.Step:
    """The step without its transposition: integers always lie as [outputs, inputs]."""
    return replace(step, ops=tuple(op for op in step.ops if op != "T"))


def quantization_config(grid: Grid, left: Sequence[str], transposed: bool) -> dict[str, Any]:
    """What config.json says about it. `transposed` marks families that store [inputs, outputs] (GPT-2): only
    we read those."""
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group or None,
    }
    value: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *left],
    }
    return {**value, "transposed": True} if transposed else value


def swap(model: Decoder, folder: Path) -> int:
    """Put integer projections into a model loaded from a quantised `folder`, for serving on a CPU; returns
    how many. A folder without integers changes nothing."""
    config = checkpoint.read_config(folder)
    if not config.get("quantization_config") or fp8.stored_so(config):
        return 0
    bits, _ = scheme(config["quantization_config"])
    tensors = checkpoint.TensorFolder(folder)
    integers = set(packed_names(tensors))
    table = rules.of(families.find(model.family)).spelled(model.spelling)
    layers = projections(model)
    count = 0
    for step in rules.plan(table, model.spec, [f"{name}.weight" for name in layers]):
        names = [s.removeprefix(table.prefix) if model.bare else s for s in step.sources]
        names = [name.removesuffix(".weight") for name in names]
        if not integers.issuperset(names):
            continue
        parts = [read_integers(tensors, name, bits) for name in names]
        rows = _rows_only(step)
        q = rules.forwards([p[0] for p in parts], rows)
        scale = rules.forwards([p[1] for p in parts], rows)
        target = step.target.removesuffix(".weight")
        parent, _, own = target.rpartition(".")
        bias = layers[target].bias
        quantised = QuantLinear(q, scale, bits, None if bias is None else bias.detach())
        setattr(model.get_submodule(parent), own, quantised)
        count += 1
    return count
