"""The part of docs/search.md that comes from results/search, where `tools/search.py` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

__all__ = ["search_table"]

MODES = ("vector", "text", "hybrid")
NAMES = {"scifact": "SciFact", "trecqa": "TREC QA", "qmsum": "QMSum, summaries"}


def search_table(folder: Path) -> str:
    """Markdown; empty if nothing was measured."""
    rows: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))]
    parts = []
    if rows:
        body = []
        for row in rows:
            scores = row["ndcg_at_10"]
            best = max(scores.values())
            cells = [f"**{scores[mode]:.1f}**" if scores[mode] == best else f"{scores[mode]:.1f}" for mode in MODES]
            size = f"{row['documents']} documents, {row['queries']} queries"
            task = f"{NAMES.get(row['task'], row['task'])} ({size})"
            body.append([f"{row['model']}, `{row['method']}`", task, *cells])
        parts.append(table(["vectors", "task", *MODES], "llrrr", body))
    if (folder / "cli.json").is_file():
        told = json.loads((folder / "cli.json").read_text())
        scores = told["ndcg_at_10"]
        options = f"--model {told['model']} --method {told['method']} --dtype float32 --max-tokens {told['max_tokens']}"
        parts.append(
            f"All of {NAMES[told['task']]} ({told['documents']:,} documents, {told['queries']} queries) by `kvembed "
            f"index` and `kvembed search --mode vector`, with `{options}`: nDCG@10 {scores['search']:.4f}, and "
            f"{scores['eval']:.4f} by `kvembed eval`."
        )
    if (folder / "latency.json").is_file():
        told = json.loads((folder / "latency.json").read_text())
        times = {name: f"{found['median']:.0f} ({found['p95']:.0f})" for name, found in told["milliseconds"].items()}
        machine = f"{told['dtype']}, {told['threads']} threads, {told['hardware']}"
        parts.append(
            f"{told['documents']:,} short texts of {told['dimensions']} dimensions, once loaded ({machine}): "
            f"{times['vector']} ms a query by vector, {times['text']} by text, {times['hybrid']} by both; in brackets "
            f"the 95th percentile. {times['embedding']} ms of the first and the last are the query's own embedding "
            f"({told['model']}, `{told['method']}`)."
        )
    return "\n\n".join(parts)
