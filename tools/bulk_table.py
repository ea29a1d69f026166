"""The tables of docs/bulk.md, from results/bulk, where `tools/bulk.py` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

__all__ = ["bulk_table"]


def bulk_table(folder: Path) -> str:
    """Markdown; empty if nothing was measured."""
    parts = []
    if memory := _read(folder, "memory-*.json"):
        body = [
            [
                f"{job['rows']:,}, {told['kind']}",
                f"{job['shards']:,}",
                f"{job['peak_mb']:,} MB",
                f"{job['rows'] / job['seconds']:,.0f}",
                _machine(told),
            ]
            for told in memory
            for job in told["jobs"]
        ]
        parts.append(table(["rows, of a random model of one layer", "shards", "peak", "rows/s", "on"], "lrrrl", body))
    if kills := _read(folder, "kills-*.json"):
        body = [
            [
                f"{told['rows']:,} texts, {told['model']}, `{told['method']}`",
                f"{told['shards']:,}",
                f"{told['kills']}, {told['half_written']} as a shard was being written",
                "equal byte for byte" if told["same_bytes"] else "equal rows",
                _machine(told),
            ]
            for told in kills
        ]
        head = ["job", "shards", "`kill -9`", "against an uninterrupted job", "on"]
        parts.append(table(head, "lrlll", body))
    return "\n\n".join(parts)


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def _machine(told: dict[str, Any]) -> str:
    return f"{told['cores']} cores, {told['hardware']}"
