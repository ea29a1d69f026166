"""The table of docs/server.md, from results/serving, where `tools/serve_load.py` writes."""

from __future__ import annotations

import json
from pathlib import Path

from markdown_table import table

__all__ = ["serving_table"]

HEAD = ["model", "throughput, server / library", "load", "p50, p99", "memory, end against first quarter"]


def serving_table(folder: Path) -> str:
    """Markdown; empty if nothing was measured."""
    body = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        load = told["load"]
        ratios = ", ".join(
            f"{found['clock']:.2f} ({size} text{'s' * (size != '1')} a request)"
            for size, found in told["throughput"].items()
        )
        outcomes = ", ".join(f"{count:,} {name}" for name, count in load["outcomes"].items())
        warm, end = load["memory_mb"]
        machine = f"{told['dtype']}, {told['threads']} threads, {told['hardware']}"
        cells = [
            f"{told['model']}, `{told['method']}` ({machine})",
            ratios,
            f"{load['clients']} clients, {load['seconds']:.0f} s: {outcomes}",
            f"{load['p50']:.1f} s, {load['p99']:.1f} s",
            f"{end:,} MB, {end / warm - 1:+.1%}",
        ]
        body.append(cells)
    return table(HEAD, "lrlrr", body) if body else ""
