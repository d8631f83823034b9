"""The sampler against exact answers: distributions, masks, ties, streams."""

import math

import pytest
import torch

from caravan.algos.sampling import draw_index, sample, stream_key, truncate, uniform

INF = float("inf")


def chi2_per_dof(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum() / (len(p) - 1))


@pytest.mark.parametrize("vocab", [7, 256, 1024, 1500])
def test_draws_follow_the_distribution(vocab: int) -> None:
    torch.manual_seed(vocab)
    weight = torch.rand(vocab) + 0.1
    u = torch.rand(100_000, dtype=torch.float64)
    ids = torch.cat([draw_index(weight.expand(len(c), -1), c) for c in u.split(5000)])
    ratio = chi2_per_dof(
        torch.bincount(ids, minlength=vocab).double(), weight.double() / weight.double().sum()
    )
    spread = math.sqrt(2 / (vocab - 1))  # standard deviation of chi2 / dof
    assert abs(ratio - 1) < 5 * spread


def test_inverse_cdf_is_monotone_and_exact_at_the_edges() -> None:
    weight = torch.zeros(1, 600)
    weight[0, [3, 255, 256, 599]] = torch.tensor([1.0, 2.0, 4.0, 1.0])
    for u, want in [
        (0.0, 3),
        (0.1249, 3),
        (0.125, 255),
        (0.3749, 255),
        (0.375, 256),
        (0.8749, 256),
        (0.875, 599),
    ]:
        assert draw_index(weight, torch.tensor([u], dtype=torch.float64)).item() == want, u
    for u in (1 - 2**-53, 1.0):
        assert draw_index(weight, torch.tensor([u], dtype=torch.float64)).item() == 599


def test_forbidden_first_and_last_tokens_are_never_drawn() -> None:
    weight = torch.rand(64, 512)
    weight[:, [0, 1, 255, 256, 511]] = 0.0
    for u in (0.0, 1 - 2**-53, math.nextafter(1.0, 0.0)):
        ids = draw_index(weight, torch.full((64,), u, dtype=torch.float64))
        assert bool((weight.gather(1, ids[:, None]) > 0).all())


def test_row_without_allowed_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        draw_index(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="no token"):
        sample(torch.full((1, 4), -INF), [1.0], [0], [1.0], [0.5])
    with pytest.raises(ValueError, match="not numbers"):
        sample(torch.full((1, 4), float("nan")), [1.0], [0], [1.0], [0.5])


def reference_keep(logits: torch.Tensor, k: int, p: float) -> set[int]:
    """Top-k, then the smallest set of the renormalised rest with mass >= p, in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[: k or None]
    weight = [math.exp(float(logits[i]) - float(logits[order[0]])) for i in order]
    total, before, keep = sum(weight), 0.0, set()
    for i, w in zip(order, weight, strict=True):
        if before >= p * total and keep:
            break
        keep.add(i)
        before += w
    return keep


@pytest.mark.parametrize("vocab", [50, 3000])
def test_truncation_keeps_what_the_definition_keeps(vocab: int) -> None:
    torch.manual_seed(1)
    rows = [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.97), (20, 0.9), (0, 1e-9), (vocab + 5, 0.8)]
    rows += [(64, 1.0), (65, 1.0), (600, 0.9), (64, 0.999999)]
    logits = (
        torch.randn(len(rows), vocab) * torch.tensor([3.0, 1, 1, 3, 0.01, 2, 1, 0.001, 1, 1, 0.1, 1])[:, None]
    )
    kept = truncate(logits, [k for k, _ in rows], [p for _, p in rows]) > -INF
    for b, (k, p) in enumerate(rows):
        want = reference_keep(logits[b], k if k < vocab else 0, p)
        # a boundary that falls between two equal sums in float64 may differ by the one token at it
        assert len(set(kept[b].nonzero().flatten().tolist()) ^ want) <= (1 if p < 1 else 0), (k, p)
        assert bool(kept[b, logits[b].argmax()])


def test_ties_at_the_boundary_stay_in() -> None:
    kept = truncate(torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0]]), [2], [1.0])
    assert (kept > -INF).tolist() == [[False, True, True, True, True]]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [7, 4999]] = 1.0
    logits[1, [0, 1]] = 1.0
    draw = sample(logits, [0.0] * 3, [0] * 3, [1.0] * 3, [0.9] * 3)
    assert draw.ids_B.tolist() == [7, 0, 0]
    assert torch.allclose(draw.logprob_B, torch.log_softmax(logits, 1).amax(1))


def test_logprobs_are_of_the_distribution_drawn_from() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 300)
    temperature, top_k, top_p = [1.0, 0.7, 2.0, 0.5], [0, 0, 10, 0], [1.0, 1.0, 1.0, 0.6]
    draw = sample(logits, temperature, top_k, top_p, [0.3, 0.6, 0.9, 0.2])
    scaled = logits / torch.tensor(temperature)[:, None]
    kept = truncate(scaled, top_k, top_p)
    chosen = draw.ids_B[:, None]
    assert torch.allclose(draw.raw_logprob_B, scaled.log_softmax(1).gather(1, chosen)[:, 0], atol=1e-6)
    assert torch.allclose(draw.logprob_B, kept.log_softmax(1).gather(1, chosen)[:, 0], atol=1e-6)
    assert bool((draw.logprob_B[2:] > draw.raw_logprob_B[2:]).all())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 2000)
    spec = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.5, 40, 1.0), (1.3, 0, 0.9), (0.9, 1500, 0.5), (2.0, 3, 0.99)]
    t, k, p = (list(c) for c in zip(*spec, strict=True))
    u = [uniform(stream_key(1, b), 0) for b in range(6)]
    together = sample(logits, t, k, p, u)
    for b in range(6):
        alone = sample(logits[b : b + 1], [t[b]], [k[b]], [p[b]], [u[b]])
        assert alone.ids_B.item() == together.ids_B[b].item()
        assert abs(alone.logprob_B.item() - together.logprob_B[b].item()) < 1e-6


def test_streams_are_fixed_uniform_and_apart() -> None:
    assert uniform(stream_key(0, 0), 0) == uniform(stream_key(0, 0), 0)
    keys = [stream_key(s, i) for s in range(30) for i in range(30)]
    assert len(set(keys)) == 900
    draws = torch.tensor([uniform(k, n) for k in keys for n in range(20)])
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    counts = torch.histc(draws, 50, 0, 1)
    assert abs(chi2_per_dof(counts.double(), torch.full((50,), 0.02, dtype=torch.float64)) - 1) < 1
    columns = draws.view(900, 20)
    assert float(torch.corrcoef(columns.T).fill_diagonal_(0).abs().max()) < 0.15
