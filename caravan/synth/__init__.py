"""Instruction data we generate ourselves."""
