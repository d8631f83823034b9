"""Evaluation: runner, statistics, tasks."""
