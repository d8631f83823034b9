"""The HTTP server: an OpenAI-shaped API, the chat page, and the feedback it sends.

    POST /v1/chat/completions    whole or streamed (SSE)        GET /v1/models, /v1/models/{name}
    POST /v1/completions         the same without a template    GET /health, /ready
    POST /v1/embeddings          one vector per text            GET /metrics   for Prometheus
    POST /feedback               thumbs and choices             GET /, /web/...   the chat page

What happens to one request for text is in turn.py; what is refused before it gets here, in guard.py.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from caravan.serve import metrics as counted
from caravan.serve import protocol, shapes
from caravan.serve import turn as turns
from caravan.serve.feedback import FeedbackStore, UnknownAnswer
from caravan.serve.guard import LOOPBACK_NAMES, Guard
from caravan.serve.metrics import Metrics
from caravan.serve.protocol import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest
from caravan.serve.turn import ServedModel, Turn
from caravan.serve.worker import Draining, QueueFull

log = logging.getLogger("caravan.serve")
WEB = Path(__file__).parent / "web"
Body = TypeVar("Body", bound=BaseModel)


def create_app(
    models: Mapping[str, ServedModel],
    feedback: FeedbackStore | None,
    api_key: str | Collection[str] | None = None,
    *,
    hosts: Collection[str] | None = LOOPBACK_NAMES,
    max_body_bytes: int = 1 << 20,
    examples: Collection[str] = (),
) -> FastAPI:
    """The app over `models` (name -> ServedModel; the first is the page's choice). `hosts`: names allowed in
    the Host header, None for any (a server reachable from outside). `examples`: questions the page offers,
    None for its own."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models.values():
            await run_in_threadpool(model.worker.close)

    app = FastAPI(title="caravan", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    keys = [api_key] if isinstance(api_key, str) else list(api_key or ())
    app.add_middleware(Guard, hosts=hosts, api_keys=keys, max_body_bytes=max_body_bytes)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_any_error)
    metrics = Metrics()
    _add_text(app, models, feedback, metrics)
    _add_embeddings(app, models, metrics)
    _add_feedback(app, feedback)
    _add_state(app, models, metrics)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(WEB / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/web/page.json")
    async def page_settings() -> dict[str, Any]:
        return {"feedback": feedback is not None, "needs_key": bool(keys), "examples": list(examples)}

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


# ---- text and vectors ----


def _add_text(
    app: FastAPI, models: Mapping[str, ServedModel], feedback: FeedbackStore | None, metrics: Metrics
) -> None:
    async def answer(make: Callable[[], Turn], route: str) -> Response:
        with _refusals(metrics, route):
            turn = make()
            turn.admit()
        if turn.asked.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(turn.events(), media_type="text/event-stream", headers=headers)
        return await turn.whole()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.body()

        def make() -> Turn:
            asked = _validated(ChatRequest, body)
            return turns.chat_turn(request, asked, _find(models, asked.model), feedback, metrics)

        return await answer(make, "chat")

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await request.body()

        def make() -> Turn:
            asked = _validated(CompletionRequest, body)
            return turns.completion_turn(request, asked, _find(models, asked.model), metrics)

        return await answer(make, "completions")


def _add_embeddings(app: FastAPI, models: Mapping[str, ServedModel], metrics: Metrics) -> None:
    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        with _refusals(metrics, "embeddings"):
            asked = _validated(EmbeddingRequest, await request.body())
            model = _find(models, asked.model)
            texts = [model.plain(given, "input") for given in protocol.inputs(asked.input)]
            for ids in texts:
                model.check_room(ids, "input", answer=False)
            vectors: list[list[float]] = []
            for ids in texts:  # one call each: answers under way go on in between
                vectors += await _called(request, model, functools.partial(_embed, ids=ids))
            if asked.dimensions not in (None, len(vectors[0])):
                width = len(vectors[0])
                raise ApiError(400, f"this model's vectors have {width} numbers", param="dimensions")
        tokens = sum(len(ids) for ids in texts)
        metrics.count("prompt_tokens", tokens, model_name=model.name)
        metrics.count("requests", model_name=model.name, route="embeddings", outcome="stop")
        return JSONResponse(shapes.embeddings(model.name, vectors, asked.encoding_format, tokens))


def _embed(engine: Any, ids: list[int]) -> list[list[float]]:
    return engine.embed([ids])


async def _called(request: Request, model: ServedModel, run: Callable[[Any], Any]) -> Any:
    """`run(engine)` on the engine's thread; given up when the client is gone."""
    try:
        future = asyncio.wrap_future(model.worker.call(run))
    except (QueueFull, Draining) as problem:
        raise turns.refusal(problem) from problem
    while not future.done():
        await asyncio.wait([future], timeout=turns.POLL_SECONDS)
        if not future.done() and await request.is_disconnected():
            future.cancel()
    if future.cancelled():
        raise ApiError(503, "the server is closing", type="unavailable_error")
    failure = future.exception()
    if failure is not None:
        assert isinstance(failure, Exception)
        raise turns.engine_error(failure) from failure
    return future.result()


@contextmanager
def _refusals(metrics: Metrics, route: str) -> Iterator[None]:
    """Count what is refused, by status."""
    try:
        yield
    except ApiError as error:
        metrics.count("requests", route=route, outcome=str(error.status))
        raise


# ---- feedback, state ----


def _add_feedback(app: FastAPI, feedback: FeedbackStore | None) -> None:
    words: TypeAdapter[protocol.VoteIn | protocol.ChoiceIn] = TypeAdapter(protocol.VoteIn | protocol.ChoiceIn)

    @app.post("/feedback")
    async def give_feedback(request: Request) -> Response:
        if feedback is None:
            raise ApiError(404, "this server keeps no feedback", code="feedback_off")
        given = _parsed(words.validate_json, await request.body())
        try:
            if isinstance(given, protocol.VoteIn):
                await run_in_threadpool(feedback.vote, turns.answer_id(given.id, given.index), given.vote)
            else:
                chosen, rejected = (turns.answer_id(name, 0) for name in (given.chosen, given.rejected))
                await run_in_threadpool(feedback.choose, chosen, rejected, given.tie)
        except UnknownAnswer as problem:
            raise ApiError(404, str(problem), code="answer_not_found") from problem
        except ValueError as problem:
            raise ApiError(400, str(problem)) from problem
        return JSONResponse({"ok": True})


def _add_state(app: FastAPI, models: Mapping[str, ServedModel], metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(model) for model in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _card(_find(models, name))

    @app.get("/health")
    async def health() -> Response:
        alive = all(model.worker.alive for model in models.values())
        body = {
            "status": "ok" if alive else "failed",
            "models": {name: model.worker.stats() for name, model in models.items()},
        }
        return JSONResponse(body, status_code=200 if alive else 500)

    @app.get("/metrics")
    def numbers() -> Response:  # on a thread: the engine answers between two steps
        workers = {name: model.worker for name, model in models.items()}
        return Response(metrics.text(workers), media_type=counted.CONTENT_TYPE)

    @app.get("/ready")
    async def ready() -> Response:
        draining = any(model.worker.draining for model in models.values())
        return JSONResponse({"ready": not draining}, status_code=503 if draining else 200)


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "caravan",
        "context_length": model.context_length,
        "weights": model.weights,
        "defaults": {"temperature": model.defaults.temperature, "max_tokens": model.defaults.max_tokens},
    }


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """By name; no name means the only model there is."""
    if not name and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        known = ", ".join(models)
        raise ApiError(
            404, f"no model {name!r} is served; there is: {known}", param="model", code="model_not_found"
        )
    return models[name]


# ---- bodies and errors ----


def _validated(kind: type[Body], body: bytes) -> Body:
    return _parsed(kind.model_validate_json, body)


def _parsed(parse: Callable[[bytes], Any], body: bytes) -> Any:
    """Parse a JSON body; ApiError 400 names the first field that is wrong."""
    try:
        return parse(body)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "VoteIn", "ChoiceIn"))
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise ApiError(400, message, param=where or None) from problem


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = ApiError(error.status_code, str(error.detail), type=kind).body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_any_error(_: Request, error: Exception) -> Response:
    log.error("unexpected error: %s", type(error).__name__)
    return JSONResponse(
        ApiError(500, "unexpected error", type="server_error").body,
        status_code=500,
        headers={"x-should-retry": "false"},
    )
