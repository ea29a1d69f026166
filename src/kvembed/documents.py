"""Documents to search: folders walked, files cut into passages or read row by row, each with its place.

| file                                | document                                           |
|-------------------------------------|----------------------------------------------------|
| `.jsonl`, `.csv`, `.parquet`, alike | a row: its text, and its other fields to filter by |
| `.md`, `.markdown`                  | a passage, cut at headings too                     |
| `.txt`, `.rst`; any other, by name  | a passage                                          |
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import hashlib
import json
import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .bars import Bar
from .checks import check_unicode
from .errors import InputError
from .files import raise_named, user_path
from .passages import passages
from .texts import DOCUMENT_ENDINGS, MARKDOWN, ROW_ENDINGS, composed, place_of, read_lines, read_rows
from .transform import LEAST_TEXTS

__all__ = ["INDEX_FILE", "Corpus", "Document", "Kind", "Place", "check_same", "converted", "joint_kind"]

logger = logging.getLogger(__name__)

INDEX_FILE = "kvembed-index.json"  # a folder with it is an index, and passed over
_SAMPLE = 1000  # texts that a transform is fitted on

Kind = Literal["bool", "int64", "float64", "string"]


class Place(NamedTuple):
    """Where a document is, and the hash of all that it holds."""

    file: str
    line: int
    content: str

    def __str__(self) -> str:
        return place_of(Path(self.file), self.line)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to find.

    Attributes:
        id: of the row, if its field was named; or else the hash of text and fields.
        text: the row's, or a passage.
        file: absolute path.
        line: the first one, from 1; in Parquet the row.
        fields: the row's other fields, by their names in the index.
    """

    id: str
    text: str
    file: str
    line: int
    fields: Mapping[str, Any]

    @property
    def place(self) -> Place:
        """Where it is, and the hash of id, text and fields."""
        return Place(self.file, self.line, _hash([self.id, self.text, sorted(self.fields.items())]))

    @property
    def text_hash(self) -> str:
        """32 hex digits; texts with the same have the same vector."""
        return _hash(self.text)


class Corpus:
    """All documents of some paths, read once to know them and again to embed them; texts are not kept.

    Attributes:
        roots: the paths, absolute.
        gone: those of them that do not exist.
        documents: id -> place. A document that is there more than once is known by its first place.
        kinds: field -> type of its column: what holds all its values.
        sample: up to 1,000 texts, drawn with a fixed seed, for a transform to be fitted on (see `kvembed.tuning`).
        files: how many were read.
        passed_over: what was not, by ending, and why -> how many files.
        unread: those of them that are not UTF-8. What an index has of such a file stays, for it may just be written.
        duplicates: documents that were left out, being there once already.
        empty: documents that were left out, having no text.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        field: str = "text",
        id_field: str | None = None,
        lines: bool = False,
        may_be_gone: bool = False,
        progress: bool = False,
    ) -> None:
        """Read all files once.

        Args:
            paths: files, and folders with all that is in them; hidden files and links out of a folder are passed over.
            field: the key or column that holds a row's text.
            id_field: the key or column that holds a row's id. Default: rows are known by their content.
            lines: whether each line of a plain text file is a document, as in `kvembed embed`. Default: passages are.
            may_be_gone: whether a path may be missing, because its documents are to be removed from an index.
            progress: show a bar on a terminal.

        Raises:
            InputError: a path that is missing; a row that can't be used, with its file and line; one id for two rows.
        """
        self._field, self._id_field, self._lines = field, id_field, lines
        self.roots = list(dict.fromkeys(os.path.abspath(user_path(path)) for path in paths))
        self._roots = frozenset(self.roots)
        if odd := [root for root in self.roots if not _is_unicode(root)]:
            raise InputError(f"{odd[0]!r}: its name is not UTF-8")
        self.gone = [root for root in self.roots if not os.path.lexists(root)]
        if self.gone and not may_be_gone:
            raise InputError(f"{self.gone[0]}: no such file or folder")
        if pipes := [root for root in self.roots if os.path.exists(root) and not _is_kept(root)]:
            raise InputError(f"{pipes[0]}: neither a file nor a folder; what is indexed is read twice")
        self.documents: dict[str, Place] = {}
        self.kinds: dict[str, Kind] = {}
        self.sample: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self.unread: set[str] = set()
        self.duplicates = self.empty = 0
        self._files = [file for file in dict.fromkeys(self._find()) if self._is_read(file)]
        self.files = len(self._files)
        named: dict[str, str] = {}  # column -> field
        draw = random.Random(0)
        with Bar(desc="reading", unit="document", unit_scale=True, progress=progress) as bar:
            for file in self._files:
                for document in self._read(file, named):
                    bar.update()
                    if not document.text.strip():
                        self.empty += 1
                        continue
                    here = document.place
                    known = self.documents.setdefault(document.id, here)
                    if known is not here:
                        check_same(document.id, here, known)
                        self.duplicates += 1
                        continue
                    for name, value in document.fields.items():
                        if (kind := _kind(value)) is not None:
                            self.kinds[name] = joint_kind(self.kinds.get(name, kind), kind)
                    at = draw.randrange(len(self.documents))
                    if len(self.sample) < _SAMPLE:
                        self.sample.append(document.text)
                    elif at < _SAMPLE:
                        self.sample[at] = document.text

    def calibration(self) -> list[str] | None:
        """What a transform is fitted on: texts of the corpus, or None, with a warning, if these are too few."""
        if len({*self.sample}) >= LEAST_TEXTS:
            return self.sample
        logger.warning(
            "fewer than %d documents (%d), so the transform is fitted on text that the model writes itself",
            LEAST_TEXTS,
            len(self.documents),
        )
        return None

    def read(self, ids: Mapping[str, Place]) -> Iterator[Document]:
        """Read some documents again: those that still are where and what they were when the corpus was made."""
        files, named, left = {place.file for place in ids.values()}, dict[str, str](), dict(ids)
        for file in self._files:
            if file in files:
                for document in self._read(file, named):
                    if left.get(document.id) == document.place:
                        del left[document.id]  # a line that repeats itself may hold it again, at the same place
                        yield document

    def check_not_empty(self) -> None:
        """Raises `InputError` if there are no documents."""
        if not self.documents:
            raise InputError(f"{', '.join(self.roots)}: no documents in {'them' if self.roots[1:] else 'it'}")

    def holds(self, file: str) -> bool:
        """Whether a path is one of the corpus's, or in a folder of it."""
        while file not in self._roots:
            below, file = file, os.path.dirname(file)
            if file == below:
                return False
        return True

    def _find(self) -> Iterator[str]:
        """Files in the order of their names, those named themselves whatever their ending."""
        for root in self.roots:
            if not os.path.isdir(root):
                if root not in self.gone:
                    yield root
                continue
            real = os.path.realpath(root)
            for folder, inner, names in os.walk(root, onerror=raise_named):
                inner[:] = sorted(name for name in inner if not name.startswith(".") and INDEX_FILE not in names)
                if INDEX_FILE in names:
                    continue
                for name in sorted(names):
                    path = os.path.join(folder, name)
                    if name.startswith("."):
                        continue
                    if not _is_unicode(path):
                        logger.warning("passed over, for its name is not UTF-8: %r", path)
                        self.passed_over["name not UTF-8"] += 1
                    elif os.path.splitext(name)[1].lower() not in (*ROW_ENDINGS, *DOCUMENT_ENDINGS, ".txt"):
                        self.passed_over[os.path.splitext(name)[1] or "without ending"] += 1
                    elif os.path.commonpath([real, os.path.realpath(path)]) != real:
                        self.passed_over["link out of its folder"] += 1
                    elif os.path.exists(path) and not os.path.isfile(path):
                        self.passed_over["no regular file"] += 1  # a pipe would be waited for
                    else:
                        yield path

    def _is_read(self, file: str) -> bool:
        """Whether a file of text is UTF-8; in a folder one that is not is passed over, and told.

        Raises:
            InputError: it can't be read at all. What the index has of it must not be taken for gone.
        """
        if file in self._roots or (os.path.exists(file) and Path(file).suffix.lower() == ".parquet"):
            return True
        try:
            for _ in read_lines(Path(file)):
                pass
        except InputError as error:
            if not os.path.exists(file):
                self.passed_over["broken link"] += 1
                return False
            if isinstance(error.__context__, OSError):
                raise
            logger.warning("passed over: %s", error)
            self.passed_over["not UTF-8"] += 1
            self.unread.add(file)
            return False
        return True

    def _read(self, file: str, named: dict[str, str]) -> Iterator[Document]:
        """A file's documents."""
        path = Path(file)
        kind = path.suffix.lower()
        if kind not in ROW_ENDINGS:
            lines = ((row.line, row.text) for row in read_lines(path))
            whole = self._lines and kind not in MARKDOWN
            for line, text in lines if whole else passages(lines, headings=kind in MARKDOWN):
                text = composed(text)
                yield Document(_hash([text, []]), text, file, line, {})
            return
        csv = kind in (".csv", ".tsv")
        for row in read_rows(path, self._field, self._id_field, others=True):
            at = place_of(path, row.line)
            fields = {_column(name, named, at): _plain(value, csv) for name, value in row.others.items()}
            for name, value in fields.items():
                check_unicode(f"{name} {value}", at)
            text = composed(row.text)
            key = _hash([text, sorted(fields.items())]) if row.id is None else str(row.id)
            yield Document(key, text, file, row.line, fields)


def check_same(key: str, new: Place, known: Place) -> None:
    """Raises `InputError` if an id has other content at another place."""
    if known.content != new.content:
        raise InputError(f"{new}: id {key!r} is in {known}, with other content")


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_kept(path: str) -> bool:
    return os.path.isfile(path) or os.path.isdir(path)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


# --- fields -----------------------------------------------------------------------------------------------------------

OWN = ("id", "text", "vector", "file", "line")


class _Cell(str):
    """A value in CSV: a number if it reads like one, as long as all in its column do."""

    __slots__ = ()


_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")


def _column(name: str, named: dict[str, str], place: str) -> str:
    """A field's name in the index: letters, digits and `_`, unlike the index's own."""
    column = re.sub(r"\W", "_", name).lstrip("_") or "field"
    column += "_" * (column in OWN)
    if named.setdefault(column, name) != name:
        raise InputError(f"{place}: fields {named[column]!r} and {name!r} would both be called {column!r}; rename one")
    return column


def _plain(value: Any, csv: bool) -> Any:
    """A value as plain JSON types: lists and objects as their JSON, dates as ISO 8601, what else there is as text."""
    if csv:
        return _Cell(value) if value else None
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def _kind(value: Any) -> Kind | None:
    if isinstance(value, _Cell):
        found = _NUMBER.fullmatch(value)
        return "string" if found is None else "float64" if found[2] or found[3] else "int64"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return None if value is None else "float64" if isinstance(value, float) else "string"


def joint_kind(one: Kind, other: Kind) -> Kind:
    """The narrowest type that holds the values of both."""
    return one if one == other else "float64" if {one, other} == {"int64", "float64"} else "string"


def converted(value: Any, kind: Kind) -> Any:
    """A value of a document's field in the type of its column."""
    if value is None:
        return None
    if kind == "string":
        return str(value) if isinstance(value, str) else json.dumps(value)
    return bool(value) if kind == "bool" else int(value) if kind == "int64" else float(value)
