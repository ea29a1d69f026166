"""`kvembed serve` under load: vectors and throughput against the library, then many clients with mixed lengths.

    python tools/serve_load.py [--seconds 300] [--clients 64]

It starts the server itself, on a free port, and writes results/serving/MODEL-METHOD.json; `make tables` makes
docs/server.md's table of it. Needs the extra `server` and the `openai` package.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from openai import APIStatusError, AsyncOpenAI

from kvembed import Embedder
from kvembed.evaluate import hardware
from kvembed.process import keep_freed_memory

ROOT = Path(__file__).parent.parent
CUT = {"truncate": True}  # as the library does
NOTICES = (ROOT / "examples" / "notices.txt").read_text().splitlines()


def mixed(count: int, seed: int) -> list[str]:
    """Texts from a sentence to about a page."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(NOTICES, k=min(40, max(1, int(draw.lognormvariate(0.7, 1)))))) for _ in range(count)]


@contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """A running server's address."""
    command = [sys.executable, "-m", "kvembed", "serve", model, "--name", "m", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "listening" in line:
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
        try:
            yield json.loads(line)["address"]
        finally:
            process.terminate()
            process.wait()


def _drain(log: IO[str]) -> None:
    for _ in log:
        pass


def metric(address: str, name: str) -> float:
    """One of the server's metrics."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


async def embed(client: AsyncOpenAI, texts: Sequence[str], size: int) -> list[list[float]]:
    """All texts, in concurrent requests of `size`."""
    parts = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
    answers = await asyncio.gather(*(client.embeddings.create(model="m", input=part, extra_body=CUT) for part in parts))
    return [row.embedding for answer in answers for row in answer.data]


async def load(client: AsyncOpenAI, address: str, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered; seconds, and megabytes after a quarter and at the end."""
    times: list[float] = []
    outcomes: Counter[str] = Counter()
    memory: list[float] = []
    texts, end = 0, time.monotonic() + seconds

    async def one(seed: int) -> None:
        nonlocal texts
        draw, own = random.Random(seed), mixed(200, seed)
        while time.monotonic() < end:
            asked = draw.choices(own, k=draw.choice([1, 1, 1, 1, 2, 4, 8]))
            started = time.perf_counter()
            try:
                answer = await client.embeddings.create(model="m", input=asked, extra_body=CUT)
                outcomes["answered" if len(answer.data) == len(asked) else "WRONG"] += 1
                texts += len(asked)
                times.append(time.perf_counter() - started)
            except APIStatusError as error:
                outcomes[f"status {error.status_code}"] += 1
                await asyncio.sleep(float(error.response.headers.get("retry-after", 1)))
            except Exception as error:
                outcomes[type(error).__name__] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append((await asyncio.to_thread(metric, address, "process_resident_memory_bytes")) / 1e6)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(one(seed) for seed in range(clients)))
    warm = memory[len(memory) // 4]
    p50, p99 = np.percentile(times, [50, 99])
    told = {"clients": clients, "seconds": seconds, "outcomes": dict(outcomes), "texts": texts}
    return told | {"p50": round(p50, 2), "p99": round(p99, 2), "memory_mb": [round(warm), round(memory[-1])]}


async def main() -> None:
    """Vectors, throughput, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving")
    options = parser.parse_args()
    told: dict[str, Any] = {"model": options.model, "method": options.method, "throughput": {}, "difference": 0.0}
    keep_freed_memory()  # as the server's process does
    embedder = Embedder.from_pretrained(options.model, method=options.method, dtype=options.dtype)
    texts = mixed(options.texts, 0)
    with serving(options.model, "--method", options.method, "--dtype", options.dtype) as address:
        client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        ratios: dict[int, list[tuple[float, float]]] = {1: [], 50: []}
        for _ in range(options.rounds):
            started, used = time.perf_counter(), time.process_time()
            encoded = embedder.encode_with_report(texts)
            library, library_cpu = time.perf_counter() - started, time.process_time() - used
            for size, found in ratios.items():
                started, used = time.perf_counter(), metric(address, "process_cpu_seconds_total")
                rows = await embed(client, texts, size)
                server = time.perf_counter() - started
                found.append((library / server, library_cpu / (metric(address, "process_cpu_seconds_total") - used)))
                worst = float(np.abs(np.array(rows, np.float32) - encoded.vectors).max())
                told["difference"] = max(told["difference"], worst)
                tokens = encoded.token_counts.sum() / server
                print(f"{len(texts)} texts, {size} a request: {tokens:.0f} tok/s, largest difference {worst:.1e}")
        for size, found in ratios.items():
            wall, processor = np.median(found, axis=0).round(3).tolist()
            told["throughput"][size] = {"clock": wall, "processor": processor}
        told["load"] = await load(client, address, options.clients, options.seconds)
    told |= {
        "dtype": embedder.dtype,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{Path(options.model).stem}-{options.method}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main())
