"""Models in and out of plain Hugging Face folders: config.json and safetensors, nothing else is ever
executed.

Keys are strict in both directions, shards are opened lazily, the same weights are saved as the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caravan import outside
from caravan.model import families, fp8, keys, rules
from caravan.model.blank import blank
from caravan.model.decoder import Decoder
from caravan.model.filling import fill
from caravan.model.heads import PooledHead, RewardModel, ScoreHead
from caravan.model.spec import Spec
from caravan.model.tensors import Renamed, TensorFolder, write_json, write_tensors
from caravan.types import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model", "ice_text.model", "qwen.tiktoken",
    "vocab.txt",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a model folder, with what its family reads beside it. Raises UserError if it is none."""
    try:
        config = _json(Path(folder) / "config.json")
    except FileNotFoundError:
        raise outside.without_config(Path(folder)) from None
    kind = str(config.get("model_type"))
    beside = getattr(families.find(kind), "beside", None) if kind in families.names() else None
    found = beside(Path(folder)) if beside else {}
    return config | {key: value for key, value in found.items() if config.get(key) is None}


def read_generation(folder: Path | str) -> dict[str, Any]:
    """generation_config.json of a model folder; {} without one. Raises UserError when it is not JSON."""
    path = Path(folder) / "generation_config.json"
    return _json(path) if path.exists() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not JSON: {error}", "download or write it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def load_spec(folder: Path | str) -> Spec:
    """What the model in a folder is, from config.json alone."""
    config = read_config(folder)
    return _spec(config, folder)


def _spec(config: Mapping[str, Any], folder: Path | str) -> Spec:
    """The Spec of a config.json. Readers name what is wrong with a key; whatever they did not think of is
    still an error in the file, not in the program."""
    try:
        result: Spec = _family(config, folder).spec(config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/config.json cannot be understood: {str(error)[:200]}",
            "a key has a value that no model of this family has",
        ) from error
    return result


def _family(config: Mapping[str, Any], folder: Path | str) -> Any:
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise UserError(f"{folder}/config.json has no 'model_type'", f"known: {', '.join(families.names())}")
    return families.find(config["model_type"])


def read_tensors(folder: Path | str, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Plain weights of a folder, under the names of its files; quantised ones are written out in full.

    Raises UserError naming the key for a quantisation that is not read.
    """
    said = config.get("quantization_config")
    if said and not isinstance(said, Mapping):
        raise keys.wrong("quantization_config", said, "an object")
    tensors = getattr(_family(config, folder), "opened", lambda plain: plain)(TensorFolder(folder))
    if not said:
        return tensors
    if fp8.stored_so(config):
        return fp8.Blocks(tensors, said)
    from caravan.kernels.quantized import dequantise  # only quantised folders pay for it

    return dequantise(tensors, said)


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A folder in Hugging Face layout -> Decoder in `dtype` on `device`: a model that writes text.

    Raises UserError for encoders, and as `load_backbone` does.
    """
    config = read_config(folder)
    if hasattr(_family(config, folder), "POOL"):
        raise UserError(
            f"{folder}: '{config['model_type']}' is not a language model that reads from left to right",
            "`caravan reward --base` takes it; see docs/encoders.md",
        )
    return load_backbone(folder, dtype, device)


def load_backbone(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A folder in Hugging Face layout -> its Decoder, or the module of its own that the family has.

    Raises UserError for unknown families, missing or left-over tensors (naming the key), wrong shapes,
    damaged files.
    """
    config = read_config(folder)
    spec = _spec(config, folder)
    tensors = read_tensors(folder, config)
    if "score.weight" in tensors:
        raise UserError(
            f"{folder} holds a reward model, not a language model", "give a model artefact instead"
        )
    if spec.tie and spec.head:
        config, spec, tensors = _tied_head(folder, config, spec, tensors)
    return _build(folder, config, spec, tensors, dtype, device)


def _tied_head(
    folder: Path | str, config: dict[str, Any], spec: Spec, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Spec, Mapping[str, Tensor]]:
    """A head stored although config.json says tied: an alias if the bytes agree, else a head of its own."""
    table = rules.of(_family(config, folder)).spelled(tensors.keys())
    head, stem = (_stored(table, target, tensors) for target in ("head", "embed"))
    if head is None:
        return config, spec, tensors
    if stem is not None and torch.equal(tensors[stem], tensors[head]):
        return config, spec, Renamed(tensors, keys=[key for key in tensors if key != head])
    import warnings

    warnings.warn(f"{folder}: {head} differs from the embedding although tied; loaded untied", stacklevel=3)
    return {**config, "tie_word_embeddings": False}, replace(spec, tie=False), tensors


def _stored(table: rules.Table, target: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The key under which a folder holds the weight of a canonical module, if it does."""
    for source in table.sources(target):
        for key in (f"{source}.weight", f"{source}.weight".removeprefix(table.prefix or "\0")):
            if key in tensors:
                return key
    return None


def _build(
    folder: Path | str,
    config: Mapping[str, Any],
    spec: Spec,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    head: PooledHead | None = None,
) -> Decoder:
    """The model of a folder; a classifier's `head` is filled as well, in fp32."""
    family = _family(config, folder)
    model = empty(family, config, spec, folder)
    shapes = {name: p.shape for part in (model, head) if part for name, p in part.named_parameters()}
    table = rules.of(family).spelled(tensors.keys())
    model.spelling = table.spelling
    steps = rules.plan(table, spec, shapes)
    kept = rules.beside(getattr(family, "KEPT", ""), steps, table, tensors.keys())
    sources, model.bare = rules.assign(table, steps, tensors.keys() - kept, str(folder))
    wide = wide_names(model) | ({name for name, _ in head.named_parameters()} if head is not None else set())
    kinds = {name: torch.float32 if name in wide else dtype for name in shapes}
    loaded = fill(steps, sources, tensors, shapes, kinds, device, str(folder))
    model.kept = {key: tensors[key].clone() for key in sorted(kept)}
    for name, p in head.named_parameters() if head is not None else ():
        p.data.copy_(loaded.pop(name))
    model.load_state_dict(loaded, strict=True, assign=True)
    model.config.pop("quantization_config", None)
    return model


def empty(family: Any, config: Mapping[str, Any], spec: Spec, folder: Path | str) -> Decoder:
    """The module without memory."""
    try:
        with blank():
            return getattr(family, "MODULE", Decoder)(spec, str(config["model_type"]), dict(config))
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can count
        raise UserError(
            f"{folder}/config.json describes no model that could be: {str(error).splitlines()[0]}",
            "the file was edited or damaged",
        ) from None


def wide_names(model: nn.Module) -> set[str]:
    """Parameters that stay fp32 in memory and on disk, whatever the others are: a module lists them in
    FP32."""
    modules = dict(model.named_modules())
    return {f"{at}.{leaf}" for at, module in modules.items() for leaf in getattr(module, "FP32", ())}


def export_tensors(
    model: Decoder, dtype: torch.dtype | None = None, head: PooledHead | None = None
) -> dict[str, Tensor]:
    """Weights of a model under the names and in the layout of its family's files, on the CPU; with the head
    of a classifier, or else with what the file had besides."""
    table = rules.of(families.find(model.family)).spelled(getattr(model, "spelling", ()))
    own = {name: p.detach() for part in (model, head) if part for name, p in part.named_parameters()}
    wide = wide_names(model)
    own = {name: t if name in wide else t.to(dtype or t.dtype) for name, t in own.items()}
    steps = rules.plan(table, model.spec, own)
    exported = rules.export(table, steps, own, model.bare and head is None)
    exported |= {name: t.to(dtype or t.dtype) for name, t in model.kept.items()} if head is None else {}
    return {name: t.to("cpu").contiguous() for name, t in sorted(exported.items())}


def export_config(
    model: Decoder, dtype: torch.dtype, architecture: str, tokenizer: Path | str | None = None
) -> dict[str, Any]:
    """config.json of a model: keys it came with survive, ids of special tokens are the tokenizer's, what the
    Spec knows is written from the Spec (for ChatGLM-6B `bos_token_id` ends the prefix)."""
    family = families.find(model.family)
    made = family.config(replace(model.spec, tie=model.config.get("tie_word_embeddings", model.spec.tie))
                         if not model.spec.head else model.spec)  # fmt: skip
    kept = {
        k: v for k, v in model.config.items() if k not in ("num_labels", "reward_bias", "quantization_config")
    }
    made = family.carried(kept, made) if hasattr(family, "carried") else made
    if family.__name__.rpartition(".")[2] != model.family:
        kept.pop("auto_map", None)  # an alias is written as what it is, which needs no code of its own
    return {
        **kept,
        **_special_ids(tokenizer),
        **made,
        "model_type": families.model_type(family),
        "architectures": [architecture],
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }


def save_model(
    model: Decoder,
    folder: Path | str,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers and vLLM open as it is. `tokenizer` is a folder whose tokenizer files
    are copied; `generation` goes into generation_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = families.find(model.family).ARCHITECTURE
    if not model.spec.head:  # an encoder: whatever head the file had is written back with it
        architecture = (model.config.get("architectures") or [architecture])[0]
    config = export_config(model, dtype, architecture, tokenizer)
    write_tensors(export_tensors(model, dtype), folder)
    write_json(folder / "config.json", config)
    ids = {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None
    }
    write_json(folder / "generation_config.json", {**ids, **(generation or {})})
    copy_tokenizer(tokenizer, folder)


def _special_ids(tokenizer: Path | str | None) -> dict[str, int]:
    """bos, eos and pad ids, by looking the token texts of tokenizer_config.json up in tokenizer.json."""
    if tokenizer is None or not (Path(tokenizer) / "tokenizer_config.json").exists():
        return {}
    named = json.loads((Path(tokenizer) / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not (Path(tokenizer) / "tokenizer.json").exists():
        return {}
    added = json.loads((Path(tokenizer) / "tokenizer.json").read_text(encoding="utf-8")).get(
        "added_tokens", []
    )
    ids = {token["content"]: token["id"] for token in added}
    result = {}
    for role in ("bos", "eos", "pad"):
        text = named.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            result[f"{role}_token_id"] = ids[text]
    return result


def copy_tokenizer(source: Path | str | None, folder: Path | str) -> None:
    """Copy whichever tokenizer files a folder has, and its licence, which holds for what is made from it."""
    if source is None:
        return
    terms = [p.name for p in sorted(Path(source).glob("*")) if outside.says_whose(p.name)]
    for name in [*TOKENIZER_FILES, *(n for n in terms if not n.lower().startswith("readme"))]:
        path = Path(source) / name
        if path.is_file() and path.resolve() != (Path(folder) / name).resolve():
            shutil.copyfile(path, Path(folder) / name)


def load_classifier(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A sequence-classification folder of an encoder family, any number of labels; see RewardModel.labels."""
    config = read_config(folder)
    family = _family(config, folder)
    if not hasattr(family, "POOL"):
        raise UserError(f"{folder}: '{config['model_type']}' is no encoder", "it can be a reward model only")
    spec = replace(_spec(config, folder), head=False)
    tensors = read_tensors(folder, config)
    key = _stored(rules.of(family), "score", tensors)
    if key is None:
        raise UserError(
            f"{folder} has no classifier ('{rules.of(family).sources('score')[0]}.weight')",
            "a reward model is wanted here: train one with `caravan reward`",
        )
    bias = float(config.get("reward_bias", 0.0))
    head = PooledHead(spec.d, family.POOL, tensors[key].shape[0], bias)
    return RewardModel(_build(folder, config, spec, tensors, dtype, device, head), head.to(device))


def load_reward(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A sequence-classification folder with one label -> RewardModel that subtracts `reward_bias`."""
    config = read_config(folder)
    if hasattr(_family(config, folder), "POOL"):
        model = load_classifier(folder, dtype, device)
        assert isinstance(model.score, PooledHead)
        if model.score.count != 1:
            raise UserError(f"{folder} tells {model.score.count} labels apart", "a reward has one label")
        return model
    spec = replace(_spec(config, folder), head=False)
    tensors = read_tensors(folder, config)
    if "score.weight" not in tensors:
        raise UserError(
            f"{folder} has no 'score.weight'",
            "a reward model is wanted here: train one with `caravan reward`",
        )
    score = tensors["score.weight"]
    tensors = Renamed(tensors, keys=[key for key in tensors if key != "score.weight"])
    if tuple(score.shape) != (1, spec.out_dim):
        raise UserError(
            f"{folder}: 'score.weight' has shape {tuple(score.shape)}, wanted (1, {spec.out_dim})"
        )
    decoder = _build(folder, config, spec, tensors, dtype, device)
    head = ScoreHead(spec.out_dim, bias=float(config.get("reward_bias", 0.0)))
    head.weight.data.copy_(score)
    return RewardModel(decoder, head.to(device))


def fresh_head(model: Decoder, generator: torch.Generator) -> ScoreHead | PooledHead:
    """A new scalar head of the family's kind. An encoder that brings a pooling matrix (BERT's) keeps it."""
    family = families.find(model.family)
    if not hasattr(family, "POOL"):
        return ScoreHead(model.spec.out_dim, generator=generator)
    head = PooledHead(model.spec.d, family.POOL, generator=generator)
    table = rules.of(family)
    for step in rules.plan(
        table, model.spec, [n for n, _ in head.named_parameters() if n.startswith("pool")]
    ):
        source = step.sources[0].removeprefix(table.prefix if model.bare else "")
        if source in model.kept:
            head.get_parameter(step.target).data.copy_(model.kept[source])
    return head


def save_reward(
    model: RewardModel,
    folder: Path | str,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a reward model as `...ForSequenceClassification` with one label, a classifier with all of its.

    The reward is the score minus `reward_bias` of config.json; other readers see the raw score.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    decoder, head = model.decoder, model.score
    architecture = families.classifier(families.find(decoder.family))
    config = export_config(decoder, dtype, architecture, tokenizer)
    count = head.count if isinstance(head, PooledHead) else 1
    names = [f"LABEL_{i}" for i in range(count)]
    if count == 1 or len(config.get("id2label") or {}) != count:
        config |= {"id2label": {str(i): n for i, n in enumerate(names)}}
        config |= {"label2id": {n: i for i, n in enumerate(names)}}
    config |= {"num_labels": count, "reward_bias": float(head.bias)}
    if isinstance(head, PooledHead):
        tensors = export_tensors(decoder, dtype, head)
    else:
        tensors = {k: t for k, t in export_tensors(decoder, dtype).items() if not k.startswith("lm_head.")}
        tensors["score.weight"] = head.weight.detach().to("cpu", dtype).contiguous()
    write_tensors(tensors, folder)
    write_json(folder / "config.json", config)
    copy_tokenizer(tokenizer, folder)


def check_vocab(spec: Spec, tokenizer_vocab_size: int) -> None:
    """Raise UserError unless every token id has a row. More rows than ids is padding and fine."""
    if tokenizer_vocab_size > spec.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer_vocab_size} ids but the model only {spec.vocab} embedding rows",
            "use the tokenizer that the model was trained with",
        )
