"""Whole flows as Python."""
