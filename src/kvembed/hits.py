"""Documents found in a table: by the cosine of all vectors, by words, or by both rankings put together."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError
from .extras import import_extra

if TYPE_CHECKING:
    import numpy as np
    from lancedb.table import Table
    from numpy.typing import NDArray

__all__ = ["Hit", "Mode", "find", "lancedb_reason"]

DEPTH = 100  # documents of either ranking that hybrid search puts together
Mode = Literal["vector", "text", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        rank: from 1.
        score: the higher the better. vector: cosine similarity; text: BM25; hybrid: reciprocal rank fusion.
        id: of the row, or else a hash of its content.
        file: where it was read.
        line: in that file, from 1; in Parquet the row.
        text: the document.
        fields: what else it has.
        cosine, bm25: hybrid: what the score comes from, each None if the document is not among the first of that
            ranking. Else the one that is the score.
    """

    rank: int
    score: float
    id: str
    file: str
    line: int
    text: str
    fields: dict[str, Any]
    cosine: float | None = None
    bm25: float | None = None


def find(
    table: Table, query: str, vector: NDArray[np.float32] | None, top: int, mode: Mode, where: str | None
) -> list[Hit]:
    """One query of `Index.search_many`; `vector` (dim,) is not needed in mode `"text"`."""
    names = [name for name in table.schema.names if name != "vector" and not name.startswith("_")]
    depth = max(top, DEPTH) if mode == "hybrid" else top

    def found(search: Any, score: str) -> Any:
        search = search if where is None else search.where(f"({where}\n)")  # or what follows a ; is not read
        return search.limit(depth).select([*names, score]).with_row_id(True).to_arrow()

    cosines: dict[int, float] = {}
    bm25s: dict[int, float] = {}
    try:
        if mode != "text":
            near: Any = table.search(vector, vector_column_name="vector")
            rows = found(near.distance_type("dot").bypass_vector_index(), "_distance")
            cosines = {row: 1 - distance for row, distance in _pairs(rows, "_distance")}
        if mode != "vector":
            words = import_extra("lancedb.query", "search").MatchQuery(query, "text")
            matched = found(table.search(words, query_type="fts"), "_score")
            bm25s = dict(_pairs(matched, "_score"))
            if mode == "text":
                rows = matched
            else:
                rows = import_extra("lancedb.rerankers", "search").RRFReranker().rerank_hybrid(query, rows, matched)
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{'the index' if where is None else f'where {where!r}'}: {lancedb_reason(error)}") from None
    hits = []
    for rank, row in enumerate(rows.slice(0, top).to_pylist(), 1):
        cosine, bm25 = cosines.get(row["_rowid"]), bm25s.get(row["_rowid"])
        score = {"vector": cosine, "text": bm25, "hybrid": row.get("_relevance_score")}[mode]
        own = {name: row.pop(name) for name in ("id", "file", "line", "text")}
        fields = {name: row[name] for name in names if row.get(name) is not None}
        hits.append(Hit(rank, score, **own, fields=fields, cosine=cosine, bm25=bm25))
    return hits


def _pairs(rows: Any, score: str) -> zip[tuple[int, float]]:
    return zip(rows["_rowid"].to_pylist(), rows[score].to_pylist(), strict=True)


def lancedb_reason(error: Exception) -> str:
    """What LanceDB says went wrong, without where in its source."""
    reason = re.sub(r", \S+\.rs:\d+:\d+.*", "", " ".join(str(error).split()))
    reason = re.sub(r"`(vector|_\w+)`, ", "", reason)  # of the columns, those that are for filters
    return re.sub(r"^(lance error: )?(LanceError\(\w+\): |Invalid input, )", "", reason)[:300]
