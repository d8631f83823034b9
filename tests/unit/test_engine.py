"""The engine's own behaviour: stops, text, limits, abort, bookkeeping. Its numbers: tests/invariants."""

import pytest
import torch

from caravan.engine.engine import Engine, Event
from caravan.engine.text import TextStream
from caravan.model.decoder import Decoder
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.types import Sampling, UserError


def tiny(vocab: int = 40, context: int = 64, kv: int = 2, seed: int = 0) -> Decoder:
    """A random Llama-type model of two layers, scaled up so that its choices are far from uniform."""
    norm = Norm()
    layer = Layer(
        attn=Attn(n_head=4, n_kv=kv, head_dim=8, rope=Rope(dim=8)),
        ffn=FFN(kind="glu", d_ff=48, act="silu"),
        norm=norm,
    )
    spec = Spec(vocab=vocab, d=32, layers=(layer, layer), final_norm=norm, max_pos=context)
    model = fresh(spec, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model.eval()


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny()


def run(engine: Engine) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_stop_token_is_in_ids_and_not_in_text(model: Decoder) -> None:
    free = Engine(model, decode=letters).generate([[1, 2, 3]], Sampling(temperature=0, max_tokens=9))[0][0]
    assert free.finish_reason == "length" and len(free.ids) == len(free.logprobs) == 9
    stop = free.ids[4]
    first = free.ids.index(stop)
    done = Engine(model, stop_ids=frozenset([stop]), decode=letters).generate(
        [[1, 2, 3]], Sampling(temperature=0, max_tokens=9)
    )[0][0]
    assert done.ids == free.ids[: first + 1] and done.finish_reason == "stop"
    assert done.text == letters(list(free.ids[:first]))


def test_stop_tokens_are_forbidden_before_min_tokens(model: Decoder) -> None:
    stops = frozenset(range(0, 40, 2))
    sampling = Sampling(max_tokens=20, min_tokens=6, seed=3)
    for group in Engine(model, stop_ids=stops).generate([[1, 2]] * 8, sampling):
        ids = group[0].ids
        assert all(i not in stops for i in ids[:6])
        assert len(ids) >= 7


def test_stop_text_across_tokens_ends_the_answer(model: Decoder) -> None:
    sampling = Sampling(temperature=0, max_tokens=12)
    free = Engine(model, decode=letters).generate([[5, 6]], sampling)[0][0]
    stop = free.text[4:7]
    at = free.text.index(stop)
    engine = Engine(model, decode=letters)
    cut = engine.generate([[5, 6]], Sampling(temperature=0, max_tokens=12, stop=(stop,)))[0][0]
    assert cut.text == free.text[:at] and cut.finish_reason == "stop"
    assert cut.ids == free.ids[: at + 3]
    assert engine.stats()["blocks_owned"] == 0


def test_streamed_text_is_the_whole_text_and_never_shows_a_stop(model: Decoder) -> None:
    free = Engine(model, decode=letters).generate([[5, 6]], Sampling(temperature=0, max_tokens=12))[0][0]
    stop = free.text[6:9]
    engine = Engine(model, decode=letters)
    engine.submit([5, 6], Sampling(temperature=0, max_tokens=12, stop=(stop, "zzz")))
    events = run(engine)
    text = ""
    for event in events:
        text += event.text
        assert stop not in text
        assert not event.finished or event is events[-1]
    assert text == free.text[: free.text.index(stop)] and events[-1].finish_reason == "stop"


def bytes_decoder(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_half_characters_wait() -> None:
    stream = TextStream(bytes_decoder)
    pieces = [stream.push(b)[0] for b in "a你é".encode()]
    assert pieces == ["a", "", "", "你", "", "é"]
    stream = TextStream(bytes_decoder)
    assert [stream.push(b)[0] for b in "好".encode()[:2]] == ["", ""]
    assert stream.flush() == ("�", False)


def test_possible_beginning_of_a_stop_waits_and_is_given_back() -> None:
    stream = TextStream(bytes_decoder, ("</s>", "STOP"))
    assert [stream.push(b)[0] for b in b"a</b"] == ["a", "", "", "</b"]
    assert [stream.push(b) for b in b"STO"] == [("", False)] * 3
    assert stream.flush() == ("STO", False)
    stream = TextStream(bytes_decoder, ("ab",))
    assert [stream.push(b) for b in b"xab"] == [("x", False), ("", False), ("", True)]
    assert stream.flush() == ("", True)


def test_tokenizer_that_strips_the_first_space_is_followed() -> None:
    words = ["▁hello", "▁wor", "ld", "▁x"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert [stream.push(i)[0] for i in range(4)] == ["hello", " wor", "ld", " x"]
    words.append("")  # a special token, which is skipped: the space behind it is not the first
    stream = TextStream(decode)
    assert [stream.push(i)[0] for i in (4, 0, 4, 4, 1, 2)] == ["", "hello", "", "", " wor", "ld"]


def test_abort_frees_everything_within_the_call(model: Decoder) -> None:
    engine = Engine(model, max_seqs=2)
    ids = [engine.submit(list(range(20)), Sampling(max_tokens=30), index=i) for i in range(5)]
    for _ in range(3):
        engine.step()
    for id in ids:
        engine.abort(id)
        engine.abort(id)
    stats = engine.stats()
    assert stats["blocks_owned"] == stats["running"] == stats["waiting"] == 0
    assert not engine.busy and engine.step() == [] and engine.lanes.order == []
    engine.abort(12345)


def test_lanes_stay_dense(model: Decoder) -> None:
    engine = Engine(model, max_seqs=4)
    for i, length in enumerate([3, 9, 5, 7, 4, 6]):
        engine.submit([1, 2, i], Sampling(max_tokens=length), index=i)
    while engine.busy:
        engine.step()
        assert sorted(engine.lanes.lane_of.values()) == list(range(len(engine.scheduler.running)))
        assert {r.id for r in engine.scheduler.running} == set(engine.lanes.order)


def test_padding_rows_of_the_vocabulary_are_never_drawn(model: Decoder) -> None:
    engine = Engine(model, vocab_size=33)
    drawn = {
        i for g in engine.generate([[1]] * 30, Sampling(temperature=3.0, max_tokens=20)) for i in g[0].ids
    }
    assert max(drawn) < 33
    with pytest.raises(UserError, match=r"outside 0\.\.32"):
        engine.submit([35], Sampling())
    with pytest.raises(UserError, match="41 ids and the model only 40"):
        Engine(model, vocab_size=41)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(stop=("",)), "empty"),
        (Sampling(stop=("x",)), "tokenizer"),
        (Sampling(max_tokens=0), "max_tokens"),
    ],
)
def test_senseless_sampling_is_refused(model: Decoder, sampling: Sampling, message: str) -> None:
    engine = Engine(model)
    with pytest.raises(UserError, match=message):
        engine.submit([1], sampling)
    assert not engine.busy and not engine._active


def test_long_prompt_is_refused_and_the_engine_lives(model: Decoder) -> None:
    engine = Engine(model)
    with pytest.raises(UserError, match="64 tokens and the context holds 64"):
        engine.generate([[1, 2], [1] * 64], Sampling(max_tokens=2))
    assert not engine.busy and engine.stats()["blocks_owned"] == 0
    assert len(engine.generate([[1] * 60], Sampling(max_tokens=50))[0][0].ids) == 4


def test_answers_survive_a_failing_step(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_tokens=12, seed=1)
    want = Engine(model, max_seqs=3).generate([list(range(20))] * 5, sampling)
    engine = Engine(model, max_seqs=3)
    ids = [engine.submit(list(range(20)), sampling, index=i) for i in range(5)]
    got: dict[int, list[int]] = {id: [] for id in ids}
    calls = 0

    def flaky(q: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise RuntimeError("interrupted")
        return type(model).logits(model, q)

    monkeypatch.setattr(model, "logits", flaky)
    while engine.busy:
        try:
            events = engine.step()
        except RuntimeError:
            continue
        for event in events:
            got[event.id] += event.new_ids
    assert [tuple(got[id]) for id in ids] == [g[0].ids for g in want]
    assert engine.stats()["blocks_owned"] == 0 and engine.lanes.order == []


def test_a_failing_step_leaves_generate_clean(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)

    def broken(plan: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.runner, "run", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.generate([[1, 2, 3]], Sampling(), n=3)
    assert not engine.busy and engine.stats()["blocks_owned"] == 0
