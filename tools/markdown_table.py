"""Markdown tables, for the pages that are made from results."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["table"]


def table(head: list[str], align: str, body: Iterable[Iterable[str]]) -> str:
    """A table; `align` has a letter for each column, `l` or `r`."""
    rules = ["---" if letter == "l" else "---:" for letter in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rules, *body])
