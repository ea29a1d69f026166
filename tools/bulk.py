"""What `kvembed bulk` promises, measured: flat memory at a million rows, and nothing lost by ten `kill -9`.

python tools/bulk.py memory [--kind parquet]               # a random model of one layer, 100,000 and 1,000,000 rows
python tools/bulk.py kills texts.jsonl --model smollm2     # any texts and model; stops ten times at random moments

Each writes a file to results/bulk/; `make tables` makes docs/bulk.md's tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from peak import peak_of

from kvembed.evaluate import hardware

ROOT = Path(__file__).parent.parent
WORDS = [
    "ferry",
    "island",
    "harbour",
    "moth",
    "wool",
    "bread",
    "bicycle",
    "committee",
    "budget",
    "rain",
    "library",
    "dog",
]


def memory(folder: Path, counts: list[int], kind: str) -> dict[str, Any]:
    """Peak memory and pace of the same job at several sizes."""
    from tiny import tiny_embedder  # it imports torch

    tiny_embedder().save_pretrained(folder / "model")
    jobs = []
    for count in counts:
        source, out = folder / f"{count}.{kind}", folder / f"out-{count}"
        write_texts(source, count)
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "kvembed",
            "bulk",
            source,
            out,
            "--model",
            folder / "model",
            "--method",
            "mean",
        ]
        peak = peak_of(command)
        seconds = time.monotonic() - started
        shards = sorted(out.glob("*.parquet"))
        rows = [pq.read_metadata(path).num_rows for path in shards]
        assert rows == [10_000] * (count // 10_000), "shards are not as planned"
        ids = pq.read_table(out, columns=["id"])["id"].to_numpy()
        assert np.array_equal(ids, np.arange(count)), "rows are lost, doubled or out of order"
        job = {"rows": count, "shards": len(shards), "seconds": round(seconds, 1)}
        jobs.append(job | {"peak_mb": round(peak * 1.024 / 1e3), "input_mb": round(source.stat().st_size / 1e6, 1)})
        print(json.dumps(jobs[-1]), flush=True)
    return {"kind": kind, "jobs": jobs}


def write_texts(path: Path, count: int) -> None:
    """Texts of 3 to 12 words, no two alike."""
    draw = random.Random(0)
    texts = (f"{i} {' '.join(draw.choices(WORDS, k=draw.randint(3, 12)))}" for i in range(count))
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return
    import pyarrow as pa

    with pq.ParquetWriter(path, schema := pa.schema([("text", pa.string())])) as writer:
        for start in range(0, count, 100_000):
            chunk = [next(texts) for _ in range(min(100_000, count - start))]
            writer.write_table(pa.table({"text": chunk}, schema))


def kills(folder: Path, source: Path, model: str, method: str, times: int, shard_rows: int) -> dict[str, Any]:
    """The same job uninterrupted, and killed at random moments of its work until it is done."""
    options = ["--model", model, "--method", method, "--shard-rows", str(shard_rows)]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvembed", "bulk", str(source), str(out), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    whole, stopped = folder / "whole", folder / "stopped"
    begun = time.monotonic()
    if start(whole).wait():
        raise SystemExit("kvembed bulk failed")
    seconds = time.monotonic() - begun
    print(f"uninterrupted: {seconds:.0f} s")
    shards = len(list(whole.glob("shard-*")))
    draw = random.Random(0)
    killed = half_written = 0
    for _ in range(times):
        there, stale = len(list(stopped.glob("shard-*"))), set(stopped.glob(".shard-*"))
        writing = draw.random() < 0.3  # stop as a shard is being written, or else at any moment of making one
        new = draw.randint(not writing, max(1, shards // times))  # shards that are let through
        delay = 0.0 if writing else draw.uniform(0, 1.5 * seconds / shards)
        process = start(stopped)
        begun = time.monotonic()
        while process.poll() is None:
            parts = set(stopped.glob(".shard-*")) - stale
            if len(list(stopped.glob("shard-*"))) >= there + new and (parts or not writing):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        killed += process.wait() == -signal.SIGKILL
        now, left = len(list(stopped.glob("shard-*"))), len(set(stopped.glob(".shard-*")) - stale)
        half_written += left
        print(f"killed after {time.monotonic() - begun:.1f} s: {now} shards, {now - there} new, {left} half-written")
    if start(stopped).wait():
        raise SystemExit("kvembed bulk failed")
    one, other = pq.read_table(whole), pq.read_table(stopped)
    assert one["id"].equals(other["id"]), "rows are lost, doubled or out of order"
    assert one.equals(other), "rows differ"
    names = sorted(path.name for path in whole.glob("*.parquet"))
    same = all((whole / name).read_bytes() == (stopped / name).read_bytes() for name in names)
    told = {"model": model, "method": method, "rows": one.num_rows, "shards": len(names), "seconds": round(seconds)}
    return told | {"kills": killed, "half_written": half_written, "same_bytes": same}


def main() -> None:
    """See the docstring above."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("memory")
    one.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    one.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    other = commands.add_parser("kills")
    other.add_argument("source", type=Path)
    other.add_argument("--model", default="smollm2")
    other.add_argument("--method", default="kv")
    other.add_argument("--times", type=int, default=10)
    other.add_argument("--shard-rows", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.command == "memory":
            name, told = f"memory-{given.kind}", memory(Path(folder), given.rows, given.kind)
        else:
            name = f"kills-{Path(given.model).stem}-{given.method}"
            told = kills(Path(folder), given.source, given.model, given.method, given.times, given.shard_rows)
    path = ROOT / "results" / "bulk" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told | {"hardware": hardware(), "cores": os.cpu_count()}, indent=1) + "\n")
    print(path.relative_to(ROOT), json.dumps(told))


if __name__ == "__main__":
    main()
