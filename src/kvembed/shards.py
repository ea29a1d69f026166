"""The plan of a bulk job: its input files, and their rows cut into shards, each of which can be read by itself."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .bars import Bar
from .errors import InputError
from .extras import import_extra
from .files import check_folder, naming, raise_named, sha256_of
from .texts import ROW_ENDINGS, Mark, Row, place_of, read_rows

__all__ = [
    "MANIFEST",
    "InputChanged",
    "InputFile",
    "Plan",
    "Shard",
    "ShardReader",
    "check_folders",
    "find_inputs",
    "make_plan",
]

logger = logging.getLogger(__name__)

# Readers of folders of Parquet pass over names that begin with "_" or ".".
MANIFEST, FIT = "_manifest.json", "_transform.safetensors"


class InputChanged(InputError):
    """An input is not what it was when the plan was made."""


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of texts.

    Attributes:
        path: within the input folder, with `/`.
        size: in bytes.
        sha256: of its content.
        first_row: number of its first row, counted from 0 over all files.
        rows: how many it has.
    """

    path: str
    size: int
    sha256: str
    first_row: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows that are embedded together and written to one file.

    Attributes:
        index: from 0.
        first_row: number of its first row, counted from 0 over all files.
        rows: how many it has.
        file: index of the input file in which it begins.
        offset, line: where in it (see `Mark`).
    """

    index: int
    first_row: int
    rows: int
    file: int
    offset: int
    line: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"shard-{self.index:06d}.parquet"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is read, and in which pieces; the same inputs give the same plan.

    Attributes:
        folder: where the inputs are.
        inputs: in the order in which they are read.
        shards: all of them, in order.
        field, id_field: as in `read_rows`; without `id_field`, ids are row numbers.
        id_type: `"string"` or `"int64"`.
    """

    folder: Path
    inputs: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    field: str
    id_field: str | None
    id_type: str

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(file.rows for file in self.inputs)

    def check_unchanged(self) -> None:
        """Raises `InputChanged` if an input is not what it was when the plan was made."""
        for path, file in ((self.folder / file.path, file) for file in self.inputs):
            _check_size(path, file.size)
            if sha256_of(path) != file.sha256:
                raise InputChanged(f"{path} changed while it was read; give the job another folder")


def find_inputs(source: Path, *, tell: bool = True) -> tuple[Path, list[str]]:
    """The folder, and the files in it to read, sorted; names that begin with `.` or `_` are passed over.

    Args:
        source: a file or a folder.
        tell: log how many others are passed over, links to folders among them.

    Raises:
        InputError: there are none, or a folder or a file's link can't be read.
    """
    if os.path.isfile(source):  # Path's own raises for a name that is too long
        return source.parent, [source.name]
    if not os.path.isdir(source):
        piped = "; bulk reads its inputs twice, so none can come from a pipe" if str(source) == "-" else ""
        raise InputError(f"{source}: no such file or folder{piped}")
    inside: list[Path] = []
    links = 0
    for folder, inner, names in os.walk(source, onerror=raise_named):
        inner[:] = [name for name in inner if not name.startswith((".", "_"))]
        links += sum(os.path.islink(os.path.join(folder, name)) for name in inner)
        inside += [Path(folder, name) for name in names if not name.startswith((".", "_"))]
    found = sorted(path.relative_to(source) for path in inside if path.suffix.lower() in ROW_ENDINGS)
    for path in found:
        with naming(source / path):
            os.stat(source / path)  # a link may lead nowhere
    if not found:
        raise InputError(f"{source}: no {', '.join(ROW_ENDINGS)} files in this folder")
    if tell and (others := len(inside) - len(found)):
        logger.info("%s: %d files are passed over, being none of %s", source, others, ", ".join(ROW_ENDINGS))
    if tell and links:
        logger.info("%s: %d links to folders are passed over", source, links)
    return source, [path.as_posix() for path in found]


def check_folders(source: Path, out: Path) -> None:
    """Fail before a model is loaded. Raises `InputError` if there is nothing to read, or `out` is not for us."""
    import_extra("pyarrow.parquet", "parquet")
    find_inputs(source, tell=False)
    check_folder(out, "bulk job", MANIFEST, (FIT, f".{FIT}."))
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{out} is inside {source}: the job would read what it writes")


def make_plan(source: Path, *, field: str, id_field: str | None, shard_rows: int, progress: bool = False) -> Plan:
    """Read all inputs once, so that rows are counted and a bad one is told before days of work, not after.

    Raises:
        InputError: no inputs, no rows, a row that can't be used (file and line are named), ids of both types.
    """
    folder, names = find_inputs(source)
    inputs: list[InputFile] = []
    shards: list[Shard] = []
    id_type: str | None = None
    total = 0
    with Bar(desc="reading", unit="row", unit_scale=True, progress=progress) as bar:
        for number, name in enumerate(names):
            path = folder / name
            size = _size(path)
            first, mark = total, Mark()
            for row in read_rows(path, field, id_field):
                if total % shard_rows == 0:
                    shards.append(Shard(len(shards), total, shard_rows, number, *mark))
                total, mark = total + 1, row.next
                if id_field is not None:
                    kind = "string" if isinstance(row.id, str) else "int64"
                    if id_type is None:
                        id_type = kind
                    elif kind != id_type:
                        before = "strings" if id_type == "string" else "whole numbers"
                        raise InputError(
                            f"{place_of(path, row.line)}: the id is {row.id!r:.60}; those before it are {before}"
                        )
                if total % 1000 == 0:
                    bar.update(1000)
            inputs.append(InputFile(name, size, sha256_of(path), first, total - first))
            _check_size(path, size)
    if not total:
        raise InputError(f"{source}: no texts in it")
    shards[-1] = dataclasses.replace(shards[-1], rows=total - shards[-1].first_row)
    return Plan(folder, tuple(inputs), tuple(shards), field, id_field, id_type or "int64")


def _size(path: Path) -> int:
    with naming(path):
        return path.stat().st_size


def _check_size(path: Path, before: int) -> None:
    if (size := _size(path)) != before:
        raise InputChanged(f"{path} changed while it was read: it had {before:,} bytes, and has {size:,}")


class ShardReader:
    """Reads shards of a plan, in any order; a shard that follows the last one read costs no new search."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rows: Iterator[Row] = iter(())
        self._next = -1

    def read(self, shard: Shard) -> Iterator[Row]:
        """The rows of a shard, one by one.

        Raises:
            InputChanged: the inputs are not what they were when the plan was made.
        """
        if self._next != shard.first_row:
            self._rows = self._from(shard)
        self._next = -1  # until all are read
        count = 0
        for count, row in enumerate(itertools.islice(self._rows, shard.rows), 1):
            yield row if self._plan.id_field is not None else row._replace(id=shard.first_row + count - 1)
        if count < shard.rows:
            raise InputChanged(f"{self._plan.folder}: a file changed while it was read")
        self._next = shard.first_row + shard.rows

    def _from(self, shard: Shard) -> Iterator[Row]:
        start = Mark(shard.offset, shard.line)
        for file in self._plan.inputs[shard.file :]:
            path = self._plan.folder / file.path
            _check_size(path, file.size)
            yield from read_rows(path, self._plan.field, self._plan.id_field, start)
            start = Mark()
