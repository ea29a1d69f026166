"""Vectors out: .npy, .jsonl, .parquet, or .jsonl on standard output; a file is whole or not there."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import InputError
from .files import check_writable, needed, whole_file, why

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OUTPUTS", "Encoded", "check_output", "write_vectors"]

OUTPUTS = (".npy", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What `Embedder.encode_with_report` gives.

    Attributes:
        vectors: (n, dim) float32, rows of norm 1.
        token_counts: (n,) int64, tokens of each prompt as it was embedded, template included.
        tokens_cut: (n,) int64, tokens of each text that were left out to fit `max_tokens`.
    """

    vectors: NDArray[np.float32]
    token_counts: NDArray[np.int64]
    tokens_cut: NDArray[np.int64]

    @property
    def truncated(self) -> int:
        """How many texts lost any tokens."""
        return int((self.tokens_cut > 0).sum())


def check_output(path: Path | None) -> None:
    """Fail before the work, not after it. Raises `InputError` for an ending or folder that can't be written."""
    if path is None or str(path) == "-":
        return
    if path.suffix.lower() not in OUTPUTS:
        raise InputError(
            f"{path}: can't write {path.suffix or 'a file without an ending'}; choose from {', '.join(OUTPUTS)}"
        )
    if path.suffix.lower() == ".parquet":
        needed("pyarrow.parquet", "parquet")
    check_writable(path)


def write_vectors(encoded: Encoded, path: Path | None) -> None:
    """Write vectors in order; standard output, as .jsonl, if `path` is None or `-`.

    `.npy` holds (n, dim) in the vectors' dtype; `.jsonl` and `.parquet` rows of `index`, `tokens`, `tokens_cut`,
    `embedding`.

    Raises:
        InputError: the file can't be written; what was there before is still there.
    """
    try:
        if path is None or str(path) == "-":
            _write_jsonl(encoded, sys.stdout.buffer)
            sys.stdout.flush()
            return
        check_output(path)
        with whole_file(path) as file:
            {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[path.suffix.lower()](encoded, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path or 'standard output'}: {why(error)}") from None


def _write_npy(encoded: Encoded, file: BinaryIO) -> None:
    import numpy as np

    np.save(file, encoded.vectors, allow_pickle=False)


def _write_jsonl(encoded: Encoded, file: BinaryIO) -> None:
    rows = zip(encoded.token_counts.tolist(), encoded.tokens_cut.tolist(), encoded.vectors, strict=True)
    for index, (tokens, cut, vector) in enumerate(rows):
        # float(str(x)) of a float32 keeps 9 digits, enough to read the same float32 back
        numbers = [float(str(x)) for x in vector] if vector.dtype.kind == "f" else vector.tolist()
        row = {"index": index, "tokens": tokens, "tokens_cut": cut, "embedding": numbers}
        file.write(json.dumps(row).encode() + b"\n")


def _write_parquet(encoded: Encoded, file: BinaryIO) -> None:
    arrow = needed("pyarrow", "parquet")
    parquet = needed("pyarrow.parquet", "parquet")
    count, dim = encoded.vectors.shape
    table = arrow.table(
        {
            "index": arrow.array(range(count), arrow.int64()),
            "tokens": arrow.array(encoded.token_counts),
            "tokens_cut": arrow.array(encoded.tokens_cut),
            "embedding": arrow.FixedSizeListArray.from_arrays(arrow.array(encoded.vectors.ravel()), dim),
        }
    )
    parquet.write_table(table, file)
