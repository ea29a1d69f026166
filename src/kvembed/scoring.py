"""Scores by the field's definitions, and how far they may be trusted: bootstrap over items.

| kind           | metric            | definition                                                                 |
|----------------|-------------------|----------------------------------------------------------------------------|
| sts            | spearman          | Spearman correlation of cosine and gold (SciPy; ties get their mean rank)  |
| pairs          | average_precision | of the cosine as a detector of label 1 (scikit-learn)                      |
| classification | accuracy          | MTEB's protocol: 10 times, 8 training texts per label, logistic regression |
| clustering     | v_measure         | mean of 10 k-means runs, seeds 0 to 9 (scikit-learn), k = number of labels |
| reranking      | map               | mean average precision over a query's own candidates (trec_eval)           |
| retrieval      | ndcg_at_10        | nDCG@10, gain = rel (trec_eval)                                            |

All are in percent. Rows of vectors need not be normalised: similarity is the cosine, and classification and clustering
see unit vectors. A cosine is computed in float64 and rounded to 6 decimals, so that equal texts tie. Documents that tie
are ranked as trec_eval does, by their index as a string, descending.

Classification, exactly: the indices of the training texts are shuffled by `numpy.random.RandomState(42)`, ten times,
each time going on from the last order; of each order the first 8 texts of every label train
`LogisticRegression(max_iter=100, random_state=42)`, and the ten accuracies on the test texts are averaged. Clustering:
`KMeans(n_clusters=k, n_init=1, random_state=seed)`.
"""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .extras import import_extra
from .tasks import Task

__all__ = ["METRICS", "REPLICATES", "Score", "score"]

METRICS = {
    "sts": "spearman",
    "pairs": "average_precision",
    "classification": "accuracy",
    "clustering": "v_measure",
    "reranking": "map",
    "retrieval": "ndcg_at_10",
}
REPLICATES = 500
_SEED = 42  # MTEB's
_EXPERIMENTS, _SAMPLES_PER_LABEL = 10, 8

Vectors = NDArray[np.float64]
Chance = np.random.Generator | None  # of a replicate; None: the score itself
Value = Callable[[NDArray[np.int64], Chance], float]  # indices of items -> score of just these, in percent


@dataclasses.dataclass(frozen=True)
class Score:
    """A score and its spread.

    Attributes:
        metric: a value of `METRICS`.
        value: in percent.
        low, high: 95 % bootstrap interval over items (percentiles), within what the metric can be. Queries that look
            for the same documents are drawn together. In clustering the partitions are drawn, too, but each is of all
            items, so what a partition owes to them is left out: such intervals are about a third too narrow.
        replicates: the bootstrap scores behind it, `REPLICATES` of them, their mean moved to `value`. For a task the
            same items are drawn for every method, so the difference of two methods' replicates is a paired bootstrap of
            their difference.
    """

    metric: str
    value: float
    low: float
    high: float
    replicates: tuple[float, ...]


def score(task: Task, documents: NDArray[np.float32], queries: NDArray[np.float32]) -> Score:
    """Score a task's vectors.

    Args:
        task: what was embedded.
        documents: (number of documents, dim), in the task's order.
        queries: (number of queries, dim), likewise; may be empty.
    """
    value = _SCORERS[task.kind](task, _unit(documents), _unit(queries))
    whole = value(np.arange(task.n), None)
    chance = np.random.default_rng(zlib.crc32(documents.tobytes()))  # of a method's own: see `_clustering`
    drawn = np.array([value(items, chance) for items in _samples(task)])
    # Duplicates in a sample raise the V-measure; only the replicates' spread is wanted, so they are centred.
    replicates = drawn - drawn.mean() + whole
    least = -100 if task.kind == "sts" else 0
    low, high = np.percentile(replicates, [2.5, 97.5]).clip(least, 100).tolist()
    return Score(METRICS[task.kind], whole, low, high, tuple(replicates.tolist()))


def _samples(task: Task) -> Iterator[NDArray[np.int64]]:
    """Items drawn with replacement, `REPLICATES` times; the same for every method.

    Queries that look for the same documents succeed or fail together, so they are drawn together. Resampling by
    cluster: Davison & Hinkley 1997, section 3.8.
    """
    wanted: list[Any] = [frozenset(document for document, gain in row.items() if gain) for row in task.relevant]
    alike: dict[Any, list[int]] = {}
    for item, key in enumerate(wanted or range(task.n)):
        alike.setdefault(key, []).append(item)
    groups = [np.array(items, np.int64) for items in alike.values()]
    if len(groups) == 1:  # nothing would vary
        groups = [*np.arange(task.n)[:, None]]
    draw = np.random.default_rng(zlib.crc32(f"{task.name} {task.n}".encode()))
    for _ in range(REPLICATES):
        yield np.concatenate([groups[index] for index in draw.integers(0, len(groups), len(groups))])


def _unit(vectors: NDArray[np.float32]) -> Vectors:
    exact = vectors.astype(np.float64)
    unit: Vectors = exact / np.linalg.norm(exact, axis=-1, keepdims=True).clip(1e-12)
    return unit


def _sts(task: Task, documents: Vectors, _: Vectors) -> Value:
    spearmanr = import_extra("scipy.stats", "eval").spearmanr
    gold, cosine = np.array(task.gold), _cosines(documents)

    def value(items: NDArray[np.int64], _: Chance) -> float:
        if len({*gold[items].tolist()}) < 2 or np.ptp(cosine[items]) == 0:
            return 0.0  # no correlation can be told
        return 100 * float(spearmanr(cosine[items], gold[items]).statistic)

    return value


def _pairs(task: Task, documents: Vectors, _: Vectors) -> Value:
    average_precision = import_extra("sklearn.metrics", "eval").average_precision_score
    gold, cosine = np.array(task.gold), _cosines(documents)

    def value(items: NDArray[np.int64], _: Chance) -> float:
        return 100 * float(average_precision(gold[items], cosine[items])) if gold[items].any() else 0.0

    return value


def _cosines(documents: Vectors) -> NDArray[np.float64]:
    half = len(documents) // 2
    return np.einsum("nd,nd->n", documents[:half], documents[half:]).round(6)  # type: ignore[no-any-return]


def _classification(task: Task, documents: NDArray[Any], _: Vectors) -> Value:
    """As MTEB's AbsTaskClassification: the training texts are drawn with its seed and shuffled as it does."""
    linear_model = import_extra("sklearn.linear_model", "eval")
    gold, documents = np.array(task.gold), documents.astype(np.float32)
    train, test = documents[: task.train], documents[task.train :]
    order = list(range(task.train))
    correct = np.zeros(len(test))
    for _experiment in range(_EXPERIMENTS):
        np.random.RandomState(_SEED).shuffle(order)
        taken: Counter[Any] = Counter()
        chosen = []
        for index in order:
            if taken[gold[index]] < _SAMPLES_PER_LABEL:
                taken[gold[index]] += 1
                chosen.append(index)
        model = linear_model.LogisticRegression(max_iter=100, random_state=_SEED)
        with warnings.catch_warnings():  # stopped after MTEB's 100 iterations, it says that it has not converged
            warnings.simplefilter("ignore")
            model.fit(train[chosen], gold[chosen])
        correct += model.predict(test) == gold[task.train :]
    correct *= 100 / _EXPERIMENTS
    return lambda items, _: float(correct[items].mean())


def _clustering(task: Task, documents: Vectors, _: Vectors) -> Value:
    """The mean over partitions from several starts. Replicates draw the partitions too, for each method apart: another
    start may be worth more than other texts, and is as good for one method as bad for the next.
    """
    cluster, metrics = import_extra("sklearn.cluster", "eval"), import_extra("sklearn.metrics", "eval")
    names, gold = np.unique(np.array(task.gold), return_inverse=True)
    with warnings.catch_warnings():  # that there are fewer different vectors than clusters
        warnings.simplefilter("ignore")
        runs = [
            cluster.KMeans(n_clusters=len(names), n_init=1, random_state=seed).fit_predict(documents.astype(np.float32))
            for seed in range(_EXPERIMENTS)
        ]

    def value(items: NDArray[np.int64], chance: Chance) -> float:
        drawn = range(len(runs)) if chance is None else chance.integers(0, len(runs), len(runs))
        return 100 * float(np.mean([metrics.v_measure_score(gold[items], runs[at][items]) for at in drawn]))

    return value


def _ranking(measure: str) -> Callable[[Task, Vectors, Vectors], Value]:
    def scorer(task: Task, documents: Vectors, queries: Vectors) -> Value:
        pytrec_eval = import_extra("pytrec_eval", "eval")
        run, judged = {}, {}
        for index, (row, gains) in enumerate(zip(queries, task.relevant, strict=True)):
            candidates = np.array(sorted(gains)) if task.kind == "reranking" else np.arange(len(documents))
            similarity = (documents[candidates] @ row).round(6)
            if task.kind == "retrieval" and len(candidates) > 1000:  # more than nDCG@10 can see
                least = np.partition(similarity, -1000)[-1000]
                best = np.flatnonzero(similarity >= least)  # with all that tie, whose order is trec_eval's
                candidates, similarity = candidates[best], similarity[best]
            run[str(index)] = {str(d): float(s) for d, s in zip(candidates, similarity, strict=True)}
            judged[str(index)] = {str(d): gain for d, gain in gains.items()}
        results = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(run)
        name = measure.replace(".", "_")
        values = np.array([100 * results[str(index)][name] for index in range(len(queries))])
        return lambda items, _: float(values[items].mean())

    return scorer


_SCORERS: dict[str, Callable[[Task, Vectors, Vectors], Value]] = {
    "sts": _sts,
    "pairs": _pairs,
    "classification": _classification,
    "clustering": _clustering,
    "reranking": _ranking("map"),
    "retrieval": _ranking("ndcg_cut.10"),
}
