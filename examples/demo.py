"""Embed the notices in this folder with the default model and print the nearest ones to a few queries."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> None:
    """Load, embed, rank, print, with the time each step took."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kvembed").setLevel(logging.INFO)  # says so when a model is downloaded and converted
    started = time.perf_counter()
    from kvembed import Embedder  # inside, so that its import is timed too

    embedder = Embedder.from_pretrained("smollm2", method="auto")
    loaded = time.perf_counter()

    documents = (HERE / "notices.txt").read_text().splitlines()
    queries = (HERE / "queries.txt").read_text().splitlines()
    encoded = embedder.encode_with_report(documents, role="document")
    scores = embedder.similarity(embedder.encode_query(queries), encoded.vectors)  # (queries, documents)
    done = time.perf_counter()

    table = Table("query", "cosine", "nearest notices", box=box.SIMPLE, pad_edge=False)
    for query, row in zip(queries, scores, strict=True):
        for rank, index in enumerate((-row).argsort()[:3]):
            table.add_row(query if rank == 0 else "", f"{row[index]:.3f}", documents[index])
        table.add_section()
    Console(width=120).print(table)
    print(
        f"{len(documents)} notices and {len(queries)} queries in {done - loaded:.1f} s "
        f"({int(encoded.token_counts.sum())} tokens of notices, {embedder.dim} dimensions); "
        f"start-up and loading {loaded - started:.1f} s"
    )


if __name__ == "__main__":
    main()
