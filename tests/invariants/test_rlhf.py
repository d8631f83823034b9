"""What must hold in every RLHF run, on a toy world of two layers: most bugs of published trainers break one
of these."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rlhf_toy as toy
import torch

from caravan import stage
from caravan.algos.reward import ranked_pairs
from caravan.algos.rl import ppo
from caravan.data.loader import RankingLoader, group_batches
from caravan.data.pack import group_batch, lm_batch
from caravan.data.rankings import load_rankings
from caravan.data.records import read_conversations
from caravan.data.render import Rendered, render_pair
from caravan.data.tokenizer import Tokenizer
from caravan.engine import rollout, score
from caravan.kernels.attention import Segments
from caravan.model.checkpoint import load_model, load_reward
from caravan.model.heads import Pool, PooledHead
from caravan.stages import _rl as rl_step
from caravan.stages import _rl_start as rl_start
from caravan.stages import prefer, reward, rl
from caravan.store import Artefact, Store
from caravan.types import Message, UserError

RT = stage.Runtime(threads=1, device="cpu")
REWARD = reward.Config(epochs=1, batch_tokens=512, micro_tokens=256, lr=3e-3, precision="fp32")
PREFER = prefer.Config(epochs=1, batch_tokens=512, micro_tokens=256, lr=1e-3, precision="fp32")
RL = rl.Config(
    steps=4,
    batch_prompts=6,
    samples=2,
    max_new_tokens=6,
    temperature=0.7,
    epochs=2,
    minibatches=2,
    micro_tokens=64,
    ptx_tokens=128,
    lr=1e-3,
    precision="fp32",
    kl=rl.KLConfig(coefficient=0.1, target=1.0, horizon=100),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Artefact]]:
    return toy.world(tmp_path_factory.mktemp("world"))


def _run(world: tuple[Store, dict[str, Artefact]], name: str, cfg: Any, **roles: str) -> Artefact:
    store, art = world
    return stage.execute(store, name, cfg, {role: art[kind] for role, kind in roles.items()}, RT)


def _rl(world: tuple[Store, dict[str, Artefact]], cfg: rl.Config = RL) -> Artefact:
    return _run(
        world, "rl", cfg, policy="model", reward="reward", prompts="conversations", ptx="conversations"
    )


def _metrics(art: Artefact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (art / "metrics.jsonl").read_text().splitlines()]


def _sample(policy: Any, seed: int = 5, temperature: float = 0.7) -> rollout.Rollout:
    prompts = [(0, [5, 9, 7]), (1, [6, 6, 8, 4, 11, 12, 13]), (2, [30])]
    return rollout.sample(
        policy,
        prompts,
        3,
        temperature=temperature,
        max_new_tokens=9,
        seed=seed,
        stop_ids=frozenset(range(100, 140)),
        vocab_size=policy.spec.vocab,
    )


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return toy.decoder(300), toy.reward_model(300)


# -- first steps
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_minibatch_has_ratio_1_and_step_0_has_no_kl(world, precision: str) -> None:
    """Exactly, at temperature 0.7 and in bf16 too: old, new and reference come from identical forwards."""
    rows = _metrics(_rl(world, replace(RL, steps=2, precision=precision)))
    assert [row["first_ratio_error"] for row in rows] == [0.0, 0.0]
    assert rows[0]["kl"] == 0.0 and rows[0]["kl_k3"] == 0.0
    assert rows[1]["kl"] != 0.0
    one = _metrics(_rl(world, replace(RL, steps=1, epochs=1, minibatches=1, precision=precision)))[0]
    assert one["approxkl"] == 0.0 and one["clipfrac"] == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dpo_starts_at_ln_2(world, precision: str) -> None:
    facts = _run(
        world, "prefer", replace(PREFER, precision=precision), policy="model", data="preferences"
    ).facts
    assert abs(facts["first_loss"] - 0.6931471805599453) < 1e-6
    assert facts["last_loss"] < 0.69


def test_sampler_and_trainer_agree_on_ids_and_log_probs(models) -> None:
    policy, _ = models
    drawn = _sample(policy)
    with torch.no_grad():
        logp_R, _ = score.logprobs(policy, lm_batch(drawn.sequences()), 0.7)
    sampled_R = torch.tensor(drawn.sampled_logp_R)
    assert float((logp_R - sampled_R).abs().max()) < 1e-5
    with torch.no_grad():
        wrong_R, _ = score.logprobs(policy, lm_batch(drawn.sequences()), 1.0)
    assert float((wrong_R - sampled_R).abs().max()) > 1e-2  # what a forgotten temperature looks like


def test_rollouts_differ_and_evaluations_agree(models) -> None:
    policy, _ = models
    first, again, other = _sample(policy), _sample(policy), _sample(policy, seed=6)
    assert first == again
    assert first.ids_N != other.ids_N
    answers = [tuple(r.ids[p:]) for r, p in zip(first.sequences(), first.prompt_lengths, strict=True)]
    assert len(set(answers)) > len(answers) // 2  # samples of one prompt differ too
    assert any(first.done) and not all(first.done)


def test_ranks_that_share_a_step_draw_what_one_rank_draws(models) -> None:
    policy, _ = models
    kw: dict[str, Any] = {
        "temperature": 0.7, "max_new_tokens": 5, "seed": 3, "stop_ids": frozenset(), "vocab_size": 300,
    }  # fmt: skip
    prompts = [(i, [5 + i, 9]) for i in range(5)]
    whole = [r.ids for r in rollout.sample(policy, prompts, 2, **kw).sequences()]
    for rank in (0, 1):
        part = [r.ids for r in rollout.sample(policy, prompts[rank::2], 2, **kw).sequences()]
        assert part == [whole[2 * n + j] for n, _ in prompts[rank::2] for j in (0, 1)]


# -- what may and may not matter
# ---------------------------------------------------------------------------------


def test_neighbours_in_a_batch_change_nothing(models) -> None:
    """Log-probs, values and scores of a sequence alone and among others of other lengths."""
    policy, critic = models
    drawn = _sample(policy)
    rows = drawn.sequences()
    with torch.no_grad():
        together = lm_batch(rows)
        logp = score.logprobs(policy, together, 0.7)[0].split(list(drawn.response_lengths))
        value = score.values(critic, together).split(list(drawn.response_lengths))
        scores = score.rewards(critic, together)
        for i, row in enumerate(rows):
            alone = lm_batch([row])
            torch.testing.assert_close(score.logprobs(policy, alone, 0.7)[0], logp[i], rtol=0, atol=2e-6)
            torch.testing.assert_close(score.values(critic, alone), value[i], rtol=0, atol=2e-6)
            torch.testing.assert_close(score.rewards(critic, alone)[0], scores[i], rtol=0, atol=2e-6)


def test_value_is_of_the_state_before_the_action(models) -> None:
    """Changing token t of an answer moves values after t only, and log-probs from t on."""
    policy, critic = models
    ids, mask = [5, 6, 7, 20, 21, 22, 23], [False] * 3 + [True] * 4
    other = [*ids[:5], 99, *ids[6:]]
    with torch.no_grad():
        a, b = (score.values(critic, lm_batch([Rendered(x, mask)])) for x in (ids, other))
        p, q = (score.logprobs(policy, lm_batch([Rendered(x, mask)]))[0] for x in (ids, other))
    torch.testing.assert_close(a[:3], b[:3], rtol=0, atol=0)
    assert a[3] != b[3]
    torch.testing.assert_close(p[:2], q[:2], rtol=0, atol=0)
    assert p[2] != q[2] and p[3] != q[3]


def test_end_of_turn_has_gradient_and_is_counted_once(world) -> None:
    _, art = world
    tok = Tokenizer.load(art["model"].path)
    row = render_pair([Message("user", "sun")], "good moon", tok)
    assert row.ids[-1] == tok.end_of_turn and row.mask[-1]
    assert row.ids[row.mask.index(True) :].count(tok.end_of_turn) == 1
    model = toy.decoder(tok.vocab_size, tie=False)
    logp_R, _ = score.logprobs(model, lm_batch([row]))
    assert len(logp_R) == sum(row.mask)
    ppo.policy_loss(logp_R[-1:], logp_R[-1:].detach(), torch.ones(1), 1, ppo.Config()).value.backward()
    assert float(model.head.weight.grad[tok.end_of_turn].abs().max()) > 0


def test_answers_that_differ_in_one_token_have_a_gradient(world) -> None:
    """The first differing token itself counts, and what is shared before it cancels exactly."""
    _, art = world
    tok = Tokenizer.load(art["model"].path)
    model = load_model(art["model"].path)
    one = [render_pair([Message("user", "sun")], text, tok) for text in ("moon tree", "moon bird")]
    assert sum(a != b for a, b in zip(one[0].ids, one[1].ids, strict=True)) >= 1
    batch = group_batch([one], [0])
    with torch.no_grad():
        reference = prefer.Reference([(0, 1)], [prefer.candidate_logprobs(model, batch)])
    loss = prefer.preference_loss(model, batch, reference, 1, PREFER, stage.load("algos/preference", "dpo"))
    loss.value.backward()
    assert float(model.embed.weight.grad.abs().max()) > 0
    logp_R, _ = score.logprobs(model, batch)
    first, second = logp_R.split(list(score.supervised(batch)[1]))
    differ = next(i for i, (a, b) in enumerate(zip(one[0].ids, one[1].ids, strict=True)) if a != b)
    shared = differ - one[0].mask.index(True)
    torch.testing.assert_close(first[:shared], second[:shared], rtol=0, atol=1e-6)
    assert first[shared] != second[shared]


def _weights(art: Artefact) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(art.path).parameters()])


def test_micro_batches_change_rounding_only(world) -> None:
    """One big forward or many small ones: largest and mean difference of the weights stay at rounding."""
    base = _weights(world[1]["model"])
    a, b = (_weights(_rl(world, replace(RL, steps=2, micro_tokens=m))) for m in (32, 4096))
    moved = float((a - base).abs().mean())
    assert moved > 1e-4
    assert float((a - b).abs().mean()) < 1e-3 * moved


def test_holding_the_first_graph_changes_nothing(world, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro batch in one minibatch is differentiated without a second forward: the same weights, bit for
    bit."""
    cfg = replace(RL, steps=2, epochs=1, minibatches=1, micro_tokens=4096)
    held = _rl(world, cfg)
    ask, counts = rl_step.ask, []

    def forget(*args: Any) -> rl_step.Experience:
        experience = ask(*args)
        counts.append(len(experience.held))
        experience.held.clear()
        return experience

    monkeypatch.setattr(rl_step, "ask", forget)
    store = Store(world[0].root.parent / "unheld")
    inputs = {role: store.add(world[1][kind].path, kind=kind) for role, kind in ROLES["rl"][1].items()}
    assert stage.execute(store, "rl", cfg, inputs, RT).id == held.id
    assert counts == [2, 2]


def test_ranking_gradient_does_not_depend_on_the_cut(world) -> None:
    """Groups of a prompt are never split, and micro batches add up to the gradient of the whole step."""
    store_root = world[0].root.parent
    three = toy.rankings(20, 7, k=4)
    (store_root / "k4.jsonl").write_text("".join(json.dumps(r) + "\n" for r in three))
    tok = Tokenizer.load(world[1]["model"].path)
    groups = load_rankings(store_root / "k4.jsonl", tok, 128)
    loader = RankingLoader(groups.groups, 10**6, 0)
    grads = []
    for micro in (1, 100, 10**6):
        model = toy.reward_model(tok.vocab_size)
        batches = loader.micro_batches(0, micro)
        assert all(len(b.lengths) == sum(b.groups) and set(b.groups) == {4} for b in batches)
        for batch in batches:
            reward.ranking_loss(model, batch, groups.ranks, loader.normaliser(0), REWARD).value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(loader.micro_batches(0, 1)) == 20
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-6)


def test_nll_of_the_best_answers_is_added_per_token(world) -> None:
    rows = toy.rankings(5, 8, k=3)
    path = world[0].root.parent / "k3.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok = Tokenizer.load(world[1]["model"].path)
    data = load_rankings(path, tok, 128)
    (batch,) = group_batches(data.groups, 10**6)
    model = toy.decoder(tok.vocab_size)
    reference = prefer.Reference(data.ranks, [torch.zeros(3)] * 5)
    plain, added = (
        prefer.preference_loss(
            model,
            batch,
            reference,
            5.0,
            replace(PREFER, nll_weight=weight),
            stage.load("algos/preference", "dpo"),
        )
        for weight in (0.0, 0.5)
    )
    losses = []
    for group, ranks in zip(data.groups, data.ranks, strict=True):
        best = lm_batch([group[ranks.index(0)]])
        logits = model.logits(model(best.ids_N, best.pos_N, Segments(best.lengths)))
        nll_N = torch.nn.functional.cross_entropy(logits, best.targets_N, reduction="none")
        losses.append((nll_N @ best.weight_N) / best.weight_N.sum())
    want = torch.stack(losses).mean()
    assert added.stats["nll"].item() == pytest.approx(want.item(), rel=1e-5)
    assert (added.value - plain.value).item() == pytest.approx(0.5 * want.item(), rel=1e-4)


# -- who learns
# --------------------------------------------------------------------------------------------------


def test_policy_and_critic_move_and_the_frozen_do_not(world, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[rl_start.Models] = []
    load = rl_start.load
    monkeypatch.setattr(rl_start, "load", lambda *a: kept.append(load(*a)) or kept[0])
    art = _rl(world, replace(RL, steps=1, seed=77))
    (models,) = kept
    start, start_reward = load_model(world[1]["model"].path), load_reward(world[1]["reward"].path)
    for name, p in start.named_parameters():
        assert torch.equal(models.reference.state_dict()[name], p), name
        assert not torch.equal(models.policy.model.state_dict()[name], p), name
    for name, p in start_reward.named_parameters():
        assert torch.equal(models.reward.state_dict()[name], p), name
        assert not torch.equal(models.critic.model.state_dict()[name], p), name
    assert float(models.critic.model.score.bias) == pytest.approx(0.25)
    assert torch.equal(load_model(art.path).embed.weight, models.policy.model.embed.weight)


def test_reward_learns_and_is_centred_on_references(world) -> None:
    store, art = world
    inputs = {"base": art["model"], "data": art["preferences"], "references": art["conversations"]}
    made = stage.execute(store, "reward", replace(REWARD, epochs=4), inputs, RT)
    assert made.facts["heldout"]["accuracy"] > 0.9
    assert made.facts["heldout"]["accuracy_low"] <= made.facts["heldout"]["accuracy"]
    model, tok = load_reward(made.path), Tokenizer.load(made.path)
    rows = [
        reward.last_answer(c, tok)
        for s in ("heldout", "train")
        for c in read_conversations(art["conversations"] / f"{s}.jsonl")
    ]
    scores = torch.tensor([s for (s,) in reward.scores_of(model, [[r] for r in rows], 256)])
    assert abs(float(scores.mean())) < 1e-4
    assert float(model.score.bias) == pytest.approx(made.facts["reward_bias"], abs=1e-6)


def test_fresh_head_has_the_right_scale() -> None:
    heads = torch.cat(
        [reward.fresh(toy.decoder(50, d=64), seed).score.weight.flatten() for seed in range(40)]
    )
    assert heads.std().item() == pytest.approx(0.124035, rel=0.05)


def test_score_is_read_at_the_end_of_turn_token(models) -> None:
    _, critic = models
    rows = [Rendered([5, 6, 7, 8], [False, False, True, True]), Rendered([9, 3], [False, True])]
    batch = lm_batch(rows)
    with torch.no_grad():
        hidden = critic(batch.ids_N, batch.pos_N, Segments(batch.lengths))
        torch.testing.assert_close(score.rewards(critic, batch), critic.score(hidden)[[3, 5]])


def test_ptx_enters_the_same_step(world) -> None:
    rows = _metrics(_rl(world, replace(RL, steps=2)))
    assert 4.0 < rows[0]["ptx_loss"] < 7.0
    without = _run(
        world, "rl", replace(RL, steps=2), policy="model", reward="reward", prompts="conversations"
    )
    assert "ptx_loss" not in _metrics(without)[0]
    assert not torch.equal(_weights(without), _weights(_rl(world, replace(RL, steps=2))))


def test_no_end_rate_and_replaced_scores(world) -> None:
    row = _metrics(_rl(world, replace(RL, steps=1, no_end_score=-9.0, max_new_tokens=1)))[0]
    assert row["no_end_rate"] > 0.9
    assert row["score"] < -8.0 < row["reward"]


# -- killed and resumed
# ------------------------------------------------------------------------------------------

ROLES = {
    "reward": ("REWARD", {"base": "model", "data": "preferences"}, 3),
    "prefer": ("PREFER", {"policy": "model", "data": "preferences"}, 3),
    "rl": (
        "RL",
        {"policy": "model", "reward": "reward", "prompts": "conversations", "ptx": "conversations"},
        3,
    ),
}


def _run_and_die(store: Store, name: str, cfg: Any, refs: dict[str, str], at: int) -> int | None:
    """Run a stage in a process of its own that kills itself when it reports step `at`; returns its exit code.

    A fork, since a fresh interpreter would spend most of its time importing.
    """

    def child() -> None:
        def report(done: float, total: float, unit: str, **numbers: Any) -> None:
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        rt = stage.Runtime(threads=1, device="cpu", save_steps=1, report=report)
        stage.execute(store, name, cfg, {role: store.open(ref) for role, ref in refs.items()}, rt)

    torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    return process.exitcode


@pytest.mark.parametrize("name", list(ROLES))
def test_kill_9_and_the_same_command_again_give_the_same_artefact(world, tmp_path: Path, name: str) -> None:
    """Policy, critic, both optimisers, KL controller, rollout seeds, journals: all come back."""
    cfg_name, roles, at = ROLES[name]
    straight = _run(world, name, globals()[cfg_name], **roles)
    store = Store(tmp_path / "store")
    inputs = {role: store.add(world[1][kind].path, kind=kind) for role, kind in roles.items()}
    code = _run_and_die(store, name, globals()[cfg_name], {role: art.ref for role, art in inputs.items()}, at)
    assert code == -signal.SIGKILL
    again = stage.execute(store, name, globals()[cfg_name], inputs, RT)
    assert again.manifest["attempts"] == 2
    assert again.id == straight.id
    assert _metrics(again) == _metrics(straight)


# -- what users get wrong
# ----------------------------------------------------------------------------------------


def test_reward_model_of_another_vocabulary_is_refused(world, tmp_path: Path) -> None:
    store, art = world
    from caravan.data.tokenizer import train
    from caravan.model.checkpoint import save_reward

    train(["other words entirely, again and again"] * 5, 290).save(tmp_path / "tok")
    save_reward(toy.reward_model(300), tmp_path / "reward", tmp_path / "tok", torch.float32)
    foreign = store.add(tmp_path / "reward", kind="reward")
    with pytest.raises(UserError, match="vocabulary differs"):
        stage.execute(
            store, "rl", RL, {"policy": art["model"], "reward": foreign, "prompts": art["conversations"]}, RT
        )


def test_an_encoder_cannot_be_the_critic(world, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is sampled, not at the first value."""

    def encoder(path: Path, **kw: Any) -> Any:
        model = load_reward(path, **kw)
        model.score = PooledHead(model.decoder.spec.d, Pool(act=None, reads="last"))
        return model

    monkeypatch.setattr(rl_start, "load_reward", encoder)
    with pytest.raises(UserError, match="is an encoder"):
        _rl(world, replace(RL, seed=9))


def test_prompts_without_room_are_refused_with_a_count(world) -> None:
    with pytest.raises(UserError, match="40 leave no room"):
        _rl(world, replace(RL, max_new_tokens=127))


def test_preferences_without_a_pair_are_refused(world, tmp_path: Path) -> None:
    store, art = world
    row = toy.rankings(1, 1)[0] | {"responses": ["b", "b"]}
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.jsonl").write_text(json.dumps(row) + "\n")
    empty = store.add(tmp_path / "p", kind="preferences")
    with pytest.raises(UserError, match="no preference to train on"):
        stage.execute(store, "reward", REWARD, {"base": art["model"], "data": empty}, RT)


def test_greedy_training_is_refused() -> None:
    with pytest.raises(UserError, match="temperature"):
        replace(RL, temperature=0.0)
    with pytest.raises(UserError, match="minibatches"):
        replace(RL, minibatches=13)


def test_group_batches_of_heldout_cover_every_group(world) -> None:
    tok = Tokenizer.load(world[1]["model"].path)
    held = load_rankings(world[1]["preferences"] / "heldout.jsonl", tok, 128)
    seen = sorted(i for b in group_batches(held.groups, 100) for i in b.index)
    assert seen == list(range(len(held))) and len(ranked_pairs(held.ranks).better) == len(held)
