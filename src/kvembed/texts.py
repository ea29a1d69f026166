"""Texts in: lines, JSON lines, CSV, Parquet and standard input, row by row, from any row on."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import logging
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from .checks import check_unicode
from .errors import InputError
from .extras import import_extra
from .files import naming

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "DOCUMENT_ENDINGS",
    "MARKDOWN",
    "ROW_ENDINGS",
    "Mark",
    "Row",
    "composed",
    "place_of",
    "read_lines",
    "read_rows",
    "read_texts",
    "stream_rows",
]

logger = logging.getLogger(__name__)


class Mark(NamedTuple):
    """Where a row starts: bytes (in Parquet rows) and lines before it."""

    offset: int = 0
    line: int = 0


_START = Mark()


class Row(NamedTuple):
    """A text, its id if one was asked for, where the next row starts, the line (in Parquet the row) that it begins in,
    from 1, and its other fields if they were asked for.
    """

    text: str
    id: str | int | None
    next: Mark
    line: int
    others: Mapping[str, Any] = MappingProxyType({})


def read_texts(paths: Sequence[Path], field: str = "text") -> list[str]:
    """Read texts from files, or from standard input if there are none (or one is `-`).

    Args:
        paths: `.jsonl`, `.csv`, `.parquet` and the like by their endings; anything else is text, one a line.
        field: the key or column that holds the text, where there are any.

    Raises:
        InputError: a file that is missing, empty, not UTF-8, not what its ending says, or of a kind that does not hold
            one text a line; it names file and line.
    """
    return [row.text for path in paths or [Path("-")] for row in _some_rows(path, field)]


def stream_rows(
    paths: Sequence[Path], field: str = "text", id_field: str | None = None
) -> tuple[Iterator[Row], int | None]:
    """As `read_texts`, but row by row, and how many there are; None if one is a pipe, which can be read but once.

    Files are read twice, the first time to count and check every row before any work is done. At the end, a warning
    says how many texts are blank.
    """
    paths = list(paths) or [Path("-")]
    known = not any(str(path) == "-" or _is_pipe(path) for path in paths)
    count = sum(1 for path in paths for _ in _some_rows(path, field, id_field)) if known else None
    return _telling_blank(row for path in paths for row in _some_rows(path, field, id_field)), count


def _is_pipe(path: Path) -> bool:
    """Whether it can be read but once."""
    try:
        mode = path.stat().st_mode
    except OSError:  # is told when it is opened
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _telling_blank(rows: Iterable[Row]) -> Iterator[Row]:
    count = blank = 0
    for row in rows:
        count, blank = count + 1, blank + (not row.text.strip())
        yield row
    if blank:
        logger.warning("%d of %d texts are blank", blank, count)


def _some_rows(path: Path, field: str, id_field: str | None = None) -> Iterator[Row]:
    """`read_rows`, but an empty file is an `InputError`."""
    row = None
    for row in read_rows(path, field, id_field):
        yield row
    if row is None:
        raise InputError(f"{_name(path)}: no texts in it")


def read_rows(
    path: Path, field: str = "text", id_field: str | None = None, start: Mark = _START, *, others: bool = False
) -> Iterator[Row]:
    """Read a file row by row; never the whole of it at once.

    Args:
        path, field: as in `read_texts`.
        id_field: the key or column that holds a row's id, a string or a whole number.
        start: where to begin: `Row.next` of the row before.
        others: give the other fields too, as the file has them: strings in CSV, any value in JSON and Parquet.

    Raises:
        InputError: as `read_texts`, when the row is reached; a file without rows is no error here.
    """
    kind = path.suffix.lower()
    if kind in DOCUMENT_ENDINGS:
        raise InputError(f"{path}: is read as one text a line only if it is a .txt; `kvembed index` takes documents")
    _refuse_others(path)
    with _opened(path) as file:
        yield from _KINDS.get(kind, _text_rows)(file, _name(path), field, id_field, start, others)


def read_lines(path: Path) -> Iterator[Row]:
    """The lines of a document, whatever its ending. Errors as in `read_rows`."""
    _refuse_others(path)
    with _opened(path) as file:
        yield from _text_rows(file, _name(path), "", None, _START, False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    with (
        naming(_name(path)),
        contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file,
    ):
        yield file


def _refuse_others(path: Path) -> None:
    """Lines of these are no texts. Raises `InputError`, with what to do."""
    kind = path.suffix.lower()
    if kind == ".json":
        raise InputError(f"{path}: JSON is read line by line, one object or string each, from a .jsonl file")
    if kind in _PACKED:
        raise InputError(f"{path}: is compressed; decompress it first")
    if kind in _FORMATTED:
        raise InputError(f"{path}: its text has to be taken out first, into a file of one of the kinds that are read")


def composed(text: str) -> str:
    """In Unicode's form NFC: text search would not find "é" in two characters by "é" in one."""
    return unicodedata.normalize("NFC", text)


def place_of(path: Path, line: int) -> str:
    """Where a row is, for people: `Row.line` of a file."""
    return f"{_name(path)}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {line}"


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
            if not self._offset and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise InputError(
                    f"{self._name}: is UTF-16, as Excel's Unicode text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
                ) from None
            place = f"{self._name}, line {self._line + 1}"
            raise InputError(f"{place}: not UTF-8 text (byte 0x{raw[error.start]:02x}); iconv can convert it") from None
        self._offset += len(raw)
        self._line += 1
        return text

    @property
    def mark(self) -> Mark:
        return Mark(self._offset, self._line)


def _text_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark, others: bool) -> Iterator[Row]:
    if id_field is not None:
        raise InputError(f"{name}: lines of text have no field {id_field!r} to take ids from")
    if field not in ("", "text"):
        raise InputError(f"{name}: lines of text have no field {field!r}")
    if start.offset:
        file.seek(start.offset)
    lines = _Lines(file, name, start)
    for line in lines:
        if name == "standard input" and lines.mark.line == 1 and line.startswith("{") and _is_json(line):
            logger.warning(
                "%s: its lines are JSON, and taken as texts as they are; a .jsonl file is read by field", name
            )
        yield Row(line.removesuffix("\n").removesuffix("\r"), None, lines.mark, lines.mark.line)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark, others: bool) -> Iterator[Row]:
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
        if not isinstance(value, str):
            if isinstance(row, dict) and field in row:
                raise InputError(f"{place}: field {field!r} holds {json.dumps(value):.40}, not text")
            if not isinstance(row, dict):
                raise InputError(f"{place}: a line is an object or a string, not {json.dumps(row):.40}")
            raise InputError(f"{place}: no text in field {field!r}{_fields(row)} (choose with --field)")
        check_unicode(value, place)
        if id_field is not None and not (isinstance(row, dict) and id_field in row):
            raise InputError(f"{place}: no field {id_field!r}{_fields(row)} (choose with --id-field)")
        row_id = None if id_field is None else _id(row[id_field], place, id_field)
        more = (
            {key: row[key] for key in row if key not in (field, id_field)} if others and isinstance(row, dict) else {}
        )
        yield Row(value, row_id, lines.mark, lines.mark.line, more)


def _fields(row: Any) -> str:
    return f"; it has {_quoted(row)}" if isinstance(row, dict) else ""


def _quoted(names: Iterable[str]) -> str:
    """In quotes where one could not see a name's ends."""
    return ", ".join(repr(name) if name != name.strip() or not name else name for name in names)[:200]


def _csv_rows(file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark, others: bool) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = _Lines((piece for line in file for piece in line.splitlines(keepends=True)), name, Mark())
    try:
        columns, delimiter = _header(lines, field)
        if not columns:
            return
        text_at = _column(columns, field, name, "--field")
        id_at = None if id_field is None else _column(columns, id_field, name, "--id-field")
        rest = [
            i for i, column in enumerate(columns) if others and _column(columns, column, name) not in (text_at, id_at)
        ]
        if start.offset:
            file.seek(start.offset)
            lines = _Lines((piece for line in file for piece in line.splitlines(keepends=True)), name, start)
        line = lines.mark.line
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            first, line = line + 1, lines.mark.line  # a cell may hold line ends
            if not row:
                continue
            if len(row) <= max(text_at, id_at or 0):
                lacking = field if len(row) <= text_at else id_field
                raise InputError(f"{name}, line {first}: no value in column {lacking!r}")
            if any(row[len(columns) :]):
                raise InputError(
                    f"{name}, line {first}: {len(row)} values for {len(columns)} columns; text with a delimiter in it "
                    "must stand in quotes"
                )
            if id_at is not None and not row[id_at]:
                raise InputError(f"{name}, line {first}: no id in column {id_field!r}")
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in row):
                raise InputError(
                    f"{name}, line {first}: a quote that opens a cell here closes in another line, with tabs between; "
                    "if quotes mean nothing in this file, make it JSONL"
                )
            more = {columns[i]: row[i] for i in rest if i < len(row)}
            yield Row(row[text_at], None if id_at is None else row[id_at], lines.mark, first, more)
    except csv.Error as error:
        raise InputError(f"{name}, line {lines.mark.line}: not CSV ({error})") from None


def _header(lines: Iterator[str], field: str) -> tuple[list[str], str]:
    """The columns, and the delimiter: the first of `,` `;` and tab by which `field` is one of them.

    Without such a one, the delimiter that makes most columns. Raises `csv.Error` if none makes any.
    """
    read: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    found: list[tuple[list[str], str]] = []
    failed: csv.Error | None = None
    for delimiter in ",;\t":
        try:
            rows = csv.reader(itertools.chain([*read], noted()), delimiter=delimiter, strict=True)
            columns = next(filter(None, rows), [])  # after blank lines
            if field in columns or not columns:
                return columns, delimiter
            found.append((columns, delimiter))
        except csv.Error as error:
            failed = failed or error
    if not found and failed:
        raise failed
    return max(found, key=lambda one: len(one[0]))


def _parquet_rows(
    file: BinaryIO, name: str, field: str, id_field: str | None, start: Mark, others: bool
) -> Iterator[Row]:
    parquet = import_extra("pyarrow.parquet", "parquet")
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
        rest = [column for column in columns if others and column not in wanted]
        for column in rest:
            _column(columns, column, name)
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(1024, row_groups=groups, columns=wanted + rest) if groups else ():
            texts = batch.column(field).to_pylist()
            ids = texts if id_field is None else batch.column(id_field).to_pylist()
            read = [_values(batch.column(column)) for column in rest]
            fields_of = zip(*read, strict=True) if rest else itertools.repeat((), len(texts))
            for text, key, fields in zip(texts, ids, fields_of, strict=True):
                at += 1
                if at <= start.offset:
                    continue
                if not isinstance(text, str):
                    kind = "null" if text is None else type(text).__name__
                    raise InputError(f"{name}, row {at}: column {field!r} holds {kind}, not text")
                row_id = None if id_field is None else _id(key, f"{name}, row {at}", id_field)
                yield Row(text, row_id, Mark(at, at), at, dict(zip(rest, fields, strict=True)))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, OverflowError, import_extra("pyarrow", "parquet").ArrowException) as error:
        raise InputError(f"{name}: can't be read as Parquet ({str(error).splitlines()[0]})") from None


def _values(column: pa.Array) -> list[Any]:
    """A column's values for Python; as text if there are dates among them that Python does not reach."""
    try:
        found: list[Any] = column.to_pylist()
    except OverflowError:
        found = column.cast("string").to_pylist()
    return found


_KINDS = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
ROW_ENDINGS = tuple(_KINDS)
MARKDOWN = (".md", ".markdown")
DOCUMENT_ENDINGS = (*MARKDOWN, ".rst")  # whose lines are no texts by themselves; .txt may be either
_PACKED = {".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z"}
_FORMATTED = {".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".xlsx", ".xls", ".html", ".htm", ".xml", ".npy"}


def _column(columns: list[str], wanted: str, name: str, option: str = "") -> int:
    """Where a column is. Raises `InputError` if it is not there, or more than once."""
    if columns.count(wanted) > 1:
        raise InputError(f"{name}: column {wanted!r} is there more than once")
    if wanted not in columns:
        raise InputError(f"{name}: no column {wanted!r}; it has {_quoted(columns)} (choose with {option})")
    return columns.index(wanted)


def _id(value: Any, place: str, field: str) -> str | int:
    if isinstance(value, str):
        check_unicode(value, f"{place}: the id in {field!r}")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    raise InputError(f"{place}: the id in {field!r} is neither a string nor a whole number of 64 bits: {value!r:.60}")
