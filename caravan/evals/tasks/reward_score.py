"""Mean score a reward model gives to answers the model samples at temperature 1.

Sampled, not greedy: this is the expectation reinforcement learning maximises, and `kl` is taken on the same
answers, so the two numbers are the two ends of one trade (Ouyang et al. 2022, section 4). A reward model is
a judge that can be fooled: read it beside the answers that can be checked.
"""

from __future__ import annotations

KIND = "reward"
VERSION = 1


def score(reward: float) -> dict[str, float]:
    """The reward of one answer is its score."""
    return {"reward_score": float(reward)}
