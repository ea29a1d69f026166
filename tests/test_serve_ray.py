"""The server on a real Ray Serve: two replicas speak OpenAI's API, and one that is killed is replaced meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import psutil
import pydantic
import pytest
import yaml
from conftest import NOTICES
from fastapi.testclient import TestClient
from pages import blocks

from kvembed import Embedder, InputError, KvembedError

SERVE = Path(sys.executable).with_name("serve")
OFF = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "1"}


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


@pytest.fixture(scope="module")
def serve_ray():
    with warnings.catch_warnings():  # Ray's own use of pydantic
        warnings.simplefilter("ignore", DeprecationWarning)
        from kvembed import serve_ray
    return serve_ray


def test_arguments_as_the_command_line_gives_them(serve_ray, folder):
    given = {"model": str(folder), "layers": "2-3", "bias": "2.5", "max_tokens": "99", "replicas": "2", "cpus": "0.5"}
    arguments = serve_ray.Arguments.model_validate(given)
    config = arguments.embedder().config
    assert (config.layers, config.bias, config.max_tokens) == ((2, 3), 2.5, 99)
    assert (arguments.replicas, arguments.cpus) == (2, 0.5)
    assert serve_ray.Arguments(replicas="auto").replicas == "auto"
    for wrong in ({"modell": "x"}, {"replicas": "many"}, {"cpus": "0"}, {"queue_tokens": "0"}, {"model": ""}):
        with pytest.raises(pydantic.ValidationError):
            serve_ray.Arguments.model_validate(wrong)
    for unused in ({"bias": 3.0}, {"method": "static", "layers": "2-3"}):  # as the command line refuses them
        with pytest.raises(InputError, match=r"--(bias|layers)"):
            serve_ray.Arguments(**{"model": str(folder), "method": "mean"} | unused).embedder()


def test_the_page_tells_what_is_taken(serve_ray):
    text = (Path(__file__).parent.parent / "docs" / "server.md").read_text()
    (config,) = [yaml.safe_load(block.text) for block in blocks(text) if block.language == "yaml"]
    (command,) = re.findall(r"^\$ serve run kvembed.serve_ray:app (.*)$", text, re.MULTILINE)
    for given in (config["applications"][0]["args"], dict(part.split("=") for part in command.split())):
        serve_ray.Arguments.model_validate(given)
    assert all(f"`{name}`" in text for name in serve_ray.Arguments.model_fields)


def test_a_replica_is_healthy_while_batches_are_taken(serve_ray, folder):
    replica = serve_ray.Replica(serve_ray.Arguments(model=str(folder), dtype="float32"), ["secret"])
    app = replica.__serve_build_asgi_app__()
    with pytest.raises(KvembedError, match="no batches"):
        replica.check_health()
    with TestClient(app) as client:
        replica.check_health()
        assert client.get("/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"
    with pytest.raises(KvembedError, match="no batches"):
        replica.check_health()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def running(folder, tmp_path_factory):
    """`serve run` of two replicas, on a cluster that Ray starts for it on this machine."""
    home = tmp_path_factory.mktemp("serve")
    port = free_port()
    (home / "keys").write_text("secret\n")
    args = {"model": str(folder), "dtype": "float32", "max_tokens": 400, "replicas": 2, "cpus": 0.5}
    args |= {"keys": str(home / "keys")}
    application = {"name": "kvembed", "import_path": "kvembed.serve_ray:app", "route_prefix": "/", "args": args}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (home / "config.yaml").write_text(json.dumps(config))  # YAML takes JSON
    with (home / "log").open("w") as log:
        command = [SERVE, "run", home / "config.yaml"]
        environment = os.environ | OFF
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    said = lambda: (home / "log").read_text()  # noqa: E731
    try:
        wait_for(lambda: len(replicas(process)) == 2 and answers(port), process, said)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", process=process, said=said)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            for one in descendants(process):
                one.kill()
            process.kill()


def wait_for(true, process, said, seconds=180):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


def answers(port):
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        return bool(client.models.list().data)
    except openai.APIError:
        return False


def descendants(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def replicas(process):
    """Process ids of the replicas."""
    found = set()
    for one in descendants(process):
        try:
            if "ServeReplica" in " ".join(one.cmdline()):
                found.add(one.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=running.url, api_key="secret") as client:
        yield client


def vectors(client, texts, model="tiny"):
    return np.array([row.embedding for row in client.embeddings.create(model=model, input=texts).data], np.float32)


@pytest.mark.slow
def test_openais_client_gets_the_librarys_vectors(client, embedder):
    for start in range(0, 40, 4):  # either replica
        texts = NOTICES[start : start + 4]
        np.testing.assert_allclose(vectors(client, texts), embedder.encode(texts), atol=1e-5)
    np.testing.assert_allclose(vectors(client, ["when?"], "tiny:query"), embedder.encode_query(["when?"]), atol=1e-5)


@pytest.mark.slow
def test_errors_and_keys_are_the_servers_own(running, client):
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]: takes .* the limit is 400"):
        vectors(client, [" ".join(NOTICES[:20])])
    with pytest.raises(openai.AuthenticationError):
        vectors(client.with_options(api_key="another"), ["a"])
    with pytest.raises(openai.NotFoundError):
        vectors(client, ["a"], model="gone")


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_requests_go_on(running, client, embedder):
    before = replicas(running.process)
    assert len(before) == 2
    expected = embedder.encode(NOTICES[:8])
    stop, errors, count = threading.Event(), [], 0

    def ask():
        nonlocal count
        while not stop.is_set():
            try:
                np.testing.assert_allclose(vectors(client, NOTICES[:8]), expected, atol=1e-5)
                count += 1
            except Exception as error:
                errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        time.sleep(1)
        os.kill(min(before), signal.SIGKILL)
        killed_after = count
        wait_for(
            lambda: len(replicas(running.process)) == 2 and min(before) not in replicas(running.process),
            running.process,
            running.said,
        )
        then = count
        wait_for(lambda: count > then + 20 or errors, running.process, running.said)
    finally:
        stop.set()
        asking.join(60)
    assert not errors
    assert killed_after < then, "no request was answered while one replica was missing"
