"""Texts in (.txt, .jsonl, .csv, .parquet, standard input); vectors out (.npy, .jsonl, .parquet), whole or not."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "OUTPUTS",
    "Encoded",
    "check_output",
    "check_writable",
    "needed",
    "read_texts",
    "store",
    "whole_file",
    "why",
    "write_vectors",
]

logger = logging.getLogger(__name__)

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


def read_texts(paths: Sequence[Path], field: str = "text") -> list[str]:
    """Read texts from files, or from standard input if there are none (or one is `-`).

    Args:
        paths: `.jsonl`, `.csv` and `.parquet` by their endings; anything else is text, one a line.
        field: the key or column that holds the text, where there are any.

    Raises:
        InputError: a file that is missing, empty, not UTF-8 or not what its ending says; it names file and line.
    """
    texts: list[str] = []
    for path in paths or [Path("-")]:
        name = "standard input" if str(path) == "-" else str(path)
        if name == "standard input" and sys.stdin is None:
            raise InputError("standard input is closed")
        try:
            data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        except OSError as error:
            raise InputError(f"{name}: {why(error)}") from None
        found = _parse(data, path.suffix.lower(), name, field)
        if not found:
            raise InputError(f"{name}: no texts in it")
        texts += found
    return texts


def _parse(data: bytes, suffix: str, name: str, field: str) -> list[str]:
    if suffix == ".parquet":
        return _parse_parquet(data, name, field)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    if suffix == ".jsonl":
        # Not splitlines(): U+2028 and its like are allowed inside a JSON string.
        return [
            _json_text(line, f"{name}, line {i}", field) for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    if suffix == ".csv":
        return list(_csv_texts(text, name, field))
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _json_text(line: str, place: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({str(error).splitlines()[0]})") from None
    value = row if isinstance(row, str) else row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        known = f"; it has {', '.join(map(str, row))[:200]}" if isinstance(row, dict) else ""
        raise InputError(f"{place}: no text in field {field!r}{known} (choose with --field)")
    return value


def _csv_texts(text: str, name: str, field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if not rows.fieldnames:
            return
        if rows.fieldnames.count(field) > 1:
            raise InputError(f"{name}: column {field!r} is there more than once")
        if field not in rows.fieldnames:
            raise InputError(
                f"{name}: no column {field!r}; it has {', '.join(rows.fieldnames)[:200]} (choose with --field)"
            )
        for row in rows:
            if row[field] is None:
                raise InputError(f"{name}, line {rows.line_num}: no value in column {field!r}")
            yield row[field]
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: not CSV ({error})") from None


def _parse_parquet(data: bytes, name: str, field: str) -> list[str]:
    parquet = needed("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        if field not in file.schema_arrow.names:
            raise InputError(
                f"{name}: no column {field!r}; it has {', '.join(file.schema_arrow.names)[:200]} (choose with --field)"
            )
        values = file.read([field]).column(0).to_pylist()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise InputError(f"{name}: not Parquet ({str(error).splitlines()[0]})") from None
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise InputError(f"{name}, row {row}: column {field!r} holds {type(value).__name__}, not text")
    return [str(value) for value in values]


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


def check_writable(path: Path) -> None:
    """Raises `InputError` for a folder, or a file in a folder that does not exist or can't be written to."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} can't be written to")


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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends well: whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files private; this one should be as any other
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def store(path: Path, text: str, what: str) -> None:
    """Put `text` into a cache, folders and all; a cache that can't be written is a warning, not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        logger.warning("%s could not be stored in %s: %s", what, path.parent, error)


def why(error: OSError) -> str:
    """What went wrong, without errno and path: `no such file or directory`."""
    return (error.strerror or str(error)).lower()


def needed(module: str, extra: str) -> Any:
    """Import an optional dependency. Raises `InputError` with the pip line if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"this needs {module.split('.')[0]}: pip install 'kvembed[{extra}]'") from None
