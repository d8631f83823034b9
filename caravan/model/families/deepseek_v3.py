"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv:2412.19437): V2 with sigmoid scores, a bias that balances the
experts without a loss, and groups judged by their best two.

Modules for predicting several tokens ahead (layer 61 of the release) are left out, as every reader does.
The release is stored in FP8 blocks (model/fp8.py); what we save is plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caravan.model import keys
from caravan.model.families import deepseek_v2
from caravan.model.families.mixtral import experts_of
from caravan.model.spec import Spec

ARCHITECTURE = "DeepseekV3ForCausalLM"
CLASSIFIER = "DeepseekV3ForSequenceClassification"
CHECKPOINTS = ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1")

RULES = r"""
table deepseek_v3 like deepseek_v2
drop rotary_emb ^model\.layers\.61\.
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key."""
    keys.refuse(config, "scoring_func", "sigmoid")
    keys.refuse(config, "topk_method", "noaux_tc")
    plain = deepseek_v2.experts(config, aux_coef=0.0, scale=2.5)
    moe = replace(
        deepseek_v2.in_groups({"n_group": 8, "topk_group": 4, **config}, plain),
        score="sigmoid",
        renorm=keys.flag(config, "norm_topk_prob", default=True),
        eps=1e-20,
        group_score="top2",
        bias_correction=True,
    )
    interleaved = keys.flag(config, "rope_interleave", default=True)
    return deepseek_v2.latent(config, moe, fp32=False, interleaved=interleaved)


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    moe, rope = experts_of(value), value.attns[0].rope
    assert rope is not None
    return {
        **deepseek_v2.latent_config(value),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.renorm,
        "aux_loss_alpha": moe.aux_coef,
        "rope_interleave": rope.interleaved,
    }
