"""One file per reinforcement-learning method."""
