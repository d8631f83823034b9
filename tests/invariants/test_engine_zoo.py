"""Every knob of attention, and recurrences, under the engine: one slow forward per token is the truth.

The slow side has its own attention, written from the definition; batches, chunks, blocks, shared prefixes,
preemption and abandoned neighbours must not change its greedy tokens or their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caravan.engine import rollout, score
from caravan.engine.engine import Engine
from caravan.kernels.attention import Pairs
from caravan.kernels.quantized import QuantLinear
from caravan.model.decoder import Decoder
from caravan.model.encoders.bgpt import Bgpt, BgptSpec
from caravan.model.encoders.cpm import Ant, Bee, CpmSpec
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, MLA, Attn, Layer, MoE, Norm, Rope, RopeScaling, Spec
from caravan.types import Completion, Sampling, UserError

VOCAB, CONTEXT, BEGIN = 53, 80, 52
PROMPTS = [[3, 1, 4, 1, 5], list(range(40)), [7], list(range(40))[:33], [9, 8] * 9, list(range(40))]
LENGTHS = [8, 14, 8, 3, 10, 14]


@dataclass
class Slow:
    """The definition of attention, one segment after another, nothing kept."""

    lengths: tuple[int, ...]
    prefix: tuple[int, ...] | None = None
    whole: bool = True

    def __post_init__(self) -> None:
        self.routed: dict[int, Any] = {}
        self.whole = True

    def state(self, index: int) -> None:
        return None

    def keep(self, index: int, state: dict[str, Tensor]) -> None:
        pass

    def __call__(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, attn: Attn, pairs: Pairs | None = None
    ) -> Tensor:
        (n,) = self.lengths
        k, v = (x.repeat_interleave(attn.n_head // attn.n_kv, 1) for x in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q, k) * attn.scale
        if attn.softcap:
            scores = attn.softcap * torch.tanh(scores / attn.softcap)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        if attn.alibi:
            scores = scores + slopes(attn)[:, None, None] * (j - i) * attn.alibi_scale
        if pairs is not None:
            known = pairs.read(pairs.ids_N[None])
            rows = pairs.row(j - i, known[:, :, None], known[:, None])[0]
            scores = scores + pairs.table_XH[rows].permute(2, 0, 1)
        seen = j <= i
        if attn.window:
            seen = seen & (i - j < attn.window)
        if self.prefix:
            seen = seen | ((i < self.prefix[0]) & (j < self.prefix[0]))
        return torch.einsum("hij,jhv->ihv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def slopes(attn: Attn) -> Tensor:
    """Press et al.: a geometric series; for 6 heads that of 4, then every second one of that of 8."""
    assert attn.n_head == 6
    wide = [2 ** (-attn.alibi_max * i / 8) for i in range(1, 9)]
    return torch.tensor([*wide[1::2], *wide[::2]][:6])


ATTN = Attn(n_head=6, n_kv=2, head_dim=8, rope=Rope(dim=8))
BARE = replace(ATTN, rope=None)
GLU = FFN(kind="glu", d_ff=24, act="silu")
LAYER = Layer(attn=ATTN, ffn=GLU, norm=Norm())
SPEC = Spec(vocab=VOCAB, d=24, layers=(LAYER,) * 2, final_norm=Norm(), max_pos=CONTEXT)


def of(*attns: Attn, **more: Any) -> Spec:
    return replace(SPEC, layers=tuple(replace(LAYER, attn=attn) for attn in attns), **more)


def stretched(kind: Any) -> Attn:
    factors = {"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (1.0, 1.5, 2.5, 4.0)}
    more = factors if kind == "longrope" else {}
    scaling = RopeScaling(kind=kind, factor=2.0, original_context=44, **more)
    return replace(ATTN, rope=Rope(dim=8, theta=100.0, scaling=scaling))


ZOO: dict[str, Spec] = {
    "window": of(*(replace(ATTN, window=7),) * 2),
    "window of one": of(replace(ATTN, window=1), ATTN),
    "mixed": of(replace(ATTN, window=5, softcap=1.5), replace(BARE, softcap=1.5), logit_softcap=3.0),
    "softcap": of(*(replace(ATTN, softcap=0.7),) * 2, logit_scale=0.5),
    "alibi": of(*(replace(BARE, alibi=True),) * 2),
    "alibi window": of(*(replace(BARE, alibi=True, alibi_scale=0.5, alibi_max=4.0, window=9),) * 2),
    "alibi softcap": of(replace(BARE, alibi=True, softcap=1.0), replace(BARE, alibi=True, alibi_max=2.0)),
    "qk norm": of(replace(ATTN, qk_norm=Norm()), replace(ATTN, qk_norm=Norm(), qk_norm_over="full")),
    "offset": of(BARE, BARE, pos="learned", pos_offset=2),
    "no positions": of(BARE, replace(BARE, n_kv=6)),
    "layer widths": of(replace(ATTN, n_head=2, n_kv=1), replace(ATTN, head_dim=4, rope=Rope(dim=4))),
    "prefix": of(ATTN, replace(ATTN, window=21), prefix_token=BEGIN),
    "two streams": of(*(replace(ATTN, rope=Rope(dim=8, sections=(2, 2))),) * 2, prefix_token=BEGIN),
    "longrope": of(*(stretched("longrope"),) * 2),
    "dynamic": of(*(stretched("dynamic"),) * 2),
    "powers": of(*(replace(stretched("powers"), rope=replace(stretched("powers").rope, log_from=20)),) * 2),
    "capped head": of(ATTN, tie=False, head_bias=True, logit_scale=0.3, logit_softcap=2.0, head_norm=True),
}
_LATENT = MLA(q_rank=12, kv_rank=10, nope=6, rope=4, v=5)
_MLA = replace(ATTN, n_kv=6, head_dim=10, rope=Rope(dim=4), mla=_LATENT)
ZOO["latent"] = replace(SPEC, layers=(replace(LAYER, mixer="mla", attn=_MLA),) * 2)
_MOE = MoE(n_expert=5, top_k=2, d_ff=12)
ZOO["bee"] = CpmSpec(
    vocab=VOCAB, d=24, layers=of(BARE, replace(BARE, n_kv=6)).layers, final_norm=Norm(), max_pos=CONTEXT,
    buckets=12, segments=20, bos=9, prefix_token=BEGIN, prefix_more=2, embed_scale=24**-0.5,
)  # fmt: skip
ZOO["bee without context"] = replace(ZOO["bee"], prefix_token=-1)
ZOO["ant"] = CpmSpec(
    vocab=VOCAB, d=24, layers=of(BARE, replace(BARE, n_kv=6)).layers, final_norm=Norm(), max_pos=CONTEXT,
    buckets=12, segments=3, type_vocab=3, prompt=5, prompt_kinds=3, prefix_token=BEGIN, tie=False,
)  # fmt: skip
ZOO["experts"] = replace(SPEC, layers=(replace(LAYER, ffn=replace(GLU, kind="moe", moe=_MOE)),) * 2)


_PLAIN = replace(LAYER, attn=None, norm=Norm(kind="layer", bias=True))
_RWKV = replace(_PLAIN, ffn=FFN(kind="rwkv", d_ff=40, act="relu2"))
MIXERS: dict[str, Layer] = {
    "mamba": replace(_PLAIN, ssm=knobs.Mamba(d_inner=20, d_state=5, dt_rank=3), ffn=None),
    "mamba2": replace(_PLAIN, ssm=knobs.Mamba2(n_head=4, head_dim=5, d_state=6, n_group=2), ffn=None),
    "rwkv4": replace(_RWKV, ssm=knobs.Rwkv4(d_att=28)),
    "rwkv5": replace(_RWKV, ssm=knobs.Rwkv5(n_head=4, head_dim=6)),
    "rwkv6": replace(_RWKV, ssm=knobs.Rwkv6(n_head=4, head_dim=6, mix_rank=3, decay_rank=4)),
    "rwkv7": replace(
        _RWKV,
        ssm=knobs.Rwkv7(n_head=4, head_dim=6, decay_rank=3, rate_rank=4, value_rank=2, gate_rank=5),
    ),
    "hyena": replace(_PLAIN, ssm=knobs.Hyena(n_head=4, d_state=3)),
}


class Leaky(nn.Module):
    """A toy recurrence with two states: a decayed sum of a projection, and the token before."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(d, d), nn.Linear(2 * d, d)

    def forward(self, x_ND: Tensor, index: int, angles: Any, attend: Any) -> Tensor:
        before = attend.state(index)
        sums, lasts, out, start = [], [], [], 0
        for s, n in enumerate(attend.lengths):
            sum_D = before["sum"][s] if before else x_ND.new_zeros(x_ND.shape[1])
            last_D = before["last"][s] if before else x_ND.new_zeros(x_ND.shape[1])
            for x_D in x_ND[start : start + n]:
                sum_D = 0.8 * sum_D + torch.tanh(self.inp(x_D))
                out.append(self.out(torch.cat([sum_D, last_D])))
                last_D = x_D
            start += n
            sums.append(sum_D)
            lasts.append(last_D)
        attend.keep(index, {"sum": torch.stack(sums), "last": torch.stack(lasts)})
        return torch.stack(out)


def build(spec: Any, seed: int = 1) -> Any:
    """A random model whose choices are far from uniform."""
    torch.manual_seed(seed)
    if isinstance(spec, BgptSpec):
        model: Any = Bgpt(spec)
    else:
        model = ((Ant if spec.prompt else Bee) if isinstance(spec, CpmSpec) else Decoder)(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and "bias" not in name:
                p.uniform_(0.5, 1.5)
            elif "poles" in name:  # inside the unit circle, or nothing fades
                p.uniform_(-0.6, 0.6)
            elif "embed" in name or "head" in name or "pos" in name:
                p.normal_(0, 1.0)
            else:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model.eval()


def recurrent(hybrid: bool) -> Decoder:
    model = build(SPEC)
    layers = (replace(LAYER, attn=None), LAYER if hybrid else replace(LAYER, attn=None))
    model.spec = replace(SPEC, layers=layers)
    torch.manual_seed(3)
    for block in list(model.blocks)[: 1 if hybrid else 2]:
        block.mix = Leaky(SPEC.d)
    return model.eval()


def patches(size: int) -> BgptSpec:
    """Patches of so many bytes; heads share keys in either half, and not alike."""
    patch = of(BARE, replace(BARE, n_kv=6), pos="learned", max_pos=-(-CONTEXT // size))
    byte = of(replace(BARE, n_kv=3), pos="learned", max_pos=size + 1)
    return BgptSpec(patch=replace(patch, vocab=1), byte=replace(byte, vocab=VOCAB), patch_size=size)


def prompts(spec: Spec) -> list[list[int]]:
    return PROMPTS if spec.prefix_token in (None, -1) else [[*p[:-1], BEGIN, *p[-1:]] for p in PROMPTS]


@torch.no_grad()
def slow(model: Decoder, prompt: list[int], new: int) -> Completion:
    ids, logprobs = list(prompt), []
    prefix = None if model.spec.prefix_token is None else (0,)
    if model.spec.prefix_token in prompt:
        prefix = (min(len(prompt), prompt.index(BEGIN) + model.spec.prefix_more),)
    for _ in range(new):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), Slow((len(ids),), prefix))
        logp = model.logits(hidden[-1]).log_softmax(-1)
        ids.append(int(logp.argmax()))
        logprobs.append(float(logp[ids[-1]]))
    return Completion(tuple(ids[len(prompt) :]), tuple(logprobs), "length")


def same(got: Completion, want: Completion) -> None:
    assert got.ids == want.ids
    assert max(abs(a - b) for a, b in zip(got.logprobs, want.logprobs, strict=True)) < 1e-4


OPTIONS: list[dict[str, int]] = [
    {"max_seqs": 2, "block_size": 4, "step_tokens": 10},
    {"max_seqs": 3, "step_tokens": 11, "block_size": 8},
    {"max_seqs": 6, "cache_tokens": 64, "block_size": 4},
]


def answers(engine: Engine, asked: list[list[int]]) -> list[Completion]:
    """Staggered arrivals and answers of different lengths, so that lanes move; one neighbour gives up."""
    order, got = [], {}
    quitter = engine.submit(asked[0], Sampling(temperature=0, max_tokens=40))
    for prompt, new in zip(asked, LENGTHS, strict=True):
        id = engine.submit(prompt, Sampling(temperature=0, max_tokens=new))
        order.append(id)
        got[id] = ([], [])
        collect(engine, got)
    engine.abort(quitter)
    while engine.busy:
        collect(engine, got)
    assert engine.stats()["blocks_owned"] == 0 and engine.lanes.order == []
    return [Completion(tuple(got[id][0]), tuple(got[id][1]), "length") for id in order]


def collect(engine: Engine, got: dict[int, tuple[list[int], list[float]]]) -> None:
    for event in engine.step():
        if event.id in got:
            got[event.id][0].extend(event.new_ids)
            got[event.id][1].extend(event.logprobs)


def check(make: Callable[[], Decoder]) -> None:
    model = make()
    asked = prompts(model.spec)
    want = [slow(model, prompt, new) for prompt, new in zip(asked, LENGTHS, strict=True)]
    assert len({i for c in want for i in c.ids}) > 4, "the answers say too little"
    for options in OPTIONS:
        engine = Engine(model, **options)
        for got, truth in zip(answers(engine, asked), want, strict=True):
            same(got, truth)
        if "cache_tokens" in options:
            assert engine.stats()["preemptions"] > 0
        if options["max_seqs"] == 2:  # once more, with a warm prefix cache
            for got, truth in zip(answers(engine, asked), want, strict=True):
                same(got, truth)


@pytest.mark.parametrize("name", ZOO)
def test_generation_equals_one_full_forward_per_token(name: str) -> None:
    check(lambda: build(ZOO[name]))


@pytest.mark.parametrize("hybrid", [False, True], ids=["recurrent", "hybrid"])
def test_states_move_with_their_lanes(hybrid: bool) -> None:
    check(lambda: recurrent(hybrid))


@pytest.mark.parametrize("name", MIXERS)
def test_recurrent_mixers_go_on_where_they_stopped(name: str) -> None:
    layer = replace(MIXERS[name], mixer=name)
    attention = () if "rwkv" in name else (LAYER,)
    check(lambda: build(replace(SPEC, layers=(layer, *attention, layer))))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_patches_are_cached_once_each(size: int) -> None:
    check(lambda: build(patches(size)))


SCORED = ["mixed", "alibi softcap", "prefix", "two streams", "capped head", "latent", "bee", "ant", "patches"]


@pytest.mark.parametrize("name", SCORED)
def test_the_trainer_scores_what_the_sampler_drew(name: str) -> None:
    """Masks, caps, scale, bias and normalised rows of the head: the same numbers on both sides."""
    model = build({**ZOO, "patches": patches(4)}[name])
    asked = list(enumerate(prompts(model.spec)))
    drawn = rollout.sample(
        model, asked, 1, temperature=0.7, max_new_tokens=6, seed=1, stop_ids=frozenset(), vocab_size=VOCAB
    )
    per_answer = torch.tensor(drawn.sampled_logp_R).split(drawn.response_lengths)
    (batch,) = drawn.batches(range(len(drawn)), 1 << 12)
    with torch.no_grad():
        logp, _ = score.logprobs(model, batch, 0.7)
    assert (logp - torch.cat([per_answer[i] for i in batch.index])).abs().max() < 1e-4


def test_a_model_of_patches_keeps_positions_of_patches() -> None:
    """A position per patch, also when the cache grows; and the context is counted in bytes."""
    model = build(patches(4))
    engine = Engine(model, max_seqs=2, step_tokens=64)
    with pytest.raises(UserError, match="81 tokens and the context holds 80"):
        engine.submit([1] * 81, Sampling(max_tokens=1))
    long = [i % VOCAB for i in range(76)]
    (answers,) = engine.generate([long], Sampling(temperature=0, max_tokens=9))
    assert len(answers[0].ids) == 4, "the context is full"
    same(answers[0], slow(model, long, 4))
    assert engine.stats()["cached_tokens"] == 0 and not engine.lanes.kv
    assert [keys.shape[2] for keys, _ in engine.lanes.coarser[4].kv.values()] == [20, 20]
    wide = Engine(build(replace(patches(1), patch=replace(patches(1).patch, max_pos=300))), max_seqs=2)
    wide.generate([[i % VOCAB for i in range(n)] for n in (60, 90)], Sampling(max_tokens=50))
    assert [keys.shape[2] for keys, _ in wide.lanes.coarser[1].kv.values()] == [256, 256]


def test_a_pair_of_tokens_is_looked_up_in_its_own_text() -> None:
    """A text writes in the second lane while the first one's prompt is still being read."""
    model = build(ZOO["bee without context"])
    engine = Engine(model, max_seqs=2, step_tokens=11, block_size=4)
    asked = [[*range(10, 50)], [9, 8, 9]]
    ids = [engine.submit(prompt, Sampling(temperature=0, max_tokens=6)) for prompt in asked]
    got: dict[int, tuple[list[int], list[float]]] = {id: ([], []) for id in ids}
    collect(engine, got)
    assert engine.lanes.order == ids and len(got[ids[1]][0]) == 1 and not got[ids[0]][0]
    while engine.busy:
        collect(engine, got)
    for id, prompt in zip(ids, asked, strict=True):
        same(Completion(tuple(got[id][0]), tuple(got[id][1]), "length"), slow(model, prompt, 6))


def test_what_a_prefix_model_may_share() -> None:
    model = build(ZOO["prefix"])
    engine = Engine(model, max_seqs=4)
    prompt = [*range(36), BEGIN]
    (group,) = engine.generate([prompt], Sampling(temperature=1.0, max_tokens=4, seed=1), n=3)
    assert engine.stats()["cached_tokens"] == 2 * 32 and len({c.ids for c in group}) > 1
    longer = [*range(37), BEGIN]
    got = engine.generate([longer], Sampling(temperature=0, max_tokens=4))[0][0]
    assert engine.stats()["cached_tokens"] == 2 * 32, "another prefix sees other tokens: nothing is alike"
    same(got, slow(model, longer, 4))
    plain = [1, 2, 3, 4]  # without the token nobody sees ahead
    same(engine.generate([plain], Sampling(temperature=0, max_tokens=4))[0][0], slow(model, plain, 4))


def test_recurrent_models_share_nothing() -> None:
    model = recurrent(True)
    engine = Engine(model, max_seqs=4)
    engine.generate([list(range(40))], Sampling(temperature=0, max_tokens=3), n=3)
    assert engine.stats()["cached_tokens"] == 0 and not engine.lanes.pool


@pytest.mark.parametrize("name", ["longrope", "dynamic", "powers"])
def test_prompts_beyond_the_original_context(name: str) -> None:
    model = build(ZOO[name])
    asked = [list(range(50)), list(range(43)), list(range(50)), [5, *range(48)]]
    engine = Engine(model, max_seqs=3, step_tokens=12, block_size=4)
    for got, prompt in zip(engine.generate(asked, Sampling(temperature=0, max_tokens=4)), asked, strict=True):
        same(got[0], slow(model, prompt, 4))
    cached = engine.stats()["cached_tokens"]
    assert 0 < cached <= 48, "only the twin was turned by the same angles"


def test_a_window_keeps_no_more_than_it_needs() -> None:
    """A ring that grows before it goes round, goes round, and is filled from the prefix cache."""
    model = build(of(replace(ATTN, window=50), replace(ATTN, window=9), ATTN))
    engine = Engine(model, max_seqs=2, step_tokens=11, block_size=8)
    asked = [list(range(50)) + [i] * 12 for i in range(3)]
    for _ in range(2):
        answers = engine.generate(asked, Sampling(temperature=0, max_tokens=18))
        for got, prompt in zip(answers, asked, strict=True):
            same(got[0], slow(model, prompt, 18))
    assert [keys.shape[2] for keys, _ in engine.lanes.kv.values()] == [72, 32, 80]
    assert engine.stats()["cached_tokens"] >= 48 * 2 + 56 * 3


def test_latent_attention_keeps_latents() -> None:
    """One key head of latent and rotary part, the latent as its value; also where the map that would expand
    it is quantised, whose products are rounded to bfloat16."""
    model = build(ZOO["latent"])
    engine = Engine(model, max_seqs=2)
    engine.generate(PROMPTS[:2], Sampling(temperature=0, max_tokens=5))
    for keys, values in engine.lanes.kv.values():
        assert keys.shape[1::2] == (1, _LATENT.kv_rank + _LATENT.rope) and values.shape[1::2] == (1, 10)
        assert model.spec.attns[0].kept == keys.shape[3] + values.shape[3]
    for block in model.blocks:
        weight = block.mix.kvb.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        block.mix.kvb = QuantLinear((weight / scale).round().to(torch.int8), scale, 8)
    got = Engine(model, max_seqs=2).generate(PROMPTS[:2], Sampling(temperature=0, max_tokens=5))
    for (answer,), prompt in zip(got, PROMPTS, strict=False):
        truth = slow(model, prompt, 1)
        assert abs(answer.logprobs[0] - truth.logprobs[0]) < 0.1, "int8 products in bfloat16"


def test_a_model_without_a_limit_gets_one() -> None:
    model = recurrent(False)
    model.spec = replace(model.spec, max_pos=1 << 40)
    engine = Engine(model)
    assert engine.scheduler.max_context == 1 << 20 and engine.stats()["blocks"] == 1 << 16
    assert len(engine.generate([[1, 2]], Sampling(max_tokens=3))[0][0].ids) == 3


def test_readers_in_both_directions_do_not_generate() -> None:
    with pytest.raises(UserError, match="both directions"):
        Engine(build(of(replace(ATTN, causal=False))))
