"""Scores against definitions written out by hand, and the spread that goes with them."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score

from kvembed.scoring import REPLICATES, score
from kvembed.tasks import Task

NONE = np.zeros((0, 2), np.float32)


def at(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * 3  # vectors need not be of norm 1


def ranks(values):
    return np.array([np.mean([2 * (x < v) + (x == v) for x in values]) for v in values])


def test_sts_is_spearman_with_ties():
    gold = (5.0, 3.0, 3.0, 1.0, 0.0)
    task = Task("t", "sts", ("",) * 10, gold=gold)
    documents = at(0, 0, 0, 0, 0, 5, 40, 20, 80, 80)
    expected = np.corrcoef(ranks(gold), ranks([np.cos(np.radians(x)) for x in (5, 40, 20, 80, 80)]))[0, 1]
    assert score(task, documents, NONE).value == pytest.approx(100 * expected, abs=1e-4)


def test_pairs_is_average_precision():
    task = Task("t", "pairs", ("",) * 8, gold=(1, 0, 1, 0))
    documents = at(0, 0, 0, 0, 10, 20, 30, 40)  # by cosine: 1 0 1 0
    assert score(task, documents, NONE).value == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_more_ties_than_are_ranked_are_all_seen():
    """trec_eval has an order of its own for them, by name."""
    task = Task("t", "retrieval", ("",) * 3000, ("",), relevant=({999: 1, 2999: 1, 5: 1},))
    documents, queries = np.zeros((3000, 2), np.float32), np.zeros((1, 2), np.float32)
    run = {"0": {str(document): 0.0 for document in range(3000)}}
    evaluator = pytrec_eval.RelevanceEvaluator({"0": {"999": 1, "2999": 1, "5": 1}}, {"ndcg_cut.10"})
    assert score(task, documents, queries).value == 100 * evaluator.evaluate(run)["0"]["ndcg_cut_10"] > 0


def test_retrieval_is_ndcg_at_10():
    task = Task("t", "retrieval", ("",) * 12, ("",), relevant=({0: 1, 1: 2, 11: 1},))
    documents = at(5, 10, 2, *range(20, 100, 10), 170)  # ranks: 2 0 1 3 ...; 11 is out of the ten
    gained = 1 / np.log2(3) + 2 / np.log2(4)
    ideal = 2 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert score(task, documents, at(0)).value == pytest.approx(100 * gained / ideal, abs=1e-4)


def test_reranking_of_thousands_has_no_end():
    task = Task("t", "reranking", ("",) * 1500, ("",), relevant=({n: int(n in (0, 1400)) for n in range(1500)},))
    expected = (1 + 2 / 1401) / 2
    assert score(task, at(*np.arange(1500) / 10), at(0)).value == pytest.approx(100 * expected, abs=1e-4)


def test_reranking_is_map_over_a_querys_own_candidates():
    task = Task("t", "reranking", ("",) * 4, ("", ""), relevant=({0: 0, 1: 1, 2: 1}, {3: 1, 0: 0}))
    documents = at(1, 2, 50, 3)
    assert score(task, documents, at(0, 0)).value == pytest.approx(100 * ((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2, abs=1e-4)


def test_classification_learns_from_train_and_is_scored_on_test():
    draw = np.random.default_rng(0)
    labels = tuple(draw.choice(["a", "b"], 300).tolist())
    centres = np.where(np.array(labels)[:, None] == "a", [[1, 0]], [[0, 1]])
    documents = (centres + draw.normal(0, 0.1, (300, 2))).astype(np.float32)
    flipped = (*labels[:250], *("b" if label == "a" else "a" for label in labels[250:275]), *labels[275:])
    assert score(Task("t", "classification", ("",) * 300, gold=labels, train=200), documents, NONE).value > 99
    fair = score(Task("t", "classification", ("",) * 300, gold=flipped, train=200), documents, NONE)
    assert fair.value == pytest.approx(75, abs=1)


@pytest.mark.filterwarnings("ignore")  # MTEB's own imports
def test_classification_is_mtebs_protocol():
    from datasets import Dataset
    from mteb.tasks import Banking77Classification

    draw = np.random.default_rng(1)
    labels = draw.choice(list("abcde"), 400)
    documents = draw.normal(size=(400, 6)).astype(np.float32)
    documents += 0.7 * np.eye(6, dtype=np.float32)[np.unique(labels, return_inverse=True)[1]]
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    theirs = Banking77Classification()
    train = Dataset.from_dict({"label": labels[:300].tolist()})
    order, accuracies = None, []
    for experiment in range(theirs.n_experiments):
        _, order, chosen = theirs._undersample_data(train, experiment, order)
        model = theirs.evaluator_model.set_params(random_state=theirs.seed)
        model.fit(documents[chosen], labels[chosen])
        accuracies.append((model.predict(documents[300:]) == labels[300:]).mean())
    task = Task("t", "classification", ("",) * 400, gold=tuple(labels.tolist()), train=300)
    assert score(task, documents, NONE).value == pytest.approx(100 * np.mean(accuracies), abs=1e-6)


def test_clustering_is_v_measure(monkeypatch):
    monkeypatch.setattr("kvembed.scoring.REPLICATES", 100)  # each takes as long as the score itself
    labels = ("x",) * 40 + ("y",) * 40 + ("z",) * 40
    angles = np.concatenate([np.linspace(start, start + 10, 40) for start in (0, 60, 120)])
    assert score(Task("t", "clustering", ("",) * 120, gold=labels), at(*angles), NONE).value == pytest.approx(100)
    mixed = labels[:20] + ("z",) * 20 + labels[40:]
    result = score(Task("t", "clustering", ("",) * 120, gold=mixed), at(*angles), NONE)
    assert result.value == pytest.approx(100 * v_measure_score(mixed, labels), abs=1)
    assert result.low < result.value < result.high


def test_the_interval_is_right_where_theory_knows_it():
    draw = np.random.default_rng(0)
    n = 400
    task = Task("t", "sts", ("",) * 2 * n, gold=tuple(draw.normal(size=n).tolist()))
    angle = np.pi / 2 - 0.5 * np.array(task.gold) - draw.normal(size=n)
    result = score(task, at(*np.zeros(n), *np.degrees(np.clip(angle, 0, np.pi))), NONE)
    assert len(result.replicates) == REPLICATES
    rho = result.value / 100
    half = 1.96 * 100 * (1 - rho**2) * np.sqrt((1 + rho**2 / 2) / n)  # Fisher, Bonett and Wright
    assert result.high - result.low == pytest.approx(2 * half, rel=0.25)
    assert np.mean(result.replicates) == pytest.approx(result.value)


def test_methods_are_paired():
    draw = np.random.default_rng(0)
    task = Task("t", "sts", ("",) * 400, gold=tuple(draw.normal(size=200).tolist()))
    angle = np.degrees(np.arccos(np.clip(0.2 * np.array(task.gold) + draw.normal(0, 0.2, 200), -1, 1)))
    first = score(task, at(*np.zeros(200), *angle), NONE)
    second = score(task, at(*np.zeros(200), *(angle + draw.normal(0, 1, 200))), NONE)
    difference = np.subtract(first.replicates, second.replicates)
    assert difference.std() < 0.5 * np.std(first.replicates)
    assert first.replicates == score(task, at(*np.zeros(200), *angle), NONE).replicates


def test_queries_for_the_same_documents_are_drawn_together():
    """Five queries for each of forty documents, of which twenty are found, say no more than one query each."""
    documents = np.eye(60, dtype=np.float32)[:, 20:]  # the last forty differ
    wanted = np.repeat(np.arange(40), 5)
    queries = np.eye(40, dtype=np.float32)[np.where(wanted < 20, wanted, 0)]

    def half_of(wanted, queries):
        relevant = tuple({20 + int(document): 1, 0: 0} for document in wanted)
        task = Task("t", "retrieval", ("",) * 60, ("",) * len(wanted), relevant=relevant)
        result = score(task, documents, queries)
        return (result.high - result.low) / 2

    assert half_of(wanted, queries) == pytest.approx(1.96 * 50 / 40**0.5, rel=0.2)
    assert half_of(wanted[::5], queries[::5]) == pytest.approx(1.96 * 50 / 40**0.5, rel=0.2)
    one_document = half_of(np.zeros(100), np.eye(40, dtype=np.float32)[np.arange(100) % 2])
    assert one_document == pytest.approx(1.96 * 50 / 100**0.5, rel=0.2)  # of one group nothing could be drawn


def test_partitions_that_come_by_chance_widen_a_clusterings_interval():
    """Three heaps for two labels: which two go together is the start's whim."""
    heaps = np.repeat(np.eye(3), 30, axis=0)
    vectors = (heaps + np.random.default_rng(0).normal(0, 0.05, heaps.shape)).astype(np.float32)
    task = Task("t", "clustering", ("",) * 90, gold=("a",) * 60 + ("b",) * 30)
    found = score(task, vectors, NONE)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    runs = [KMeans(2, n_init=1, random_state=seed).fit_predict(unit) for seed in range(10)]
    values = [100 * v_measure_score(task.gold, run) for run in runs]
    assert found.value == pytest.approx(np.mean(values))
    assert np.std(values) > 20
    assert np.std(found.replicates) == pytest.approx(np.std(values) / 10**0.5, rel=0.3)
    assert found == score(task, vectors, NONE)
    other = score(task, vectors + np.float32(1e-7), NONE)  # another method's chance is another
    assert np.corrcoef(found.replicates, other.replicates)[0, 1] < 0.7


def test_equal_texts_tie_whatever_the_rounding():
    documents = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    twice = np.concatenate([documents, documents])
    pairs = Task("t", "pairs", ("",) * 120, gold=tuple(i % 2 for i in range(60)))
    assert score(pairs, twice, NONE).value == pytest.approx(50)
    assert score(Task("t", "sts", ("",) * 120, gold=tuple(range(60))), twice, NONE).value == 0


def test_an_interval_stays_within_what_can_be():
    result = score(Task("t", "sts", ("",) * 6, gold=(1.0, 2.0, 3.0)), at(0, 0, 0, 10, 30, 20), NONE)
    assert -100 <= result.low <= result.value <= result.high <= 100
