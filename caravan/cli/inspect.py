"""`caravan inspect`: what a model is and what it takes, from config.json alone; no weight is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from caravan.cli.running import take
from caravan.store import Store
from caravan.types import UserError

USAGE = "usage: caravan inspect FOLDER|hf:ORG/NAME|REF [--json]"


def main(words: Sequence[str]) -> int:
    """Print what is known of a model folder, a Hub id (only its small files are fetched) or an artefact."""
    taken, rest = take([w for w in words if w != "--json"], ["store"])
    if len(rest) != 1 or rest[0].startswith("--"):
        raise UserError(USAGE, "one model; `--json` for machines")
    page = report(_folder(rest[0], taken.get("store")))
    print(json.dumps(page, indent=1) if "--json" in words else "\n".join(_lines(page)))
    return 0


def _folder(text: str, store: str | None) -> Path:
    if text.startswith("hf:"):
        from caravan.model import hub

        return hub.fetch(text, weights=False)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file, not a model folder", "give the folder that holds config.json")
    try:
        return Store(store).open(text).path
    except UserError as error:
        raise UserError(f"there is no model folder or artefact {text}", error.hint) from None


def report(folder: Path) -> dict[str, Any]:
    """Everything about a model folder as plain data. Raises UserError when it is none."""
    from caravan.model import checkpoint, families
    from caravan.model.encoders.bgpt import BgptSpec
    from caravan.model.spec import Spec
    from caravan.systems import memory

    config = checkpoint.read_config(folder)
    spec: Any = checkpoint.load_spec(folder)
    family = families.find(config["model_type"])
    labels = _labels(config, family)
    scored: Any = None
    if labels or hasattr(family, "POOL"):
        bare = dataclasses.replace(spec, head=False)
        scored = _scored(checkpoint.empty(family, config, bare, folder), family, labels or 1)
        spec = bare if labels else spec
    model: Any = scored if labels else checkpoint.empty(family, config, spec, folder)
    count = sum(p.numel() for p in model.parameters())
    one, two = isinstance(spec, Spec), isinstance(spec, BgptSpec)
    page: dict[str, Any] = {
        "folder": str(folder),
        "family": family.__name__.rpartition(".")[2],
        "architecture": _architecture(config) or family.ARCHITECTURE,
        "spec": _spec(spec) if one else _halves(spec) if two else _fields(spec),
        "layers": _layers(spec.layers) if one else _of_both(spec) if two else [],
        "parameters": {"all": count, **memory.parts(model)},
        "weights": _items(memory.weights(model)),
    }
    if one or two:
        page["parameters"]["per token"] = count - memory.idle(spec)
        if labels:
            page["spec"]["head"] = "one score per text" if labels == 1 else f"{labels} labels per text"
    if (one or two) and spec.head and not hasattr(family, "POOL"):
        page["cache"] = {
            "per token": memory.cache(spec, 1),
            "full context": memory.cache(spec, spec.context),
            "context": spec.context,
            "recurrent state": memory.state(spec),
        }
        page["training"] = _items(memory.training(model))
    elif scored is not None:
        page["training"] = _items({"reward": memory.trainee(scored)})
    return {**page, **_words(folder), "licence": licence(folder, config), "stored": _stored(folder, config)}


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _labels(config: Mapping[str, Any], family: Any) -> int:
    """Labels of a reward model or classifier; 0 for others. Where no key counts them there are 2."""
    from caravan.model import families

    # the class without its family's name: MT5ForTokenClassification, too
    kind = "For" + families.classifier(family).partition("For")[2]
    if not _architecture(config).endswith(kind):
        return 0
    named = config.get("id2label")
    count = config.get("num_labels", len(named) if isinstance(named, dict) else 2)
    return count if isinstance(count, int) and 0 < count < 1_000_000 else 2


def _scored(model: Any, family: Any, labels: int) -> Any:
    """A model without memory and the head that reads its states."""
    from caravan.model.blank import blank
    from caravan.model.heads import PooledHead, RewardModel

    with blank():
        pooled = PooledHead(model.spec.d, family.POOL, labels) if hasattr(family, "POOL") else None
        return RewardModel(model, pooled)


def _items(items: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"bytes": item.bytes, "formula": item.formula} for name, item in items.items()}


def _fields(value: Any) -> dict[str, Any]:
    """A Spec of another make: its plain fields."""
    every = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {
        name: v for name, v in every.items() if isinstance(v, int | float | str) and not isinstance(v, bool)
    }


def _spec(spec: Any) -> dict[str, Any]:
    """The model as a whole, in words."""
    said: dict[str, Any] = {"vocabulary": spec.vocab, "width": spec.d, "layers": len(spec.layers)}
    said["context"] = spec.context
    rotary = any(a.rope for a in spec.attns)
    alibi = any(a.alibi for a in spec.attns)
    said["positions"] = {"learned": "learned", "sinusoid": "sinusoids"}.get(
        spec.pos, "rotary" if rotary else "ALiBi" if alibi else "none"
    )
    said["head"] = "none" if not spec.head else "the embedding (tied)" if spec.tie else "a matrix of its own"
    if spec.embed_dim:
        said["embedding width"] = spec.embed_dim
    return said


def _halves(spec: Any) -> dict[str, Any]:
    """bGPT's two decoders as one model; what is counted in bytes is the byte decoder's."""
    said = _spec(spec.byte) | {"layers": len(spec.layers), "context": spec.context}
    return said | {"patch": f"{spec.patch_size} bytes"}


def _of_both(spec: Any) -> list[dict[str, Any]]:
    """The layers of either half."""
    halves = (("over patches", spec.patch), ("within a patch", spec.byte))
    return [{**run, "is": f"{where}: {run['is']}"} for where, half in halves for run in _layers(half.layers)]


def _layers(layers: Sequence[Any]) -> list[dict[str, Any]]:
    """Runs of equal layers, each in a sentence."""
    found, at = [], 0
    for layer, same in groupby(layers):
        count = len(list(same))
        found.append({"first": at, "last": at + count - 1, "is": _layer(layer)})
        at += count
    return found


def _layer(layer: Any) -> str:
    said = [_mixer(layer)]
    if layer.ffn is not None:
        said.append(_ffn(layer.ffn))
    norm = "RMS norm" if layer.norm.kind == "rms" else "layer norm"
    place = {(True, "none"): "before", (True, "out"): "before and after", (False, "out"): "after each part",
             (False, "sum"): "after each sum"}.get((layer.pre, layer.post), "before")  # fmt: skip
    return "; ".join([*said, f"{norm} {place}", *(["side by side"] if layer.parallel else [])])


def _mixer(layer: Any) -> str:
    attn = layer.attn
    if attn is None or layer.mixer not in ("attn", "mla"):
        knobs = _fields(layer.ssm) if layer.ssm is not None else {}
        return f"{layer.mixer} (" + ", ".join(f"{k} {v}" for k, v in knobs.items()) + ")"
    said = [f"{attn.n_head} heads of {attn.head_dim}"]
    if attn.mla:
        said.append(f"latent of {attn.mla.kv_rank}")
    elif attn.n_kv != attn.n_head:
        said.append(f"{attn.n_kv} for keys and values")
    if attn.rope:
        stretch = f", {attn.rope.scaling.kind} x {attn.rope.scaling.factor:g}" if attn.rope.scaling else ""
        said.append(f"rotary base {attn.rope.theta:g}{stretch}")
    for name, value in (("window", attn.window), ("soft cap", attn.softcap)):
        if value:
            said.append(f"{name} {value:g}")
    said += ["ALiBi"] * attn.alibi + ["norm of queries and keys"] * (attn.qk_norm is not None)
    said += [] if attn.causal else ["both directions"]
    return ("latent attention " if attn.mla else "attention ") + ", ".join(said)


def _ffn(ffn: Any) -> str:
    if ffn.moe:
        shared = f", one shared of {ffn.moe.shared_ff}" if ffn.moe.shared_ff else ""
        return f"{ffn.moe.top_k} of {ffn.moe.n_expert} experts of {ffn.moe.d_ff} ({ffn.act}){shared}"
    return f"{'gated ' if ffn.kind == 'glu' else ''}feed-forward {ffn.d_ff} ({ffn.act})"


def _words(folder: Path) -> dict[str, Any]:
    """Tokenizer, chat template and special tokens, if the folder has them."""
    from caravan.data import template
    from caravan.data.tokenizer import Tokenizer

    try:
        tok = Tokenizer.load(folder)
    except UserError as error:
        return {"tokenizer": None, "tokenizer_error": str(error)}
    known = {template.builtin(name).strip(): name for name in template.names()}
    lines = [line for line in tok.chat_template.strip().splitlines() if line.strip()]
    named = {"bos": tok.bos, "eos": tok.eos, "pad": tok.pad, "end of turn": tok.end_of_turn}
    return {
        "tokenizer": {"kind": tok.kind, "ids": tok.vocab_size},
        "template": known.get(tok.chat_template.strip()) or "\n".join(lines[:3])[:300],
        "special": dict(sorted(tok.special.items(), key=lambda item: item[1])),
        "roles": {name: i for name, i in named.items() if i is not None},
    }


def licence(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What the folder says: in config.json, at the head of README.md, or in a licence file's first line."""
    given = config.get("license")
    if isinstance(given, str) and given:
        return given
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")[:20_000]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S.*)$", head[1], re.MULTILINE) if head else None
        if found:
            return found[1].strip().strip("'\"")
    for path in sorted(folder.glob("LICEN[CS]E*")):
        text = path.read_text(encoding="utf-8", errors="replace")[:2000]
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return f"{line[:80]} ({path.name})"
    return None


def _stored(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The weight files there are, without opening them."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = [p.name for end in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(end))]
    quantised = config.get("quantization_config")
    said: dict[str, Any] = {"files": len(files), "bytes": sum(p.stat().st_size for p in files if p.exists())}
    dtype = config.get("dtype") or config.get("torch_dtype")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    said |= {"quantised": method} if quantised else {}
    return {**said, "dtype": dtype, **({"pickles": pickles} if pickles and not files else {})}


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _lines(page: Mapping[str, Any]) -> Iterator[str]:
    yield f"{page['folder']}: {page['family']} ({page['architecture']})"
    stored = page["stored"]
    files = f"{stored['files']} files, {_size(stored['bytes'])}" if stored["files"] else "not here"
    if "pickles" in stored:
        files = f"{stored['pickles'][0]} only, a pickle, which can run code and is not read"
    quantised = f", quantised ({stored['quantised']})" if "quantised" in stored else ""
    yield f"  weights   {files}, stored as {stored['dtype'] or 'not said'}{quantised}"
    yield from (f"  {name:<16} {value}" for name, value in page["spec"].items())
    for run in page["layers"]:
        one = f"{run['first']}" if run["first"] == run["last"] else f"{run['first']} to {run['last']}"
        yield f"  layer {one:<10} {run['is']}"
    yield "parameters"
    yield from (f"  {name:<16} {count:>16,}" for name, count in page["parameters"].items())
    yield "memory of the weights"
    yield from _table(page["weights"])
    if "cache" in page:
        cache = page["cache"]
        yield "memory of one sequence (bf16; twice that for keys and values on a CPU)"
        yield f"  per token        {_size(cache['per token']):>10}"
        yield f"  {cache['context']:,} tokens".ljust(19) + f"{_size(cache['full context']):>10}"
        if cache["recurrent state"]:
            yield f"  recurrent state  {_size(cache['recurrent state']):>10}"
    if "training" in page:
        yield "memory of training (bf16 with fp32 masters unless said; activations come on top)"
        yield from _table(page["training"])
    yield "words"
    if page["tokenizer"] is None:
        yield f"  tokenizer        none ({page['tokenizer_error']})"
    else:
        yield f"  tokenizer        {page['tokenizer']['kind']}, {page['tokenizer']['ids']:,} ids"
        first, *more = page["template"].splitlines() or [""]
        yield f"  chat template    {first}"
        yield from (f"                   {line}" for line in more)
        roles = ", ".join(f"{name} {i}" for name, i in page["roles"].items())
        yield f"  special tokens   {roles or 'none'}"
        some = list(page["special"].items())
        yield from (f"    {i:>8}  {text}" for text, i in some[:20])
        if len(some) > 20:
            yield f"    and {len(some) - 20} more"
    yield f"licence: {page['licence'] or 'the folder says none'}"


def _table(items: Mapping[str, Any]) -> Iterator[str]:
    for name, item in items.items():
        yield f"  {name:<22} {_size(item['bytes']):>10}  = {item['formula']}"
