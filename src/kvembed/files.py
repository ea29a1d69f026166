"""Texts in (.txt, .jsonl, .csv, .parquet, standard input); vectors out (.npy, .jsonl, .parquet), whole or not."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "OUTPUTS",
    "Encoded",
    "Mark",
    "Row",
    "check_output",
    "check_writable",
    "needed",
    "read_rows",
    "read_texts",
    "sha256_of",
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


class Mark(NamedTuple):
    """Where a row starts: bytes (in Parquet rows) and lines before it."""

    offset: int = 0
    line: int = 0


_START = Mark()


class Row(NamedTuple):
    """A text, its id if one was asked for, and where the next row starts."""

    text: str
    id: str | int | None
    next: Mark


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
        found = [row.text for row in read_rows(path, field)]
        if not found:
            raise InputError(f"{_name(path)}: no texts in it")
        texts += found
    return texts


def read_rows(path: Path, field: str = "text", id_field: str | None = None, start: Mark = _START) -> Iterator[Row]:
    """Read a file row by row; never the whole of it at once.

    Args:
        path, field: as in `read_texts`.
        id_field: the key or column that holds a row's id, a string or a whole number.
        start: where to begin: `Row.next` of the row before.

    Raises:
        InputError: as `read_texts`, when the row is reached; a file without rows is no error here.
    """
    name = _name(path)
    if str(path) == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            yield from _KINDS.get(path.suffix.lower(), _text_rows)(file, name, field, id_field, start)
    except OSError as error:
        raise InputError(f"{name}: {why(error)}") from None


def _name(path: Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


class _Lines:
    """The lines of UTF-8 bytes, and how far they have been read."""

    def __init__(self, raw: Iterable[bytes], name: str, mark: Mark) -> None:
        self._raw, self._name, self._offset, self._line = iter(raw), name, *mark

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = next(self._raw)
        try:
            text = raw.decode("utf-8" if self._offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            place = f"{self._name}, line {self._line + 1}"
            raise InputError(f"{place}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
        self._offset += len(raw)
        self._line += 1
        return text

    @property
    def mark(self) -> Mark:
        return Mark(self._offset, self._line)


def _text_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark) -> Iterator[Row]:
    if id_field is not None:
        raise InputError(f"{name}: lines of text have no field {id_field!r} to take ids from")
    if start.offset:
        file.seek(start.offset)
    lines = _Lines(file, name, start)
    for line in lines:
        yield Row(line.removesuffix("\n").removesuffix("\r"), None, lines.mark)


def _json_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark) -> Iterator[Row]:
    if start.offset:
        file.seek(start.offset)
    lines = _Lines(file, name, start)  # split at \n alone: U+2028 and its like are allowed inside a JSON string
    for line in lines:
        if not line.strip():
            continue
        place = f"{name}, line {lines.mark.line}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({str(error).splitlines()[0]})") from None
        value = row if isinstance(row, str) else row.get(field) if isinstance(row, dict) else None
        known = f"; it has {', '.join(map(str, row))[:200]}" if isinstance(row, dict) else ""
        if not isinstance(value, str):
            raise InputError(f"{place}: no text in field {field!r}{known} (choose with --field)")
        if id_field is not None and not (isinstance(row, dict) and id_field in row):
            raise InputError(f"{place}: no field {id_field!r}{known} (choose with --id-field)")
        yield Row(value, None if id_field is None else _id(row[id_field], place, id_field), lines.mark)


def _csv_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = _Lines((piece for line in file for piece in line.splitlines(keepends=True)), name, Mark())
    try:
        columns = next(csv.reader(lines, strict=True), [])
        if not columns:
            return
        text_at = _column(columns, field, name, "--field")
        id_at = None if id_field is None else _column(columns, id_field, name, "--id-field")
        if start.offset:
            file.seek(start.offset)
            lines = _Lines((piece for line in file for piece in line.splitlines(keepends=True)), name, start)
        for row in csv.reader(lines, strict=True):
            if not row:
                continue
            if len(row) <= max(text_at, id_at or 0):
                lacking = field if len(row) <= text_at else id_field
                raise InputError(f"{name}, line {lines.mark.line}: no value in column {lacking!r}")
            yield Row(row[text_at], None if id_at is None else row[id_at], lines.mark)
    except csv.Error as error:
        raise InputError(f"{name}, line {lines.mark.line}: not CSV ({error})") from None


def _parquet_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark) -> Iterator[Row]:
    parquet = needed("pyarrow.parquet", "parquet")
    try:
        # Left to itself, pyarrow keeps what it has read of a file in memory until the end of it.
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        columns = table.schema_arrow.names
        _column(columns, field, name, "--field")
        if id_field is not None:
            _column(columns, id_field, name, "--id-field")
        group, at = 0, 0  # row group, its first row
        while group < table.num_row_groups and at + (size := table.metadata.row_group(group).num_rows) <= start.offset:
            group, at = group + 1, at + size
        wanted = [field] if id_field in (None, field) else [field, id_field]
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(1024, row_groups=groups, columns=wanted) if groups else ():
            texts = batch.column(field).to_pylist()
            ids = texts if id_field is None else batch.column(id_field).to_pylist()
            for text, key in zip(texts, ids, strict=True):
                at += 1
                if at <= start.offset:
                    continue
                if not isinstance(text, str):
                    raise InputError(f"{name}, row {at}: column {field!r} holds {type(text).__name__}, not text")
                row_id = None if id_field is None else _id(key, f"{name}, row {at}", id_field)
                yield Row(text, row_id, Mark(at, at))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise InputError(f"{name}: not Parquet ({str(error).splitlines()[0]})") from None


_KINDS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _column(columns: list[str], wanted: str, name: str, option: str) -> int:
    """Where a column is. Raises `InputError` if it is not there, or more than once."""
    if columns.count(wanted) > 1:
        raise InputError(f"{name}: column {wanted!r} is there more than once")
    if wanted not in columns:
        raise InputError(f"{name}: no column {wanted!r}; it has {', '.join(columns)[:200]} (choose with {option})")
    return columns.index(wanted)


def _id(value: Any, place: str, field: str) -> str | int:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63):
        return value
    raise InputError(f"{place}: the id in {field!r} is neither a string nor a whole number of 64 bits: {value!r:.60}")


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
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def why(error: OSError) -> str:
    """What went wrong, without errno and path: `no such file or directory`."""
    return (error.strerror or str(error)).lower()


def needed(module: str, extra: str) -> Any:
    """Import an optional dependency. Raises `InputError` with the pip line if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"this needs {module.split('.')[0]}: pip install 'kvembed[{extra}]'") from None
