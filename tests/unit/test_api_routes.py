"""Plain completions, embeddings and metrics, against a scripted engine and the real one."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import torch
from serving import House, chunks, until

from caravan.engine.engine import Engine
from caravan.model.decoder import Decoder
from caravan.model.sizes import derive
from caravan.serve.metrics import Metrics
from caravan.serve.worker import Draining, QueueFull
from caravan.types import Sampling, UserError


def complete(home: House, **more: Any) -> httpx.Response:
    return home.http.post("/v1/completions", json={"model": "m", "prompt": "ab", **more})


def embed(home: House, **more: Any) -> httpx.Response:
    return home.http.post("/v1/embeddings", json={"model": "m", "input": "abc", **more})


def test_text_is_continued_without_a_template(home: House) -> None:
    body = complete(home, max_tokens=7, temperature=0, seed=2).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    choice = {"index": 0, "text": "one two three", "finish_reason": "stop", "logprobs": None}
    assert body["choices"] == [choice]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    ids, sampling, _ = home.engine.seen[0]
    assert ids == [97, 98] and (sampling.max_tokens, sampling.seed) == (7, 2)


def test_several_prompts_have_choices_of_their_own(home: House) -> None:
    home.engine.script = lambda ids, sampling: [str(ids[0])]
    body = complete(home, prompt=[[5, 6], [8]], n=2).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "5"), (1, "5"), (2, "8"), (3, "8")]
    assert [index for _, _, index in home.engine.seen] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3
    body = complete(home, prompt=["a", "b"], stream=True)
    said = {0: "", 1: ""}
    for part in chunks(body.text)[:-1]:
        assert part["object"] == "text_completion"
        said[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert said == {0: "97", 1: "98"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, "at most 8 answers"),
        ({"prompt": "x" * 100}, "context of 100"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 4}, "best_of"),
    ],
)
def test_senseless_completions_are_refused(home: House, change: dict[str, Any], words: str) -> None:
    answer = complete(home, **change)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"] + str(
        answer.json()["error"]["param"]
    )
    assert not home.engine.seen


def test_prompts_are_admitted_all_or_none(build: Callable[..., House]) -> None:
    home = build(running=2, queued=1)
    home.engine.gate.clear()
    assert complete(home, prompt=["a", "b", "c", "d"]).status_code == 429
    assert home.worker.stats() == {"running": 0, "waiting": 0}


def test_embeddings_as_numbers_and_as_bytes(home: House) -> None:
    body = embed(home, input=["abc", "ab"]).json()
    assert body["object"] == "list" and body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert [d["embedding"] for d in body["data"]] == [[3.0, -0.5, 0.25], [2.0, -0.5, 0.25]]
    assert [d["index"] for d in body["data"]] == [0, 1] and home.engine.embedded == [[97, 98, 99], [97, 98]]
    packed = embed(home, encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(packed)) == (3.0, -0.5, 0.25)
    assert embed(home, dimensions=3).status_code == 200
    for wrong in ({"dimensions": 2}, {"input": ""}, {"input": "x" * 101}, {"encoding_format": "int8"}):
        assert embed(home, **wrong).status_code == 400, wrong
    assert embed(home, input="x" * 100).status_code == 200, "no room for an answer is needed"
    assert embed(home, model="x").status_code == 404


def test_a_failing_call_reaches_only_its_asker(home: House) -> None:
    def broken(engine: Any) -> None:
        raise UserError("too odd")

    future = home.worker.call(broken)
    with pytest.raises(UserError, match="too odd"):
        future.result(5)
    assert embed(home).status_code == 200


def test_calls_wait_in_the_same_queue_and_end_with_the_worker(build: Callable[..., House]) -> None:
    home = build(running=1, queued=2)
    home.engine.gate.clear()
    home.worker.submit([1], Sampling(), lambda piece: None)
    until(lambda: home.worker.stats()["running"] == 1)
    futures: list[Future[Any]] = []
    with pytest.raises(QueueFull):
        for _ in range(100):  # the engine's thread takes some away
            futures.append(home.worker.call(lambda engine: home.engine.gate.wait(5)))
    home.engine.gate.set()
    assert all(future.result(5) for future in futures)
    home.worker.drain()
    with pytest.raises(Draining):
        home.worker.call(len)


def test_the_openai_client_completes_and_embeds(home: House) -> None:
    openai = pytest.importorskip("openai")
    outside = httpx.Client(trust_env=False)
    client = openai.OpenAI(
        base_url=f"{home.server.url}/v1", api_key="none", max_retries=0, http_client=outside
    )
    assert client.completions.create(model="m", prompt="ab").choices[0].text == "one two three"
    stream = client.completions.create(
        model="m", prompt="ab", stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(p.choices[0].text for p in parts if p.choices) == "one two three"
    assert parts[-1].usage.total_tokens == 5
    for encoding in ({}, {"encoding_format": "float"}):  # without one the client asks for base64
        made = client.embeddings.create(model="m", input=["abc", "a"], **encoding)
        assert [d.embedding for d in made.data] == [[3.0, -0.5, 0.25], [1.0, -0.5, 0.25]]
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="m", prompt="ab", echo=True)
    outside.close()


def numbers(text: str) -> dict[str, float]:
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9_]+(\{([a-z_]+="[^"]*",?)*\})?', name) for name, _ in rows)
    return {name: float(value) for name, value in rows}


def test_metrics_count_what_happened(home: House) -> None:
    home.chat(n=2)
    complete(home)
    complete(home, echo=True)
    embed(home)
    answer = home.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = numbers(answer.text)
    model = 'model_name="m"'
    assert found[f'caravan_requests_total{{{model},route="chat",outcome="stop"}}'] == 1
    assert found['caravan_requests_total{route="completions",outcome="400"}'] == 1
    assert found[f'caravan_requests_total{{{model},route="embeddings",outcome="stop"}}'] == 1
    assert found[f"caravan_prompt_tokens_total{{{model}}}"] == 2 + 2 + 3
    assert found[f"caravan_generation_tokens_total{{{model}}}"] == 9
    for name, count in (
        ("time_to_first_token_seconds", 2),
        ("e2e_request_latency_seconds", 2),
        ("request_queue_time_seconds", 2),
        ("time_per_output_token_seconds", 6),
    ):
        assert found[f"caravan_{name}_count{{{model}}}"] == count, name
        assert found[f'caravan_{name}_bucket{{{model},le="+Inf"}}'] == count
        assert found[f"caravan_{name}_sum{{{model}}}"] > 0
    assert found[f"caravan_num_requests_running{{{model}}}"] == 0
    assert found[f"caravan_num_requests_waiting{{{model}}}"] == 0
    assert found[f"caravan_prefix_cache_hits_total{{{model}}}"] == 32
    assert found[f"caravan_kv_cache_usage_perc{{{model}}}"] == 0.4


def test_histograms_add_up_and_labels_are_escaped() -> None:
    metrics = Metrics()
    for seconds in (0.005, 0.006, 400.0):
        metrics.observe("time_to_first_token_seconds", seconds, model_name='a"b\\c\n')
    text = metrics.text({})
    assert 'time_to_first_token_seconds_bucket{model_name="a\\"b\\\\c\\n",le="0.005"} 1' in text
    assert 'le="0.01"} 2' in text and 'le="300.0"} 2' in text and 'le="+Inf"} 3' in text
    assert "# TYPE caravan_time_to_first_token_seconds histogram" in text
    assert "_sum" in text and text.endswith("\n")


def test_metrics_need_the_key(build: Callable[..., House]) -> None:
    assert build(api_key="s3cret").http.get("/metrics").status_code == 401


def test_the_real_vectors_are_means_of_hidden_states() -> None:
    torch.manual_seed(0)
    spec, _ = derive(None, 1, 280, 64)
    model = Decoder(spec).eval()
    engine = Engine(model, vocab_size=270)
    engine.submit([1, 2, 3], Sampling(temperature=0, max_tokens=4))
    (vector,) = engine.embed([[5, 6, 7]])
    from caravan.kernels.attention import Segments

    with torch.no_grad():
        hidden = model(torch.tensor([5, 6, 7]), torch.arange(3), Segments((3,)))
    want = hidden.mean(0) / hidden.mean(0).norm()
    assert len(vector) == spec.d and math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5)
    assert (torch.tensor(vector) - want).abs().max() < 1e-6
    for wrong in ([], [270], [1] * 65):
        with pytest.raises(UserError, match="cannot be embedded"):
            engine.embed([wrong])
