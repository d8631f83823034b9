"""Quantisation algorithms and exporters."""
