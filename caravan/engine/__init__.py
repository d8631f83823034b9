"""Generation for rollouts, evaluation and serving alike."""
