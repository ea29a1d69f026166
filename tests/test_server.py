"""The server over real sockets: OpenAI's own client, hostile requests, limits, keys, logs, the page, the command."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import fastapi
import numpy as np
import openai
import pytest
import schemathesis
from conftest import MANY, NOTICES, ground, running, tiny
from hypothesis import HealthCheck, given, settings
from prometheus_client import CollectorRegistry
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from typer.testing import CliRunner

from kvembed import EmbedConfig, Embedder, InputError
from kvembed.cli import app as cli
from kvembed.gate import Gate, JsonLines
from kvembed.server import api_keys, create_app, listen_at, serve
from kvembed.service import Limits

SECRET = "xyzzy plugh"  # stands in every text that must not be logged


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2], batch_tokens=1000)


@pytest.fixture(scope="module")
def start():
    """app options -> a running server: its address, port and application."""
    with contextlib.ExitStack() as stack:

        def start(embedder, names=("tiny",), **options):
            app = create_app(embedder, names, **options)
            port = stack.enter_context(running(app))
            return SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, app=app, service=app.state.service)

        yield start


@pytest.fixture(scope="module")
def server(start, embedder):
    return start(embedder)


@pytest.fixture
def small_buffers(monkeypatch):
    """Of connections to servers that are started then; or else the kernel would take all of an answer."""

    def small(*address):
        listener = listen_at(*address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr("kvembed.server.listen_at", small)


@pytest.fixture
def log():
    """Every line that the server logs meanwhile, as it would be printed."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonLines())
    loggers = {logging.getLogger("kvembed"): logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}  # as `serve`
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def call(server, body=None, path="/v1/embeddings", method="POST", headers=(), raw=None):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} | dict(headers))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def error_of(content):
    """The error in OpenAI's format, or a failure."""
    body = json.loads(content)
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


def client(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "any", "max_retries": 0} | options)


def vectors(answer):
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data], np.float32)


def test_openais_client_works_unchanged(server, embedder, tokenizer):
    texts = NOTICES[:7]
    with client(server) as api:
        answer = api.embeddings.create(model="tiny", input=texts)  # base64, unasked
        encoded = embedder.encode_with_report(texts)
        np.testing.assert_allclose(vectors(answer), encoded.vectors, atol=1e-5)
        assert (answer.model, answer.usage.prompt_tokens) == ("tiny", encoded.token_counts.sum())
        floats = api.embeddings.create(model="tiny", input=texts, encoding_format="float")
        np.testing.assert_allclose(vectors(floats), encoded.vectors, atol=1e-5)
        one = api.embeddings.create(model="tiny", input=texts[0])
        np.testing.assert_allclose(vectors(one), encoded.vectors[:1], atol=1e-5)
        ids = [tokenizer(text)["input_ids"] for text in texts]  # with the BOS in front
        np.testing.assert_allclose(vectors(api.embeddings.create(model="tiny", input=ids)), encoded.vectors, atol=1e-5)
        np.testing.assert_allclose(
            vectors(api.embeddings.create(model="tiny", input=ids[1][1:])), encoded.vectors[1:2], atol=1e-5
        )
        assert [model.id for model in api.models.list()] == ["tiny", "tiny:query"]
        assert api.models.retrieve("tiny:query").id == "tiny:query"


def test_frameworks_need_only_settings(server, embedder, monkeypatch):
    """As docs/integrations.md has it; LangChain's and LlamaIndex's clients are packages that the tests do without."""
    monkeypatch.setenv("CHROMA_OPENAI_API_KEY", "none")
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    texts, query, url = NOTICES[:40], "two\nlines", f"{server.url}/v1"
    wanted = embedder.encode_document(texts), embedder.encode_query(query)

    key = Secret.from_token("none")
    writer = OpenAIDocumentEmbedder(model="tiny", api_base_url=url, api_key=key, progress_bar=False)
    asker = OpenAITextEmbedder(model="tiny:query", api_base_url=url, api_key=key)
    documents = writer.run(documents=[Document(content=text) for text in texts])["documents"]
    np.testing.assert_allclose([document.embedding for document in documents], wanted[0], atol=1e-5)
    np.testing.assert_allclose(asker.run(text=query)["embedding"], wanted[1], atol=1e-5)

    functions = [OpenAIEmbeddingFunction(model_name=name, api_base=url) for name in ("tiny", "tiny:query")]
    np.testing.assert_allclose(functions[0](texts), wanted[0], atol=1e-5)
    np.testing.assert_allclose(functions[1].embed_query([query])[0], wanted[1], atol=1e-5)
    for one in (writer, asker, *functions):
        one.client.close()


def test_base64_is_little_endian_float32(server, embedder):
    status, _, content = call(server, {"model": "tiny", "input": "a", "encoding_format": "base64"})
    assert status == 200
    (row,) = json.loads(content)["data"]
    found = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    np.testing.assert_allclose(found, embedder.encode("a"), atol=1e-6)


def test_roles(server, embedder):
    queries = embedder.encode_query(["when?"])
    with client(server) as api:
        by_name = vectors(api.embeddings.create(model="tiny:query", input="when?"))
        by_field = vectors(api.embeddings.create(model="tiny", input="when?", extra_body={"input_type": "query"}))
        with pytest.raises(openai.BadRequestError, match="name says query"):
            api.embeddings.create(model="tiny:query", input="a", extra_body={"input_type": "document"})
    np.testing.assert_allclose(by_name, queries, atol=1e-5)
    np.testing.assert_allclose(by_field, queries, atol=1e-5)
    assert np.abs(queries - embedder.encode_document(["when?"])).max() > 1e-3


def test_dimensions(start, server, embedder, llama, tokenizer):
    with client(server) as api:
        assert len(api.embeddings.create(model="tiny", input="a", dimensions=embedder.dim).data[0].embedding) == 48
        with pytest.raises(openai.BadRequestError, match="48 dimensions always"):
            api.embeddings.create(model="tiny", input="a", dimensions=20)
    auto = Embedder.from_model(llama, tokenizer, method="auto", texts=MANY)
    with client(start(auto)) as api:
        expected = auto.replace(dim=20).encode(NOTICES[:5])
        found = vectors(api.embeddings.create(model="tiny", input=NOTICES[:5], dimensions=20))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        whole = vectors(api.embeddings.create(model="tiny", input=NOTICES[:5]))
        np.testing.assert_allclose(whole, auto.encode(NOTICES[:5]), atol=1e-5)
        with pytest.raises(openai.BadRequestError, match=f"{auto.dim} dimensions at most"):
            api.embeddings.create(model="tiny", input="a", dimensions=auto.dim + 1)


def test_a_text_too_long_is_refused_unless_it_may_be_cut(server, embedder):
    long = " ".join(NOTICES)
    with client(server) as api:
        with pytest.raises(openai.BadRequestError, match=r"input\[1\]: takes .* the limit is 1,024") as refused:
            api.embeddings.create(model="tiny", input=["a", long])
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="the limit for any text is 16,384"):
            api.embeddings.create(model="tiny", input=long * 6, extra_body={"truncate": True})
        answer = api.embeddings.create(model="tiny", input=["a", long], extra_body={"truncate": True})
    encoded = embedder.encode_with_report(["a", long])
    np.testing.assert_allclose(vectors(answer), encoded.vectors, atol=1e-5)
    assert [getattr(row, "tokens_cut", 0) for row in answer.data] == encoded.tokens_cut.tolist()
    assert encoded.tokens_cut[1] > 0


def hostile():
    """name, how it is sent; every one must be refused with a 4xx."""
    good = {"model": "tiny", "input": SECRET}
    odd = [None, True, False, 0, -1, 1.5, 1e400, float("nan"), "", "x" * 10_000, [], {}, [[]], [{}], [None], [[None]]]
    odd += [[[]] * 3, {"a": 1}, [SECRET, 5], [5, SECRET], [SECRET, None], [[1], "a"], [True], [[True]], [1.5], [[[1]]]]
    odd += [[-1], [[-1]], [10**30], [[10**30]], [2], [[2]], [400], [[1, 2], []], ["a", ""], ["\ud800"], "\udfff"]
    odd += [["a"] * 2049, [[5]] * 2049, ["a"] * 100_000, [1] * 100_000, [[70]] * 100_000, "a" * 9000]
    for index, value in enumerate(odd):
        yield f"input {index}", {"body": good | {"input": value}}
        for field in ("model", "encoding_format", "dimensions", "input_type", "truncate"):
            null = value is None and field in ("dimensions", "input_type", "encoding_format", "truncate")
            boolean = isinstance(value, bool) and field == "truncate"
            if index < 18 and not null and not boolean:
                yield f"{field} {index}", {"body": good | {field: value}}
    for name in ("", "tiny:", "tiny:passage", "other", "tiny:query:query", ":query", "../tiny", "tiny\0", "TINY"):
        yield f"model {name!r}", {"body": good | {"model": name}}
    for value in (-5, 49, 10**30, "48", 47.5):
        yield f"dimensions {value}", {"body": good | {"dimensions": value}}
    for missing in good:
        yield f"no {missing}", {"body": {key: value for key, value in good.items() if key != missing}}
    yield "unknown field", {"body": good | {"inputs": SECRET}}
    for value in (None, True, 5, "text", [], [good], {}):
        yield f"body {value!r:.20}", {"body": value, "raw": json.dumps(value).encode()}
    whole = json.dumps(good).encode()
    raws = {
        "nothing": b"",
        "half": whole[:20],
        "twice": whole * 2,
        "deep lists": b"[" * 200_000,
        "deep lists closed": b"[" * 5000 + b"]" * 5000,
        "deep objects": b'{"a":' * 100_000,
        "deep input": b'{"model":"tiny","input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "bad utf-8": b'{"model":"tiny","input":"\xff\xfe"}',
        "overlong": b'{"model":"tiny","input":"\xc0\x80"}',
        "control": b'{"model":"tiny","input":"\x00"}',
        "bare word": b"input",
        "single quotes": b"{'model': 'tiny'}",
        "lone surrogate for a field": b'{"model":"tiny","input":"a","\\ud800":1}',
        "lone surrogate for a model": b'{"model":"\\ud800","input":"a"}',
        "comment": b'{"model":"tiny",/**/"input":"a"}',
        "trailing comma": b'{"model":"tiny","input":"a",}',
        "infinity": b'{"model":"tiny","input":"a","dimensions":Infinity}',
        "huge number": b'{"model":"tiny","input":"a","dimensions":1' + b"0" * 5000 + b"}",
        "form": b"model=tiny&input=a",
        "10 MB string": b'{"model":"tiny","input":"' + b"a" * 10_000_000 + b'"}',
        "20 MB of brackets": b"[" * 20_000_000,
        "zip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
        "zeros": bytes(1000),
        "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    }
    for name, raw in raws.items():
        yield name, {"raw": raw}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png", ""):
        yield f"type {kind}", {"raw": whole, "headers": {"Content-Type": kind}}
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        yield method, {"body": None, "method": method}
    for path in (
        "/v1",
        "/v2/embeddings",
        "/v1/embeddings/x",
        "/v1/chat/completions",
        "/%00",
        "/" + "a" * 5000,
        "//",
        "*",
    ):
        yield f"path {path:.20}", {"body": good, "path": path}
    for name in ("other", "tiny:x", "%2e%2e%2ftiny", "a" * 3000):
        yield f"/v1/models/{name:.20}", {"method": "GET", "path": f"/v1/models/{name}"}
    pages = [None, [], "a", {}, {"texts": []}, {"texts": "a"}, {"texts": [""]}, {"texts": ["a"] * 33}, {"texts": [1]}]
    for index, value in enumerate(
        [*pages, {"texts": ["a"], "role": "x"}, {"texts": ["\ud800"]}, {"texts": ["a" * 9000]}]
    ):
        yield f"compare {index}", {"raw": json.dumps(value).encode(), "path": "/compare"}


HOSTILE = dict(hostile())


def test_hostile_requests_get_a_4xx_in_openais_format_and_stall_nobody(server, log):
    slowest = 0.0
    done = threading.Event()

    def others():
        nonlocal slowest
        while not done.is_set():
            started = time.perf_counter()
            assert call(server, {"model": "tiny", "input": "a"})[0] == 200
            slowest = max(slowest, time.perf_counter() - started)

    assert len(HOSTILE) >= 200
    with ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(others)
        try:
            for name, request in HOSTILE.items():
                status, headers, content = call(server, **request)
                assert 400 <= status < 500, (name, status, content[:200])
                assert headers["content-type"] == "application/json", name
                assert error_of(content)["type"] == "invalid_request_error", name
                assert SECRET not in content.decode(), name
        finally:
            done.set()
        meanwhile.result()
    assert slowest < 5
    assert len(log) >= len(HOSTILE)
    assert all({"time", "level", "message"} <= json.loads(line).keys() for line in log)
    assert not [line for line in log if SECRET in line or "a" * 40 in line or json.loads(line)["level"] == "error"]


def test_a_request_of_another_content_type_is_told_so(server):
    status, _, content = call(server, {"model": "tiny", "input": "a"}, headers={"Content-Type": "text/plain"})
    assert status == 400
    assert "the header Content-Type: application/json" in error_of(content)["message"]


def exchange(server, *parts, pause=0.0):
    """What comes back for raw bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while block := connection.recv(65536):
                answer += block
    return answer


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
        b"\r\n\r\n\r\n\r\nnonsense\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_in_the_same_format(server, raw):
    head, _, body = exchange(server, raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error_of(body)


def test_what_is_no_http_after_an_answer_ends_the_connection(server, caplog):
    """An answer there was; a traceback of asyncio's would be no line of the log."""
    head = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    assert exchange(server, head, b"zz\r\n", pause=0.5).startswith(b"HTTP/1.1 404 ")
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_who_asked_for_the_connections_end_and_never_reads_is_cut_off(start, embedder, small_buffers, log):
    """Though what waits for it is little: asyncio's own buffer takes that, and never says that it is full."""
    server = start(embedder, limits=Limits(body_seconds=0.5))
    body = json.dumps({"model": "tiny", "input": ["a"] * 60}).encode()
    head = HEAD.replace(b"1000", str(len(body)).encode()).replace(b"Host: a", b"Host: a\r\nConnection: close")
    taken = 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head + body)
        until(lambda: any('"ms"' in line for line in log))
        time.sleep(2)
        with contextlib.suppress(ConnectionResetError):
            while block := client.recv(65536):
                taken += len(block)
    assert 0 < taken < 30_000  # of about 50,000


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


def test_a_slow_client_is_told_so_and_holds_up_nobody(start, embedder):
    server = start(embedder, limits=Limits(body_seconds=1.5))
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(exchange, server, HEAD, b'{"model":', pause=0.1) for _ in range(19)]
        times = []
        for _ in range(10):
            started = time.perf_counter()
            assert call(server, {"model": "tiny", "input": "a"})[0] == 200
            times.append(time.perf_counter() - started)
        assert np.median(times) < 0.5
        for one in slow:
            head, _, body = one.result().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert "did not arrive" in error_of(body)["message"]


@contextlib.contextmanager
def held(server):
    """Nothing is embedded meanwhile."""
    free = threading.Event()
    server.service.batcher._thread.submit(free.wait)
    try:
        yield
    finally:
        free.set()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_goes_takes_its_texts_with_it(server, log):
    body = json.dumps({"model": "tiny", "input": ["a"] * 50}).encode()
    head = HEAD.replace(b"1000", str(len(body)).encode())
    with held(server):
        first = ThreadPoolExecutor(1).submit(call, server, {"model": "tiny", "input": "a"})
        until(lambda: server.service.batcher._arrived.is_set())
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            until(lambda: server.service.batcher.waiting_tokens > 500)
        until(lambda: server.service.batcher.waiting_tokens == 0)
    assert first.result()[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + body[:5])
    until(lambda: len([line for line in log if '"ms"' in line]) >= 3)
    assert {json.loads(line)["status"] for line in log} <= {200, 400, 499}


def test_the_first_answer_is_as_later_ones(tokenizer):
    """In half precision a text whose template's beginning is computed with it has another vector than after that."""
    template = "A committee approved the budget: finance. A jockey riding a horse: sport. {text}:"
    config = EmbedConfig(document=template, query=f"Also: {template}", pooling="last")
    embedder = Embedder(tiny().bfloat16(), tokenizer, config)
    create_app(embedder, ["tiny"])
    for role in ("document", "query"):
        first, second = (embedder.encode(["ferries leave at nine"], role=role) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_a_full_queue_is_429_with_the_time_to_come_back(start, embedder):
    server = start(embedder, limits=Limits(queue_tokens=200))
    with client(server) as api, ThreadPoolExecutor(40) as pool:
        with held(server):
            asked = [pool.submit(api.embeddings.create, model="tiny", input="some text") for _ in range(40)]
            until(lambda: sum(one.done() for one in asked) > 10)
            full = [one.exception() for one in asked if one.done()]
        answered = [one for one in asked if one.exception() is None]
    for error in full:
        assert isinstance(error, openai.RateLimitError)
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert error.type == "rate_limit_error"
    assert len(answered) >= 3
    with client(server) as api, pytest.raises(openai.BadRequestError, match="more than 200 tokens in all"):
        api.embeddings.create(model="tiny", input=["some text"] * 40)


def test_too_many_requests_at_once_are_429(start, embedder):
    server = start(embedder, limits=Limits(requests=2, body_seconds=5))
    with socket.create_connection(("127.0.0.1", server.port)) as a, socket.create_connection(a.getpeername()) as b:
        a.sendall(HEAD)
        b.sendall(HEAD)
        time.sleep(0.3)
        status, headers, content = call(server, {"model": "tiny", "input": "a"})
        assert (status, headers["retry-after"]) == (429, "1")
        error_of(content)
        assert call(server, path="/health", method="GET")[0] == 200
    until(lambda: call(server, {"model": "tiny", "input": "a"})[0] == 200)


def test_a_client_that_does_not_read_its_answer_makes_room_again():
    """One that asks on and on: the server can't hold all its answers, and waits no longer than for a body."""
    limits = {"max_requests": 1, "max_bytes": 9, "held_bytes": 99, "body_seconds": 0.1}
    gate = Gate(fastapi.FastAPI(), keys=[], **limits, registry=CollectorRegistry())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        await asyncio.sleep(60)

    asyncio.run(asyncio.wait_for(gate(dict(scope), receive, send), 20))
    sent = []

    async def keep(message):
        sent.append(message.get("status"))

    asyncio.run(gate(dict(scope), receive, keep))
    assert sent[0] == 404  # and not 429


def test_an_unread_answer_is_sent_in_pieces_and_its_connection_ends(start, embedder, small_buffers):
    server = start(embedder, limits=Limits(body_seconds=0.5))
    body = json.dumps({"model": "tiny", "input": ["a"] * 2048}).encode()
    unread = socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    unread.settimeout(20)
    with unread:
        unread.connect(("127.0.0.1", server.port))
        unread.sendall(HEAD.replace(b"1000", str(len(body)).encode()) + body)
        until(lambda: 'status="499"} 1.0' in call(server, path="/metrics", method="GET")[2].decode())
        time.sleep(1)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while block := unread.recv(65536):
                taken += len(block)
    whole = call(server, {"model": "tiny", "input": ["a"] * 2048})
    assert whole[0] == 200
    assert 0 < taken < len(whole[2]) / 2


def test_bodies_without_a_key_take_no_room(start, embedder):
    server = start(embedder, keys=["k"], limits=Limits(held_bytes=50_000, body_seconds=20))
    with socket.create_connection(("127.0.0.1", server.port)) as large:
        large.sendall(HEAD.replace(b"1000", b"60000") + b" " * 45_000)
        time.sleep(0.3)
        for _ in range(3):
            assert call(server, raw=b" " * 40_000, headers={"Authorization": "Bearer k"})[0] == 400
        assert call(server, raw=b" " * 40_000)[0] == 401


def test_bodies_of_all_requests_together_have_a_limit(start, embedder):
    server = start(embedder, limits=Limits(held_bytes=50_000, body_seconds=20))
    with socket.create_connection(("127.0.0.1", server.port)) as large:
        large.sendall(HEAD.replace(b"1000", b"60000") + b" " * 45_000)
        until(lambda: call(server, raw=b" " * 10_000)[0] == 429)
        status, headers, content = call(server, raw=b" " * 10_000)
        assert (status, headers["retry-after"]) == (429, "1")
        assert error_of(content)["code"] == "rate_limit_exceeded"
        assert call(server, {"model": "tiny", "input": "a"})[0] == 200
    until(lambda: call(server, raw=b" " * 10_000)[0] == 400)


def test_a_small_request_is_not_held_up_by_the_tokenising_of_large_ones(start, embedder, monkeypatch):
    server = start(embedder, limits=Limits(queue_tokens=2**30))
    read = server.service._read

    def slowly(*args):
        time.sleep(0.1)
        return read(*args)

    monkeypatch.setattr(server.service, "_read", slowly)
    monkeypatch.setattr("kvembed.service._PIECE", 2**11)
    large = {"model": "tiny", "input": ["some text " * 10] * 600}  # 30 pieces each
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(call, server, large) for _ in range(4)]
        time.sleep(0.5)
        started = time.perf_counter()
        assert call(server, {"model": "tiny", "input": "hi"})[0] == 200
        assert time.perf_counter() - started < 4
        assert not any(one.done() for one in asked)
        for one in asked:
            one.cancel()


def test_what_will_not_fit_beside_others_is_not_tokenised(start, embedder, monkeypatch):
    server = start(embedder, limits=Limits(queue_tokens=3000))
    with held(server):
        first = ThreadPoolExecutor(1).submit(call, server, {"model": "tiny", "input": "a"})
        until(lambda: server.service.batcher._arrived.is_set())
        second = ThreadPoolExecutor(1).submit(call, server, {"model": "tiny", "input": ["some text"] * 20})
        until(lambda: server.service.batcher.waiting_tokens > 100)
        monkeypatch.setattr(server.service, "_read", lambda *_: pytest.fail("it was"))
        status, _, content = call(server, {"model": "tiny", "input": ["some words " * 20] * 60})
        assert (status, error_of(content)["code"]) == (429, "rate_limit_exceeded")
    assert first.result()[0] == second.result()[0] == 200


def test_two_servers_at_one_address(embedder):
    first, second = (listen_at("127.0.0.1", 0), socket.socket())
    second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    second.bind(first.getsockname())
    with first, second:
        first.listen()
        with pytest.raises(InputError, match="can't listen on 127"):
            serve(embedder, ["tiny"], second)


def test_a_slash_at_the_end_is_another_path(server):
    for path, method in (("/health/", "GET"), ("/v1/embeddings/", "POST")):
        status, _, content = call(server, {} if method == "POST" else None, path, method)
        assert (status, error_of(content)["code"]) == (404, "not_found")


@pytest.mark.parametrize("names", [[""], ["a", "a"], ["a", "a:query"], ["b:document"]])
def test_names_that_clients_could_not_tell_apart_are_refused(embedder, names):
    with pytest.raises(InputError, match="--name"):
        create_app(embedder, names)
    options = [part for name in names for part in ("--name", name)]
    result = CliRunner().invoke(cli, ["serve", "nosuch", *options])  # before a model is looked for
    assert result.exit_code == 1
    assert "--name" in result.stderr


def test_keys_are_asked_for_wherever_the_application_is_mounted(embedder):
    app = fastapi.FastAPI()
    app.mount("/below", create_app(embedder, ["tiny"], keys=["key"]))
    with TestClient(app) as below:
        assert below.get("/below/v1/models").status_code == 401
        assert below.get("/below/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200


def test_a_text_that_no_queue_can_hold_is_not_even_tokenised(start, llama, tokenizer):
    """Where a model takes texts of any length, as without a forward."""
    embedder = Embedder.from_model(llama, tokenizer, method="static", texts=MANY)
    server = start(embedder, limits=Limits(queue_tokens=100))
    status, _, content = call(server, {"model": "tiny", "input": "a" * 5000})
    assert status == 400
    assert "the limit for any text is 1,600" in error_of(content)["message"]


def test_a_packed_body_is_refused(start, embedder):
    server = start(embedder)
    packed = gzip.compress(b'{"model": "tiny", "input": "a"}')
    status, _, content = call(server, raw=packed, headers={"Content-Encoding": "gzip"})
    assert (status, error_of(content)["message"]) == (415, "A body is taken as it is: leave Content-Encoding out.")
    plain = {"Content-Encoding": "identity"}
    assert call(server, {"model": "tiny", "input": "a"}, headers=plain)[0] == 200


def test_keys(start, embedder, log):
    server = start(embedder, keys=["first key", "sécond"])
    for sent in (None, "", "Bearer", "Bearer wrong", "Basic first key", "Bearer first", "Bearer first key2"):
        headers = {} if sent is None else {"Authorization": sent}
        for path in ("/v1/embeddings", "/v1/models", "/v1/nothing", "/compare"):
            method = "GET" if path == "/v1/models" else "POST"
            status, answer, content = call(server, {"model": "tiny", "input": SECRET}, path, method, headers)
            assert (status, error_of(content)["code"]) == (401, "invalid_api_key")
            assert answer["www-authenticate"] == "Bearer"
    big = b" " * 10_000_000
    assert call(server, raw=big)[0] == 401
    assert call(server, raw=big, headers={"Authorization": "Bearer first key"})[0] == 413
    for key in ("first key", "sécond"):
        headers = {"Authorization": f"bearer {key}".encode()}
        assert call(server, {"model": "tiny", "input": "a"}, headers=headers)[0] == 200
    for path in ("/health", "/ready", "/metrics", "/"):
        assert call(server, path=path, method="GET")[0] == 200
    assert not [line for line in log if "key" in line or SECRET in line]


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("KVEMBED_API_KEYS", raising=False)
    assert api_keys(None) == []
    monkeypatch.setenv("KVEMBED_API_KEYS", "a, b,")
    assert api_keys(None) == ["a", "b"]
    (tmp_path / "keys").write_text("\ufeffc\n\n d \n")  # with the mark that some editors put first
    assert api_keys(tmp_path / "keys") == ["c", "d"]
    (tmp_path / "none").write_text("\n")
    for name, message in [("none", "holds no key"), ("gone", "no such file")]:
        with pytest.raises(InputError, match=message):
            api_keys(tmp_path / name)


def test_metrics_and_probes(server):
    def value(name):
        content = call(server, path="/metrics", method="GET")[2].decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", content, re.MULTILINE)[1])

    name = 'kvembed_requests_total{path="/v1/embeddings",status="200"}'
    assert call(server, {"model": "tiny", "input": "a"})[0] == 200
    before = value(name), value("kvembed_texts_total"), value("kvembed_tokens_total")
    content = call(server, {"model": "tiny", "input": ["a", "b"]})[2]
    after = value(name), value("kvembed_texts_total"), value("kvembed_tokens_total")
    assert np.subtract(after, before).tolist() == [1, 2, json.loads(content)["usage"]["total_tokens"]]
    assert value("kvembed_waiting_tokens") == 0
    assert value("process_resident_memory_bytes") > 1e7
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        assert json.loads(call(server, path=path, method="GET")[2]) == {"status": status}
        assert call(server, path=path, method="HEAD")[::2] == (200, b"")


def test_an_unexpected_error_is_a_500_whose_words_are_not_logged(server, embedder, log, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(embedder, "encode_prompts", broken)
    status, _, content = call(server, {"model": "tiny", "input": [SECRET, SECRET]})
    assert (status, error_of(content)["type"]) == (500, "server_error")
    assert SECRET not in content.decode() + "".join(log)
    assert [json.loads(line)["exception"] for line in log if "unexpected" in line] == ["ZeroDivisionError"]
    monkeypatch.undo()
    assert call(server, {"model": "tiny", "input": "a"})[0] == 200


def test_many_clients_at_once_get_their_own_vectors(server, embedder):
    texts = [" ".join(NOTICES[i % 48 : i % 48 + 1 + i % 5]) for i in range(96)]
    expected = embedder.encode(texts)
    with client(server) as api, ThreadPoolExecutor(32) as pool:
        asked = pool.map(lambda i: api.embeddings.create(model="tiny", input=texts[i : i + 3]), range(0, 96, 3))
        found = np.concatenate([vectors(answer) for answer in asked])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_description_holds_for_whatever_is_sent(server, mode):
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/embeddings", "/v1/models", "/compare", "/health"}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to get wrong

        @settings(max_examples=40, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            answer = case.call_and_validate(checks=checks)
            if answer.status_code >= 400:
                error_of(answer.content)

        send()


@contextlib.contextmanager
def command(*arguments, **options):
    arguments = [sys.executable, "-m", "kvembed", "serve", *map(str, arguments), "--dtype", "float32"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_finishes_what_it_took_when_told_to_stop(folder, embedder, number, code):
    texts = [NOTICES[i % 48] for i in range(480)]
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (ignored where tests run behind)
    with command(folder, "--port", 0, "--name", "tiny", "--name", "other", preexec_fn=default) as process:
        first = json.loads(process.stderr.readline())
        assert (first["message"], first["model"]) == ("listening", "tiny")
        server = SimpleNamespace(port=urlsplit(first["address"]).port, url=first["address"])
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "other", "input": texts, "encoding_format": "base64"}
            taken = pool.submit(call, server, body)
            until(lambda: b"kvembed_batch_texts_count 0.0" not in call(server, path="/metrics", method="GET")[2])
            process.send_signal(number)
            status, _, content = taken.result()
        lines = process.stderr.read().splitlines()
        assert process.wait(30) == code
    assert status == 200
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in json.loads(content)["data"]]
    np.testing.assert_allclose(rows[-48:], embedder.encode(texts[:48]), atol=1e-5)
    if number == signal.SIGINT:
        assert lines.pop() == "kvembed: interrupted"
    assert [json.loads(line)["message"] for line in lines][-2:] == ["request", "stopped"]


def test_the_command_says_in_one_line_what_is_wrong(folder, tmp_path, monkeypatch):
    """And before a model is loaded, where it can."""
    folder = tmp_path / "no-model"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in [
            ((folder, "--port", port), f"can't listen on 127.0.0.1:{port}: address already in use"),
            ((folder, "--port", 0, "--keys", tmp_path / "gone"), "gone: no such file or directory"),
        ]:
            result = CliRunner().invoke(cli, ["serve", *map(str, arguments)])
            assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
            assert message in result.stderr
    with pytest.raises(InputError, match=r"can't listen on no\.such\.host\.invalid:80"):
        listen_at("no.such.host.invalid", 80)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(cli, ["serve", str(folder)])
    assert "this needs uvicorn: pip install 'kvembed[server]'" in result.stderr


def test_the_page_compares_texts(browser, start, server, embedder):
    for url, key in ((server.url, None), (start(embedder, keys=["k"]).url, "k")):
        for theme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.get(url)
            assert (ground(browser)[0] > 128) == (theme == "light")
            field = browser.find_element("id", "texts")
            field.clear()
            field.send_keys("<b>Bees</b> swarm & sting\n\nBees & wasps\nMoths lay eggs")
            if key:
                browser.find_element("id", "form").submit()
                until(lambda: "No API key" in browser.find_element("id", "status").text)
                browser.find_element("id", "key").send_keys(key)
            browser.find_element("css selector", "form button").click()
            until(lambda: browser.find_elements("css selector", "table.beta td"))
            cells = [cell.text for cell in browser.find_elements("css selector", "table.cosines tbody td")]
            texts = ["<b>Bees</b> swarm & sting", "Bees & wasps", "Moths lay eggs"]
            vectors = embedder.encode(texts)
            assert cells == [f"{value:.2f}" for value in (vectors @ vectors.T).ravel()]
            heads = [cell.text for cell in browser.find_elements("css selector", "table.beta tbody th")]
            assert heads == ["layer 1", "layer 2", "mean"]
            assert "<b>Bees</b> swarm" in browser.find_element("css selector", "table.cosines tbody th").text
            loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            assert {urlsplit(name).path for name in loaded} == {"/compare"}
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        complaints = [line["message"] for line in browser.get_log("browser")]
        assert all("401" in line for line in complaints)


@pytest.mark.slow
def test_64_clients_with_mixed_lengths(folder, tmp_path):
    """The long run, on a real model, is tools/serve_load.py."""
    path = Path(__file__).parent.parent / "tools" / "serve_load.py"
    arguments = ["--model", folder, "--out", tmp_path, "--clients", "64", "--seconds", "45", "--texts", "400"]
    arguments += [
        "--dtype",
        "float32",
    ]  # in bfloat16 a random model's vectors may move more than a wrong batch would show
    subprocess.run([sys.executable, path, *arguments], check=True)
    told = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {*told["load"]["outcomes"]} <= {"answered", "status 429"}
    assert told["load"]["outcomes"]["answered"] > 500
    warm, end = told["load"]["memory_mb"]
    assert end <= 1.05 * warm
    assert told["difference"] < (1e-5 if told["dtype"] == "float32" else 0.03)  # bfloat16 rounds by the batch
