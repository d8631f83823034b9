"""How far the model has moved from a reference: KL per answer, in nats, on answers the model samples at
temperature 1.

    kl           sum over the answer of sum_v p(v) log p(v)/q(v): exact KL at each position the model reached
    kl.sampled   sum over the answer of log p(y_t) - log q(y_t): the same from the drawn tokens alone

Both have the expectation KL(p || q) over whole answers (chain rule); the first is never negative and varies
less (Rao-Blackwell). The second is what PPO's penalty sums.
"""

from __future__ import annotations

from collections.abc import Sequence

KIND = "compare"
VERSION = 1


def score(logp_T: Sequence[float], logq_T: Sequence[float], exact_T: Sequence[float]) -> dict[str, float]:
    """Log-probs of the drawn tokens under model and reference, exact KL at each position -> nats."""
    sampled = float(sum(p - q for p, q in zip(logp_T, logq_T, strict=True)))
    return {"kl": float(sum(exact_T)), "kl.sampled": sampled}
