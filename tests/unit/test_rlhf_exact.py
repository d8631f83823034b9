"""Production code against environments small enough to solve on paper: J = E[r] - beta KL(pi || ref).

Nothing here has its own copy of an algorithm. Policies are tables of logits dressed as a model: the hidden
state of a prefix is its one-hot row and the head is the table, so that log-probs come from `token_logprobs`
as in training.
"""

import itertools
import math

import pytest
import torch

from caravan.algos.advantage import gae, whiten
from caravan.algos.logprobs import token_logprobs
from caravan.algos.preference import dpo
from caravan.algos.rl import ppo

F64 = torch.float64
REF, REWARD, BETA = (0.4, 0.3, 0.2, 0.1), (0.0, 0.5, 1.0, -1.0), 0.5
PI_STAR, J_STAR = (0.147774, 0.301269, 0.545957, 0.005000), 0.497889


def _t(x) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum()


# ---------------------------------------------------------------- E1: a bandit with four arms
def _bandit_objective(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits, 0)
    return (p * _t(REWARD)).sum() - BETA * _kl(p, _t(REF))


def _bandit_surrogate_gradient(logits: torch.Tensor, value: float) -> torch.Tensor:
    """Gradient of the PPO loss over all four one-token episodes, each weighted by its probability."""
    z = logits.clone().requires_grad_()
    arms = torch.arange(4)
    logp = token_logprobs(torch.ones(4, 1, dtype=F64), z[:, None], arms)
    old = logp.detach()
    reward = ppo.shape_rewards(_t(REWARD), old, _t(REF).log(), [1] * 4, BETA)
    adv, _ = gae(reward, torch.full((4,), value, dtype=F64), [1] * 4, lam=1.0)
    ppo.policy_loss(logp, old, adv * old.exp(), 1.0, ppo.Config()).value.backward()
    return z.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_e1_enumerated_gradient_is_that_of_the_objective(seed: int, value: float) -> None:
    logits = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    z = logits.clone().requires_grad_()
    _bandit_objective(z).backward()
    torch.testing.assert_close(_bandit_surrogate_gradient(logits, value), -z.grad, rtol=0, atol=1e-6)


def test_e1_gradient_vanishes_at_the_optimum() -> None:
    best = _t(REF) * torch.exp(_t(REWARD) / BETA)
    best = best / best.sum()
    torch.testing.assert_close(best, _t(PI_STAR), rtol=0, atol=1e-6)
    assert float(_bandit_objective(best.log())) == pytest.approx(J_STAR, abs=1e-6)
    assert float(_bandit_objective(_t(REF).log())) == pytest.approx(0.25)
    assert float(_bandit_surrogate_gradient(best.log(), 0.3).abs().max()) < 1e-6


@pytest.mark.parametrize("whitened", [False, True])
def test_e1_ppo_converges_to_the_optimum(whitened: bool) -> None:
    """Sampled episodes, a critic, two epochs of two minibatches, clipping, decayed rate: TV < .02 and J > .99
    J*."""
    g = torch.Generator().manual_seed(11)
    cfg = ppo.Config(lam=1.0)
    logits = _t(REF).log().requires_grad_()
    critic = torch.zeros(1, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [logits]}, {"params": [critic]}], eps=1e-5)
    n, steps = 512, 150
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        with torch.no_grad():
            arms = torch.multinomial(torch.softmax(logits, 0), n, replacement=True, generator=g)
            old = token_logprobs(torch.ones(n, 1, dtype=F64), logits[:, None], arms)
            reward = ppo.shape_rewards(_t(REWARD)[arms], old, _t(REF).log()[arms], [1] * n, BETA)
            old_value = critic.expand(n).clone()
            adv, ret = gae(reward, old_value, [1] * n, lam=cfg.lam)
            adv = whiten(adv) if whitened else adv
        for _ in range(2):
            for part in torch.randperm(n, generator=g).split(n // 2):
                logp = token_logprobs(torch.ones(len(part), 1, dtype=F64), logits[:, None], arms[part])
                policy = ppo.policy_loss(logp, old[part], adv[part], len(part), cfg)
                value = ppo.value_loss(critic.expand(len(part)), old_value[part], ret[part], len(part), cfg)
                optimiser.zero_grad()
                (policy.value + value.value).backward()
                optimiser.step()
    pi = torch.softmax(logits.detach(), 0)
    assert 0.5 * float((pi - _t(PI_STAR)).abs().sum()) < 0.02
    assert float(_bandit_objective(logits.detach())) > 0.99 * J_STAR
    assert critic.item() == pytest.approx(J_STAR, abs=0.05)


# ---------------------------------------------------------------- E2, E4: two tokens out of three
SEQ_REF, SEQ_R = (0.5, 0.3, 0.2), ((1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (-1.0, 0.0, 1.0))
EPISODES = list(itertools.product(range(3), repeat=2))
E4_GRADIENT = (
    (0.158568, 0.099404, -0.257973),
    (0.126930, -0.040939, -0.085991),
    (-0.021218, 0.144246, -0.123028),
    (-0.058255, -0.003902, 0.062157),
)
CRITIC = _t([0.3, -0.2, 0.1, 0.4])
"""Any function of the prefix: (), (0,), (1,), (2,)."""


def _episode_logprobs(table_4V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each of the 18 actions, and the row (prefix) each was taken in."""
    rows = torch.tensor([r for a, _ in EPISODES for r in (0, 1 + a)])
    actions = torch.tensor([t for episode in EPISODES for t in episode])
    hidden = torch.eye(4, dtype=F64)[rows]
    return token_logprobs(hidden, table_4V.T, actions), rows


def _sequence_objective(table_4V: torch.Tensor) -> torch.Tensor:
    logp, _ = _episode_logprobs(table_4V)
    logp_S = logp.view(-1, 2).sum(1)
    logq_S = _t([math.log(SEQ_REF[a]) + math.log(SEQ_REF[b]) for a, b in EPISODES])
    return (logp_S.exp() * (_t([SEQ_R[a][b] for a, b in EPISODES]) - (logp_S - logq_S))).sum()


def _sequence_surrogate_gradient(table: torch.Tensor, *, broken: str = "") -> torch.Tensor:
    z = table.clone().requires_grad_()
    logp, rows = _episode_logprobs(z)
    old = logp.detach()
    ref = _t([math.log(SEQ_REF[t]) for episode in EPISODES for t in episode])
    score = _t([SEQ_R[a][b] for a, b in EPISODES])
    reward = ppo.shape_rewards(score, old, ref, [2] * 9, 1.0)
    value = CRITIC[rows]
    if broken == "score on every token":
        reward[0::2] += score
    if broken == "value after the action":
        value = torch.stack([CRITIC[rows[1::2]], torch.zeros(9, dtype=F64)], 1).flatten()
    adv, _ = gae(reward, value, [2] * 9, lam=1.0)
    weight = old.view(-1, 2).sum(1).exp().repeat_interleave(2)
    ppo.policy_loss(logp, old, adv * weight, 1.0, ppo.Config()).value.backward()
    return z.grad


def test_e2_optimum() -> None:
    z = torch.zeros(4, 3, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        loss = -_sequence_objective(z)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(_sequence_objective(z.detach())) == pytest.approx(0.698187, abs=1e-6)
    first = torch.softmax(z.detach()[0], 0)
    torch.testing.assert_close(first, _t([0.46245, 0.43531, 0.10224]), rtol=0, atol=1e-4)
    assert float(_sequence_surrogate_gradient(z.detach()).abs().max()) < 1e-5


def test_e4_enumerated_gradient() -> None:
    table = torch.zeros(4, 3, dtype=F64)
    assert float(_sequence_objective(table)) == pytest.approx(0.192853, abs=1e-6)
    torch.testing.assert_close(_sequence_surrogate_gradient(table), -_t(E4_GRADIENT), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("broken", "error"), [("score on every token", 0.111111), ("value after the action", 0.1)]
)
def test_e4_sees_the_defects_it_is_there_for(broken: str, error: float) -> None:
    table = torch.zeros(4, 3, dtype=F64)
    wrong = _sequence_surrogate_gradient(table, broken=broken)
    assert float((wrong + _t(E4_GRADIENT)).abs().max()) == pytest.approx(error, abs=1e-6)


def test_e4_free_length_with_an_end_token() -> None:
    """Token 2 ends the response, at most three tokens, -1 for a response that never ends: still the exact
    gradient.

    Catches a masked end-of-turn action, a score beside the end, lengths mixed up between ragged episodes.
    """
    episodes: list[tuple[int, ...]] = []
    for n in (1, 2, 3):
        episodes += [(*x, 2) for x in itertools.product(range(2), repeat=n - 1)]
    episodes += list(itertools.product(range(2), repeat=3))
    prefixes = sorted({e[:t] for e in episodes for t in range(len(e))})
    rows = torch.tensor([prefixes.index(e[:t]) for e in episodes for t in range(len(e))])
    actions = torch.tensor([t for e in episodes for t in e])
    lengths = [len(e) for e in episodes]
    ref = _t([0.3, 0.5, 0.2]).log()[actions]
    done = torch.tensor([e[-1] == 2 for e in episodes])
    raw = _t([sum(t == 0 for t in e) - 0.2 * len(e) for e in episodes])
    score = ppo.no_end_score(raw, done, -1.0)
    g = torch.Generator().manual_seed(4)
    table = torch.randn(len(prefixes), 3, generator=g, dtype=F64)
    value = torch.randn(len(prefixes), generator=g, dtype=F64)[rows]
    hidden = torch.eye(len(prefixes), dtype=F64)[rows]

    z = table.clone().requires_grad_()
    logp = token_logprobs(hidden, z.T, actions)
    logp_S = torch.stack([x.sum() for x in logp.split(lengths)])
    ref_S = torch.stack([x.sum() for x in ref.split(lengths)])
    assert logp_S.exp().sum().item() == pytest.approx(1.0)
    (logp_S.exp() * (score - 0.4 * (logp_S - ref_S))).sum().backward()
    exact = z.grad

    z = table.clone().requires_grad_()
    logp = token_logprobs(hidden, z.T, actions)
    old = logp.detach()
    adv, _ = gae(ppo.shape_rewards(score, old, ref, lengths, 0.4), value, lengths, lam=1.0)
    weight = torch.cat([x.sum().exp().expand(len(x)) for x in old.split(lengths)])
    ppo.policy_loss(logp, old, adv * weight, 1.0, ppo.Config()).value.backward()
    torch.testing.assert_close(z.grad, -exact, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- E3: DPO on the bandit
def test_e3_dpo_minimiser_is_the_optimum_of_the_bandit() -> None:
    """All ordered pairs, each judged by sigmoid(r_i - r_j): minimum .629414 at pi* of E1; ln 2 at the
    reference."""
    ref = _t(REF).log()
    z = ref.clone().requires_grad_()

    def population_loss(logits: torch.Tensor) -> torch.Tensor:
        logp = token_logprobs(torch.ones(4, 1, dtype=F64), logits[:, None], torch.arange(4))
        total = torch.zeros((), dtype=F64)
        for i, j in itertools.product(range(4), repeat=2):
            weight = REF[i] * REF[j]
            wrong = 1 / (1 + math.exp(REWARD[i] - REWARD[j]))
            args = (logp[i : i + 1], logp[j : j + 1], ref[i : i + 1], ref[j : j + 1])
            total = total + dpo.loss(*args, 1 / weight, beta=BETA, label_smoothing=wrong).value
        return total

    assert float(population_loss(ref)) == pytest.approx(math.log(2), abs=1e-12)
    optimiser = torch.optim.LBFGS([z], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        loss = population_loss(z)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(population_loss(z.detach())) == pytest.approx(0.629414, abs=1e-6)
    torch.testing.assert_close(torch.softmax(z.detach(), 0), _t(PI_STAR), rtol=0, atol=1e-5)
