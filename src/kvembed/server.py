"""An embedder behind OpenAI's embeddings API. `kvembed serve` calls `serve`; Ray Serve and tests, `create_app`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import h11
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import __version__
from .batcher import QueueFull
from .config import Role
from .embedder import Embedder
from .errors import InputError, OutOfMemory
from .files import why
from .gate import Gate, JsonLines
from .openai_api import ApiError, EmbeddingRequest, ErrorAnswer, as_json, embeddings_json
from .process import release_openmp_threads
from .quantize import unit
from .server_page import MAX_TEXTS, compare_page, compared
from .service import Limits, Service

__all__ = ["api_keys", "create_app", "listen_at", "serve", "uvicorn_config"]

logger = logging.getLogger(__name__)

_LAST_SECONDS = 110  # after SIGTERM; a client that does not read its answer would hold the server for ever

KEYS_VARIABLE = "KVEMBED_API_KEYS"
Answer = TypeVar("Answer")


def api_keys(file: Path | None) -> list[str]:
    """The keys in a file, one a line, or else in the environment, with commas between; none: no key is asked for.

    Raises:
        InputError: the file can't be read or holds none.
    """
    if file is None:
        return [key for part in os.environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip())]
    try:
        keys = [key for line in file.read_text("utf-8-sig").splitlines() if (key := line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {why(error) if isinstance(error, OSError) else 'not UTF-8 text'}") from None
    if not keys:
        raise InputError(f"{file}: holds no key")
    return keys


def serve(
    embedder: Embedder,
    names: Sequence[str],
    listener: socket.socket,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was taken. Logs are JSON lines on standard error.

    Args:
        embedder: what makes the vectors.
        names: what the model is called; the first is told to clients.
        listener: from `listen_at`; the log names its address.
        keys: API keys, see `api_keys`.
        limits: see `Limits`.
    """
    app = create_app(embedder, names, keys=keys, limits=limits)
    release_openmp_threads()  # this thread has loaded the model; the batches have their own
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name in ("kvembed", "uvicorn")]
    before = [(each, each.handlers, each.level, each.propagate) for each in loggers]
    for each, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        each.handlers, each.level, each.propagate = [handler], level, False
    # uvicorn hands a signal back when it has finished; by itself, SIGTERM would then end the process at once.
    terminate = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = listener.getsockname()[:2]
    try:
        facts = {
            "address": f"http://{f'[{host}]' if ':' in host else host}:{port}",
            "model": names[0],
            "keys": len(keys),
        }
        _Server(uvicorn_config(app), facts).run(sockets=[listener])
    finally:
        logger.info("stopped")
        signal.signal(signal.SIGTERM, terminate)
        for each, handlers, level, propagate in before:
            each.handlers, each.level, each.propagate = handlers, level, propagate


class _Protocol(H11Protocol):
    """HTTP as uvicorn speaks it, but what is no HTTP is told so in OpenAI's format too."""

    _giving_up: asyncio.TimerHandle | None = None

    @property
    def _seconds(self) -> float:
        limits: Limits = cast(FastAPI, self.config.app).state.service.limits
        return limits.body_seconds

    def pause_writing(self) -> None:
        """More is to be sent than the client has taken: it has some time for it, or else its connection ends."""
        super().pause_writing()
        self._giving_up = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._giving_up:
            self._giving_up.cancel()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self._seconds, self.transport.abort)  # it closes only when all has been taken

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # as the client or a proxy asked: no request is waited for that would time out
            self.loop.call_later(self._seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # it was answered before its body came
            self.transport.close()
            return
        body = bytes(ApiError(400, msg).response().body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """Says when it listens, and not before."""

    def __init__(self, config: uvicorn.Config, facts: dict[str, Any]) -> None:
        super().__init__(config)
        self._facts = facts

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            try:
                listener.listen(self.config.backlog)  # uvloop would say nothing of another who was first
            except OSError as error:
                host, port = listener.getsockname()[:2]
                raise InputError(f"can't listen on {host}:{port}: {why(error)}") from None
        await super().startup(sockets)
        logger.info("listening", extra={"fields": self._facts})


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


def listen_at(host: str, port: int) -> socket.socket:
    """An address, taken before a model is loaded, but not yet listened at: so long, clients are refused at once.

    Port 0 takes a free one. Raises `InputError` for an address that can't be listened at.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as stack:
            stack.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            stack.pop_all()
    except (OSError, UnicodeError) as error:
        reason = why(error) if isinstance(error, OSError) else "no such address"
        raise InputError(f"can't listen on {host}:{port}: {reason}") from None
    return listener


class CompareRequest(BaseModel):
    """What the page asks for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS)]
    role: Role = "document"


def create_app(
    embedder: Embedder, names: Sequence[str], *, keys: Sequence[str] = (), limits: Limits | None = None
) -> FastAPI:
    """The ASGI application; arguments as in `serve`."""
    limits = limits or Limits()
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    service = Service(embedder, names, limits, registry)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield
        service.readers.shutdown(cancel_futures=True)

    app = FastAPI(
        title="kvembed",
        version=__version__,
        description="Embeddings of a frozen language model, by OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # its pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorAnswer, "description": "What was wrong with the request."}},
    )
    app.state.service = service
    app.add_middleware(
        Gate,
        keys=keys,
        max_requests=limits.requests,
        max_bytes=limits.body_bytes,
        held_bytes=limits.held_bytes,
        body_seconds=limits.body_seconds,
        registry=registry,
    )
    app.add_exception_handler(ApiError, lambda _, error: cast(ApiError, error).response())
    app.add_exception_handler(QueueFull, _queue_full)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    # The gate checks keys; this only tells of them in the description.
    guarded = [Depends(HTTPBearer(auto_error=False, description="An API key, if the server has any."))]

    @app.post("/v1/embeddings", dependencies=guarded, summary="Embed texts")
    async def embeddings(asked: EmbeddingRequest, request: Request) -> Response:
        named = service.model(asked.model)
        if named and asked.input_type and named != asked.input_type:
            raise ApiError(400, f"The model's name says {named}, input_type says otherwise.", param="input_type")
        role: Role = named or asked.input_type or "document"
        dim = asked.dimensions or embedder.dim
        if dim > embedder.dim or (dim < embedder.dim and embedder.transform is None):
            why_not = "at most" if embedder.transform is not None else "always: its method does not order them"
            raise ApiError(400, f"This model has {embedder.dim} dimensions {why_not}.", param="dimensions")
        prompts = await _while_connected(request, service.read(asked.input, role, bool(asked.truncate)))
        tokens = sum(prompt.tokens for one in prompts for prompt in one)
        request.state.log |= {"texts": len(prompts), "tokens": tokens, "role": role}
        vectors = (await _while_connected(request, service.vectors(prompts, role)))[:, :dim]
        if dim < embedder.dim:
            vectors = unit(vectors)
        cut = [max(prompt.tokens_cut for prompt in one) for one in prompts]
        return embeddings_json(asked.model, vectors, asked.encoding_format, tokens, cut)

    fit = None if embedder.transform is None else embedder.transform.digest()

    def described(name: str) -> dict[str, Any]:
        most = min(embedder.max_tokens, service.limits.queue_tokens)  # static vectors have no limit of their own
        details = {"dimensions": embedder.dim, "max_tokens": most, "method": embedder.config.method}
        details["config"] = embedder.config.hash()
        if fit is not None:
            details["transform"] = fit
        return {"id": name, "object": "model", "created": started, "owned_by": "kvembed"} | details

    @app.get("/v1/models", dependencies=guarded, summary="The model's names")
    async def models() -> Response:
        every = [described(name + role) for name in names for role in ("", ":query")]
        return as_json({"object": "list", "data": every})

    @app.get("/v1/models/{name:path}", dependencies=guarded, summary="One of them")
    async def model(name: str) -> Response:
        service.model(name)
        return as_json(described(name))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether the process answers")
    async def health() -> Response:
        return as_json({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", summary="Whether it takes texts", responses={503: {"model": ErrorAnswer}})
    async def ready() -> Response:
        if not service.batcher.running:
            raise ApiError(503, "No batches are being taken.")
        return as_json({"status": "ready"})

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    shown = compare_page(embedder, names[0], with_key=bool(keys))

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(shown)

    @app.post(
        "/compare", dependencies=guarded, summary="What the page shows", responses={200: {"content": {"text/html": {}}}}
    )
    async def compare(asked: CompareRequest, request: Request) -> HTMLResponse:
        prompts = await _while_connected(request, service.read(asked.texts, asked.role, False))
        request.state.log |= {"texts": len(prompts), "role": asked.role}
        vectors = await _while_connected(request, service.vectors(prompts, asked.role))
        explained = service.batcher.call(lambda: embedder.explain(asked.texts[0], role=asked.role))
        explanation = await _while_connected(request, explained)
        return HTMLResponse(compared(asked.texts, embedder.similarity(vectors, vectors), explanation))

    return app


async def _while_connected(request: Request, work: Awaitable[Answer]) -> Answer:
    """The answer, unless the client goes away: then its texts are taken out of the queue."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client went away.")
        return working.result()
    except OutOfMemory as error:
        raise ApiError(400, str(error), param="input") from None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _queue_full(_: Request, error: Exception) -> Response:
    seconds = cast(QueueFull, error).retry_after
    message = f"The queue is full; try again in {seconds} s."
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": f"{seconds}"}).response()


def _http_error(_: Request, error: Exception) -> Response:
    known = cast(HTTPException, error)
    codes = {405: "method_not_supported", 404: "not_found", 429: "rate_limit_exceeded"}
    code = codes.get(known.status_code)
    return ApiError(known.status_code, f"{known.detail}", code=code, headers=known.headers).response()


def _invalid(request: Request, error: Exception) -> Response:
    """The first of what is wrong with a request, without what was in it."""
    if "json" not in request.headers.get("content-type", ""):
        return ApiError(400, "The request must be JSON, with the header Content-Type: application/json.").response()
    first = cast(RequestValidationError, error).errors()[0]
    parts = first["loc"][1:] if first["type"] != "json_invalid" else ()
    place = [f"{part}".encode("utf-8", "replace").decode() for part in parts]  # a name may hold a lone surrogate
    param = place[0] if place else None
    message = first["msg"].removeprefix("Value error, ")
    known = "not one of the request's fields" if first["type"] == "extra_forbidden" else message
    shown = ".".join(place)[:100]
    return ApiError(400, f"{shown}: {known}" if shown else known, param=param and param[:100]).response()
