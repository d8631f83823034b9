"""Reading a flat batch: what is put behind it for round shapes is seen by nobody."""

import pytest
import torch

from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.model import flat
from caravan.model.decoder import Decoder
from caravan.model.families.gpt2 import spec as gpt2
from caravan.model.families.mixtral import spec as mixtral
from caravan.model.sizes import derive, fresh
from caravan.systems.train import lm_loss
from caravan.types import Batch


def batch(*lengths: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 60, (n,), generator=draw).tolist() for n in lengths]
    return lm_batch([Rendered(row, [True] * len(row)) for row in rows])


def model(dtype: torch.dtype) -> Decoder:
    spec, _ = derive("tiny", None, 64, 128)
    return fresh(spec, 0).to(dtype)


def tokens_read(net: Decoder, some: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[int, torch.Tensor]:
    seen: list[int] = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, i, *a: seen.append(len(i)) or forward(self, i, *a))
    hidden_ND, _ = flat.hidden_states(net, some)
    return seen[0], hidden_ND


@pytest.mark.parametrize("lengths", [(40, 30, 7), (64,), (1,), (64, 64), (65,)])
def test_bf16_batches_are_rounded_and_every_row_comes_back(lengths, monkeypatch) -> None:
    net, some = model(torch.bfloat16), batch(*lengths)
    read, hidden_ND = tokens_read(net, some, monkeypatch)
    assert read == -(-sum(lengths) // flat.ROUND) * flat.ROUND
    assert hidden_ND.shape[0] == sum(lengths)
    monkeypatch.setattr(flat, "ROUND", 1)
    plain_ND, _ = flat.hidden_states(net, some)
    # Other shapes round differently: 0.016 was the largest difference seen, of values of size 1.
    torch.testing.assert_close(hidden_ND, plain_ND, atol=0.06, rtol=0.0)


def test_gradients_are_those_without_the_tokens_behind(monkeypatch) -> None:
    net, some = model(torch.bfloat16), batch(40, 30, 7)
    found = []
    for size in (64, 1):
        monkeypatch.setattr(flat, "ROUND", size)
        net.zero_grad()
        lm_loss(net, some, 74.0).value.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in net.parameters()]))
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_in_fp32_nothing_is_added(monkeypatch) -> None:
    read, _ = tokens_read(model(torch.float32), batch(40, 30, 7), monkeypatch)
    assert read == 77


def test_where_experts_are_chosen_nothing_is_added(monkeypatch) -> None:
    spec = mixtral(
        {
            "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
            "num_experts_per_tok": 2, "vocab_size": 64, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6, "hidden_act": "silu",
        }
    )  # fmt: skip
    read, _ = tokens_read(fresh(spec, 0).to(torch.bfloat16), batch(40, 30, 7), monkeypatch)
    assert read == 77


def test_a_table_of_few_positions_is_enough() -> None:
    spec = gpt2(
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 64}
    )
    hidden_ND, _ = flat.hidden_states(fresh(spec, 0).to(torch.bfloat16), batch(8, 3))
    assert hidden_ND.shape == (11, 16) and hidden_ND.isfinite().all()
