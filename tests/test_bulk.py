"""Every text once, in order, with the library's vectors; whatever stops a job, the same command ends it the same."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MANY, NOTICES, tiny
from filelock import FileLock
from test_shards import write
from typer.testing import CliRunner

from kvembed import Embedder, InputError
from kvembed.bulk import bulk, run_here
from kvembed.bulk_ray import _Actor, _written
from kvembed.cli import app

TEXTS = [f"{i} {NOTICES[i % len(NOTICES)]}" for i in range(40)]


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2], max_tokens=40)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in {"a.csv": TEXTS[:12], "b.jsonl": TEXTS[12:13], "c.parquet": TEXTS[13:]}.items():
        write(folder / name, part, [f"{name} {i}" for i in range(len(part))])
    return folder


@pytest.fixture(scope="module")
def whole(embedder, source, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    bulk(embedder, source, out, shard_rows=4)
    return out


def content(out):
    """All that a job leaves, the lock apart."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "_lock"}


def vectors(table):
    return np.array(table["embedding"].to_pylist(), np.float32)


def test_every_text_once_with_the_vector_it_has_alone(embedder, source, tmp_path):
    summary = bulk(embedder, source, tmp_path / "out", shard_rows=4, model="tiny", id_field="key")
    table = pq.read_table(tmp_path / "out")  # the manifest and the lock do not disturb readers
    expected = embedder.encode_with_report(TEXTS)
    assert table["id"].to_pylist()[10:15] == ["a.csv 10", "a.csv 11", "b.jsonl 0", "c.parquet 0", "c.parquet 1"]
    np.testing.assert_allclose(vectors(table), expected.vectors, atol=1e-5)
    assert table["tokens"].to_pylist() == expected.token_counts.tolist()
    assert table["tokens_cut"].to_pylist() == expected.tokens_cut.tolist()
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[48]"
    assert (summary.rows, summary.shards, summary.made, summary.dim) == (40, 10, 10, 48)
    assert (summary.tokens, summary.texts_cut) == (expected.token_counts.sum(), expected.truncated)
    assert summary.texts_cut > 0


def test_the_manifest_says_what_is_where(embedder, source, whole):
    manifest = json.loads((whole / "_manifest.json").read_text())
    job, shards = manifest["job"], manifest["shards"]
    assert manifest["finished"] is True
    assert job["fingerprint"] == embedder.fingerprint()
    assert job["config"] == json.loads(json.dumps(embedder.config.to_dict()))
    assert (job["config_hash"], job["dim"], job["shard_rows"]) == (embedder.config.hash(), 48, 4)
    assert [file["rows"] for file in job["inputs"]] == [[0, 12], [12, 13], [13, 40]]
    for file in job["inputs"]:
        assert file["sha256"] == hashlib.sha256((source / file["path"]).read_bytes()).hexdigest()
    assert [shard["rows"] for shard in shards] == [[i, i + 4] for i in range(0, 40, 4)]
    for shard in shards:
        data = (whole / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert pq.read_table(whole / shard["name"])["id"].to_pylist() == list(range(*shard["rows"]))


def test_a_transform_and_a_role(source, tmp_path, llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, method="auto", texts=MANY, dim=7)
    bulk(embedder, source, tmp_path / "out", role="query")
    np.testing.assert_allclose(vectors(pq.read_table(tmp_path / "out")), embedder.encode_query(TEXTS), atol=1e-5)
    job = json.loads((tmp_path / "out" / "_manifest.json").read_text())["job"]
    assert (job["transform"], job["role"], job["dim"]) == (embedder.transform.digest(), "query", 7)


@pytest.mark.parametrize("stop", [0, 1, 9])
def test_a_stopped_job_ends_as_one_that_was_not(embedder, source, whole, tmp_path, stop):
    def until_stop(job, embedder, shards, report):
        for count, written in enumerate(run_here(job, embedder, shards, report)):
            if count == stop:
                raise KeyboardInterrupt
            yield written

    with pytest.raises(KeyboardInterrupt):
        bulk(embedder, source, tmp_path / "out", shard_rows=4, engine=until_stop)
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["finished"] is False
    (tmp_path / "out" / ".shard-000003.parquet.xyz").write_bytes(b"half a sh")  # as a kill leaves it
    (tmp_path / "out" / "shard-000002.parquet").unlink(missing_ok=True)  # a gap
    summary = bulk(embedder, source, tmp_path / "out", shard_rows=4)
    assert summary.made == 10 - (stop + 1) + (stop >= 2)
    assert content(tmp_path / "out") == content(whole)
    assert bulk(embedder, source, tmp_path / "out", shard_rows=4).made == 0
    assert content(tmp_path / "out") == content(whole)


def test_long_shards_are_embedded_in_blocks(embedder, tmp_path, monkeypatch):
    """Of so many rows, and of so many characters; every row is in one of them."""
    monkeypatch.setattr("kvembed.batching._BLOCK_ITEMS", 4)
    monkeypatch.setattr("kvembed.batching._BLOCK_CHARACTERS", 100)
    texts = ["x", "y" * 40, "z" * 60, "z" * 300, *"123456789"]
    write(tmp_path / "in.jsonl", texts)
    blocks = []

    def watched(job, embedder, shards, report):
        return run_here(job, embedder, shards, lambda rows, tokens: blocks.append(rows))

    bulk(embedder, tmp_path / "in.jsonl", tmp_path / "out", engine=watched)
    assert blocks == [2, 1, 1, 4, 4, 1]
    found = vectors(pq.read_table(tmp_path / "out"))
    np.testing.assert_allclose(found, embedder.encode(texts), atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "gone"])
def test_a_damaged_shard_is_made_again(embedder, source, whole, tmp_path, damage, caplog):
    out = tmp_path / "out"
    bulk(embedder, source, out, shard_rows=4)
    path = out / "shard-000004.parquet"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1  # only the checksum can tell
    path.write_bytes(
        data[:-5] if damage == "cut" else (out / "shard-000005.parquet").read_bytes() if damage == "other" else data
    )
    if damage == "gone":
        path.unlink()
    assert bulk(embedder, source, out, shard_rows=4).made == 1
    told = "missing" if damage == "gone" else "damaged"
    assert f"shard-000004.parquet is {told}, and is made again" in caplog.text
    assert content(out) == content(whole)


def test_a_shard_damaged_before_its_job_was_finished_is_made_again(embedder, source, whole, tmp_path, caplog):
    out = tmp_path / "out"
    bulk(embedder, source, out, shard_rows=4)
    manifest = json.loads((out / "_manifest.json").read_text())
    del manifest["shards"]
    (out / "_manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (out / "shard-000009.parquet").unlink()
    path = out / "shard-000004.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert bulk(embedder, source, out, shard_rows=4).made == 2
    assert "shard-000004.parquet is damaged, and is made again" in caplog.text
    assert content(out) == content(whole)


def test_a_finished_job_starts_no_engine(embedder, source, whole):
    def engine(*_):
        pytest.fail("nothing is left to be made")

    assert bulk(embedder, source, whole, shard_rows=4, engine=engine).made == 0


def test_another_job_is_refused(embedder, source, whole, tmp_path, llama, tokenizer):
    before = content(whole)

    def refused(message, embedder=embedder, source=source, **options):
        with pytest.raises(InputError, match=rf"out holds another job \({message}\); choose another folder"):
            bulk(embedder, source, whole, **{"shard_rows": 4} | options)

    refused("bias 1.0, not 2.0", embedder.replace(bias=2.0))
    refused(r"layers \[1, 2\], not \[1\]", embedder.replace(layers=[1]))
    refused("fingerprint .*, not .*", Embedder.from_model(tiny(seed=1), tokenizer, layers=[1, 2], max_tokens=40))
    refused("batch_tokens 2048, not 100", Embedder(llama, tokenizer, embedder.config, batch_tokens=100))
    refused("shard_rows 4, not 9", shard_rows=9)
    refused('role "document", not "query"', role="query")
    refused('id_field null, not "key"', id_field="key")
    copy = tmp_path / "corpus"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert bulk(embedder, copy, whole, shard_rows=4).made == 0  # the same texts at another place
    write(copy / "b.jsonl", ["other"], ["b.jsonl 0"])
    refused(r"input b\.jsonl has changed, or is new", source=copy)
    (copy / "b.jsonl").unlink()
    refused(r"input c\.parquet has changed, or is new", source=copy)
    (copy / "a.csv").rename(copy / "a2.csv")
    refused(r"input a\.csv, not a2\.csv", source=copy)
    assert content(whole) == before


def test_a_hostile_manifest_leads_nowhere(embedder, source, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    bulk(embedder, source, out)
    outside.write_text("untouched")
    path = out / "_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"].append({"name": "../outside", "sha256": "0"})
    path.write_text(json.dumps(manifest))
    bulk(embedder, source, out)
    manifest["job"]["inputs"][0]["path"] = "../outside"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another job"):
        bulk(embedder, source, out)
    assert outside.read_text() == "untouched"
    for broken in ("", "[]", "{}", '{"job": {}, "shards": [1]}', '{"job": {}, "shards": 5}'):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"_manifest\.json is not the manifest of a bulk job|another job"):
            bulk(embedder, source, out)


def test_one_process_at_a_time(embedder, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / "_lock"), pytest.raises(InputError, match="out: another process is writing to it"):
        bulk(embedder, source, out)
    assert bulk(embedder, source, out).made == 1


def test_a_folder_is_taken_by_its_first_shard(embedder, source, tmp_path):
    """Not by a job that failed, or was stopped, before it had one."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"^max_tokens is 17, but the template"):
        bulk(embedder.replace(max_tokens=17), source, out)
    assert not out.exists()

    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bulk(embedder.replace(bias=2.0), source, out, engine=stopped)
    assert bulk(embedder, source, out, shard_rows=30).made == 2
    (out / "shard-000001.parquet").unlink()
    with pytest.raises(InputError, match="another job"):
        bulk(embedder.replace(bias=2.0), source, out, shard_rows=30)


def test_a_log_has_a_line_now_and_then(embedder, source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("kvembed.bars._SECONDS", 0.0)
    with caplog.at_level("INFO", "kvembed.bars"):
        bulk(embedder, source, tmp_path / "out", shard_rows=20, progress=True)
    lines = [line for line in caplog.messages if line.startswith("bulk: ")]
    assert [re.sub(r"\d\d:\d\d", "..", line) for line in lines] == [f"bulk: {n} of 40 rows, .. left" for n in (20, 40)]


def run(*args):
    return CliRunner().invoke(app, ["bulk", *map(str, args), "--dtype", "float32"])


def test_the_command(folder, source, whole, tmp_path):
    out = tmp_path / "out"
    done = run(source, out, "--model", folder, "--shard-rows", 4)
    total = sum(pq.read_table(whole)["tokens"].to_pylist())
    cut = sum(x > 0 for x in pq.read_table(whole)["tokens_cut"].to_pylist())
    told = f"{out}: 40 rows of 48 dimensions in 10 shards, {total:,} tokens; {cut} texts cut to 40 tokens\n"
    assert (done.stdout, done.stderr) == (told, "")
    (out / "shard-000000.parquet").unlink()
    assert "in 10 shards (9 there before)," in run(source, out, "--model", folder, "--shard-rows", 4).stdout
    assert {**content(out), "_manifest.json": b""} == {**content(whole), "_manifest.json": b""}
    assert json.loads((out / "_manifest.json").read_text())["model"] == "tiny"


def test_a_job_goes_on_with_its_own_fit(folder, llama, tokenizer, source, tmp_path):
    """On a machine that has not got it, say."""
    fit, out = tmp_path / "fit.safetensors", tmp_path / "out"
    Embedder.from_model(llama, tokenizer, method="static", texts=MANY).transform.save(fit)
    job = (source, out, "--model", folder, "--shard-rows", 4, "--method")
    assert run(*job, "static", "--fitted", fit).exit_code == 0
    assert (out / "_transform.safetensors").read_bytes() == fit.read_bytes()
    before = content(out)
    (out / "shard-000000.parquet").unlink()
    assert "in 10 shards (9 there before)," in run(*job, "static").stdout
    assert content(out) == before
    assert (
        "out holds a job with a fit of its own (_transform.safetensors): the transform was fitted for method static"
        in (run(*job, "auto").stderr)
    )
    assert "out holds another job" in run(*job, "mean").stderr


def test_the_documented_commands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "x.jsonl").write_text('{"key": "a", "body": "text"}\n')
    text = (Path(__file__).parent.parent / "docs" / "bulk.md").read_text()
    commands = [line for line in re.findall(r"^\$ kvembed bulk ([^#\n]+)", text, re.M) if "ray" not in line]
    assert len(commands) == 2
    for command in commands:
        done = run(*shlex.split(command), "--model", folder)
        assert (done.exit_code, done.stderr) == (0, "")
    assert pq.read_table("OUT")["id"].to_pylist() == ["a"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone", "out"], "gone: no such file or folder"),
        (["in.jsonl", "in.jsonl"], "in.jsonl is a file, not a folder"),
        (
            ["in.jsonl", "out", "--field", "body"],
            "line 1: no text in field 'body'; it has key, text (choose with --field)",
        ),
        (["in.jsonl", "out", "--field", "body", "--model", "./gone"], "line 1: no text in field 'body'"),
        (["gone", "new", "--model", "./gone", "--method", "best"], "gone: no such file or folder"),
        (["in.jsonl", "new", "--model", "./gone", "--method", "best"], "unknown method 'best'; choose from kv,"),
        (["in.jsonl", "out", "--workers", "2"], "--address and --workers need --engine ray"),
        (["in.jsonl", "out", "--bias", "2"], "out holds another job (bias 1.0, not 2.0); choose another folder"),
    ],
)
def test_mistakes_are_one_line(folder, embedder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ["a", "b"])
    bulk(embedder, tmp_path / "in.jsonl", tmp_path / "out")
    done = run("--model", folder, *args)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvembed: ")
    assert message in line


def start(folder, source, out, **options):
    command = [sys.executable, "-m", "kvembed", "bulk", source, out, "--model", folder, "--shard-rows", "4"]
    command += ["--dtype", "float32"]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_is_one_line_and_keeps_what_is_done(folder, source, whole, tmp_path):
    """No file may grow to more than the room that a shard takes."""
    size = (whole / "shard-000000.parquet").stat().st_size - 10
    out = tmp_path / "out"
    with start(
        folder, source, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    ) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error == f"kvembed: {out / 'shard-000000.parquet'}: file too large\n"
    assert sorted(path.name for path in out.iterdir()) == ["_lock", "_manifest.json"]


def killed_at_random(folder, source, out, times, seed=0):
    """Start, kill -9 after some part of the work, again and again; how many shards were there at each kill."""
    draw, seen = random.Random(seed), []
    for _ in range(times):
        there = len(list(out.glob("shard-*")))
        wait, delay = there + draw.randrange(3), draw.random() / 20
        with start(folder, source, out) as process:
            while process.poll() is None and len(list(out.glob("shard-*"))) < wait:
                time.sleep(0.005)
            time.sleep(delay if wait else 60 * delay)
            process.send_signal(signal.SIGKILL)
        seen.append(len(list(out.glob("shard-*"))))
    return seen


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9(folder, embedder, tmp_path, times):
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    write(source, [f"{i} {text}" for i in range(2) for text in NOTICES])
    seen = killed_at_random(folder, source, out, times)
    assert bulk(embedder, source, out, shard_rows=4, model="tiny").made == 24 - seen[-1]
    bulk(embedder, source, tmp_path / "whole", shard_rows=4, model="tiny")
    assert pq.read_table(out)["id"].to_pylist() == list(range(96))
    assert content(out) == content(tmp_path / "whole")


def test_an_input_changed_in_place_is_noticed(embedder, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"Notice number {i:03}."}) + "\n" for i in range(40)))

    def engine(job, *rest):
        source.write_text(source.read_text().replace("035", "999"))
        return run_here(job, *rest)

    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read"):
        bulk(embedder, source, tmp_path / "out", shard_rows=10, engine=engine)
    assert not json.loads((tmp_path / "out" / "_manifest.json").read_text())["finished"]
    assert not list((tmp_path / "out").glob("*.parquet"))  # or, with the old texts back, they would be taken for theirs


def test_an_actor_on_ray_tells_of_a_changed_input(embedder, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("".join(f"Notice number {i:03}.\n" for i in range(40)))

    def engine(job, _, shards, __):
        actor = _Actor(job, SimpleNamespace(load=lambda: embedder))
        for shard in shards:
            if shard.index == 2:
                source.write_text("other\n" * 60)
            yield _written({name: value for name, (value,) in actor({"index": np.array([shard.index])}).items()})

    with pytest.raises(InputError, match=r"a\.txt changed while it was read"):
        bulk(embedder, source, tmp_path / "out", shard_rows=10, engine=engine)
    assert not list((tmp_path / "out").glob("*.parquet"))
