"""Finds the tokenizer in a folder, whatever its format, and reads it into one `tokenizer.json` definition.

In this order: `tokenizer.json`; a SentencePiece `.model`; tiktoken ranks (`.tiktoken`, or a `.model` that is
text); GPT-2's `vocab.json` with `merges.txt`; RWKV's `rwkv_vocab*.txt`; CPM-Bee's and CPM-Ant's `vocab.txt`.
A bGPT model needs no file: its ids are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from caravan.data import template
from caravan.data.vocabulary import cpm, greedy, sentencepiece_model, tiktoken_ranks, training
from caravan.data.vocabulary.definition import BYTE_LEVEL, added_token, split
from caravan.data.vocabulary.splits import SPLITS
from caravan.types import UserError

END_OF_TEXT = "<|endoftext|>"
USUAL = ("tokenizer.model", "spiece.model", "ice_text.model", "qwen.tiktoken")
ADDED_BY_CODE: dict[str, tuple[str, ...]] = {
    "ChatGLMTokenizer": (
        "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
        "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    ),
}  # fmt: skip
"""Special tokens that a tokenizer class of a checkpoint appends behind its `.model`, by class name."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of a folder, or of one file. Raises UserError."""
    folder = path if path.is_dir() else path.parent
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    file = find(path)
    if file.suffix == ".json" and file.name not in ("vocab.json", "config.json"):
        return read_json(file), config
    if file.name == "vocab.json":
        definition, defaults = _gpt2(folder, config)
    elif file.name == "vocab.txt":
        definition, defaults = _cpm(file, config)
    elif file.name == "config.json":
        definition, defaults = _bytes_of_bgpt(read_json(file))
    elif file.suffix == ".txt":
        definition, defaults = greedy.read(file)
    else:
        data = file.read_bytes()
        if tiktoken_ranks.is_ranks(data):
            definition, defaults = tiktoken_ranks.read(data, file, config)
        else:
            definition, defaults = _sentencepiece(data, file, config)
    # The class that config names reads the original files.
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", **defaults}
    config.pop("tokenizer_class", None)
    config.pop("auto_map", None)
    _add(definition, {**read_json(folder / "added_tokens.json"), **_decoder_of(config)})
    return definition, {**defaults, **config}


def original(path: Path, config: Mapping[str, Any]) -> bytes | None:
    """The SentencePiece file that a definition was made from; None if it was made from something else."""
    if not config.get("sentencepiece_normalizer"):
        return None
    file = path / "tokenizer.model" if path.is_dir() and (path / "tokenizer.json").is_file() else find(path)
    return file.read_bytes() if file.is_file() else None


def find(path: Path) -> Path:
    """The file that decides ids. Raises UserError."""
    found = [path] if path.is_file() else candidates(path)
    if len(found) > 1:
        raise UserError(
            f"several tokenizers in {path}: {', '.join(f.name for f in found)}",
            "name the file, or keep one of them in the folder",
        )
    if not found:
        raise UserError(
            f"no tokenizer in {path}: tokenizer.json is missing",
            "also read: a SentencePiece .model, tiktoken ranks, vocab.json with merges.txt, rwkv_vocab*.txt, "
            "CPM's vocab.txt",
        )
    return found[0]


def candidates(folder: Path) -> list[Path]:
    """Files of a folder that may decide ids: those of the first format there; none if it has no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return [folder / "tokenizer.json"]
    found = [folder / name for name in USUAL if (folder / name).is_file()][:1]
    found = found or sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    if not found and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return [folder / "vocab.json"]
    found = found or sorted(folder.glob("rwkv_vocab*.txt"))
    if found:
        return found
    model = read_json(folder / "config.json")
    if cpm.kind(model, read_json(folder / "tokenizer_config.json")) and (folder / "vocab.txt").is_file():
        return [folder / "vocab.txt"]
    return [folder / "config.json"] if model.get("model_type") == "bgpt" else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. Raises UserError."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a JSON object")
    return found


def _sentencepiece(
    data: bytes, file: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        model = sentencepiece_model.read(data)
        definition, defaults = sentencepiece_model.definition(model)
    except UserError as error:
        raise UserError(f"{file}: {error}", error.hint) from error
    ties = sentencepiece_model.tied(model)
    if ties and config.get("ties") != "by_id":
        raise UserError(
            f"{file}: {ties} pieces share their score with another, so ids depend on what stands leftmost",
            'write {"ties": "by_id"} into tokenizer_config.json beside it to merge them in the order of ids, '
            "as converted copies do; or use the model's tokenizer.json",
        )
    more = ADDED_BY_CODE.get(str(config.get("tokenizer_class")), ())
    size = len(definition["model"]["vocab"])
    if not _decoder_of(config):
        _add(definition, {text: size + k for k, text in enumerate(more)})
    return definition, defaults


def _decoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """text -> (id, special) of `added_tokens_decoder`."""
    entries = config.get("added_tokens_decoder") or {}
    return {t["content"]: (int(i), bool(t.get("special", True))) for i, t in entries.items()}


def _add(definition: dict[str, Any], tokens: Mapping[str, Any]) -> None:
    """Put special tokens at the ids given, into the vocabulary too: the library would number them itself."""
    there = {t["content"] for t in definition["added_tokens"]}
    vocab = definition["model"]["vocab"]
    for text, entry in tokens.items():
        token, special = entry if isinstance(entry, tuple) else (entry, True)
        if text in there:
            continue
        definition["added_tokens"].append(added_token(text, token, special))
        if isinstance(vocab, dict):
            if vocab.setdefault(text, token) != token:
                raise UserError(f"the added token {text!r} has id {vocab[text]} and {token}")
        elif token == len(vocab):
            vocab.append([text, 0.0])
    definition["added_tokens"].sort(key=lambda t: t["id"])


def _cpm(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    family = cpm.kind(read_json(file.parent / "config.json"), config)
    if family is None:
        raise UserError(
            f"{file}: no file beside it says that it is CPM-Bee's or CPM-Ant's; BERT's are not read",
            "keep it with the model's config.json or tokenizer_config.json; or use a tokenizer.json",
        )
    return cpm.read(file, family)


def _bytes_of_bgpt(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bytes, and 256 for the end (sanderwood/bgpt, utils.py). Its documents begin with a patch that names the
    kind of file, which the chat template puts there."""
    definition, config = training.single_bytes((END_OF_TEXT,))
    size = model.get("patch_size", 16)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: patch_size is {size!r}, which is no number of bytes")
    written = template.builtin("bgpt").replace("patch = 16", f"patch = {size}")
    return definition, {**config, "bos_token": None, "chat_template": written}


def _gpt2(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """GPT-2's two files, which are also Qwen 2's; the `#version` line of merges.txt is optional. The class
    that tokenizer_config.json names tells the split apart, which stands in neither file."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [
        (line.partition(" ")[0], line.partition(" ")[2])
        for line in lines
        if line and not line.startswith("#version")
    ]
    vocab = read_json(folder / "vocab.json")
    if any(text.endswith("</w>") for text in vocab):
        raise UserError(
            f"vocab.json in {folder} marks ends of words (</w>), which is BPE of characters, not of bytes",
            "take the tokenizer.json that the checkpoint also has",
        )
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"vocab.json and merges.txt in {folder} do not fit: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    definition = json.loads(backend.to_str())
    if str(config.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
        definition["normalizer"] = {"type": "NFC"}
        definition["pre_tokenizer"] = {
            "type": "Sequence", "pretokenizers": [split(SPLITS["qwen2"]), BYTE_LEVEL],
        }  # fmt: skip
    if END_OF_TEXT not in vocab:
        return definition, {}
    _add(definition, {END_OF_TEXT: vocab[END_OF_TEXT]})
    return definition, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
