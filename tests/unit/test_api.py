"""The server, against a fake engine (every rule of the protocol) and once against the real one."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import WORDS, House, ScriptedEngine, Server, chunks, until

from caravan.data.calls import Spelling
from caravan.serve.api import create_app
from caravan.serve.run import Config, api_keys, check_door, is_loopback
from caravan.serve.worker import Draining, Piece, QueueFull, Worker
from caravan.types import Message, Sampling, ToolCall, UserError


def test_a_whole_answer_has_the_expected_shape(home: House) -> None:
    body = home.chat(seed=5, temperature=0.7, top_p=0.9, top_k=11, max_completion_tokens=9, stop="zzz").json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "one two three", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert body["system_fingerprint"] == "fp_abcdef012345"
    sampling = home.engine.seen[0][1]
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (5, 0.7, 0.9, 11)
    assert sampling.max_tokens == 9 and sampling.stop == ("zzz",)


def test_defaults_are_the_models_and_max_tokens_is_capped(home: House) -> None:
    home.chat()
    assert home.engine.seen[0][1].temperature == 0.3 and home.engine.seen[0][1].max_tokens == 50
    home.chat(messages=[{"role": "user", "content": "x" * 90}], max_tokens=1000)
    assert home.engine.seen[1][1].max_tokens == 10
    seeds = {sampling.seed for _, sampling, _ in home.engine.seen}
    assert len(seeds) == 2, "a request without a seed must draw its own"


def test_stream_equals_whole_and_has_one_id_role_finish_usage_done(home: House) -> None:
    whole = home.chat().json()["choices"][0]["message"]["content"]
    answer = home.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *body, last, done = chunks(answer.text)
    assert done == "[DONE]" and len({c["id"] for c in [*body, last]}) == 1
    assert body[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in body) == whole
    assert body[-1]["choices"][0]["finish_reason"] == "stop" and body[-1]["choices"][0]["delta"] == {}
    assert all(c["choices"][0]["finish_reason"] is None for c in body[:-1])
    assert all(c["usage"] is None for c in body) and last["choices"] == []
    assert last["usage"]["total_tokens"] == 5
    assert "usage" not in chunks(home.chat(stream=True).text)[0]


def test_n_choices_have_their_own_index(home: House) -> None:
    body = home.chat(n=3).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [index for _, _, index in home.engine.seen] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 9
    roles = [c for c in chunks(home.chat(n=2, stream=True).text)[:-1] if "role" in c["choices"][0]["delta"]]
    assert [c["choices"][0]["index"] for c in roles] == [0, 1]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def called(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_tools_reach_the_template_and_calls_come_back(build: Callable[..., House]) -> None:
    given: list[list[Message]] = []
    home = build(calls=Spelling(), seen=given)
    home.engine.script = lambda ids, sampling: ["I ", "add.\n<to", *CALL.removeprefix("<to"), "\n", CALL]
    whole = home.chat(tools=TOOLS).json()["choices"][0]
    message = whole["message"]
    assert whole["finish_reason"] == "tool_calls" and message["content"] == "I add."
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "add", "arguments": '{"a": 1}'}] * 2
    ids = {c["id"] for c in message["tool_calls"]}
    assert len(ids) == 2 and all(len(i) == 9 and i.isalnum() for i in ids)
    system = given[0][0]
    assert system == Message("system", "", tools=(json.dumps(TOOLS[0], separators=(",", ":")),))

    talk = [{"role": "system", "content": "Be."}, {"role": "user", "content": "hi"}]
    talk += [called("add", '{"a": 1}'), {"role": "tool", "tool_call_id": "c1", "content": "2"}]
    sent = chunks(home.chat(messages=talk, tools=TOOLS, stream=True).text)[:-1]
    deltas = [c["choices"][0]["delta"] for c in sent]
    assert "".join(d.get("content", "") for d in deltas) == "I add."
    assert [c["index"] for d in deltas for c in d.get("tool_calls", [])] == [0, 1]
    assert sent[-1]["choices"][0]["finish_reason"] == "tool_calls"
    call = ToolCall("add", '{"a": 1}', "c1")
    assert given[1][0] == Message("system", "Be.", tools=system.tools)
    assert given[1][2:] == [Message("assistant", "", (call,)), Message("tool", "2", tool_call_id="c1")]

    for change in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        plain = home.chat(**change).json()["choices"][0]
        assert plain["finish_reason"] == "stop" and CALL in plain["message"]["content"]
        assert given[-1] == [Message("user", "hi")]


def test_an_answer_with_calls_can_be_voted_on(build: Callable[..., House]) -> None:
    home = build(calls=Spelling())
    ask: dict[str, Any] = {"tools": TOOLS}
    home.engine.script = lambda ids, sampling: [CALL]
    good = home.chat(**ask).json()["id"]
    home.engine.script = lambda ids, sampling: ["no"]
    bad = home.chat(**ask).json()["id"]
    choice = {"kind": "choice", "chosen": good, "rejected": bad}
    assert home.http.post("/feedback", json=choice).status_code == 200
    ranking = home.feedback.collect().rankings[0]
    assert ranking.responses == (CALL, "no") and ranking.prompt[0].tools and ranking.prompt[1].content == "hi"


def test_tools_are_refused_where_calls_cannot_be_read(home: House) -> None:
    answer = home.chat(tools=TOOLS)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
    assert "caravan template" in answer.json()["error"]["message"]
    assert home.chat(tools=TOOLS, tool_choice="none").status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS, "tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}}, None),
        ({"tools": TOOLS, "parallel_tool_calls": False}, None),
        ({"functions": [{"name": "add"}]}, None),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [called("add", "[" * 5000)]}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": [called("add", "[1]")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"logprobs": True}, None),
        ({"response_format": {"type": "json_object"}}, None),
    ],
)
def test_bad_requests_are_400_and_name_the_field(
    home: House, change: dict[str, Any], param: str | None
) -> None:
    answer = home.chat(**change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert param is None or error["param"].startswith(param)
    assert not home.engine.seen


def test_broken_json_unknown_model_and_route(home: House) -> None:
    head = {"content-type": "application/json"}
    for content in (b"{", b"[]", b"\xff", b"null"):
        answer = home.http.post("/v1/chat/completions", content=content, headers=head)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    missing = home.chat(model="gpt-9")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert home.chat(model="").status_code == 200, "the only model needs no name"
    assert home.http.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(home: House) -> None:
    answer = home.chat(messages=[{"role": "user", "content": "x" * 100}])
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] == 100 and error["n_ctx"] == 100


def test_a_full_queue_is_429_with_retry_after(build: Callable[..., House]) -> None:
    home = build(running=1, queued=1)
    home.engine.gate.clear()
    tickets = [home.worker.submit([1], Sampling(), lambda piece: None)]
    until(lambda: home.worker.stats()["running"] == 1)
    tickets.append(home.worker.submit([1], Sampling(), lambda piece: None))
    answer = home.chat()
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    for ticket in tickets:
        ticket.cancel()
    until(lambda: home.worker.stats() == {"running": 0, "waiting": 0})
    home.engine.gate.set()
    assert home.chat().status_code == 200


def test_draining_is_503_and_finishes_what_runs(home: House) -> None:
    home.engine.gate.clear()
    pieces: list[Piece] = []
    home.worker.submit([1], Sampling(), pieces.append)
    home.worker.drain()
    answer = home.chat()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert home.http.get("/ready").status_code == 503 and home.http.get("/health").status_code == 200
    home.engine.gate.set()
    until(lambda: pieces and pieces[-1].finish_reason == "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_engine(home: House, stream: bool) -> None:
    home.engine.gate.clear()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    line = http.client.HTTPConnection("127.0.0.1", home.server.port)
    line.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: home.worker.stats()["running"] == 1)
    assert line.sock is not None
    line.sock.shutdown(socket.SHUT_RDWR)
    line.close()
    until(lambda: len(home.engine.aborted) == 1)
    assert home.worker.stats() == {"running": 0, "waiting": 0}


def test_a_failing_request_takes_only_itself_down(home: House) -> None:
    home.engine.fail_submit = UserError("this prompt can never run")
    assert home.chat().status_code == 400
    home.engine.fail_submit = None
    home.engine.fail_step = RuntimeError("secret detail")
    answer = home.chat()
    assert answer.status_code == 500 and "secret" not in answer.text
    assert home.chat().status_code == 200, "the thread must live on"
    home.engine.fail_step = RuntimeError("again")
    last = chunks(home.chat(stream=True).text)[-1]
    assert last["error"]["type"] == "server_error", "too late for a status: the error is an event"


def test_the_key_is_asked_for_and_the_page_is_not_locked(build: Callable[..., House]) -> None:
    home = build(api_key="s3cret")
    for head in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
        answer = home.http.get("/v1/models", headers=head)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert home.http.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
    assert home.chat().status_code == 401
    vote = {"kind": "vote", "id": "x", "vote": 1}
    assert home.http.post("/feedback", json=vote).status_code == 401
    assert home.http.get("/health").status_code == home.http.get("/").status_code == 200
    assert home.http.get("/web/page.json").json()["needs_key"] is True


def test_foreign_hosts_origins_types_and_large_bodies_are_refused(home: House) -> None:
    assert home.http.get("/", headers={"host": "evil.example"}).status_code == 403
    assert home.http.get("/health", headers={"host": "127.0.0.1.evil.example:80"}).status_code == 403
    assert home.http.get("/health", headers={"host": f"localhost:{home.server.port}"}).status_code == 200
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    head = {"content-type": "application/json", "origin": "https://evil.example"}
    assert home.http.post("/v1/chat/completions", content=body, headers=head).status_code == 403
    head["origin"] = home.server.url
    assert home.http.post("/v1/chat/completions", content=body, headers=head).status_code == 200
    plain = {"content-type": "text/plain"}
    assert home.http.post("/v1/chat/completions", content=body, headers=plain).status_code == 400
    assert home.chat(user="x" * (1 << 20)).status_code == 413

    def slices() -> Iterator[bytes]:
        yield b'{"user": "'
        for _ in range(20):
            yield b"x" * (1 << 16)

    unannounced = {"content-type": "application/json"}
    assert home.http.post("/v1/chat/completions", content=slices(), headers=unannounced).status_code == 413


def test_every_answer_carries_the_safe_headers(home: House) -> None:
    for path in ("/", "/web/chat.js", "/v1/models", "/nowhere"):
        answer = home.http.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_has_no_inline_code_and_names_nothing_outside() -> None:
    web = Path(__file__).parents[2] / "caravan" / "serve" / "web"
    page = (web / "index.html").read_text()
    assert "<script>" not in page and " style=" not in page and " onclick" not in page
    for file in web.iterdir():
        text = file.read_text().replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text, file.name


def test_votes_and_choices_reach_the_store(home: House) -> None:
    first, second = home.chat().json()["id"], home.chat().json()["id"]
    assert home.http.post("/feedback", json={"kind": "vote", "id": first, "vote": 1}).status_code == 200
    home.engine.script = lambda ids, sampling: ["another", " answer"]
    third = home.chat().json()["id"]
    given = {"kind": "choice", "chosen": third, "rejected": first}
    assert home.http.post("/feedback", json=given).status_code == 200
    ranking = home.feedback.collect().rankings[0]
    assert ranking.responses == ("another answer", "one two three") and ranking.ranks == (0, 1)
    assert ranking.source == "feedback:m@abcdef012345"
    assert home.http.post("/feedback", json={**given, "rejected": third}).status_code == 400
    assert home.http.post("/feedback", json={**given, "chosen": "nobody"}).status_code == 404
    assert home.http.post("/feedback", json={"kind": "vote", "id": second, "vote": 7}).status_code == 400


def test_models_are_listed(home: House) -> None:
    card = home.http.get("/v1/models").json()["data"][0]
    assert card["id"] == "m" and card["context_length"] == 100
    assert home.http.get("/v1/models/m").json() == card
    assert home.http.get("/v1/models/x").status_code == 404


def test_the_openai_client_is_at_home(home: House) -> None:
    openai = pytest.importorskip("openai")
    outside = httpx.Client(trust_env=False)
    client = openai.OpenAI(
        base_url=f"{home.server.url}/v1", api_key="none", max_retries=0, http_client=outside
    )
    ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert client.chat.completions.create(**ask).choices[0].message.content == "one two three"
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == "one two three"
    assert parts[-1].usage.completion_tokens == 3
    assert client.models.list().data[0].id == "m"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ask, "model": "x"})
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**{**ask, "messages": [{"role": "user", "content": "x" * 200}]})
    home.engine.fail_step = RuntimeError("boom")
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**ask, stream=True))
    outside.close()


def test_the_worker_refuses_when_full_and_after_its_end() -> None:
    engine = ScriptedEngine(lambda ids, sampling: [WORDS])
    engine.gate.clear()
    worker = Worker(engine, max_running=1, max_queued=1)
    ended: list[Piece] = []
    worker.submit([1], Sampling(), ended.append)
    until(lambda: worker.stats()["running"] == 1)
    worker.submit([1], Sampling(), ended.append)
    with pytest.raises(QueueFull):
        worker.submit([1], Sampling(), ended.append)
    worker.close()
    assert [piece.finish_reason for piece in ended] == ["abort", "abort"]
    with pytest.raises(Draining):
        worker.submit([1], Sampling(), ended.append)


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    engine = ScriptedEngine(lambda ids, sampling: [WORDS])
    engine.gate.clear()
    worker = Worker(engine, max_running=1, max_queued=4, deadline_seconds=0.05)
    running: list[Piece] = []
    waiting: list[Piece] = []
    worker.submit([1], Sampling(), running.append)
    worker.submit([1], Sampling(), waiting.append)
    until(lambda: running and waiting)
    assert running[-1].finish_reason == "length" and isinstance(waiting[-1].error, TimeoutError)
    worker.close()


def test_the_world_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARAVAN_API_KEY", raising=False)
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.com")
    with pytest.raises(UserError, match="other machines"):
        check_door(Config(model="m", host="0.0.0.0"), [])
    check_door(Config(model="m", host="0.0.0.0", insecure=True), [])
    keys = tmp_path / "keys"
    keys.write_text("a\n\nb\n")
    cfg = Config(model="m", host="0.0.0.0", api_key_file=str(keys))
    assert api_keys(cfg) == ["a", "b"]
    check_door(cfg, api_keys(cfg))


def test_the_real_engine_answers_alike_streamed_and_whole(
    tmp_path: Path, serve: Callable[[Any], Server]
) -> None:
    torch = pytest.importorskip("torch")
    from caravan.data.tokenizer import train
    from caravan.model.checkpoint import save_model
    from caravan.model.decoder import Decoder
    from caravan.model.sizes import derive
    from caravan.serve.run import load_models
    from caravan.stage import Runtime
    from caravan.store import Store

    tok = train(["what is it? 你是谁？ it is a test"] * 4, 280)
    tok.save(tmp_path / "tok")
    torch.manual_seed(0)
    spec, _ = derive(None, 1, tok.vocab_size, 64)
    model = Decoder(spec)
    with torch.no_grad():  # a fresh tied model repeats its last token; small logits make it wander
        for weight in model.parameters():
            weight.mul_(0.1 if weight.dim() == 2 else 1.0)
    save_model(model, tmp_path / "m", tmp_path / "tok", dtype=torch.float32)
    deterministic = torch.are_deterministic_algorithms_enabled()
    models = load_models(
        Config(model=str(tmp_path / "m"), name="m"), Store(tmp_path / "s"), Runtime(threads=1)
    )
    server = serve(create_app(models, None))
    try:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http:
            messages = [{"role": "user", "content": "你是谁？"}]
            body = {"messages": messages, "max_tokens": 12, "seed": 3, "temperature": 1.0, "n": 2}
            whole = http.post("/v1/chat/completions", json=body).json()
            said = ["", ""]
            for part in chunks(http.post("/v1/chat/completions", json={**body, "stream": True}).text)[:-1]:
                choice = part["choices"][0]
                said[choice["index"]] += choice["delta"].get("content", "")
            assert said == [c["message"]["content"] for c in whole["choices"]]
            assert said[0] != said[1], "choices of one request must differ at temperature 1"
            too_long = {**body, "messages": [{"role": "user", "content": "it " * 99}]}
            answer = http.post("/v1/chat/completions", json=too_long)
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert http.post("/feedback", json={"kind": "vote", "id": "x", "vote": 1}).status_code == 404
    finally:
        torch.use_deterministic_algorithms(deterministic)
