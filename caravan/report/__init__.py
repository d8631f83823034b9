"""The passport: one self-contained page per model."""
