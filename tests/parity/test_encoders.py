"""Encoders and two-part models beyond the checks of every family: ragged batches against padded ones,
writing token by token, and an encoder trained and saved as a reward model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caravan.data.render import render_pair
from caravan.data.tokenizer import Tokenizer
from caravan.kernels.attention import Segments
from caravan.model import checkpoint, families
from caravan.model.encoders.deberta import log_buckets
from caravan.model.encoders.rows import t5_buckets
from caravan.stage import Runtime, execute
from caravan.stages import reward
from caravan.store import Store
from caravan.types import Message, UserError
from tests.families import (
    TOLERANCE,
    VOCAB,
    bert,
    cpmbee,
    deberta,
    deberta_v2,
    roberta,
    t5,
    tiny,
)

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 13, 9, 5, 14)


def rows(lengths: tuple[int, ...] = LENGTHS, low: int = 3) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(low, VOCAB) for _ in range(n)] for n in lengths]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.std())


def padded(texts: list[list[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T], padded on one side."""
    width = max(map(len, texts))
    fill = [[pad] * (width - len(t)) for t in texts]
    ids = [f + t if left else t + f for t, f in zip(texts, fill, strict=True)]
    mask = [[0] * len(f) + [1] * len(t) if left else [1] * len(t) + [0] * len(f)
            for t, f in zip(texts, fill, strict=True)]  # fmt: skip
    return torch.tensor(ids), torch.tensor(mask)


def saved(case: Any, folder: Path) -> Any:
    """The case's transformers model, saved into the folder."""
    hf = case.hf()
    hf.save_pretrained(folder)
    return hf


# ------------------------------------------------------------------------------------- packing and padding


@pytest.mark.parametrize("cases", [bert, roberta, deberta, deberta_v2], ids=lambda m: m.__name__[15:])
@torch.no_grad()
def test_labels_of_a_ragged_batch_are_those_of_a_padded_one(cases: Any, tmp_path: Path) -> None:
    case = cases.CASES[0]
    hf = saved(case, tmp_path)
    model = checkpoint.load_reward(tmp_path).eval()
    got = model.labels(bert.batch(rows()))
    ids, mask = padded(rows(), hf.config.pad_token_id)
    assert error(got, hf(input_ids=ids, attention_mask=mask).logits) < TOLERANCE
    alone = torch.cat([model.labels(bert.batch([row])) for row in rows()])
    assert error(got, alone) < TOLERANCE
    assert torch.equal(model.scores(bert.batch(rows())), got[:, 0])


@torch.no_grad()
def test_a_ragged_batch_of_t5_is_a_padded_one(tmp_path: Path) -> None:
    hf = saved(t5.CASES[1], tmp_path)
    model = checkpoint.load_backbone(tmp_path)
    sources, targets = rows(), [[0, *row] for row in rows((3, 7, 3, 1, 3, 2))]
    batch, out = bert.batch(sources), bert.batch(targets)
    memory = model(batch.ids_N, batch.pos_N, Segments(batch.lengths))
    got = model.logits(model.decode(out.ids_N, out.lengths, memory, batch.lengths))
    ids, mask = padded(sources, 0, left=True)
    ids_out, mask_out = padded(targets, 0)
    want = hf(input_ids=ids, attention_mask=mask, decoder_input_ids=ids_out).logits[mask_out.bool()]
    assert error(got, want) < TOLERANCE


def test_buckets_are_the_same_over_the_whole_range() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, furthest in ((32, 128), (512, 2048), (10, 77)):
        distance = torch.arange(-2 * furthest, 2 * furthest)
        for both in (True, False):
            want = T5Attention._relative_position_bucket(distance, both, buckets, furthest)
            assert torch.equal(t5_buckets(distance, buckets, furthest, both), want)
    for buckets, furthest in ((256, 512), (6, 30), (32, 513)):
        distance = torch.arange(-2 * furthest, 2 * furthest)
        want = make_log_bucket_position(distance, buckets, furthest).long()
        assert torch.equal(log_buckets(distance, buckets, furthest), want)


@pytest.mark.slow
@pytest.mark.parametrize("case", [bert.CASES[2], deberta.CASES[1], deberta_v2.CASES[2]], ids=lambda c: c.name)
@torch.no_grad()
def test_encoders_compile_into_one_graph(case: Any, tmp_path: Path) -> None:
    saved(case, tmp_path)
    model = checkpoint.load_backbone(tmp_path).eval()
    batch = bert.batch(rows())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")  # the graph, no kernels
    got = compiled(batch.ids_N, batch.pos_N, Segments(batch.lengths))
    assert error(got, model(batch.ids_N, batch.pos_N, Segments(batch.lengths))) < TOLERANCE


# ---------------------------------------------------------------------------------------------- T5 writing


@torch.no_grad()
def test_t5_writes_with_a_cache_what_whole_passes_say(tmp_path: Path) -> None:
    saved(t5.CASES[1], tmp_path)
    model = checkpoint.load_backbone(tmp_path)
    sources = rows()
    batch = bert.batch(sources)
    answers = model.greedy(batch.ids_N, Segments(batch.lengths), 10)
    memory = model(batch.ids_N, batch.pos_N, Segments(batch.lengths)).split(LENGTHS)
    for known, answer in zip(memory, answers, strict=True):
        text = [model.spec.start]
        for token in answer:
            said = model.logits(model.decode(torch.tensor(text), (len(text),), known, (len(known),)))[-1]
            assert int(said.argmax()) == token
            text.append(token)
    stop = answers[0][3]
    stopped = model.greedy(batch.ids_N, Segments(batch.lengths), 10, stop)
    for whole, cut in zip(answers, stopped, strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)


@torch.no_grad()
def test_cached_logits_are_those_of_one_pass(tmp_path: Path) -> None:
    hf = saved(t5.CASES[0], tmp_path)
    model = checkpoint.load_backbone(tmp_path)
    source, target = torch.tensor(rows((9, 9))), torch.tensor(rows((12, 12)))
    cache = model.start(model(source.flatten(), torch.arange(9).repeat(2), Segments((9, 9))).view(2, 9, -1))
    got = torch.stack([model.step(target[:, t], cache) for t in range(12)], 1)
    assert error(got, hf(input_ids=source, decoder_input_ids=target).logits) < TOLERANCE


def test_t5_says_apart_what_one_key_used_to_say(tmp_path: Path) -> None:
    read = families.find("t5").spec
    old = {k: v for k, v in t5.T5.items() if k != "num_decoder_layers"}
    for more, tie, scale in (
        ({}, True, 48**-0.5),
        ({"tie_word_embeddings": True}, True, 48**-0.5),
        ({"tie_word_embeddings": False}, False, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, 1.0),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, 48**-0.5),
    ):
        spec = read(old | more)
        assert (spec.tie, spec.logit_scale, spec.dec_layers) == (tie, scale, 4)
        config = transformers.T5Config(**families.find("t5").config(spec))
        assert config.scale_decoder_outputs is (scale != 1.0)


@torch.no_grad()
def test_a_t5_head_of_its_own_is_read_and_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(t5.CASES[1], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(3)) / 7
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="lm_head"):
        model = checkpoint.load_backbone(tmp_path)
    checkpoint.save_model(model, tmp_path / "again", dtype=torch.float32)
    hf = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    ids = torch.tensor(rows((9, 9)))
    want = hf(input_ids=ids, decoder_input_ids=t5.target(ids)).logits
    assert error(t5.written(checkpoint.load_backbone(tmp_path / "again"), ids), want) < TOLERANCE


# ------------------------------------------------------------------------------------------------- CPM


# ------------------------------------------------------------------------------------------ reward models


WORDS = ["the", "fox", "is", "quick", "and", "brown", "or", "slow", "dog", "cat", "sees", "good", "bad"]


def wordpiece(folder: Path) -> Tokenizer:
    """A BERT tokenizer over a few words, as its Hub folders hold it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {text: i for i, text in enumerate([*specials, *WORDS, "##er", "?"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.add_special_tokens(specials)
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {f"{s.strip('[]').lower()}_token": s for s in specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "BertTokenizer"}))
    return Tokenizer.load(folder)


def preferences(folder: Path, name: str, count: int, seed: int) -> None:
    """Answers with the word `good` are preferred to those with `bad`, wherever it stands."""
    draw, lines = random.Random(seed), []
    for i in range(count):
        answers = []
        for word in ("good", "bad"):
            words = draw.choices(WORDS[:11], k=draw.randint(2, 4))
            words.insert(draw.randint(0, len(words)), word)
            answers.append(" ".join(words))
        prompt = [{"role": "user", "content": " ".join(draw.choices(WORDS[:11], k=3)) + "?"}]
        lines.append({"prompt": prompt, "responses": answers, "ranks": [0, 1], "id": str(i), "source": "toy"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


CONFIG = reward.Config(
    epochs=3, batch_tokens=512, micro_tokens=256, lr=2e-3, precision="fp32", warmup_share=0.1
)


def trained(hf: Any, root: Path, config: reward.Config = CONFIG, count: int = 160) -> Any:
    """The artefact of a reward stage on a transformers model's folder."""
    hf.save_pretrained(root / "base")
    wordpiece(root / "base")
    preferences(root / "preferences", "train.jsonl", count, 1)
    preferences(root / "preferences", "heldout.jsonl", 24, 2)
    store = Store(root / "store")
    inputs = {
        "base": store.add(root / "base", kind="model"),
        "data": store.add(root / "preferences", kind="preferences"),
    }
    return execute(store, "reward", config, inputs, Runtime(work=root / "work", threads=1, device="cpu"))


def test_a_bert_learns_a_planted_preference(tmp_path: Path) -> None:
    small = bert.ENCODER | {"vocab_size": 23, "num_hidden_layers": 2}
    torch.manual_seed(0)
    made = trained(transformers.BertForMaskedLM(transformers.BertConfig(**small)), tmp_path)
    assert made.facts["heldout"]["accuracy"] > 0.95, made.facts
    model, tok = checkpoint.load_reward(made.path).eval(), Tokenizer.load(made.path)
    hf = transformers.BertForSequenceClassification.from_pretrained(made.path).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(made.path)
    assert hf.config.num_labels == 1 and hf.config.architectures == ["BertForSequenceClassification"]
    with torch.no_grad():
        for prompt, answer in (("the fox?", "a good dog"), ("is cat slow?", "bad or quicker fox")):
            ids = render_pair([Message("user", prompt)], answer, tok).ids
            assert ids == theirs(prompt, answer)["input_ids"]
            score = model.scores(bert.batch([ids]))
            want = hf(torch.tensor([ids])).logits[0, 0] - hf.config.reward_bias
            assert float((score[0] - want).abs()) < 1e-5
    with pytest.raises(UserError, match="critic"):
        model.values(bert.batch([ids]))


def test_the_encoder_of_a_t5_becomes_a_reward_model(tmp_path: Path) -> None:
    small = t5.GATED | {"vocab_size": 23, "num_layers": 2, "num_decoder_layers": 1, "eos_token_id": 3}
    base = tiny("T5Config", "T5ForConditionalGeneration", small)()
    made = trained(base, tmp_path, replace(CONFIG, epochs=0.1), count=16)
    assert made.facts["steps"] >= 1
    hf = transformers.T5ForTokenClassification.from_pretrained(made.path).eval()
    texts = [[7, 9, 3], [8, 12, 5, 3]]
    with torch.no_grad():
        want = [hf(torch.tensor([text])).logits[0, -1, 0] - hf.config.reward_bias for text in texts]
        got = checkpoint.load_reward(made.path).eval().scores(bert.batch(texts))
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-5)
    assert not [key for key in checkpoint.TensorFolder(made.path) if "decoder" in key or "lm_head" in key]


def test_a_pooling_matrix_is_kept_and_weights_round_as_the_file_does(tmp_path: Path) -> None:
    hf = saved(bert.CASES[2], tmp_path)
    model = reward.fresh(checkpoint.load_backbone(tmp_path), 0)
    assert torch.equal(model.score.pool.weight, hf.pooler.dense.weight)
    other = reward.fresh(checkpoint.load_backbone(tmp_path), 1)
    assert torch.equal(model.score.pool.weight, other.score.pool.weight)
    assert not torch.equal(model.score.score.weight, other.score.score.weight)
    bert.save(model, tmp_path / "reward")
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**bert.ENCODER, num_labels=1))
    assert set(checkpoint.TensorFolder(tmp_path / "reward")) == set(theirs.state_dict())
    model.score.score.bias.data.fill_(0.123)
    reward.as_saved(model, torch.bfloat16)
    assert float(model.score.score.bias) == float(torch.tensor(0.123).bfloat16())


@pytest.mark.parametrize("cases", [bert, deberta, deberta_v2, t5], ids=lambda m: m.__name__[15:])
def test_encoders_work_in_bf16_and_give_gradients(cases: Any, tmp_path: Path) -> None:
    saved(cases.CASES[0] if cases is not t5 else cases.CASES[-1], tmp_path)
    exact = checkpoint.load_classifier(tmp_path)
    coarse = checkpoint.load_classifier(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(coarse.score.score.weight, exact.score.score.weight), "the head is never rounded"
    labels = coarse.labels(bert.batch(rows()))
    assert labels.dtype == torch.float32
    assert float((labels - exact.labels(bert.batch(rows()))).detach().abs().mean()) < 0.1
    exact.labels(bert.batch(rows())).sum().backward()
    silent = [name for name, p in exact.named_parameters() if p.grad is None]
    assert not silent


@torch.no_grad()
def test_early_names_of_norms_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf = saved(bert.CASES[3], tmp_path)
    new = load_file(tmp_path / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for key, t in new.items()}  # fmt: skip
    assert any("gamma" in key for key in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = checkpoint.load_backbone(tmp_path)
    ids = torch.tensor(rows((9, 9)))
    assert error(bert.states(model, ids), hf.bert(ids).last_hidden_state) < TOLERANCE
    assert checkpoint.export_tensors(model).keys() == new.keys()


def test_no_stage_for_writers_takes_an_encoder(tmp_path: Path) -> None:
    for case in (bert.CASES[0], deberta.CASES[0], t5.CASES[0]):
        saved(case, tmp_path)
        with pytest.raises(UserError, match="left to right"):
            checkpoint.load_model(tmp_path)


def test_complaints_name_what_is_wrong(tmp_path: Path) -> None:
    for name, config, words in (
        ("bert", bert.ENCODER | {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", bert.ENCODER | {"is_decoder": True}, "is_decoder"),
        ("roberta", bert.ENCODER | {"pad_token_id": "one"}, "pad_token_id"),
        ("deberta", deberta.DEBERTA | {"talking_head": True}, "talking_head"),
        ("deberta-v2", deberta.DEBERTA | {"pos_att_type": "c2p|p2p"}, "p2p"),
        ("deberta-v2", deberta.DEBERTA | {"norm_rel_ebd": "batch_norm"}, "batch_norm"),
        ("deberta-v2", deberta.DEBERTA | {"conv_kernel_size": 4}, "conv_kernel_size"),
        ("t5", t5.T5 | {"feed_forward_proj": "gated-swoosh"}, "feed_forward_proj"),
        ("cpmbee", cpmbee.BEE | {"mask_modules": [[True, False]]}, "mask_modules"),
    ):
        with pytest.raises(UserError, match=words):
            families.find(name).spec(config)
    saved(bert.CASES[1], tmp_path / "labels")
    with pytest.raises(UserError, match="3 labels"):
        checkpoint.load_reward(tmp_path / "labels")
    saved(bert.CASES[2], tmp_path / "bare")
    with pytest.raises(UserError, match=r"classifier\.weight"):
        checkpoint.load_reward(tmp_path / "bare")
