"""Evaluation: embed a task's texts (cached, resumable), score them, write one ledger file a result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bars import Bar
from .batching import blocks
from .config import Role
from .errors import InputError
from .files import atomic_write, cache_folder, naming
from .results import Result, result_path
from .scoring import score
from .subjects import Subject
from .tasks import Task
from .vectors import Encoded

__all__ = ["evaluate", "hardware"]

logger = logging.getLogger(__name__)

# Characters that the model reads between two commits, over all passes: what a stop can lose, a minute on two cores.
_CHUNK = 100_000


def evaluate(
    subject: Subject,
    tasks: Sequence[Task],
    *,
    suite: str,
    results: Path | None = None,
    vectors: Path | None = None,
    progress: bool = False,
) -> Iterator[Result]:
    """Embed and score tasks, one after another.

    Vectors are cached by model, config, role and text, and stored as they come, so a run that was stopped goes on where
    it was. A result that the ledger has already, of the same config and the same data, is not made again.

    Args:
        subject: what embeds.
        tasks: what to score it on.
        suite: `"mini"`, `"full"` or `"long"`; part of the result's name.
        results: folder of the ledger. None: nothing is written, nothing is skipped.
        vectors: a folder to write each task's vectors to, in the order of its texts, with its gold, for scoring
            elsewhere.
        progress: show a bar with the time left on a terminal.

    Raises:
        InputError: a task of one item; a folder can't be written to, or holds a result for other data under the same
            names; or a name can't be a folder's.

    Yields:
        A result for each task.
    """
    todo = []
    if alone := [task.name for task in tasks if task.n < 2]:
        raise InputError(f"{alone[0]} has one item, of which no interval can be told: give more")
    for folder in filter(None, (results, vectors)):
        _check_folder(folder)
    for task in tasks:
        path = None if results is None else result_path(results, suite, subject.model, _label(subject), task.name)
        known = _known(path, subject, task) if path else None
        if known and vectors is None:
            yield known
        else:
            todo.append((task, path))
    with contextlib.closing(_Store(subject)) as store, _bar(store, [task for task, _ in todo], progress) as bar:
        for task, path in todo:
            result = _run(subject, task, suite, store, bar, vectors)
            if path is not None:
                with naming(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path) as file:
                        file.write(result.to_json().encode())
            yield result


def _label(subject: Subject) -> str:
    return f"{subject.method.replace(' ', '-')}-{subject.identity[:8]}"


def _check_folder(folder: Path) -> None:
    """That results will have a place is better known before hours of embedding."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _known(path: Path, subject: Subject, task: Task) -> Result | None:
    """What was run before. Raises `InputError` if that is of other data, which must not be lost for this."""
    if not path.is_file():
        return None
    known = Result.from_json(path)
    if known.data != task.digest():
        raise InputError(
            f"{path} is of another task of this name, with other texts or gold: move it, or give another folder"
        )
    return known if known.identity == subject.identity else None


def _run(subject: Subject, task: Task, suite: str, store: _Store, bar: Bar, vectors: Path | None) -> Result:
    if subject.fit is not None:
        subject.fit([*task.documents, *task.queries])
    encoded: dict[Role, Encoded] = {}
    seconds = 0.0
    for role, texts in _inputs(task).items():
        encoded[role], spent = store.encode(texts, role, bar)
        seconds += spent
        if subject.finish is not None:
            encoded[role] = dataclasses.replace(encoded[role], vectors=subject.finish(encoded[role].vectors, role))
    if vectors is not None:
        with naming(vectors / task.name):
            _export(vectors / task.name, task, encoded)
    documents = encoded["document"].vectors
    queries = encoded["query"].vectors if "query" in encoded else documents[:0]
    scored = score(task, documents, queries)
    return Result(
        suite=suite,
        model=subject.model,
        method=subject.method,
        task=task.name,
        kind=task.kind,
        metric=scored.metric,
        score=round(scored.value, 4),
        low=round(scored.low, 4),
        high=round(scored.high, 4),
        n=task.n,
        texts=len(task.documents) + len(task.queries),
        tokens=sum(int(part.token_counts.sum()) for part in encoded.values()),
        truncated=sum(part.truncated for part in encoded.values()),
        passes=subject.passes,
        seconds=round(seconds, 2),
        config=subject.config,
        config_hash=subject.config_hash,
        identity=subject.identity,
        data=task.digest(),
        device=subject.device,
        hardware=hardware(),
        versions={name: importlib.metadata.version(name) for name in ("kvembed", "torch", "transformers")},
        replicates=tuple(round(value, 2) for value in scored.replicates),
    )


def _inputs(task: Task) -> dict[Role, tuple[str, ...]]:
    inputs: dict[Role, tuple[str, ...]] = {"document": task.documents}
    return inputs | ({"query": task.queries} if task.queries else {})


class _Store:
    """Vectors on disk, in a file of their own for each model and config; in memory for a subject that is fitted."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._path = cache_folder() / "embeddings" / f"{subject.cached_as or subject.identity}.sqlite"
        if subject.fit is not None:
            self._base = _opened(":memory:")
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._base = _opened(str(self._path))
        except (OSError, sqlite3.OperationalError) as error:
            logger.warning("embeddings can't be stored in %s (%s): a stopped run will start afresh", self._path, error)
            self._base = _opened(":memory:")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self._path}: {error}; delete it") from None

    def close(self) -> None:
        self._base.close()

    def chunks(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Similar lengths together, so that little is padded; the longest first, so that the time left is not too low.

        All of a task's texts, also those that are stored: in half precision a vector depends a little on its batch
        mates, and these should not depend on what was run before.
        """
        ordered = sorted(dict.fromkeys(texts), key=len, reverse=True)
        most = _CHUNK // max(1, self._subject.passes)
        return blocks(ordered, len, most_items=len(ordered), most_characters=most)

    def lacks(self, texts: Sequence[str], role: Role) -> bool:
        """Whether any of them is not stored."""
        return any(self._row("1", _key(text, role)) is None for text in texts)

    def encode(self, texts: Sequence[str], role: Role, bar: Bar) -> tuple[Encoded, float]:
        """Vectors of the texts, from the store or made now, and the seconds that the model took for them."""
        if self._subject.fit is not None:
            start = time.perf_counter()
            encoded = self._subject.encode(texts, role)
            bar.update(_cost(texts))
            return encoded, time.perf_counter() - start
        for chunk in self.chunks(texts):
            if not self.lacks(chunk, role):
                continue
            start = time.perf_counter()
            encoded = self._subject.encode(chunk, role)
            seconds = time.perf_counter() - start
            shares = seconds * encoded.token_counts / max(1, encoded.token_counts.sum())
            columns = (encoded.vectors, encoded.token_counts.tolist(), encoded.tokens_cut.tolist(), shares.tolist())
            rows = [
                (_key(text, role), vector.astype(np.float32).tobytes(), *numbers)
                for text, vector, *numbers in zip(chunk, *columns, strict=True)
            ]
            try:
                with self._base:
                    self._base.executemany("insert or replace into vectors values (?, ?, ?, ?, ?)", rows)
            except sqlite3.Error as error:
                raise InputError(f"{self._path}: {error}") from None
            bar.update(_cost(chunk))
        found = {key: self._row("vector, tokens, cut, seconds", key) for key in {_key(text, role) for text in texts}}
        stored = [found[_key(text, role)] for text in texts]
        matrix: NDArray[np.float32] = np.stack([np.frombuffer(vector, np.float32) for vector, *_ in stored])
        tokens, cut = (np.array([row[i] for row in stored], np.int64) for i in (1, 2))
        return Encoded(matrix, tokens, cut), sum(row[3] for row in found.values())

    def _row(self, columns: str, key: bytes) -> Any:
        # `columns` are our own words
        return self._base.execute(f"select {columns} from vectors where key = ?", (key,)).fetchone()  # noqa: S608


def _key(text: str, role: Role) -> bytes:
    return hashlib.sha256(f"{role}\0{text}".encode()).digest()


def _opened(path: str) -> sqlite3.Connection:
    base = sqlite3.connect(path, timeout=60)
    base.execute(
        "create table if not exists vectors (key blob primary key, vector blob, tokens int, cut int, seconds real)"
    )
    base.execute("insert or replace into vectors values (x'', x'', 0, 0, 0)")  # or a read-only file is found out late
    base.rollback()
    return base


def _cost(texts: Sequence[str]) -> int:
    """Characters, with a constant for what templates add and a bound for what cutting takes."""
    return sum(40 + min(len(text), 16_384) for text in texts)


@contextlib.contextmanager
def _bar(store: _Store, tasks: Sequence[Task], progress: bool) -> Iterator[Bar]:
    waiting: dict[tuple[Role, str], int] = {}
    for task in tasks:
        for role, texts in _inputs(task).items():
            for chunk in store.chunks(texts):
                if store.lacks(chunk, role):
                    waiting |= {(role, text): _cost([text]) for text in chunk}
    with Bar(total=sum(waiting.values()), desc="embedding", unit="char", unit_scale=True, progress=progress) as bar:
        yield bar


def _export(folder: Path, task: Task, encoded: dict[Role, Encoded]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for role, texts in _inputs(task).items():
        with atomic_write(folder / f"{role}.npy") as file:
            np.save(file, encoded[role].vectors, allow_pickle=False)
        with atomic_write(folder / f"{role}.jsonl") as file:
            file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    gold = {"kind": task.kind, "gold": task.gold, "train": task.train, "relevant": task.relevant}
    with atomic_write(folder / "gold.json") as file:
        file.write(json.dumps(gold).encode())


def hardware() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
