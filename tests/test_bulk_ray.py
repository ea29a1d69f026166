"""The same job on a real Ray cluster of two nodes: the same shards, and no shard lost with a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import NOTICES
from ray.cluster_utils import Cluster
from test_bulk import content
from test_shards import write

from kvembed import Embedder
from kvembed.bulk import bulk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


@pytest.fixture
def cluster():
    """Two nodes of one CPU each; `lose` kills the second one, raylet and workers."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.lose = lambda: cluster.remove_node(second, allow_graceful=False)
    yield cluster
    cluster.shutdown()


def start(address, folder, source, out, *options):
    command = [sys.executable, "-m", "kvembed", "bulk", source, out, "--model", folder, "--engine", "ray"]
    command += ["--dtype", "float32"]
    command += ["--address", address, *options]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), **output, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})


OPTIONS = {"id_field": "key", "shard_rows": 15, "model": "tiny"}


@pytest.fixture(scope="module")
def local(embedder, tmp_path_factory):
    """The input, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("local")
    write(folder / "in.parquet", [f"{i} {text}" for i in range(15) for text in NOTICES], group=200)
    bulk(embedder, folder / "in.parquet", folder / "out", **OPTIONS)
    return folder


@pytest.mark.parametrize("lose", [False, True])
def test_two_nodes_make_what_one_process_makes(cluster, embedder, folder, local, tmp_path, lose):
    out = tmp_path / "out"
    with start(cluster.address, folder, local / "in.parquet", out, "--id-field", "key", "--shard-rows", 15) as process:
        if lose:
            while len(list(out.glob("shard-*"))) < 4 and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None
            cluster.lose()
        printed, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert printed.count("\n") == 1
    assert printed.startswith(f"{out}: 720 rows of 48 dimensions in 48 shards, ")
    ours, theirs = pq.read_table(local / "out"), pq.read_table(out)
    assert theirs["id"].to_pylist() == [f"id {i}" for i in range(720)]
    a, b = (table["embedding"].combine_chunks().flatten().to_numpy() for table in (ours, theirs))
    assert abs(a - b).max() < 1e-5
    assert theirs.drop(["embedding"]).equals(ours.drop(["embedding"]))
    a, b = (json.loads((path / "_manifest.json").read_text()) for path in (local / "out", out))
    assert a["job"] == b["job"]
    assert content(out).keys() == content(local / "out").keys()
    # what one engine has begun, the other goes on with
    (out / "shard-000007.parquet").unlink()
    assert bulk(embedder, local / "in.parquet", out, **OPTIONS).made == 1


def test_mistakes_are_one_line(cluster, folder, tmp_path):
    source = tmp_path / "in.jsonl"
    write(source, ["a", "b"])
    with start(cluster.address, folder, source, tmp_path / "out", "--max-tokens", 17) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.splitlines()[-1] == "kvembed: max_tokens is 17, but the template alone takes 31 tokens"


def test_no_cluster_there(folder, tmp_path):
    write(tmp_path / "in.jsonl", ["a", "b"])
    with start("127.0.0.1:1", folder, tmp_path / "in.jsonl", tmp_path / "out") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("kvembed: no Ray cluster at 127.0.0.1:1: ")
    assert error.endswith("Connection refused\n")
