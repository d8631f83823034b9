"""Losses and estimators: pure functions on tensors that know nothing of machines."""
