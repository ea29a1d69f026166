"""Means and paired differences with their intervals; tables that follow from the ledger alone."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kvembed import METHODS, InputError
from kvembed.results import Estimate, Result, by_method, difference, mean, read_results, result_path
from kvembed.tasks import MINI_TOKENS

ROOT = Path(__file__).parent.parent


def result(task="a", score=50.0, spread=1.0, seed=0, method="kv", model="smollm2", **changes):
    draws = np.random.default_rng(seed).normal(0, 1, 500)
    replicates = tuple((score + spread * (draws - draws.mean())).tolist())
    config = METHODS[method].replace(max_tokens=MINI_TOKENS).to_dict() if method in METHODS else {}
    fields = {
        "suite": "mini",
        "model": model,
        "method": method,
        "task": task,
        "kind": "sts",
        "metric": "spearman",
        "score": score,
        "low": score - 2 * spread,
        "high": score + 2 * spread,
        "n": 100,
        "texts": 200,
        "tokens": 4000,
        "truncated": 0,
        "passes": 1,
        "seconds": 1.0,
        "config": config,
        "config_hash": f"{method}-hash",
        "identity": f"{model} {method}",
        "data": f"digest of {task}",
        "device": "cpu",
        "hardware": "a machine",
        "versions": {"kvembed": "0"},
        "replicates": replicates,
    }
    return Result(**fields | changes)


def test_a_means_interval_is_within_what_can_be_and_holds_it():
    sure = mean([result(score=99.9, spread=2.0), result("b", score=100.0, spread=0.0)])
    assert sure.low < sure.value < sure.high == 100
    moved = result(score=100.0, replicates=(101.0,) * 500)  # a metric's own bias moves the replicates
    assert mean([moved]) == Estimate(100.0, 100.0, 100.0)


def test_the_mean_of_tasks_is_surer_than_one():
    tasks = [result(task=str(i), score=40.0 + i, seed=i) for i in range(9)]
    whole = mean(tasks)
    assert whole.value == pytest.approx(44)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 / 3, rel=0.15)  # a third of one task's


def test_a_difference_is_paired():
    ours = [result(task=task, score=50.0, spread=5, seed=i) for i, task in enumerate("ab")]
    theirs = [result(task=task, score=49.0, spread=5, seed=i) for i, task in enumerate("ba"[::-1])]
    gap = difference(ours, theirs)
    assert gap.value == pytest.approx(1)
    assert (gap.low, gap.high) == pytest.approx((1, 1))  # the same items go wrong on both sides
    assert gap.sign == 1
    assert difference(theirs, ours).sign == -1
    unpaired = [result(task=task, score=49.0, spread=5, seed=9 + i) for i, task in enumerate("ab")]
    assert difference(ours, unpaired).sign == 0


@pytest.mark.parametrize("theirs", [[], [result("b")], [result("a"), result("b")], [result("a", data="other")]])
def test_unlike_things_are_not_compared(theirs):
    with pytest.raises(InputError, match="different tasks or data"):
        difference([result("a")], theirs)


def test_paths_and_groups(tmp_path):
    for one in (result("a"), result("b"), result("a", method="mean"), result("a", model="org/name")):
        path = result_path(tmp_path, one.suite, one.model, one.method, one.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.to_json())
    groups = by_method(read_results(tmp_path))
    assert {key[:2]: len(rows) for key, rows in groups.items()} == (
        {("smollm2", "kv"): 2, ("smollm2", "mean"): 1, ("org/name", "kv"): 1}
    )


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tie_is_not_called_a_win(tables):
    rows = []
    for i, task in enumerate("abc"):
        rows += [
            result(task, 50.0, 5, seed=i),
            result(task, 49.7, 5, seed=50 + i, method="mean"),
            result(task, 40.0, 1, seed=i, method="last"),
            result(task, 70.0, 1, seed=i, method="echo"),
        ]
    text = tables._document(rows, rows)
    assert "- **smollm2**: beats `last` +10.0" in text
    assert "; can't be told from `mean` +0.3 (" in text
    assert "; loses to `echo` -20.0 (" in text
    assert "| `kv` | 1 | 50.0 (" in tables._summary(rows, [], [])


def test_how_far_auto_is_ahead(tables):
    """Of the other methods that the model has on the same tasks, the best; not bold where it may be chance."""
    scores = {"auto": 60.0, "kv": 50.0, "echo": 57.0, "mean": 40.0, "static": 59.9}
    rows = [
        result(task, score, 5, seed=ord(task) + 10 * number, method=method)
        for task in "abc"
        for number, (method, score) in enumerate(scores.items())
    ]
    rows += [result("a", 59.0, 1, method="last")]
    rows += [result(task, 65.0, 1, seed=ord(task), method="tf-idf", model="tf-idf") for task in "abc"]
    told = "| the eleven above | smollm2 | **+10.0** | +3.0 (`echo`) | +0.1 |  | **-5.0** |"
    assert told in tables._summary(rows, [], [])


def test_how_low_a_mean_can_be():
    one, other = result("a", -19.0, 30, kind="sts"), result("b", 2.0, 1, kind="clustering")
    drawn = np.percentile(np.mean([one.replicates, other.replicates], axis=0), 2.5)
    assert -50 < mean([one, other]).low == pytest.approx(drawn)
    with pytest.raises(InputError, match="no results"):
        mean([])


def test_a_method_that_lacks_tasks_is_not_in_the_summary(tables):
    rows = [result("a"), result("b"), result("a", method="mean")]
    assert "`mean`" not in tables._summary(rows, [], [])
    assert "1 of 2 tasks" in tables._document(rows, rows)


def test_tasks_that_nothing_was_chosen_by_stand_apart(tables):
    mini = [result("a", method="auto", score=50)]
    unseen = [
        result(task, method=method, score=score, suite="unseen")
        for task in ("x", "y")
        for method, score in (("auto", 40), ("kv", 20))
    ]
    readme, page = tables._summary(mini, unseen, []), tables._document(mini, [*mini, *unseen])
    assert "#on-tasks-that-nothing-was-chosen-by) | smollm2 | **+20.0** |" in readme
    _, _, apart = page.partition("## On tasks that nothing was chosen by")
    assert "x (sts, 100), y (sts, 100)" in apart
    assert "| `kv` | 20.0 " in apart
    assert "unseen" not in tables._document(mini, mini)


def test_other_languages_stand_apart(tables):
    given = "auto, fitted on the language's texts"
    rows = [
        result(f"{what}-{language}", score, 1, method=method, suite="languages", kind=kind)
        for what, kind, language in (("p", "retrieval", "de"), ("p", "retrieval", "ru"), ("s", "clustering", "de"))
        for method, score in (("auto", 40.0), (given, 42.0), ("kv", 20.0))
    ]
    mini = [result("a", method="auto", score=50)]
    readme, page = tables._summary(mini, rows, []), tables._document(mini, [*mini, *rows])
    assert "#in-other-languages) | smollm2 | **+20.0** |" in readme
    _, _, apart = page.partition("## In other languages")
    assert "nDCG@10:\n\n| method | mean | `auto` minus it | de | ru |" in apart
    assert f"| `{given}` | 42.0 (" in apart


def test_what_is_left_of_a_method_without_its_re_routing_is_told(tables):
    rows = [result(task, 50.0, 1, seed=1, suite="ablation") for task in ("a", "b")]
    off = [result(task, 48.0, 1, seed=1, suite="ablation", method="no re-routing") for task in ("a", "b")]
    assert "alike (a, b): smollm2 50.0 and 48.0, that is +2.0 (" in "".join(tables._rerouting([*rows, *off]))
    assert tables._rerouting(rows) == []


def test_the_task_of_the_longest_texts_is_told_apart(tables):
    rows = [result("a", 50.0, 1, method="auto"), result("qmsum", 40.0, 1, method="auto")]
    rows += [result(task, score, 1, method="tf-idf", model="tf-idf") for task, score in (("a", 45.0), ("qmsum", 90.0))]
    assert "stands (smollm2) against TF-IDF +5.0 (" in tables._without_longest(tables._presets(rows), ["smollm2"])


def test_a_preset_with_changes_is_not_the_preset(tables):
    changed = result("a", config=METHODS["mean"].replace(pooling="last").to_dict(), method="mean")
    other_limit = result("a", config=METHODS["mean"].replace(max_tokens=512).to_dict(), method="mean")
    assert tables._presets([changed]) == tables._presets([other_limit]) == {}
    assert list(tables._presets([result("a", method="mean")])) == [("smollm2", "mean")]


def test_stale_tables_fail(tables, tmp_path, monkeypatch, capsys):
    for name in ("docs", "results"):
        (tmp_path / name).mkdir()
    for name in ("README.md", "docs/bulk.md", "docs/search.md", "docs/server.md"):
        (tmp_path / name).write_text(f"before\n{tables.BEGIN}\n{tables.END}\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    one = result("a")
    path = result_path(tmp_path / "results", "mini", "smollm2", "kv-x", "a")
    path.parent.mkdir(parents=True)
    path.write_text(one.to_json())
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "README.md is stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    path.write_text(result("a", score=51.0).to_json())
    assert tables.main() == 1


def test_the_full_sets_are_compared_on_the_tasks_that_auto_has(tables):
    full = [result(task, 70.0, seed=i, suite="full", method="auto") for i, task in enumerate("ab")]
    full += [result(task, 60.0, seed=i, suite="full", method="kv") for i, task in enumerate("ab")]
    full += [result("a", 90.0, suite="full", method="static")]  # lacks a task
    trained = {"model": "trained", "method": "sentence-transformer", "suite": "full"}
    full += [result(task, 80.0, seed=i, **trained) for i, task in enumerate("abc")]
    rows = [line.split(" | ") for line in tables._full(full).splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| trained (trained)", "| `auto`", "| `kv`"]
    assert [row[2] for row in rows[2:]] == ["**-10.0**", "", "**+10.0**"]
    assert tables._full([one for one in full if one.method != "auto"]) == ""


def test_scores_that_pages_tell_in_prose_are_those_of_the_table():
    """Typed by hand where a sentence needs them, so nothing else would notice when they are measured anew."""
    readme, models = ((ROOT / name).read_text() for name in ("README.md", "docs/models.md"))
    scores = {  # method -> of each model
        row[0].strip(" `"): [cell.split()[0] for cell in row[2:]]
        for row in (line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| `"))
        if len(row) == 5
    }
    trained = re.search(r"all-MiniLM-L6-v2 \(trained, .*?\) ([\d.]+)", readme)[1]
    kv, auto = (sorted(scores[method]) for method in ("kv", "auto"))
    about = readme.partition("## Quick start")[0].replace("\n", " ")
    assert (
        f"the mean score of `kv` is {kv[0]} to {kv[-1]}, that of `auto` {auto[0]} to {auto[-1]}; the trained" in about
    )
    assert f"all-MiniLM-L6-v2 scores {trained}." in about
    other = [one for one in read_results(ROOT / "results") if one.suite == "languages"]
    gemma, qwen, words, english = (
        f"{mean([one for one in other if (one.model, one.method) == key]).value:.1f}"
        for key in (
            ("gemma3-270m", "auto"),
            ("qwen2.5-coder-0.5b", "auto"),
            ("tf-idf", "tf-idf"),
            ("all-MiniLM-L6-v2", "sentence-transformer"),
        )
    )
    assert f"`auto` scores {gemma} and {qwen} with the two" in about
    assert f"(TF-IDF) {words}, and all-MiniLM-L6-v2, which is for English, {english}." in about
    told = models.replace("\n", " ")
    assert f"{gemma} with Gemma3-270M and {qwen} with Qwen2.5-Coder-0.5B, where TF-IDF has {words} and" in told
    assert f"all-MiniLM-L6-v2, trained on English, {english}." in told
    told = models.partition("## What can be loaded")[0].replace("\n", " ")
    for method in ("auto", "static", "kv"):
        assert f"({', '.join(scores[method])})" in told
