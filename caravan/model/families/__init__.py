"""One file per family: Hugging Face config to Spec, and reversible weight rules."""
