"""A model that reads what is asked in both directions (ChatGLM-6B), wherever it reads: as reward model, as
critic, and while its weights are rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from caravan.compress import folder
from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.engine.engine import Engine
from caravan.engine.score import logprobs
from caravan.kernels.attention import Segments
from caravan.model import checkpoint
from caravan.model.decoder import Decoder, prefixes
from caravan.model.heads import RewardModel, ScoreHead
from caravan.types import Batch, Sampling
from tests.families import chatglm


def source(at: Path) -> dict[str, Tensor]:
    """A folder of random weights; returns them."""
    at.mkdir()
    tensors = chatglm.weights()
    (at / "config.json").write_text(json.dumps(chatglm.FIRST))
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    return tensors


def texts() -> tuple[Tensor, tuple[int, ...], Batch]:
    """Two rows that begin to answer at different places, and the same two as a flat ragged batch."""
    rows, lengths = chatglm.with_start(), (21, 16)
    ids_N = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
    pos_N = torch.cat([torch.arange(n) for n in lengths])
    nothing = torch.zeros_like(ids_N)
    return rows, lengths, Batch(ids_N, pos_N, lengths, nothing, nothing.float())


@torch.no_grad()
def test_scores_and_values_are_the_oracles(tmp_path: Path) -> None:
    tensors = source(tmp_path / "model")
    head = ScoreHead(chatglm.D, generator=torch.Generator().manual_seed(3))
    # the first row of this table is the score: the oracle's first logit is the value of every token
    judged = tensors | {"lm_head.weight": torch.cat([head.weight, tensors["lm_head.weight"][1:]])}
    rows, lengths, batch = texts()
    want = [chatglm.oracle(chatglm.FIRST, judged, row[None, :n])[0, :, 0]
            for row, n in zip(rows, lengths, strict=True)]  # fmt: skip
    model = RewardModel(checkpoint.load_model(tmp_path / "model"), head)
    size = torch.cat(want).std()
    assert float((model.values(batch) - torch.cat(want)).abs().max() / size) < 5e-5
    assert float((model.scores(batch) - torch.stack([w[-1] for w in want])).abs().max() / size) < 5e-5


@torch.no_grad()
def test_gptq_sees_what_the_model_will_see(tmp_path: Path) -> None:
    source(tmp_path / "model")
    rows, lengths, batch = texts()
    sequences = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
    model = folder.load_source(tmp_path / "model")
    (seen,) = folder._entering(model, model, sequences)
    for i, block in enumerate(model.blocks):
        seen.hidden_ND = block(seen.hidden_ND, i, seen.angles, seen.attend)
    assert torch.allclose(model.norm(seen.hidden_ND), states(model, batch), atol=1e-5)
    grid = folder.Grid(8, 0, torch.float32)
    weights = folder.by_gptq(model, grid, sequences, lambda *_: None)
    assert set(weights) == set(folder.projections(model))
    assert max(one.error for one in weights.values()) < 0.02
    folder.write(tmp_path / "model", tmp_path / "out", model, grid, weights)
    again = checkpoint.load_model(tmp_path / "out")
    assert torch.allclose(states(again, batch), states(model, batch), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("judge", [False, True])
def test_another_token_named_bos_does_not_move_the_prefix(judge: bool, tmp_path: Path) -> None:
    """The family calls the end of its prefix `bos_token_id`; a tokenizer beside it may mean another by it."""
    source(tmp_path / "model")
    vocab = {f"w{i}": i for i in range(5)}
    special = [{"id": i, "content": text, "special": True} for i, text in ((0, "<pad>"), (4, "<s>"))]
    definition = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}, "added_tokens": special}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(definition))
    named = {"bos_token": "<s>", "pad_token": "<pad>"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(named))
    model = checkpoint.load_model(tmp_path / "model")
    assert model.spec.prefix_token != 4
    if judge:
        head = ScoreHead(model.spec.out_dim, generator=torch.Generator().manual_seed(3))
        checkpoint.save_reward(RewardModel(model, head), tmp_path / "out", tmp_path / "model")
    else:
        checkpoint.save_model(model, tmp_path / "out", tmp_path / "model")
    assert checkpoint.load_spec(tmp_path / "out").prefix_token == model.spec.prefix_token
    assert checkpoint.read_config(tmp_path / "out")["pad_token_id"] == 0


@torch.no_grad()
def test_an_answer_that_holds_the_start_is_scored_as_it_was_written(tmp_path: Path) -> None:
    """Its own start token ends no prefix, neither where the prompt has none nor where it has: whoever writes
    does not know it yet, and a prefix that reached so far would show the scored tokens."""
    source(tmp_path / "model")
    model = checkpoint.load_model(tmp_path / "model").eval()
    start, draw = chatglm.START, torch.Generator().manual_seed(1)
    prompts = [torch.randint(start + 1, 90, (n,), generator=draw).tolist() for n in range(1, 9)]
    prompts += [[*prompt, start] for prompt in prompts[:2]]
    made = Engine(model, stop_ids=frozenset()).generate(
        prompts, Sampling(temperature=5.0, max_tokens=40, seed=1), n=3
    )
    found = 0
    for prompt, answers in zip(prompts, made, strict=True):
        for answer in answers:
            ids, mask = [*prompt, *answer.ids], [False] * len(prompt) + [True] * len(answer.ids)
            said, _ = logprobs(model, lm_batch([Rendered(ids, mask)]), temperature=5.0)
            assert torch.allclose(said, torch.tensor(answer.logprobs), atol=1e-4)
            found += start in answer.ids[1:] and start not in prompt
    assert found > 1


def states(model: Decoder, batch: Batch) -> Tensor:
    prefix = prefixes(model.spec, batch.ids_N, batch.lengths)
    assert prefix == (7, 5)
    return model(batch.ids_N, batch.pos_N, Segments(batch.lengths, prefix=prefix))


def test_the_token_that_ends_the_prefix_is_the_models_own(tmp_path: Path) -> None:
    """A tokenizer may call another id the beginning of a text: stages write its files beside the model, and
    the model goes on reading as it did."""
    source(tmp_path / "model")
    added = [{"id": 0, "content": "<start>"}, {"id": 7, "content": "<end>"}]
    (tmp_path / "model/tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    named = {"bos_token": "<start>", "eos_token": "<end>"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(named))
    model = checkpoint.load_model(tmp_path / "model")
    checkpoint.save_model(model, tmp_path / "made", tmp_path / "model")
    judge = RewardModel(model, ScoreHead(chatglm.D))
    checkpoint.save_reward(judge, tmp_path / "judge", tmp_path / "model")
    for made in ("made", "judge"):
        assert checkpoint.load_spec(tmp_path / made).prefix_token == chatglm.START
        assert json.loads((tmp_path / made / "config.json").read_text())["eos_token_id"] == 7
