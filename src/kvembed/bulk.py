"""Bulk jobs: millions of texts to Parquet shards, each whole or not there, so that a stopped job goes on where it was.

    OUT/_manifest.json         what the job is; at the end also what each shard holds, and its checksum
    OUT/shard-000000.parquet   rows of id, tokens, tokens_cut, embedding
    OUT/_transform.safetensors the fit of a method that has one: on another machine another would be made
    OUT/_lock                  held by the process that writes

A shard holds the rows that the plan gives it, embedded in blocks that depend on these rows alone: wherever a job is
stopped, and whoever goes on with it, every batch is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .bars import Bar
from .batching import blocks
from .config import Role
from .embedder import Embedder
from .errors import InputError, KvembedError
from .extras import import_extra
from .files import atomic_write, exclusive_writer, json_hash, naming, sha256_of, user_path, why, write_json
from .identity import first_difference, identity
from .shards import FIT, MANIFEST, InputChanged, Plan, Shard, ShardReader, check_folders, make_plan
from .vectors import Encoded, as_table

__all__ = ["Engine", "Job", "ShardMaker", "Summary", "Written", "bulk", "found_shard", "kept_fit", "run_here"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a shard depends on besides the model.

    Attributes:
        plan: what is read, and in which pieces.
        out: folder of the shards.
        role: which template.
        hash: 16 hex digits of everything that decides the vectors; every shard carries it.
    """

    plan: Plan
    out: Path
    role: Role
    hash: str


@dataclasses.dataclass(frozen=True)
class Written:
    """What is known of a shard that is done; `sha256` is empty if it was made by an earlier run."""

    index: int
    tokens: int
    texts_cut: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `bulk` did.

    Attributes:
        rows: texts of the job.
        shards: files that hold them.
        made: those of the shards that were not there before.
        dim: length of a vector.
        tokens: read by the model, templates included.
        texts_cut: texts that were cut to `max_tokens`.
        max_tokens: the embedder's.
    """

    rows: int
    shards: int
    made: int
    dim: int
    tokens: int
    texts_cut: int
    max_tokens: int


Report = Callable[[float, float], None]  # rows and tokens done since the last call
Engine = Callable[[Job, Embedder, Sequence[Shard], Report], Iterator[Written]]


def bulk(
    embedder: Embedder | Callable[[], Embedder],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str = "",
    field: str = "text",
    id_field: str | None = None,
    role: Role = "document",
    shard_rows: int = 10_000,
    engine: Engine | None = None,
    progress: bool = False,
) -> Summary:
    """Embed all texts of a file or folder; what an earlier, stopped run of the same job has done is kept.

    Args:
        embedder: the model and its config, or what loads it, called when all inputs have been read and are good.
        source: a `.parquet`, `.jsonl`, `.ndjson`, `.csv` or `.tsv` file, any other with one text a line, or a folder
            (and folders in it) of all but the last kind.
        out: a new or empty folder, or one with the same job.
        model: the model's name, for the manifest.
        field: the key or column that holds the text.
        id_field: the key or column that holds a row's id. Default: ids are row numbers, from 0.
        role: which template.
        shard_rows: rows of a shard, the last one apart.
        engine: makes the shards, for example `bulk_ray.ray_engine(...)`. Default: this process.
        progress: show bars on a terminal.

    Raises:
        InputError: inputs that can't be read, a folder that holds something else, a job that differs from the one
            there, another process at work on it, a full disk. What is done is kept.
    """
    if shard_rows < 1:
        raise InputError(f"shard_rows must be a whole number from 1, not {shard_rows!r}")
    source, out = user_path(source), user_path(out)
    check_folders(source, out)
    plan = make_plan(source, field=field, id_field=id_field, shard_rows=shard_rows, progress=progress)
    embedder = embedder() if callable(embedder) else embedder
    job_identity = _identity(embedder, plan, role, shard_rows)
    job_hash = json_hash(job_identity)
    job = Job(plan, out, role, job_hash)
    manifest: dict[str, Any] = {
        "model": model,
        "revision": getattr(embedder.model.config, "_commit_hash", None),
        "job_hash": job_hash,
        "job": job_identity,
    }
    with exclusive_writer(out):
        for stale in (*out.glob(".shard-*.parquet.*"), *out.glob(f".{MANIFEST}.*"), *out.glob(f".{FIT}.*")):
            stale.unlink(missing_ok=True)  # what a killed run left half-written
        before = _read_manifest(out / MANIFEST)
        if before is None or not (before["finished"] or any(out.glob("shard-*.parquet"))):  # nothing to be lost
            before = None
            with naming(out / FIT):
                (out / FIT).unlink(missing_ok=True)
                if embedder.transform is not None:
                    embedder.transform.save(out / FIT)
            _write_manifest(out, manifest | {"finished": False})
        elif before["job"] != job_identity:
            apart = _difference(before["job"], job_identity)
            raise InputError(f"{out} holds another job ({apart}); choose another folder")
        known = {part["name"]: part["sha256"] for part in (before or {}).get("shards", ())}
        done = {
            shard.index: found for shard in plan.shards if (found := found_shard(job, shard, known.get(shard.name)))
        }
        todo = [shard for shard in plan.shards if shard.index not in done]
        rows_left = sum(shard.rows for shard in todo)
        try:
            with _bar(plan.rows, plan.rows - rows_left, progress) as report:
                for written in (engine or run_here)(job, embedder, todo, report) if todo else ():
                    done[written.index] = written
            if len(done) < len(plan.shards):
                raise KvembedError(f"{len(plan.shards) - len(done)} shards were not made; run the same command again")
            listed = [_listed(job, shard, done[shard.index]) for shard in plan.shards]
            if todo:
                plan.check_unchanged()
        except InputChanged:
            for shard in todo:  # of which texts they are cannot be told, should the old ones come back
                (out / shard.name).unlink(missing_ok=True)
            raise
        _write_manifest(out, manifest | {"finished": True, "shards": listed})
    return Summary(
        rows=plan.rows,
        shards=len(plan.shards),
        made=len(todo),
        dim=embedder.dim,
        tokens=sum(one.tokens for one in done.values()),
        texts_cut=sum(one.texts_cut for one in done.values()),
        max_tokens=embedder.max_tokens,
    )


def kept_fit(out: Path) -> Path | None:
    """The fit of a job of which shards are there, for who goes on with it; None if there is none."""
    fit = user_path(out) / FIT
    return fit if fit.is_file() and any(fit.parent.glob("shard-*.parquet")) else None


def run_here(job: Job, embedder: Embedder, shards: Sequence[Shard], report: Report) -> Iterator[Written]:
    """Make shards in this process, one after the other."""
    make = ShardMaker(job, embedder)
    for shard in shards:
        yield make(shard, report)


class ShardMaker:
    """Reads, embeds and writes shards of a job; every process that makes some has one."""

    def __init__(self, job: Job, embedder: Embedder) -> None:
        self._job = job
        self._embedder = embedder
        self._reader = ShardReader(job.plan)

    def __call__(self, shard: Shard, report: Report = lambda rows, tokens: None) -> Written:
        """Make one shard. Raises `InputError` if its texts can't be read or embedded, or it can't be written."""
        ids: list[Any] = []
        parts: list[Encoded] = []
        for block in blocks(self._reader.read(shard), lambda row: len(row.text)):
            try:
                prompts = self._embedder.prompts([row.text for row in block], role=self._job.role)
                tokens = sum(prompt.tokens for one in prompts for prompt in one)
                each = functools.partial(_report, report, tokens / len(prompts))
                part = self._embedder.encode_prompts(prompts, role=self._job.role, report=each)
            except InputError as error:
                first = shard.first_row + len(ids)
                raise InputError(f"in the {len(block)} rows from row {first} on: {error}") from None
            parts.append(part)
            ids += [row.id for row in block]
        names = (field.name for field in dataclasses.fields(Encoded))
        encoded = Encoded(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        path = self._job.out / shard.name
        with naming(path):
            with atomic_write(path) as file:
                _write(file, ids, encoded, self._job, shard)
            return Written(shard.index, int(encoded.token_counts.sum()), encoded.truncated, sha256_of(path))


def _report(report: Report, tokens: float, rows: int) -> None:
    """Rows that are done, with a block's mean of `tokens` each."""
    report(rows, tokens * rows)


def _write(file: Any, ids: list[Any], encoded: Encoded, job: Job, shard: Shard) -> None:
    arrow, parquet = import_extra("pyarrow", "parquet"), import_extra("pyarrow.parquet", "parquet")
    footer = {
        "job_hash": job.hash,
        "rows": [shard.first_row, shard.first_row + shard.rows],
        "tokens": int(encoded.token_counts.sum()),
        "texts_cut": encoded.truncated,
    }
    keys = arrow.array(ids, getattr(arrow, job.plan.id_type)())
    table = as_table("id", keys, encoded).replace_schema_metadata({"kvembed": json.dumps(footer)})
    parquet.write_table(table, file, use_dictionary=False, write_page_checksum=True)


def found_shard(job: Job, shard: Shard, sha256: str | None = None) -> Written | None:
    """A shard that is there, whole and of this job (and with this checksum, if given); None if it is to be made."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    path = job.out / shard.name
    try:
        meta = parquet.read_metadata(path)
        footer = json.loads(meta.metadata[b"kvembed"])
        wanted = (job.hash, [shard.first_row, shard.first_row + shard.rows], shard.rows)
        if (footer["job_hash"], footer["rows"], meta.num_rows) == wanted and _is_whole(path, sha256):
            return Written(shard.index, footer["tokens"], footer["texts_cut"], sha256 or "")
    except FileNotFoundError:
        if sha256 is None:  # it has not been made yet
            return None
        logger.warning("%s is missing, and is made again", path)
        return None
    except (OSError, ValueError, KeyError, TypeError, import_extra("pyarrow", "parquet").ArrowException):
        pass
    logger.warning("%s is damaged, and is made again", path)
    return None


def _is_whole(path: Path, sha256: str | None) -> bool:
    """By a checksum, or else by those that Parquet has of its own pages, which raise where they do not fit."""
    if sha256 is not None:
        return sha256 == sha256_of(path)
    parquet = import_extra("pyarrow.parquet", "parquet")
    for _ in parquet.ParquetFile(path, page_checksum_verification=True).iter_batches():
        pass
    return True


def _listed(job: Job, shard: Shard, written: Written) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    path = job.out / shard.name
    return {
        "name": shard.name,
        "rows": [shard.first_row, shard.first_row + shard.rows],
        "tokens": written.tokens,
        "texts_cut": written.texts_cut,
        "bytes": path.stat().st_size,
        "sha256": written.sha256 or sha256_of(path),
    }


def _identity(embedder: Embedder, plan: Plan, role: Role, shard_rows: int) -> dict[str, Any]:
    """Everything that decides what the shards hold, in plain JSON types."""
    from . import __version__

    return {
        "kvembed": __version__,
        **identity(embedder),
        "config_hash": embedder.config.hash(),
        "batch_tokens": embedder.batch_tokens,
        "role": role,
        "field": plan.field,
        "id_field": plan.id_field,
        "id_type": plan.id_type,
        "inputs": [
            {
                "path": file.path,
                "bytes": file.size,
                "sha256": file.sha256,
                "rows": [file.first_row, file.first_row + file.rows],
            }
            for file in plan.inputs
        ],
        "rows": plan.rows,
        "shard_rows": shard_rows,
    }


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing in which two jobs differ, of their inputs the first that does."""
    others = {name: value for name, value in now.items() if name not in ("inputs", "rows")}
    if apart := first_difference(before, others):
        return apart
    was = {file["path"]: file for file in before["inputs"]}
    changed = [file for file in now["inputs"] if file != was.get(file["path"])]
    if not changed:
        return "input files are gone"
    path, content = changed[0]["path"], changed[0]["sha256"]
    known = {file["sha256"]: name for name, file in was.items()}
    if known.get(content, path) != path:
        return f"input {known[content]}, not {path}"
    return f"input {path} has changed, or is new"


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text())
        known = isinstance(manifest["job"]["inputs"], list) and isinstance(manifest["finished"], bool)
        if known and all({"name", "sha256"} <= {*part} for part in manifest.get("shards", ())):
            return cast("dict[str, Any]", manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: {why(error)}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is not the manifest of a bulk job; give another folder")


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    with naming(out / MANIFEST):
        write_json(out / MANIFEST, manifest)


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Report]:
    """Rows done, rows and tokens a second, and the time left, of what this run does."""
    started, tokens = time.monotonic(), 0.0
    with Bar(total=total, initial=done, desc="bulk", unit="row", unit_scale=True, progress=progress) as bar:

        def report(rows: float, more: float) -> None:
            nonlocal tokens
            tokens += more
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-3):,.0f} tok/s", refresh=False)
            bar.update(rows)

        yield report
