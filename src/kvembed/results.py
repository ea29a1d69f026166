"""The ledger: one JSON file a result, read back, compared with its spread, and made into tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError
from .files import user_path
from .scoring import REPLICATES

__all__ = ["REFERENCES", "Estimate", "Result", "by_method", "difference", "mean", "read_results", "result_path"]

# Methods that are no methods of ours, but stand beside them in every table, and what they are.
REFERENCES = {"sentence-transformer": "trained", "tf-idf": "lexical"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One model, method and task.

    Attributes:
        suite: `"mini"`, `"full"` or `"long"`; tools have their own.
        model: its name.
        method: its name.
        task: its name.
        kind: of task, see `kvembed.tasks`.
        metric: see `kvembed.scoring`.
        score: in percent.
        low: the lower end of the score's 95 % bootstrap interval over items.
        high: the upper end.
        n: items that the score is over.
        texts: texts embedded, counted as often as the task names them.
        tokens: read by the model for them, templates and copies included, as `Encoded.token_counts` has them.
        truncated: texts that were cut.
        passes: forward passes for a text.
        seconds: the model's, for these texts, each different one once.
        config: what was done to a text, as `EmbedConfig.to_dict` has it.
        config_hash: 16 hex digits of it.
        identity: 16 hex digits of weights, dtype and config: all that decides a vector.
        data: digest of the task's texts and gold.
        device: device, threads, dtype.
        hardware: name of the processor.
        versions: of kvembed, torch and transformers.
        replicates: bootstrap scores, paired over methods; see `kvembed.scoring.Score`.
    """

    suite: str
    model: str
    method: str
    task: str
    kind: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    texts: int
    tokens: int
    truncated: int
    passes: int
    seconds: float
    config: Mapping[str, Any]
    config_hash: str
    identity: str
    data: str
    device: str
    hardware: str
    versions: Mapping[str, str]
    replicates: tuple[float, ...]

    def to_json(self) -> str:
        """A key a line, the replicates on one."""
        fields = dataclasses.asdict(self)
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()) + "\n}\n"

    @classmethod
    def from_json(cls, path: Path) -> Result:
        """Raises `InputError` if the file is not a result."""
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a result: {error}") from None
        for field in dataclasses.fields(cls):
            if not isinstance(fields, dict) or not _CHECKS[str(field.type)](fields.get(field.name)):
                raise InputError(f"{path} is not a result: {field.name} is missing or not what it should be")
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in fields.items() if name in known}
        return cls(**kept | {"replicates": tuple(fields["replicates"])})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# type of a field, as annotated -> what a value from JSON must be
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "float": _is_number,
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
    "Mapping[str, str]": lambda value: isinstance(value, dict) and all(isinstance(x, str) for x in value.values()),
    "tuple[float, ...]": lambda value: (
        isinstance(value, list) and len(value) == REPLICATES and all(map(_is_number, value))
    ),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tasks, or a difference of two, in percent points.

    Attributes:
        value: the mean or the difference.
        low: the lower end of its 95 % bootstrap interval.
        high: the upper end.
    """

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if below, else 0: a difference that the data can't tell from none."""
        return (self.low > 0) - (self.high < 0)


def mean(results: Iterable[Result]) -> Estimate:
    """The mean score over tasks; its interval is within what the metrics can be, and holds it.

    Raises:
        InputError: none, or more than one result of a task.
    """
    results = list(results)
    if not results:
        raise InputError("no results to take the mean of")
    _check_once(results)
    found = _estimate([r.score for r in results], [r.replicates for r in results])
    least = float(np.mean([-100.0 if r.kind == "sts" else 0.0 for r in results]))
    low, high = np.clip([found.low, found.high], least, 100).tolist()
    return Estimate(found.value, min(low, found.value), max(high, found.value))


def difference(ours: Iterable[Result], theirs: Iterable[Result]) -> Estimate:
    """Mean over tasks of ours - theirs, paired: the same bootstrap items on both sides.

    Raises:
        InputError: the two are not over the same tasks and data, or have more than one result of a task.
    """
    ours, theirs = list(ours), list(theirs)
    for some in (ours, theirs):
        _check_once(some)
    pairs = list(itertools.zip_longest(sorted(ours, key=_task), sorted(theirs, key=_task)))
    if not pairs or any(a is None or b is None or (a.task, a.data) != (b.task, b.data) for a, b in pairs):
        raise InputError("results of different tasks or data can't be compared")
    rows = [np.subtract(a.replicates, b.replicates) for a, b in pairs]
    return _estimate([a.score - b.score for a, b in pairs], rows)


def by_method(results: Iterable[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Results grouped by (model, method, identity), in the order they come."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.method, result.identity), []).append(result)
    return groups


def _check_once(results: Iterable[Result]) -> None:
    """Raises `InputError` if a task comes more than once, so that a mean would be over different configs."""
    task, count = max(Counter(map(_task, results)).items(), key=operator.itemgetter(1), default=("", 0))
    if count > 1:
        raise InputError(f"{count} results of {task}: choose one of them, by method, suite or config_hash")


def _task(result: Result) -> str:
    return result.task


def _estimate(values: Sequence[float], replicates: Sequence[ArrayLike]) -> Estimate:
    """Replicates of different tasks are independent; their means are replicates of the mean."""
    low, high = np.percentile(np.mean(np.array(replicates), axis=0), [2.5, 97.5]).tolist()
    return Estimate(float(np.mean(values)), low, high)


def result_path(folder: Path, suite: str, model: str, method: str, task: str) -> Path:
    """`FOLDER/suite/model/method/task.json`.

    Raises:
        InputError: a name can't be a folder's.
    """
    parts = [part.replace("/", "--") for part in (suite, model, method)]
    for part in parts:
        if part in ("", ".", "..") or len(part.encode()) > 120 or "\0" in part:
            raise InputError(f"{part[:40]!r} can't be the name of a folder in the ledger")
    return folder.joinpath(*parts, f"{task}.json")


def read_results(folder: str | os.PathLike[str]) -> list[Result]:
    """All results below a folder, sorted by path.

    Raises:
        InputError: no such folder, or a file in it that is not a result.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return [Result.from_json(path) for path in sorted(folder.glob("*/*/*/*.json"))]
