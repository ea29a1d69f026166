"""What every HTTP request passes: keys, limits of size, time and number, one line of log, metrics; no text is kept."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import anyio
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .openai_api import ApiError

__all__ = ["Gate", "JsonLines"]

logger = logging.getLogger(__name__)


_PIECE = 2**16  # bytes


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what is in its `fields` goes in, an exception without its message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__  # a message may quote a text
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line)


class _Unread(Exception):
    """A client does not read its answer, and the server can't hold more of it."""


class Gate:
    """ASGI middleware; see `Limits` in `service` for the numbers.

    Args:
        app: what is behind it.
        keys: API keys, any of which opens a path below `/v1/` and the page's own; none: all is open.
        max_requests: with a body, being read or worked on at the same time.
        max_bytes: of a body.
        held_bytes: of all bodies that are worked on, and of answers that are not taken yet, together.
        body_seconds: for a body to arrive, and for a client to take what it is sent.
        registry: where its metrics go.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        max_requests: int,
        max_bytes: int,
        held_bytes: int,
        body_seconds: float,
        registry: CollectorRegistry,
    ) -> None:
        self.app = app
        self._keys = [_digest(key) for key in keys]
        self._max_requests, self._max_bytes, self._body_seconds = max_requests, max_bytes, body_seconds
        self._held_bytes = held_bytes
        self._working = self._held = 0
        labels = ["path", "status"]
        self._count = Counter("kvembed_requests", "HTTP requests answered.", labels, registry=registry)
        self._seconds = Histogram(
            "kvembed_request_seconds",
            "From a request's first byte to its answer's last.",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        fields: dict[str, Any] = {"id": uuid.uuid4().hex}
        scope.setdefault("state", {})["log"] = fields
        status, begun = 499, False  # 499: the client went before there was an answer

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", fields["id"].encode())]
            size = len(message.get("body", b""))
            self._held += size
            try:
                for part in _parts(message):  # in pieces, so that a client has to take one before there is another
                    with anyio.fail_after(self._body_seconds):
                        await send(part)
            except TimeoutError:
                raise _Unread from None
            finally:
                self._held -= size

        body = _Body(self, receive)
        try:
            await self._pass(scope, body, answer)
        except _Unread:
            status = 499
        except Exception as error:
            logger.error("unexpected error", exc_info=error, extra={"fields": {"id": fields["id"]}})
            if not begun:
                await ApiError(500, "The server failed; see its log.").response()(scope, receive, answer)
        finally:
            body.let_go()
            route = getattr(scope.get("route"), "path", "other")  # never the path itself: it may hold anything
            seconds = time.perf_counter() - started
            self._count.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
            fields |= {"method": method, "path": route, "status": status, "ms": round(1000 * seconds, 1)}
            logger.info("request", extra={"fields": fields})

    async def _pass(self, scope: Scope, body: _Body, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            with contextlib.suppress(HTTPException):  # many clients read no answer before they have sent everything
                while (await body.receive()).get("more_body", False):
                    body.let_go()  # or clients without a key could hold all the memory there is
            await error.response()(scope, body.receive, send)
            return
        counted = scope["method"] == "POST"
        self._working += counted
        try:
            await self.app(scope, body.receive, send)
        finally:
            self._working -= counted

    def _check(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where it is mounted
        if self._keys and (path.startswith("/v1/") or scope["method"] == "POST"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            found = [hmac.compare_digest(_digest(key.strip()), known) for known in self._keys]  # all, always
            if scheme.lower() != b"bearer" or not any(found):
                message = "Incorrect API key." if given else "No API key: send the header Authorization: Bearer KEY."
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        encoding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"identity")
        if encoding.lower() != b"identity":
            raise ApiError(415, "A body is taken as it is: leave Content-Encoding out.")
        if self._working >= self._max_requests and scope["method"] == "POST":
            raise ApiError(
                429,
                "Too many requests are being worked on; try again in 1 second.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )


class _Body:
    """A request's body, as it comes: not too long, not too slow, and not while others hold all the memory there is."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self._gate, self._receive = gate, receive
        self._seconds = gate._body_seconds
        self._deadline, self._complete = time.monotonic() + self._seconds, False
        self._length = 0
        self._taken = 0  # bytes that are held

    async def receive(self) -> Message:
        """The next message; raises where there is too much. Such a body is read to its end first, within reason."""
        if self._complete:
            return await self._receive()
        most = self._gate._max_bytes
        refused = False
        try:
            with anyio.fail_after(max(0.0, self._deadline - time.monotonic())):
                while True:
                    message = await self._receive()
                    size = len(message.get("body", b""))
                    self._length += size
                    self._complete = not message.get("more_body", False)
                    refused = refused or (self._length <= most and not self._hold(size))
                    if self._length <= most and not refused:
                        return message
                    if self._complete or self._length > 16 * most:
                        break
        except TimeoutError:
            self._complete = True
            raise _closing(408, f"The body did not arrive within {self._seconds:g} seconds.") from None
        self._complete = True
        if refused:
            raise _closing(429, "Too much text is being worked on; try again in 1 second.", {"Retry-After": "1"})
        raise _closing(413, f"The body is larger than {most:,} bytes.")

    def _hold(self, size: int) -> bool:
        """Whether there is room for so much more."""
        if size and self._gate._held + size > self._gate._held_bytes:
            return False
        self._gate._held += size
        self._taken += size
        return True

    def let_go(self) -> None:
        """What has come is not held any more."""
        self._gate._held -= self._taken
        self._taken = 0


def _parts(message: Message) -> Iterator[Message]:
    """An answer's body in pieces."""
    body = message.get("body", b"")
    if len(body) <= _PIECE:
        yield message
        return
    for start in range(0, len(body), _PIECE):
        more = message.get("more_body", False) or start + _PIECE < len(body)
        yield {"type": message["type"], "body": body[start : start + _PIECE], "more_body": more}


def _closing(status: int, message: str, headers: Mapping[str, str] | None = None) -> HTTPException:
    # What is left of the body is not read.
    return HTTPException(status, message, {"Connection": "close"} | dict(headers or {}))


def _digest(key: str | bytes) -> bytes:
    """Of one length for all keys, so that comparing tells nothing of it."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
