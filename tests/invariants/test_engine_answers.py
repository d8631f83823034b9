"""What must not change an answer: batching, chunking, sharing, preemption, the order of arrival.

The reference is one full forward pass per token, without any cache.
"""

import json
from pathlib import Path

import pytest
import torch

from caravan.algos.sampling import sample, stream_key, uniform
from caravan.engine.engine import Engine
from caravan.kernels.attention import Segments
from caravan.model.checkpoint import load_model
from caravan.model.decoder import Decoder
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.types import Completion, Sampling

ROPE = Rope(dim=8)


def build(kv: int = 2, learned: bool = False, context: int = 96) -> Decoder:
    norm = Norm(kind="layer", bias=True) if learned else Norm()
    layer = Layer(
        attn=Attn(n_head=4, n_kv=kv, head_dim=8, rope=None if learned else ROPE),
        ffn=FFN(kind="glu", d_ff=48, act="silu"),
        norm=norm,
    )
    spec = Spec(
        vocab=50, d=32, layers=(layer, layer), final_norm=norm, max_pos=context,
        pos="learned" if learned else "none",
    )  # fmt: skip
    model = fresh(spec, 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model.eval()


@pytest.fixture(scope="module", params=["gqa", "mha", "learned"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return build(kv=4 if request.param == "mha" else 2, learned=request.param == "learned")


PROMPTS = [[3, 1, 4, 1, 5], list(range(40)), [7], [7] * 17, list(range(40))[:33], [9, 9] * 16]


@torch.no_grad()
def slow(model: Decoder, prompt: list[int], sampling: Sampling, index: int) -> Completion:
    """One full forward per token."""
    ids, logprobs = list(prompt), []
    key = stream_key(sampling.seed, index)
    for n in range(sampling.max_tokens):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), Segments((len(ids),)))
        draw = sample(
            model.logits(hidden[-1:]),
            [sampling.temperature],
            [sampling.top_k],
            [sampling.top_p],
            [uniform(key, n)],
        )
        ids.append(int(draw.ids_B))
        logprobs.append(float(draw.logprob_B))
    return Completion(tuple(ids[len(prompt) :]), tuple(logprobs), "length")


def same(a: Completion, b: Completion) -> None:
    assert a.ids == b.ids
    assert a.finish_reason == b.finish_reason
    assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 2e-5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, max_tokens=20),
        Sampling(temperature=1.0, max_tokens=20, seed=5),
        Sampling(temperature=0.7, top_k=12, top_p=0.9, max_tokens=20, seed=6),
    ],
    ids=["greedy", "plain", "truncated"],
)
def test_engine_equals_full_forward(model: Decoder, sampling: Sampling) -> None:
    answers = Engine(model, max_seqs=4).generate(PROMPTS, sampling, n=2)
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            same(answers[i][j], slow(model, prompt, sampling, 2 * i + j))


def test_neither_batch_nor_chunks_nor_blocks_change_an_answer() -> None:
    model = build()
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=24, seed=2)
    want = Engine(model).generate(PROMPTS, sampling)
    for options in (
        {"max_seqs": 1},
        {"max_seqs": 2, "block_size": 4},
        {"max_seqs": 6, "step_tokens": 22},
        {"max_seqs": 3, "step_tokens": 11, "block_size": 8},
        {"max_seqs": 6, "cache_tokens": 128},
    ):
        engine = Engine(model, **options)
        got = engine.generate(PROMPTS, sampling)
        for a, b in zip(want, got, strict=True):
            same(a[0], b[0])
        assert engine.stats()["blocks_owned"] == 0
        if "cache_tokens" in options:
            assert engine.stats()["preemptions"] > 0


def test_arrival_order_and_neighbours_do_not_matter() -> None:
    model = build()
    sampling = Sampling(temperature=1.0, max_tokens=18, seed=9)
    engine = Engine(model, max_seqs=3)
    alone = {}
    for index, prompt in enumerate(PROMPTS):
        id = engine.submit(prompt, sampling, index=index)
        alone[index] = [e.new_ids[0] for e in drain(engine) if e.id == id]
    ids = {}
    events = []
    for index in (4, 0, 5, 2, 1, 3):
        ids[engine.submit(PROMPTS[index], sampling, index=index)] = index
        events += engine.step()
    events += drain(engine)
    mixed = {index: [e.new_ids[0] for e in events if e.id == id] for id, index in ids.items()}
    assert mixed == alone


def drain(engine: Engine) -> list:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_samples_share_the_prefill_and_differ() -> None:
    model = build()
    engine = Engine(model, max_seqs=8)
    (group,) = engine.generate([list(range(40))], Sampling(max_tokens=8, seed=1), n=8)
    assert len({c.ids for c in group}) > 4
    stats = engine.stats()
    assert stats["cached_tokens"] == 7 * 32
    (four,) = Engine(model).generate([list(range(40))], Sampling(max_tokens=8, seed=1), n=4)
    assert four[0].ids == group[0].ids and four[3].ids == group[3].ids


def test_second_turn_reuses_the_first() -> None:
    model = build()
    engine = Engine(model)
    prompt = list(range(30))
    sampling = Sampling(temperature=0, max_tokens=20)
    engine.submit(prompt, sampling)
    answer = [e.new_ids[0] for e in drain(engine)]
    longer = [*prompt, *answer, 5, 6]
    engine.submit(longer, sampling)
    second = [e.new_ids[0] for e in drain(engine)]
    assert engine.stats()["cached_tokens"] == 48  # 30 + 19 computed positions, in blocks of 16
    assert tuple(second) == slow(model, longer, sampling, 0).ids


def test_weights_are_read_live_and_an_update_forgets_the_cache() -> None:
    model = build()
    engine = Engine(model)
    sampling = Sampling(temperature=0, max_tokens=12)
    prompt = list(range(40))
    before = engine.generate([prompt], sampling)[0][0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    engine.update_weights("step 1")
    after = engine.generate([prompt], sampling)[0][0]
    same(after, slow(model, prompt, sampling, 0))
    assert after.ids != before.ids


def test_logprobs_are_those_of_the_trainer() -> None:
    from caravan.algos.logprobs import token_logprobs

    for dtype, atol in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        model = build().to(dtype)
        sampling = Sampling(temperature=0.8, max_tokens=16, seed=4)
        done = Engine(model).generate([[1, 2, 3]], sampling)[0][0]
        ids = [1, 2, 3, *done.ids]
        with torch.no_grad():
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), Segments((len(ids),)))
            logp = token_logprobs(hidden[2:-1], model.head_weight(), torch.tensor(done.ids), temperature=0.8)
        assert (logp - torch.tensor(done.logprobs)).abs().max() < atol


def test_stop_tokens_do_not_disturb_the_stream_of_draws() -> None:
    model = build()
    sampling = Sampling(max_tokens=16, seed=8)
    free = Engine(model).generate([[1, 2]], sampling)[0][0]
    stop = frozenset([free.ids[7]])
    first = free.ids.index(free.ids[7])
    assert Engine(model, stop_ids=stop).generate([[1, 2]], sampling)[0][0].ids == free.ids[: first + 1]


def test_known_greedy_answer_of_stories260k(kit: Path) -> None:
    want = json.loads((kit / "model" / "greedy_first_32.json").read_text())["ids"]
    model = load_model(kit / "model" / "stories260k_hf")
    for prompt in (want[:1], want[:9], want[:20]):
        done = Engine(model).generate([prompt], Sampling(temperature=0, max_tokens=len(want) - len(prompt)))
        assert [*prompt, *done[0][0].ids] == want
