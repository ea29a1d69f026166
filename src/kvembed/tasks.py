"""Evaluation tasks in folders: JSON lines in the keys below, read with care, and cut to a fixed sample for `mini`.

| kind           | files (`.jsonl` or `.jsonl.gz`) | keys                                            |
|----------------|---------------------------------|-------------------------------------------------|
| sts            | test                            | s1, s2, score                                   |
| pairs          | test                            | s1, s2, label (0 or 1)                          |
| classification | train, test                     | text, label                                     |
| clustering     | test, and no train              | text, label                                     |
| reranking      | test                            | query, positive (list), negative (list)         |
| retrieval      | corpus, queries, qrels          | id, title, text; id, text; qid, did, rel        |

The kind is found from files and keys, so any folder of such folders will do. Without a `test`, `dev` is taken. A
retrieval task may have a second set of queries, `queries_summary` and `qrels_summary`: then that one bears the folder's
name, and the other is `NAME-queries`, which is left out unless it is asked for.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import InputError
from .files import why

__all__ = ["LIMITS", "MINI_TOKENS", "Kind", "Task", "load_tasks", "mini", "sample"]

Kind = Literal["sts", "pairs", "classification", "clustering", "reranking", "retrieval"]

# The sizes of `mini`; a retrieval corpus is bounded by its characters, of each document at most MINI_DOCUMENT.
MINI_PAIRS, MINI_TEST, MINI_CLUSTERING, MINI_RERANKING, MINI_QUERIES = 250, 500, 1000, 34, 100
# Training texts in all, if that is no fewer of a label than the first and no more than the second number: ten
# classifiers learn from eight of a label each, and should not learn from the same.
MINI_TRAIN, MINI_TRAIN_OF_LABEL = 800, (10, 80)
MINI_CORPUS, MINI_DOCUMENT = 300_000, 4_000
MINI_TOKENS = 1024
# suite -> limits of tokens that it is run at; longer texts are cut, and counted. `full`: the model's own limit.
LIMITS: dict[str, tuple[int, ...]] = {"mini": (MINI_TOKENS,), "full": (), "long": (512, 1024, 2048, 4096, 16_384)}
# A retrieval task whose median document has this many characters belongs to `long`, with a sample of its documents.
_LONG_DOCUMENT, _LONG_DOCUMENTS = 8_000, 40


@dataclasses.dataclass(frozen=True)
class Task:
    """What to embed, and the gold to score it by.

    Attributes:
        name: the folder's.
        kind: see above.
        documents: texts in the document role. sts, pairs: all s1, then all s2. classification: train, then test.
        queries: texts in the query role; retrieval and reranking only.
        gold: sts: scores; pairs: 0 or 1; classification and clustering: a label for each document.
        relevant: for each query, index of a document -> its gain (0: judged, but not relevant). reranking: these are
            the query's candidates; retrieval: all documents are.
        train: classification: how many of the documents are for training.
    """

    name: str
    kind: Kind
    documents: tuple[str, ...]
    queries: tuple[str, ...] = ()
    gold: tuple[Any, ...] = ()
    relevant: tuple[Mapping[int, int], ...] = ()
    train: int = 0

    @property
    def n(self) -> int:
        """Number of items that the score is over: pairs, test texts or queries."""
        if self.kind in ("sts", "pairs"):
            return len(self.gold)
        return len(self.queries) or len(self.documents) - self.train

    def digest(self) -> str:
        """16 hex digits that change when the texts, the gold or the split into training and test texts do."""
        parts: list[Any] = [
            self.kind,
            self.documents,
            self.queries,
            self.gold,
            [sorted(row.items()) for row in self.relevant],
        ]
        parts += [self.train] * bool(self.train)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_tasks(folder: Path, names: Sequence[str] = ()) -> list[Task]:
    """Read all tasks of a folder (each a folder in it), or some by name, sorted by name.

    Raises:
        InputError: no such folder or task, or a bad row, with its file and line.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    try:
        homes = sorted(path for path in folder.iterdir() if path.is_dir() and any(map(_is_data, path.iterdir())))
        if not homes and any(map(_is_data, folder.iterdir())):
            homes = [folder.resolve()]  # a single task
    except OSError as error:
        raise InputError(f"{error.filename}: {why(error)}") from None
    if not homes:
        raise InputError(f"{folder}: no folder in it holds .jsonl or .jsonl.gz files")
    known = [name for home in homes for name in _names(home)]
    if missing := sorted({*names} - {*known}):
        raise InputError(f"no task {missing[0]!r} in {folder}; there are: {', '.join(known)}")
    wanted = {*names} or {home.name for home in homes}
    return [task for home in homes if wanted & {*_names(home)} for task in _load(home) if task.name in wanted]


def sample(tasks: Sequence[Task], suite: str) -> list[Task]:
    """What a suite takes: `mini` a fixed sample of each task, `full` all, `long` some documents if they are long.

    Raises:
        InputError: no task has long texts.
    """
    if suite == "full":
        return list(tasks)
    if suite == "long":
        tasks = [task for task in tasks if task.kind == "retrieval"]
        tasks = [task for task in tasks if statistics.median(map(len, task.documents)) >= _LONG_DOCUMENT]
        if not tasks:
            raise InputError(f"no retrieval task has documents of {_LONG_DOCUMENT:,} characters and more")
        return [_few_documents(task) for task in tasks]
    return [mini(task) for task in tasks]


def _few_documents(task: Task) -> Task:
    """Some documents, and queries that are about these alone."""
    draw = random.Random(zlib.crc32(f"long {task.name}".encode()))
    kept = {*_sample(draw, range(len(task.documents)), _LONG_DOCUMENTS)}
    about = [i for i, gains in enumerate(task.relevant) if kept >= {*gains}]
    if not about:
        raise InputError(f"{task.name}: no query is about {_LONG_DOCUMENTS} sampled documents alone")
    return _part(task, _sample(draw, about, MINI_QUERIES), sorted(kept))


def mini(task: Task) -> Task:
    """The fixed sample of a task for the suite `mini`; the same for the same data anywhere. Small tasks stay whole.

    Raises:
        InputError: the sample has one label only, so that nothing can be scored.
    """
    part = _mini(task)
    if task.kind in ("sts", "pairs", "clustering") and len({*part.gold}) == 1:
        raise InputError(
            f"{task.name}: all in the sample of {len(part.gold)} are {part.gold[0]}; --suite full takes all"
        )
    return part


def _mini(task: Task) -> Task:
    draw = random.Random(zlib.crc32(task.name.encode()))
    if task.kind in ("sts", "pairs"):
        half = len(task.gold)
        chosen = _sample(draw, range(half), MINI_PAIRS)
        documents = [task.documents[i] for i in chosen] + [task.documents[half + i] for i in chosen]
        return dataclasses.replace(task, documents=tuple(documents), gold=tuple(task.gold[i] for i in chosen))
    if task.kind in ("classification", "clustering"):
        train: list[int] = []
        labels = sorted({*task.gold[: task.train]})
        least, most = MINI_TRAIN_OF_LABEL
        each = min(most, max(least, MINI_TRAIN // (len(labels) or 1)))
        for label in labels:
            train += _sample(draw, [i for i in range(task.train) if task.gold[i] == label], each)
        size = MINI_TEST if task.train else MINI_CLUSTERING
        test = _sample(draw, range(task.train, len(task.documents)), size)
        chosen = sorted(train) + test
        return dataclasses.replace(
            task,
            documents=tuple(task.documents[i] for i in chosen),
            gold=tuple(task.gold[i] for i in chosen),
            train=len(train),
        )
    asked = _sample(draw, range(len(task.queries)), MINI_QUERIES if task.kind == "retrieval" else MINI_RERANKING)
    kept = sorted({document for query in asked for document in task.relevant[query]})
    if task.kind == "retrieval":
        others = sorted({*range(len(task.documents))} - {*kept})
        draw.shuffle(others)
        room = MINI_CORPUS - sum(min(len(task.documents[i]), MINI_DOCUMENT) for i in kept)
        for index in others:
            room -= min(len(task.documents[index]), MINI_DOCUMENT)
            if room < 0:
                break
            kept.append(index)
        kept.sort()
    return _part(task, asked, kept)


def _part(task: Task, asked: Sequence[int], kept: Sequence[int]) -> Task:
    """Some queries over some documents."""
    place = {document: i for i, document in enumerate(kept)}
    return dataclasses.replace(
        task,
        documents=tuple(task.documents[i] for i in kept),
        queries=tuple(task.queries[i] for i in asked),
        relevant=tuple({place[d]: gain for d, gain in task.relevant[i].items()} for i in asked),
    )


def _sample(draw: random.Random, items: Sequence[int], size: int) -> list[int]:
    """At most `size` of them, in their order."""
    return sorted(draw.sample(list(items), size)) if len(items) > size else list(items)


# --- reading ----------------------------------------------------------------------------------------------------------


def _is_data(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _names(home: Path) -> list[str]:
    return [home.name, f"{home.name}-queries"] if _find(home, "queries_summary") else [home.name]


def _find(home: Path, stem: str) -> Path | None:
    there = [path for path in (home / f"{stem}.jsonl.gz", home / f"{stem}.jsonl") if os.path.lexists(path)]
    if len(there) > 1:
        raise InputError(f"{home}: has both {there[0].name} and {there[1].name}")
    return there[0] if there else None


def _load(home: Path) -> Iterator[Task]:
    if corpus := _find(home, "corpus"):
        sets = ["queries", "queries_summary"] if _find(home, "queries_summary") else ["queries"]
        for name, queries in zip(_names(home), reversed(sets), strict=True):
            yield _retrieval(name, corpus, home, queries)
        return
    test = _find(home, "test") or _find(home, "dev")
    if test is None:
        raise InputError(f"{home}: holds neither test.jsonl[.gz] nor corpus.jsonl[.gz]")
    rows = [*_rows(test)]
    keys = {*rows[0][1]}
    if {"s1", "s2", "score"} <= keys:
        yield _pairs(home.name, "sts", rows, "score", _number)
    elif {"s1", "s2", "label"} <= keys:
        yield _pairs(home.name, "pairs", rows, "label", _zero_or_one)
    elif {"text", "label"} <= keys:
        train = _find(home, "train")
        yield _labelled(home.name, [*_rows(train)] if train else [], rows)
    elif {"query", "positive", "negative"} <= keys:
        yield _reranking(home.name, rows)
    else:
        raise InputError(f"{test}, line 1: no task has the keys {', '.join(sorted(keys))}")


Row = tuple[str, dict[str, Any]]  # where it is, for messages; what it holds


def _rows(path: Path) -> Iterator[Row]:
    line_number, empty = 0, True
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line_number, line in enumerate(file, 1):
                place = f"{path}, line {line_number}"
                if line.strip():
                    empty = False
                    yield place, _object(place, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, after line {line_number}: broken file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: {why(error)}") from None
    if empty:
        raise InputError(f"{path}: holds no rows")


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{place}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object")
    return row


def _value(row: Row, key: str, check: Callable[[Any], bool], what: str) -> Any:
    place, fields = row
    if key not in fields:
        raise InputError(f"{place}: no key {key!r}")
    if not check(fields[key]):
        raise InputError(f"{place}: {key} must be {what}, not {fields[key]!r:.80}")
    return fields[key]


def _string(row: Row, key: str) -> str:
    text: str = _value(row, key, _is_text, "a string of valid Unicode")
    return text


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _strings(row: Row, key: str) -> list[str]:
    return list(
        _value(
            row,
            key,
            lambda value: isinstance(value, list) and all(map(_is_text, value)),
            "a list of strings",
        )
    )


def _number(row: Row, key: str) -> float:
    return float(_value(row, key, lambda value: _is_number(value) and abs(value) < 1e300, "a finite number"))


def _zero_or_one(row: Row, key: str) -> int:
    return int(_value(row, key, lambda value: _is_number(value) and value in (0, 1), "0 or 1"))


def _is_name(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pairs(name: str, kind: Kind, rows: list[Row], key: str, read: Callable[[Row, str], float]) -> Task:
    gold = tuple(read(row, key) for row in rows)
    documents = [_string(row, side) for side in ("s1", "s2") for row in rows]
    if len({*gold}) < 2:
        raise InputError(f"{rows[0][0].rpartition(',')[0]}: all rows have the same {key}, so nothing can be scored")
    return Task(name, kind, tuple(documents), gold=gold)


def _labelled(name: str, train: list[Row], test: list[Row]) -> Task:
    rows = train + test
    labels = [str(_value(row, "label", _is_name, "a string or a whole number")) for row in rows]
    if unseen := {*labels[len(train) :]} - {*labels[: len(train)]} if train else set():
        place = next(place for (place, _), label in zip(test, labels[len(train) :], strict=True) if label in unseen)
        raise InputError(f"{place}: label {sorted(unseen)[0]!r} has no row in train")
    if len({*labels}) < 2:
        raise InputError(f"{test[0][0].rpartition(',')[0]}: fewer than two labels, so nothing can be scored")
    kind: Kind = "classification" if train else "clustering"
    return Task(name, kind, tuple(_string(row, "text") for row in rows), gold=tuple(labels), train=len(train))


def _reranking(name: str, rows: list[Row]) -> Task:
    documents: dict[str, int] = {}
    relevant = []
    for row in rows:
        gains: dict[int, int] = {}
        for key, gain in (("negative", 0), ("positive", 1)):
            candidates = _strings(row, key)
            if not candidates:
                raise InputError(f"{row[0]}: {key} is empty, so the query can't be scored")
            for text in candidates:
                if gains.setdefault(documents.setdefault(text, len(documents)), gain) != gain:
                    raise InputError(f"{row[0]}: {text!r:.60} is both positive and negative")
        relevant.append(gains)
    queries = tuple(_string(row, "query") for row in rows)
    return Task(name, "reranking", tuple(documents), queries, relevant=tuple(relevant))


def _retrieval(name: str, corpus: Path, home: Path, queries: str) -> Task:
    judged = queries.replace("queries", "qrels")
    query_file, judgement_file = _find(home, queries), _find(home, judged)
    if query_file is None or judgement_file is None:
        raise InputError(f"{home}: has a corpus, but no {judged if query_file else queries}.jsonl[.gz]")
    documents: dict[str, str] = {}
    for row in _rows(corpus):
        title = _string(row, "title") if "title" in row[1] else ""
        _add(documents, row, f"{title} {_string(row, 'text')}".strip())
    asked: dict[str, str] = {}
    for row in _rows(query_file):
        _add(asked, row, _string(row, "text"))
    places = {key: i for i, key in enumerate(documents)}
    gains: dict[str, dict[int, int]] = {key: {} for key in asked}
    for row in _rows(judgement_file):
        query, document = _key(row, "qid"), _key(row, "did")
        if query not in gains or document not in places:
            where = query_file if query not in gains else corpus
            raise InputError(f"{row[0]}: {(query if query not in gains else document)!r} is not in {where.name}")
        gain = _value(row, "rel", lambda x: _is_number(x) and isinstance(x, int) and 0 <= x <= 1000, "0, 1, ... 1000")
        if gains[query].setdefault(places[document], gain) != gain:
            raise InputError(f"{row[0]}: {document!r} has another rel for {query!r} above")
    if missing := [key for key, row in gains.items() if not any(row.values())]:
        raise InputError(f"{judgement_file}: no document is relevant to query {missing[0]!r}")
    return Task(name, "retrieval", tuple(documents.values()), tuple(asked.values()), relevant=tuple(gains.values()))


def _key(row: Row, key: str) -> str:
    return str(_value(row, key, _is_name, "a string or a whole number"))


def _add(texts: dict[str, str], row: Row, text: str) -> None:
    key = _key(row, "id")
    if key in texts:
        raise InputError(f"{row[0]}: id {key!r} appears twice")
    texts[key] = text
