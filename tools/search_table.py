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
    if (folder / "latency.json").is_file():
        told = json.loads((folder / "latency.json").read_text())
        times = [
            f"{told['milliseconds'][mode]['median']:.0f} ({told['milliseconds'][mode]['p95']:.0f})" for mode in MODES
        ]
        machine = f"{told['threads']} threads, {told['hardware']}"
        parts.append(
            f"{told['documents']:,} documents of {told['dimensions']} dimensions, once loaded ({machine}): {times[0]} "
            f"ms a query by vector, {times[1]} by text, {times[2]} by both; in brackets the 95th percentile. The "
            "query's own embedding comes on top."
        )
    return "\n\n".join(parts)
