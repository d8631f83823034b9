"""What stands between the network and the server, as one plain ASGI layer.

- Host: on a loopback server only loopback names are answered. A page on evil.example whose name is re-pointed
  at 127.0.0.1 (DNS rebinding) sends its own name here and is refused.
- Origin and content type: a foreign page may send simple cross-site POSTs; JSON content is demanded (which
  needs a preflight, and CORS is off) and an Origin, when sent, must be ours.
- Key: `Authorization: Bearer ...` on everything but /health, /ready and the static page; compared in constant
  time, never logged.
- Body: refused beyond a size, announced or not.
- Headers: nosniff, no referrer, no framing, and a content policy without inline code or outside resources.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Collection
from typing import Any

from caravan.serve.protocol import ApiError

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CONTENT_POLICY.encode()),
)
DRAIN_BODIES, DRAIN_SECONDS = 16, 5.0
"""How much of a refused body is read, in largest bodies, and for how long: a connection closed on unread
bytes is reset, and the client never sees why it was refused."""
OPEN_PATHS = ("/health", "/ready", "/web/")


class Guard:
    """Wraps an ASGI app. `hosts`: names that may stand in the Host header, None for any."""

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str] | None,
        api_keys: Collection[str] = (),
        max_body_bytes: int = 1 << 20,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(name.lower() for name in hosts)
        self._keys = [key.encode() for key in api_keys]
        self._max_body = max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no websockets are served
            return None
        guarded = _with_headers(send)
        body = _Body(receive, self._max_body)
        try:
            self._check(scope)
            await self._app(scope, body.capped, guarded)
        except ApiError as error:
            await body.swallow()
            await _answer(error, guarded)

    def _check(self, scope: dict[str, Any]) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise ApiError(403, "this server answers to loopback names only", type="permission_error")
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and origin.split("://", 1)[-1].lower() != host.lower():
                raise ApiError(403, "requests from other sites are refused", type="permission_error")
            if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                raise ApiError(400, "the body must be JSON: send Content-Type: application/json")
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self._max_body:
                raise _too_large(self._max_body)
        path = scope["path"]
        if self._keys and path != "/" and not path.startswith(OPEN_PATHS):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Every key is compared, so that the time says nothing about which one was close.
            known = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                raise ApiError(
                    401, "a valid API key is needed", type="authentication_error", code="invalid_api_key"
                )


class _Body:
    """The body of one request, as it comes in."""

    def __init__(self, receive: Any, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._seen, self._more = 0, True

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._receive()
        self._seen += len(message.get("body", b""))
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def capped(self) -> dict[str, Any]:
        """For the app: its `receive`, until the body is too large."""
        message = await self._next()
        if self._seen > self._limit:
            raise _too_large(self._limit)
        return message

    async def swallow(self) -> None:
        """Read what the client of a refused request is still sending, within bounds."""
        end = time.monotonic() + DRAIN_SECONDS
        while self._more and self._seen < DRAIN_BODIES * self._limit and time.monotonic() < end:
            try:
                await asyncio.wait_for(self._next(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                return


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")


def _name(host: str) -> str:
    """Host header without its port: `[::1]:8000` -> `[::1]`, `localhost:8000` -> `localhost`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rsplit(":", 1)[0] if ":" in host else host


def _with_headers(send: Any) -> Any:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *SECURITY_HEADERS]}
        await send(message)

    return sending


async def _answer(error: ApiError, send: Any) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
