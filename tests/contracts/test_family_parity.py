"""Every case of tests/families: the family's own files through our loader, and back.

Reference side: a tiny random transformers model, or a slow oracle where no class exists. Differences are
max|difference| / std in fp32, held below the case's bound, which one deliberately wrong knob per case must
exceed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.engine.engine import Engine
from caravan.kernels.attention import Segments
from caravan.model import checkpoint, families
from caravan.model.decoder import Decoder, prefixes
from caravan.types import Sampling
from tests import families as tiny
from tests.families import Case, table

pytest.importorskip("transformers")
ALL = tiny.cases()


def label(family: str, case: Case) -> str:
    """The case's name, after the family's where it does not begin with it."""
    return case.name if case.name.startswith(family) else f"{family}-{case.name}"


@dataclass
class Made:
    """A case with its reference built, run and saved, and its files loaded by us."""

    case: Case
    family: str
    folder: Path
    hf: Any
    """The transformers model; None with an oracle."""
    ids_BT: Tensor
    want: Tensor
    """What the reference says of ids_BT."""
    model: Any

    def ours(self, model: Any, ids_BT: Tensor) -> Tensor:
        return (self.case.run or logits)(model, ids_BT)

    def theirs(self, ids_BT: Tensor) -> Tensor:
        if self.hf is None:
            assert self.case.oracle is not None
            return self.case.oracle(checkpoint.read_config(self.folder), stored(self.folder), ids_BT)
        return (self.case.run_hf or (lambda m, ids: m(input_ids=ids, use_cache=False).logits))(
            self.hf, ids_BT
        )


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def logits(model: Decoder, ids_BT: Tensor) -> Tensor:
    """[B, T, V] of rows laid end to end as segments of one flat batch."""
    rows, width = ids_BT.shape
    return flat_logits(model, ids_BT.flatten(), (width,) * rows).view(rows, width, -1)


def flat_logits(model: Decoder, ids_N: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[N, V] of texts end to end."""
    pos_N = torch.cat([torch.arange(n) for n in lengths])
    attend = Segments(lengths, prefix=prefixes(model.spec, ids_N, lengths))
    return model.logits(model(ids_N, pos_N, attend))


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.std())


def skip_unless(flag: bool | str, what: str = "") -> None:
    if flag is not True:
        pytest.skip(f"{what}: {flag}" if flag else what)


@pytest.fixture(scope="module", params=ALL, ids=lambda pair: label(*pair))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    family, case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    hf = None
    if case.hf is not None:
        hf = case.hf()
        hf.save_pretrained(folder)  # before any forward pass: some classes rescale weights in place
        if case.disguise is not None:
            case.disguise(folder)
    else:
        assert case.oracle and case.config and case.tensors, f"{case.name} needs hf or an oracle"
        (folder / "config.json").write_text(json.dumps(case.config))
        save_file(case.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    result = Made(case, family, folder, hf, (case.ids or tiny.ids)(), torch.empty(0), None)
    with torch.no_grad():
        result.want = result.theirs(result.ids_BT)
    result.model = (case.load or checkpoint.load_model)(folder)
    yield result


def save(made: Made, folder: Path) -> None:
    (made.case.save or (lambda m, f: checkpoint.save_model(m, f, dtype=torch.float32)))(made.model, folder)


# ----------------------------------------------------------------------------------------------- checks


def test_logits_are_the_references(made: Made) -> None:
    with torch.no_grad():
        assert error(made.ours(made.model, made.ids_BT), made.want) < made.case.tolerance


def test_a_wrong_knob_is_noticed(made: Made) -> None:
    spec = made.case.wrong(made.model.spec)
    assert spec != made.model.spec, "the wrong knob is the right one"
    build = made.case.rebuild or (lambda model, spec: Decoder(spec, model.family))
    wrong = build(made.model, spec)
    wrong.load_state_dict(made.model.state_dict(), strict=False)
    with torch.no_grad():
        assert error(made.ours(wrong.eval(), made.ids_BT), made.want) > 2 * made.case.tolerance


def test_export_is_the_same_bytes(made: Made, tmp_path: Path) -> None:
    save(made, tmp_path)
    theirs, mine = made.case.written(stored(made.folder)), stored(tmp_path)
    table = families.find(checkpoint.read_config(made.folder)["model_type"])
    from caravan.model import rules

    dropped = rules.of(table) if isinstance(getattr(table, "RULES", None), str) else None
    theirs = {key: t for key, t in theirs.items() if key in mine or not (dropped and dropped.dropped(key))}
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)


def test_transformers_opens_our_export(made: Made, tmp_path: Path) -> None:
    if made.hf is None:
        pytest.skip("transformers has no class for this family")
    skip_unless(made.case.reload, "reload")
    save(made, tmp_path)
    again = (
        type(made.hf)
        .from_pretrained(
            tmp_path, attn_implementation=made.hf.config._attn_implementation, dtype=torch.float32
        )
        .eval()
    )
    assert json.loads((tmp_path / "config.json").read_text())["architectures"]
    with torch.no_grad():
        got = Made(made.case, made.family, tmp_path, again, made.ids_BT, made.want, None).theirs(made.ids_BT)
    assert error(got, made.want) < 5e-6


def test_our_config_says_the_same_again(made: Made, tmp_path: Path) -> None:
    save(made, tmp_path)
    written = checkpoint.read_config(tmp_path)
    assert checkpoint.load_spec(tmp_path) == made.model.spec
    # readers of either generation find all they need
    for gone in (("rope_parameters",), ("rope_theta", "rope_scaling", "partial_rotary_factor")):
        if "rope_parameters" not in written or "rope_theta" not in written:
            break
        text = json.dumps({k: v for k, v in written.items() if k not in gone})
        (tmp_path / "config.json").write_text(text)
        assert checkpoint.load_spec(tmp_path) == made.model.spec, f"without {gone[0]}"


def test_both_spellings_of_config_give_one_spec(made: Made, tmp_path: Path) -> None:
    skip_unless(made.case.legacy, "legacy")
    config = checkpoint.read_config(made.folder)
    rope = config.pop("rope_parameters", None)
    if rope is not None and "rope_theta" not in rope:
        pytest.skip("one rope per kind of layer: the family's own test covers its old keys")
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.load_spec(tmp_path) == made.model.spec


def test_weights_are_counted(made: Made) -> None:
    if made.hf is None or not isinstance(made.model, Decoder):
        pytest.skip("no class to count with")
    beside = sum(tensor.numel() for tensor in made.model.kept.values())
    assert made.model.spec.parameters + beside == made.hf.num_parameters()


def test_packed_segments_are_single_texts(made: Made) -> None:
    skip_unless(made.case.packing, "packing")
    ids, lengths = made.ids_BT.flatten(), (5, 1, 13, 9, 14)
    assert sum(lengths) == len(ids), "the default ids"
    with torch.no_grad():
        packed = flat_logits(made.model, ids, lengths)
        single = torch.cat([made.theirs(part[None])[0] for part in ids.split(lengths)])
        assert error(packed, single) < made.case.tolerance


def test_left_padding_changes_nothing(made: Made) -> None:
    if made.hf is None:
        pytest.skip("an oracle has no padding")
    skip_unless(made.case.left_pad, "left padding")
    short = 14
    ids_BT = made.ids_BT.clone()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :-short] = 0
    ids_BT[1, :-short] = 1
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if "position_ids" in inspect.signature(made.hf.forward).parameters:
        batch["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    width = ids_BT.shape[1]
    flat = torch.cat([ids_BT[0], ids_BT[1, -short:]])
    with torch.no_grad():
        want = made.hf(**batch, use_cache=False).logits
        got = flat_logits(made.model, flat, (width, short))
    assert error(got, torch.cat([want[0], want[1, -short:]])) < made.case.tolerance


def test_decoding_is_one_long_pass(made: Made) -> None:
    """The engine's log-probability of every token it draws against one pass over the whole text."""
    skip_unless(made.case.decode, "decode")
    prompts = [made.ids_BT[0, :13].tolist(), made.ids_BT[1, :3].tolist(), made.ids_BT[1, :9].tolist()]
    engine = Engine(made.model, stop_ids=frozenset(), max_seqs=2, max_tokens=64, block_size=4)
    answers = engine.generate(prompts, Sampling(max_tokens=12, seed=3))
    with torch.no_grad():
        for prompt, (answer,) in zip(prompts, answers, strict=True):
            assert len(answer.ids) == 12
            row = torch.tensor([[*prompt, *answer.ids]])
            want = made.theirs(row)[0, len(prompt) - 1 : -1]
            chosen = want.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            assert float((torch.tensor(answer.logprobs) - chosen).abs().max() / want.std()) < 1e-4


def test_gradients_are_the_references(made: Made) -> None:
    if not made.case.gradients:
        pytest.skip("one case per mixer")
    model = (made.case.load or checkpoint.load_model)(made.folder)
    ids = made.ids_BT
    made.hf.zero_grad()
    for said in (made.theirs(ids), made.ours(model, ids)):
        torch.nn.functional.cross_entropy(said[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    mine = checkpoint.export_tensors(model)
    compared = 0
    for key, p in made.hf.named_parameters():
        if key in mine:  # fused experts have other names in memory than on disk
            # a bias on the keys shifts all scores of a query alike: its gradient is rounding around zero
            assert float((mine[key] - p.grad).abs().max()) < 1e-4 * float(p.grad.std()) + 1e-7, key
            compared += 1
    assert compared >= len(mine) // 2
    made.hf.zero_grad()


# one graph is a question to the tracer; code generation would only make the answer slow
ONE_GRAPH: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}


def traced(made: Made) -> Any:
    """The case's model anew, its passes compiled in place."""
    torch._dynamo.reset()
    model = (made.case.load or checkpoint.load_model)(made.folder)
    body = getattr(model, "decoder", model)
    body.compile(**ONE_GRAPH)
    if hasattr(body, "decode"):
        body.decode = torch.compile(body.decode, **ONE_GRAPH)
    return model


@pytest.mark.slow
def test_it_compiles_into_one_graph(made: Made) -> None:
    skip_unless(made.case.compile, "compile")
    with torch.no_grad():
        assert error(made.ours(traced(made), made.ids_BT), made.want) < made.case.tolerance


TRAINED = {"rwkv-5", "rwkv-6", "rwkv-7", "stripedhyena", "deepseek_v3", "jamba", "t5", "bert-labels",
           "deberta-v2-conv", "cpmbee", "bgpt"}  # fmt: skip
"""Mixers without a class whose gradients are compared, hybrids, experts with a choice bias, encoders."""


@pytest.mark.slow
def test_training_compiles_into_one_graph(made: Made) -> None:
    """Forward and backward, for the cases whose gradients are compared and the mixers without such a case."""
    if not made.case.gradients and made.case.name not in TRAINED:
        pytest.skip("one case per mixer")
    skip_unless(made.case.compile, "compile")
    plain, model = (made.case.load or checkpoint.load_model)(made.folder), traced(made)
    for one in (plain, model):
        made.ours(one, made.ids_BT).square().mean().backward()
    want = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        grad = want[name].grad
        assert (p.grad is None) == (grad is None), name
        if p.grad is not None and grad is not None:
            assert error(p.grad, grad) < 1e-4, name


# ------------------------------------------------------------------------------------- the whole folder


def test_every_family_has_a_case() -> None:
    missing = sorted(set(families.names()) - set(tiny.names()))
    assert not missing, f"write tests/families/{missing[0]}.py"
    assert not set(tiny.names()) - set(families.names())


def test_names_of_cases_are_different() -> None:
    names = [case.name for _, case in ALL]
    assert len(set(names)) == len(names)


def test_reasons_are_given() -> None:
    flags: list[Callable[[Case], Any]] = [
        lambda c: c.decode, lambda c: c.left_pad, lambda c: c.packing, lambda c: c.reload,
        lambda c: c.legacy, lambda c: c.compile,
    ]  # fmt: skip
    for name, case in ALL:
        for flag in flags:
            assert flag(case) is True or isinstance(flag(case), str), f"{name} {case.name}: why is it off?"


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "python -m tests.families.table"
