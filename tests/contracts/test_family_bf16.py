"""In bf16, the type most checkpoints come in, every family is as near to the fp32 reference as transformers'
own bf16 model is.

Single numbers cannot be compared: one rounding more or less moves them, and a router may choose another
expert. The mean difference from fp32 can: ours was 0.73 to 1.04 times theirs over all families, and 1.22 for
DBRX's router. It notices what is wrong by a few percent, and a type that does not fit; not the order of two
roundings.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from caravan.kernels.attention import Segments
from caravan.model import checkpoint
from caravan.model.decoder import Decoder
from tests import families as tiny
from tests.families import Case

pytest.importorskip("transformers")
BOUND = 1.3
IDS_BT = torch.randint(3, tiny.VOCAB, (4, 60), generator=torch.Generator().manual_seed(1))


def plain() -> list[tuple[str, Case]]:
    """The first case of every family that is one decoder and has a class."""
    firsts: dict[str, Case] = {}
    for name, case in tiny.cases():
        if case.hf and not (case.run or case.load or case.ids):
            firsts.setdefault(name, case)
    return list(firsts.items())


@pytest.mark.parametrize(("family", "case"), plain(), ids=[name for name, _ in plain()])
def test_bf16_is_as_near_to_fp32_as_transformers_is(family: str, case: Case, tmp_path: Path) -> None:
    assert case.hf is not None
    theirs = case.hf()
    theirs.save_pretrained(tmp_path)
    rows, width = IDS_BT.shape
    with torch.no_grad():
        exact = theirs(input_ids=IDS_BT, use_cache=False).logits
        rounded = theirs.to(torch.bfloat16)(input_ids=IDS_BT, use_cache=False).logits.float()
        model = checkpoint.load_model(tmp_path, dtype=torch.bfloat16)
        assert isinstance(model, Decoder)
        pos_N = torch.arange(width).repeat(rows)
        hidden = model(IDS_BT.flatten(), pos_N, Segments((width,) * rows))
        assert hidden.dtype == torch.bfloat16
        ours = model.logits(hidden).float().view_as(exact)
    assert (ours - exact).abs().mean() < BOUND * (rounded - exact).abs().mean()
