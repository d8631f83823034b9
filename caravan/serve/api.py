"""The HTTP server: an OpenAI-shaped API, the chat page, and the feedback it sends.

    POST /v1/chat/completions    whole or streamed (SSE)        GET /v1/models, /v1/models/{name}
    POST /feedback               thumbs and choices             GET /health, /ready
    GET  /                       the chat page                  GET /web/...   its files

What happens to one request is in turn.py; what is refused before it gets here, in guard.py.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from caravan.serve import protocol
from caravan.serve.feedback import FeedbackStore, UnknownAnswer
from caravan.serve.guard import LOOPBACK_NAMES, Guard
from caravan.serve.protocol import ApiError, ChatRequest
from caravan.serve.turn import ServedModel, Turn, answer_id

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
    _add_chat(app, models, feedback)
    _add_feedback(app, feedback)
    _add_state(app, models)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(WEB / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/web/page.json")
    async def page_settings() -> dict[str, Any]:
        return {"feedback": feedback is not None, "needs_key": bool(keys), "examples": list(examples)}

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


# ---- chat ----


def _add_chat(app: FastAPI, models: Mapping[str, ServedModel], feedback: FeedbackStore | None) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = _validated(ChatRequest, await request.body())
        model = _find(models, asked.model)
        turn = Turn(request, asked, model, feedback)
        turn.admit()
        if asked.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(turn.events(), media_type="text/event-stream", headers=headers)
        return await turn.whole()


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
                await run_in_threadpool(feedback.vote, answer_id(given.id, given.index), given.vote)
            else:
                chosen, rejected = answer_id(given.chosen, 0), answer_id(given.rejected, 0)
                await run_in_threadpool(feedback.choose, chosen, rejected, given.tie)
        except UnknownAnswer as problem:
            raise ApiError(404, str(problem), code="answer_not_found") from problem
        except ValueError as problem:
            raise ApiError(400, str(problem)) from problem
        return JSONResponse({"ok": True})


def _add_state(app: FastAPI, models: Mapping[str, ServedModel]) -> None:
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
