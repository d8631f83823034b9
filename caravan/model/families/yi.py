"""Yi as first released (Young et al. 2024, arXiv:2403.04652): Llama with the norms' old names. Later files
say that they are Llama."""

from __future__ import annotations

from caravan.model.families import llama

ARCHITECTURE = "YiForCausalLM"
CLASSIFIER = None
MODEL_TYPE = "Yi"
ALIASES = ("Yi",)
CHECKPOINTS = ("01-ai/Yi-6B", "01-ai/Yi-34B")
RULES = """
table yi like llama
@.{ln1,ln2} -> {n1,n2}
"""

spec = llama.spec
config = llama.config
