"""Notices in a LanceDB table. `python examples/with_lancedb.py [MODEL]`; needs lancedb."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lancedb
from lancedb.table import Table

from kvembed import Embedder

HERE = Path(__file__).parent


def store_notices(folder: str | Path, embedder: Embedder) -> Table:
    """Embed the notices and write them."""
    notices = (HERE / "notices.txt").read_text().splitlines()
    rows = zip(notices, embedder.encode_document(notices), strict=True)
    return lancedb.connect(folder).create_table("notices", [{"text": text, "vector": vector} for text, vector in rows])


def main(model: str = "smollm2") -> None:
    """Ask the first query."""
    embedder = Embedder.from_pretrained(model, method="auto")
    query = (HERE / "queries.txt").read_text().splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:
        table = store_notices(folder, embedder)
        found = table.search(embedder.encode_query(query)).limit(3).to_list()
    print(query)
    for row in found:
        # The distance is Euclidean, squared: of unit vectors 2 - 2 cosine.
        print(f"{1 - row['_distance'] / 2:.3f}  {row['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
