"""Vectors out: .npy, .jsonl, .parquet, or .jsonl on standard output; a file is whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import InputError
from .extras import import_extra
from .files import atomic_write, check_writable, naming

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OUTPUTS", "Encoded", "as_table", "check_output", "write_vectors"]

OUTPUTS = (".npy", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What `Embedder.encode_with_report` gives.

    Attributes:
        vectors: (n, dim) float32, rows of norm 1; of `encode_views` (n, V, D), raw; quantised ones int8 or uint8.
        token_counts: (n,) int64, tokens of each prompt as it was embedded, template included (once, however many
            chunks there are), but for a long beginning that texts share, computed once (see `kvembed.prefix`).
        tokens_cut: (n,) int64, tokens of each text that were left out to fit `max_tokens`.
    """

    vectors: NDArray[np.float32]
    token_counts: NDArray[np.int64]
    tokens_cut: NDArray[np.int64]

    @property
    def truncated(self) -> int:
        """How many texts lost any tokens."""
        return int((self.tokens_cut > 0).sum())


def check_output(path: Path | None, *, with_ids: bool = False) -> None:
    """Fail before the work, not after it. Raises `InputError` for an ending or folder that can't be written."""
    if path is None or str(path) == "-":
        return
    if path.suffix.lower() not in OUTPUTS:
        raise InputError(
            f"{path}: can't write {path.suffix or 'a file without an ending'}; choose from {', '.join(OUTPUTS)}"
        )
    if path.suffix.lower() == ".parquet":
        import_extra("pyarrow.parquet", "parquet")
    if path.suffix.lower() == ".npy" and with_ids:
        raise InputError(f"{path}: .npy has no place for ids; choose .jsonl or .parquet")
    check_writable(path)


def write_vectors(pieces: Iterable[Encoded], path: Path | None, ids: Iterator[str | int] | None = None) -> int:
    """Write vectors in order, as they come; standard output, as .jsonl, if `path` is None or `-`. Returns their number.

    `.npy` holds (n, dim) in the vectors' dtype; `.jsonl` and `.parquet` rows of `index` (from 0; or of `id`, if `ids`
    are given), `tokens`, `tokens_cut`, `embedding`.

    Raises:
        InputError: there are none, or the file can't be written; what was there before is still there.
    """
    name, keys = ("index", itertools.count()) if ids is None else ("id", ids)
    counts: list[int] = []
    some = _some(pieces, counts)
    with naming(path or "standard output"):
        if path is None or str(path) == "-":
            _write_jsonl(some, sys.stdout.buffer, name, keys)
            sys.stdout.flush()
            return sum(counts)
        check_output(path, with_ids=ids is not None)
        with atomic_write(path) as file:
            if path.suffix.lower() == ".npy":
                _write_npy(some, file)
            else:
                write = _write_jsonl if path.suffix.lower() == ".jsonl" else _write_parquet
                write(some, file, name, keys)
    return sum(counts)


def _some(pieces: Iterable[Encoded], counts: list[int]) -> Iterator[Encoded]:
    for piece in pieces:
        counts.append(len(piece.vectors))
        yield piece
    if not counts:
        raise InputError("no texts to write the vectors of")


def _write_npy(pieces: Iterator[Encoded], file: BinaryIO) -> None:
    import numpy as np

    count = 0
    header: dict[str, Any] = {}
    for piece in pieces:
        if not header:
            header = {"descr": piece.vectors.dtype.str, "fortran_order": False}
            # NumPy leaves room in the header for the count to grow.
            np.lib.format.write_array_header_1_0(file, header | {"shape": (0, piece.vectors.shape[1])})
        file.write(np.ascontiguousarray(piece.vectors).data)
        count += len(piece.vectors)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, piece.vectors.shape[1])})


def _write_jsonl(pieces: Iterator[Encoded], file: BinaryIO, name: str, keys: Iterator[str | int]) -> None:
    for piece in pieces:
        for tokens, cut, vector in zip(
            piece.token_counts.tolist(), piece.tokens_cut.tolist(), piece.vectors, strict=True
        ):
            # float(str(x)) of a float32 keeps 9 digits, enough to read the same float32 back
            numbers = [float(str(x)) for x in vector] if vector.dtype.kind == "f" else vector.tolist()
            row = {name: next(keys), "tokens": tokens, "tokens_cut": cut, "embedding": numbers}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def as_table(name: str, keys: Any, encoded: Encoded) -> Any:
    """An Arrow table: a column `name` of an Arrow array that tells the rows apart, then what `encoded` holds."""
    arrow = import_extra("pyarrow", "parquet")
    vectors = encoded.vectors
    return arrow.table(
        {
            name: keys,
            "tokens": arrow.array(encoded.token_counts),
            "tokens_cut": arrow.array(encoded.tokens_cut),
            "embedding": arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), vectors.shape[1]),
        }
    )


def _write_parquet(pieces: Iterator[Encoded], file: BinaryIO, name: str, keys: Iterator[str | int]) -> None:
    arrow = import_extra("pyarrow", "parquet")
    parquet = import_extra("pyarrow.parquet", "parquet")
    with contextlib.ExitStack() as stack:
        writer = kind = None
        for piece in pieces:
            some = list(itertools.islice(keys, len(piece.vectors)))
            kind = kind or (arrow.string() if isinstance(some[0], str) else arrow.int64())
            try:
                table = as_table(name, arrow.array(some, kind), piece)
            except (TypeError, ValueError):  # pyarrow's errors are these
                raise InputError("ids are strings here and whole numbers there; Parquet takes one kind") from None
            writer = writer or stack.enter_context(parquet.ParquetWriter(file, table.schema))
            writer.write_table(table)
