"""How well and how fast `kvembed search` finds, into results/search/; `make tables` makes docs/search.md's table of it.

    python tools/search.py --data ../shared/eval-data [--model smollm2] [--out results/search] [modes|cli|latency ...]

modes    nDCG@10 by vector, by text and by both: `auto`, fitted on what is searched, as `kvembed index` does; and `kv`
cli      nDCG@10 of `kvembed index` and `kvembed search` on all of SciFact, and that of `kvembed eval`
latency  10,000 short documents, once loaded: a query's own embedding, then each mode

Modes embeds some hundred long documents twice, and cli 5,000 documents' first 64 tokens twice: half an hour each on
two cores. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from kvembed import Embedder
from kvembed.documents import Corpus
from kvembed.evaluate import hardware
from kvembed.hits import Mode
from kvembed.index import Index
from kvembed.tasks import MINI_TOKENS, Task, load_tasks, mini

ROOT = Path(__file__).parent.parent
TASKS, METHODS = ("scifact", "trecqa", "qmsum"), ("auto", "kv")
MODES: tuple[Mode, ...] = ("vector", "text", "hybrid")
PARTS = ("modes", "cli", "latency")
SHORT = ("sts", "pairs", "clustering")
CLI_TASK, CLI_TOKENS = "scifact", 64
DOCUMENTS, QUERIES = 10_000, 100


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "search")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = arguments.parts or PARTS
    if "modes" in parts:
        for task in load_tasks(arguments.data, TASKS):
            for method in METHODS:
                path = arguments.out / f"{arguments.model}-{method}-{task.name}.json"
                if not path.exists():
                    _write(path, modes(mini(task), arguments.model, method))
    path = arguments.out / "cli.json"
    if "cli" in parts and not path.exists():
        _write(path, command_line(load_tasks(arguments.data, [CLI_TASK])[0], arguments.data, arguments.model))
    if "latency" in parts:
        _write(arguments.out / "latency.json", latency(load_tasks(arguments.data), arguments.model))


def _write(path: Path, told: dict[str, Any]) -> None:
    told |= {"hardware": hardware(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(path.name, json.dumps(told), flush=True)


def modes(task: Task, model: str, method: str) -> dict[str, Any]:
    """nDCG@10 of each mode, by trec_eval."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = _corpus(Path(scratch), list(task.documents))
        options: dict[str, Any] = {"texts": corpus.calibration()} if method == "auto" else {}
        embedder = Embedder.from_pretrained(model, method=method, max_tokens=MINI_TOKENS, progress=True, **options)
        index = Index.create(Path(scratch) / "db", embedder)
        index.update(corpus, progress=True)
        scores = {}
        for mode in MODES:
            hits = index.search_many(list(task.queries), top=10, mode=mode)
            # by rank: trec_eval would put equal scores in an order of its own
            run = {str(i): {hit.id: float(-hit.rank) for hit in found} for i, found in enumerate(hits)}
            scores[mode] = _ndcg(task, run)
    told = {"model": model, "method": method, "task": task.name, "documents": len(task.documents)}
    return told | {"queries": len(task.queries), "config_hash": embedder.config.hash(), "ndcg_at_10": scores}


def command_line(task: Task, data: Path, model: str) -> dict[str, Any]:
    """nDCG@10 by what a user types, in float32: in bfloat16 a vector depends a little on its batch."""
    same = ["--model", model, "--method", "kv", "--dtype", "float32", "--max-tokens", str(CLI_TOKENS)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents, queries, db = folder / "corpus.jsonl", folder / "queries.jsonl", str(folder / "db")
        _texts(documents, list(task.documents))
        _texts(queries, list(task.queries))
        _kvembed("index", str(documents), "--id-field", "key", "--db", db, *same)
        asked = ["--queries", str(queries), "--id-field", "key", "--mode", "vector", "--trec"]
        run: dict[str, dict[str, float]] = {}
        for line in _kvembed("search", "--db", db, *asked).splitlines():
            query, _, document, rank, *_ = line.split()
            run.setdefault(query, {})[document] = -float(rank)
        ledger = folder / "results"
        asked = ["--data", str(data), "--suite", "full", "--task", task.name, "--results", str(ledger)]
        _kvembed("eval", *asked, *same)
        result = json.loads(next(ledger.rglob(f"{task.name}.json")).read_text())
    told = {"model": model, "method": "kv", "task": task.name, "max_tokens": CLI_TOKENS}
    told |= {"documents": len(task.documents), "queries": len(task.queries), "config_hash": result["config_hash"]}
    return told | {"ndcg_at_10": {"search": _ndcg(task, run), "eval": result["score"]}}


def _kvembed(*arguments: str) -> str:
    command = [sys.executable, "-m", "kvembed", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def _ndcg(task: Task, run: dict[str, dict[str, float]]) -> float:
    """Mean nDCG@10 in percent, by trec_eval; 0 where nothing was found."""
    import pytrec_eval

    gold = {str(i): {str(k): int(v) for k, v in found.items()} for i, found in enumerate(task.relevant)}
    found = pytrec_eval.RelevanceEvaluator(gold, {"ndcg_cut.10"}).evaluate(run)
    return 100 * statistics.fmean(found.get(key, {}).get("ndcg_cut_10", 0.0) for key in gold)


def latency(tasks: list[Task], model: str) -> dict[str, Any]:
    """Milliseconds a query, median and 95th percentile: of its embedding, and of each mode with that embedding."""
    found = dict.fromkeys(text for task in tasks if task.kind in SHORT for text in task.documents)
    if len(found) < DOCUMENTS + QUERIES:
        raise SystemExit(f"{len(found):,} different short texts are there; {DOCUMENTS + QUERIES:,} are needed")
    texts = random.Random(0).sample(list(found), DOCUMENTS + QUERIES)
    texts, queries = texts[:DOCUMENTS], texts[DOCUMENTS:]
    embedder = Embedder.from_pretrained(model, method="auto", progress=True)
    with tempfile.TemporaryDirectory() as scratch:
        index = Index.create(Path(scratch) / "db", embedder)
        index.update(_corpus(Path(scratch), texts), progress=True)
        times = {"embedding": _milliseconds(lambda query: embedder.encode_query([query]), queries)}
        for mode in MODES:
            times[mode] = _milliseconds(lambda query, mode=mode: index.search(query, mode=mode), queries)
    told = {
        "model": model,
        "method": "auto",
        "documents": DOCUMENTS,
        "dimensions": embedder.dim,
        "dtype": embedder.dtype,
    }
    return told | {"queries": QUERIES, "milliseconds": {name: _summary(found) for name, found in times.items()}}


def _milliseconds(run: Any, queries: list[str]) -> list[float]:
    times = []
    for query in [queries[0], *queries]:
        started = time.perf_counter()
        run(query)
        times.append(1000 * (time.perf_counter() - started))
    return times[1:]


def _summary(times: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(times), "p95": cast(float, np.percentile(times, 95))}
    return {name: round(value, 1) for name, value in found.items()}


def _corpus(folder: Path, texts: list[str]) -> Corpus:
    _texts(folder / "corpus.jsonl", texts)
    return Corpus([folder / "corpus.jsonl"], id_field="key")


def _texts(path: Path, texts: list[str]) -> None:
    """The texts as a file, their numbers as ids."""
    path.write_text("".join(json.dumps({"key": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))


if __name__ == "__main__":
    main()
