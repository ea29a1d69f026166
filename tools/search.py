"""How well and how fast `kvembed search` finds, into results/search/; `make tables` makes docs/search.md's table of it.

    python tools/search.py --data ../shared/eval-data [--model smollm2] [--out results/search] [modes|latency ...]

modes    nDCG@10 by vector, by text and by both: `auto`, fitted on what is searched, as `kvembed index` does; and `kv`
latency  10,000 documents of 576 dimensions, once loaded, without the query's own embedding

Modes embeds some hundred long documents twice: half an hour on two cores. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tiny import tiny_embedder

from kvembed import Embedder
from kvembed.documents import Corpus
from kvembed.evaluate import hardware
from kvembed.hits import Mode
from kvembed.index import Index
from kvembed.tasks import MINI_TOKENS, Task, load_tasks, mini

ROOT = Path(__file__).parent.parent
TASKS, METHODS = ("scifact", "trecqa", "qmsum"), ("auto", "kv")
MODES: tuple[Mode, ...] = ("vector", "text", "hybrid")
PARTS = ("modes", "latency")
DOCUMENTS, DIMENSIONS, QUERIES = 10_000, 576, 100


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
    if "latency" in parts:
        _write(arguments.out / "latency.json", latency())


def _write(path: Path, told: dict[str, Any]) -> None:
    told |= {"hardware": hardware(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(path.name, json.dumps(told), flush=True)


def modes(task: Task, model: str, method: str) -> dict[str, Any]:
    """nDCG@10 of each mode, by trec_eval."""
    import pytrec_eval

    with tempfile.TemporaryDirectory() as scratch:
        corpus = _corpus(Path(scratch), list(task.documents))
        options: dict[str, Any] = {"texts": corpus.calibration()} if method == "auto" else {}
        embedder = Embedder.from_pretrained(model, method=method, max_tokens=MINI_TOKENS, progress=True, **options)
        index = Index.create(Path(scratch) / "db", embedder)
        index.update(corpus, progress=True)
        gold = {str(i): {str(k): int(v) for k, v in found.items()} for i, found in enumerate(task.relevant)}
        judge = pytrec_eval.RelevanceEvaluator(gold, {"ndcg_cut.10"})
        scores = {}
        for mode in MODES:
            hits = index.search_many(list(task.queries), top=10, mode=mode)
            # by rank: trec_eval would put equal scores in an order of its own
            run = {str(i): {hit.id: float(-hit.rank) for hit in found} for i, found in enumerate(hits)}
            found = judge.evaluate(run)
            scores[mode] = 100 * statistics.fmean(found.get(key, {}).get("ndcg_cut_10", 0.0) for key in gold)
    told = {"model": model, "method": method, "task": task.name, "documents": len(task.documents)}
    return told | {"queries": len(task.queries), "config_hash": embedder.config.hash(), "ndcg_at_10": scores}


def latency() -> dict[str, Any]:
    """Milliseconds a query: median and 95th percentile."""
    words = [line.split() for line in (ROOT / "examples" / "notices.txt").read_text().splitlines()]
    texts = [f"{i} {' '.join(words[i % 48] + words[i % 47])}" for i in range(DOCUMENTS)]
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_embedder(DIMENSIONS)
        index = Index.create(Path(scratch) / "db", tiny)
        index.update(_corpus(Path(scratch), texts))
        queries = texts[:: DOCUMENTS // QUERIES]
        embedding = _milliseconds(lambda query: tiny.encode_query([query]), queries)
        found = {
            mode: _milliseconds(lambda query, mode=mode: index.search(query, mode=mode), queries) for mode in MODES
        }
    own = statistics.median(embedding)
    rows = {
        mode: {name: round(value - (own if mode != "text" else 0), 1) for name, value in _summary(times).items()}
        for mode, times in found.items()
    }
    return {"documents": DOCUMENTS, "dimensions": DIMENSIONS, "queries": len(queries), "milliseconds": rows}


def _milliseconds(run: Any, queries: list[str]) -> list[float]:
    times = []
    for query in [queries[0], *queries]:
        started = time.perf_counter()
        run(query)
        times.append(1000 * (time.perf_counter() - started))
    return times[1:]


def _summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "p95": cast(float, np.percentile(times, 95))}


def _corpus(folder: Path, texts: list[str]) -> Corpus:
    """The texts as a file, their numbers as ids."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"key": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return Corpus([path], id_field="key")


if __name__ == "__main__":
    main()
