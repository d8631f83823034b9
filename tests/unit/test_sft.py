"""What sft does with data that does not fit, and what it inherits."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "invariants"))
import training_toys

from caravan.model.checkpoint import save_model
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, MLA, Attn, Layer, MoE, Norm, Rope, Spec
from caravan.stage import Runtime
from caravan.stages import pretrain, sft
from caravan.store import Artefact
from caravan.types import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    training_toys.write_inputs(folder)
    return folder


def data(folder, *conversations):
    folder.mkdir()
    rows = [
        {
            "messages": [
                {"role": r, "content": c} for r, c in zip(("user", "assistant") * 9, turns, strict=False)
            ]
        }
        for turns in conversations
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Artefact(folder, {"kind": "conversations"})


def run(tmp_path, inputs, conversations, strict=False, **config):
    roles = {"base": Artefact(inputs / "model", {"kind": "model"}), "data": conversations}
    (tmp_path / "out").mkdir()
    rt = Runtime(work=tmp_path / "work", device="cpu", threads=1, strict=strict)
    return sft.run(sft.Config(**{"steps": 2, "batch_tokens": 128, **config}), roles, tmp_path / "out", rt)


LONG = ("7+1?", "8", "Tell me more about the fox that jumps. " * 9, "The quick fox number 3 jumps. " * 9)
HOPELESS = ("Tell me more about the fox that jumps. " * 20, "no")


def test_too_long_is_cut_at_a_turn_or_dropped_and_counted(tmp_path, inputs, capsys):
    facts = run(tmp_path, inputs, data(tmp_path / "data", ("1+1?", "2"), LONG, HOPELESS))
    assert (facts["conversations"], facts["truncated"], facts["dropped"]) == (2, 1, 1)
    said = capsys.readouterr().err
    assert "1 conversations cut at a turn, 1 dropped" in said and "inherited from the base" in said


def test_strict_stops_and_names_the_line(tmp_path, inputs):
    with pytest.raises(UserError, match=r"line 2: .* do not fit a context of 64"):
        run(tmp_path, inputs, data(tmp_path / "data", ("1+1?", "2"), LONG), strict=True)


def test_nothing_to_train_on_is_a_sentence(tmp_path, inputs):
    with pytest.raises(UserError, match=r"no conversation .* can be trained on"):
        run(tmp_path, inputs, data(tmp_path / "data", HOPELESS))


def test_an_empty_data_set_is_a_sentence(tmp_path, inputs):
    with pytest.raises(UserError, match="no conversation"):
        run(tmp_path, inputs, data(tmp_path / "data"))


def test_a_damaged_line_is_named(tmp_path, inputs):
    broken = data(tmp_path / "data", ("1+1?", "2"))
    (broken.path / "train.jsonl").open("a").write('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(UserError, match="line 2 is not a conversation"):
        run(tmp_path, inputs, broken)


def test_more_context_than_the_base_has_is_refused(tmp_path, inputs):
    with pytest.raises(UserError, match="more than the 64"):
        run(tmp_path, inputs, data(tmp_path / "data", ("1+1?", "2")), context=65)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, inputs):
    from caravan.data import tokenizer

    shards, other = inputs / "shards", tmp_path / "shards"
    other.mkdir()
    for path in shards.glob("*.*"):
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer.train(
        [f"{a}{b} " * 3 for a in "abcdefgh" for b in "ijklmnop"] + training_toys.texts(), 400
    ).save(other / "tokenizer")
    roles = {"shards": Artefact(other, {"kind": "shards", "id": "0" * 16})}
    with pytest.raises(UserError, match="embedding rows"):
        pretrain.run(
            pretrain.Config(size="nano", steps=1), roles, tmp_path, Runtime(work=tmp_path, threads=1)
        )


def test_it_learns_the_answers(tmp_path, inputs):
    chats = data(tmp_path / "data", *[(f"{i}+1?", str(i + 1)) for i in range(8)])
    facts = run(tmp_path, inputs, chats, steps=40, lr=3e-3, precision="fp32")
    assert facts["heldout_loss"] < 1.5 and facts["heldout_accuracy"] > 0.45  # from ln(291) = 5.7
    assert 0 < facts["supervised_share"] < 0.3 and facts["epochs"] == 40 / 2
    before, after = (load_file(p / "model.safetensors") for p in (inputs / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names


def test_a_chat_template_is_chosen_by_name(tmp_path, inputs):
    from caravan.data import template, tokenizer

    chats = data(tmp_path / "data", *[(f"{i}+1?", str(i + 1)) for i in range(4)])
    run(tmp_path, inputs, chats, steps=1, template="zephyr")
    assert tokenizer.Tokenizer.load(tmp_path / "out").chat_template == template.builtin("zephyr")
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="no chat template 'zefyr'"):
        run(tmp_path / "again", inputs, chats, steps=1, template="zefyr")


def test_settings_of_generation_stay_and_the_end_of_a_turn_is_added(tmp_path, inputs):
    from caravan.data.tokenizer import Tokenizer

    shutil.copytree(inputs / "model", tmp_path / "model")
    tok = Tokenizer.load(tmp_path / "model")
    assert tok.end_of_turn != tok.eos
    settings = {"temperature": 0.6, "eos_token_id": tok.eos}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    run(tmp_path, tmp_path, data(tmp_path / "data", ("1+1?", "2")), steps=1)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said == said | {"temperature": 0.6, "eos_token_id": sorted([tok.eos, tok.end_of_turn])}


@pytest.fixture(scope="module")
def experts(inputs, tmp_path_factory):
    """A base whose router has a choice bias, with the tokenizer of the others."""
    folder = tmp_path_factory.mktemp("experts")
    config = json.loads((inputs / "model" / "config.json").read_text())
    moe = MoE(n_expert=4, top_k=2, d_ff=8, score="sigmoid", bias_correction=True, eps=1e-20, scale=2.5,
              group_score="top2", aux_coef=0.0)  # fmt: skip
    mla = MLA(q_rank=None, kv_rank=8, nope=4, rope=4, v=8)
    attn = Attn(n_head=2, n_kv=2, head_dim=8, mla=mla, rope=Rope(dim=4, interleaved=True))
    layer = Layer(mixer="mla", attn=attn, ffn=FFN(kind="moe", d_ff=16, act="silu", moe=moe), norm=Norm())
    spec = Spec(vocab=config["vocab_size"], d=16, layers=(layer,), final_norm=Norm(), max_pos=64, tie=False)
    model = fresh(spec, 0)
    model.family = "deepseek_v3"
    save_model(model, folder / "model", tokenizer=inputs / "model", dtype=torch.float32)
    return folder


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_choice_bias_of_experts_moves_at_the_rate_asked_for(tmp_path, experts, rate):
    """One step: every bias goes up or down by the rate, or stays where its expert had the mean."""
    run(tmp_path, experts, data(tmp_path / "data", ("7+1?", "8")), steps=1, balance_rate=rate)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    before, after = (load_file(f / "model.safetensors")[name] for f in (experts / "model", tmp_path / "out"))
    assert set((after - before).abs().tolist()) <= {0.0, rate} and bool((after != before).any()) == (rate > 0)
