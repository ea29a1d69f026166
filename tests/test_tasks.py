"""Reading tasks: every kind is told from its files and keys, and bad data names its file and line."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections import Counter

import pytest

from kvembed import InputError
from kvembed.tasks import MINI_CORPUS, Task, load_tasks, mini, sample

PAIR = {"s1": "a", "s2": "b", "score": 1.5}
CORPUS = [
    {"id": "d1", "title": "T", "text": "one"},
    {"id": "d2", "title": "", "text": "two"},
    {"id": 3, "text": "three"},
]
QUERIES = [{"id": "q1", "text": "first?"}, {"id": "q2", "text": "second?"}]
QRELS = [
    {"qid": "q1", "did": "d2", "rel": 1},
    {"qid": "q2", "did": "3", "rel": 2},
    {"qid": "q2", "did": "d1", "rel": 0},
]


@pytest.fixture
def put(tmp_path):
    def write(name, rows, *, raw=None):
        path = tmp_path / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = raw if raw is not None else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode() if isinstance(lines, str) else lines))
        return tmp_path / "data"

    return write


def load(folder, *names):
    return load_tasks(folder, names)


def test_each_kind(put):
    put("a/test", [PAIR, PAIR | {"score": 2}])
    put("a/dev", [PAIR])
    put("b/dev", [{"s1": "a", "s2": "b", "label": 0}, {"s1": "c", "s2": "d", "label": 1}])
    put("c/train", [{"text": "x", "label": "l"}, {"text": "y", "label": "m"}])
    put("c/test", [{"text": "z", "label": "l"}])
    put("d/test", [{"text": "x", "label": "l"}, {"text": "y", "label": "m"}])
    put("e/test", [{"query": "q", "positive": ["p"], "negative": ["n", "p2"]}])
    put("f/corpus", CORPUS)
    put("f/queries", QUERIES)
    folder = put("f/qrels", QRELS)
    a, b, c, d, e, f = load(folder)
    assert (a.kind, a.documents, a.gold, a.n) == ("sts", ("a", "a", "b", "b"), (1.5, 2.0), 2)
    assert (b.kind, b.documents, b.gold, b.n) == ("pairs", ("a", "c", "b", "d"), (0, 1), 2)
    assert (c.kind, c.documents, c.gold, c.train, c.n) == ("classification", ("x", "y", "z"), ("l", "m", "l"), 2, 1)
    assert (d.kind, d.documents, d.gold, d.train, d.n) == ("clustering", ("x", "y"), ("l", "m"), 0, 2)
    assert (e.kind, e.queries, {e.documents[i]: gain for i, gain in e.relevant[0].items()}, e.n) == (
        ("reranking", ("q",), {"p": 1, "n": 0, "p2": 0}, 1)
    )
    assert (f.kind, f.documents, f.queries) == ("retrieval", ("T one", "two", "three"), ("first?", "second?"))
    assert f.relevant == ({1: 1}, {2: 2, 0: 0})
    assert [task.name for task in load(folder, "c", "a")] == ["a", "c"]
    assert load(folder / "d")[0].name == "d"  # a single task's own folder
    assert len({task.digest() for task in (a, b, c, d, e, f)}) == 6


def test_plain_files_and_a_second_set_of_queries(put, tmp_path):
    put("f/corpus", CORPUS)
    put("f/queries", QUERIES)
    put("f/qrels", QRELS)
    put("f/queries_summary", [{"id": "s", "text": "summary"}])
    folder = put("f/qrels_summary", [{"qid": "s", "did": "d1", "rel": 1}])
    for path in (folder / "f").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    (main,) = load(folder)
    assert (main.name, main.queries) == ("f", ("summary",))
    (other,) = load(folder, "f-queries")
    assert (other.name, other.queries) == ("f-queries", ("first?", "second?"))


BAD = [
    ("x/test", '{"s1": "a"', "line 1: not JSON"),
    ("x/test", '{"s1": "a", "s2": "b", "score": 1}\n[1]\n', "line 2: not a JSON object"),
    ("x/test", '{"s1": "a", "s2": "b", "score": 1}\n\n{"s1": "a", "score": 1}\n', "line 3: no key 's2'"),
    ("x/test", '{"s1": "a", "s2": 5, "score": 1}\n{"s1": "a", "s2": "b", "score": 2}', "line 1: s2 must be a string"),
    ("x/test", '{"s1": "a", "s2": "b", "score": "1"}', "line 1: score must be a finite number, not '1'"),
    ("x/test", '{"s1": "a", "s2": "b", "score": NaN}', "line 1: score must be a finite number, not nan"),
    ("x/test", '{"s1": "a", "s2": "b", "score": true}', "line 1: score must be a finite number, not True"),
    ("x/test", '{"s1": "a", "s2": "b", "score": 1}', "all rows have the same score"),
    ("x/test", '{"s1": "a", "s2": "b", "label": 2}', "line 1: label must be 0 or 1, not 2"),
    ("x/test", '{"text": "a", "label": 1.5}', "line 1: label must be a string or a whole number"),
    ("x/test", '{"text": "a", "label": "x"}', "fewer than two labels"),
    ("x/test", '{"query": "a", "positive": [], "negative": ["b"]}', "line 1: positive is empty"),
    ("x/test", '{"query": "a", "positive": "p", "negative": ["b"]}', "line 1: positive must be a list of strings"),
    ("x/test", '{"foo": 1}', "line 1: no task has the keys foo"),
    ("x/test", "", "holds no rows"),
    ("x/test", "\n \n", "holds no rows"),
    ("x/test", '{"s1": "\\ud800", "s2": "b", "score": 1}', "line 1: s1 must be a string of valid Unicode"),
    ("x/test", f'{{"s1": "a", "s2": "b", "score": {10**310}}}', "line 1: score must be a finite number"),
    ("x/test", '{"text": "a", "label": true}', "line 1: label must be a string or a whole number"),
    ("x/test", '{"query": "a", "positive": ["p"], "negative": ["p"]}', "line 1: 'p' is both positive and negative"),
    ("x/test", b'{"foo": 1}\n\xff\xfe', "line 2: not UTF-8"),
    ("x/train", '{"text": "a", "label": "x"}', "holds neither test"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_rows(put, name, content, message):
    folder = put(name, [], raw=content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(folder)
    assert "x" in str(error.value)


def test_a_test_label_that_train_does_not_have(put):
    put("x/train", [{"text": "a", "label": "l"}, {"text": "b", "label": "m"}])
    folder = put("x/test", [{"text": "a", "label": "l"}, {"text": "b", "label": "new"}])
    with pytest.raises(InputError, match=r"test.jsonl.gz, line 2: label 'new' has no row in train"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("qrels", [*QRELS, {"qid": "q9", "did": "d1", "rel": 1}], r"qrels.jsonl.gz, line 4: 'q9' is not in queries"),
        ("qrels", [*QRELS, {"qid": "q1", "did": "d9", "rel": 1}], r"qrels.jsonl.gz, line 4: 'd9' is not in corpus"),
        ("qrels", [{"qid": "q1", "did": "d1", "rel": -1}], r"line 1: rel must be 0, 1, \.\.\. 1000, not -1"),
        ("qrels", [{"qid": "q1", "did": "d1", "rel": 2**31}], "line 1: rel must be"),
        ("qrels", [*QRELS, QRELS[0] | {"rel": 3}], "line 4: 'd2' has another rel for 'q1' above"),
        ("qrels", QRELS[:1], "no document is relevant to query 'q2'"),
        ("corpus", [*CORPUS, CORPUS[0]], r"corpus.jsonl.gz, line 4: id 'd1' appears twice"),
        ("queries", [{"id": None, "text": "q"}], "line 1: id must be a string or a whole number, not None"),
    ],
)
def test_bad_retrieval(put, file, rows, message):
    for name, good in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS)):
        folder = put(f"x/{name}", rows if name == file else good)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_broken_and_missing_folders(put, tmp_path):
    folder = put("x/test", [PAIR] * 50)
    path = folder / "x" / "test.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-15])
    with pytest.raises(InputError, match="broken file"):
        load(folder)
    put("x/corpus", CORPUS)
    with pytest.raises(InputError, match=r"has a corpus, but no queries.jsonl\[.gz\]"):
        load(folder)
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no folder in it holds .jsonl"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"no task 'y' in .*; there are: x"):
        load(folder, "y")


def test_mini_is_a_fixed_sample(put):
    put("s/test", [PAIR | {"s1": f"text {i}", "score": i} for i in range(1000)])
    put("c/train", [{"text": f"t{i}", "label": f"l{i % 7}"} for i in range(900)])
    put("c/test", [{"text": f"u{i}", "label": f"l{i % 7}"} for i in range(900)])
    put("r/corpus", [{"id": i, "text": f"d{i} " * 500} for i in range(2000)])
    put("r/queries", [{"id": i, "text": f"q{i}"} for i in range(300)])
    folder = put("r/qrels", [{"qid": i, "did": i, "rel": 1} for i in range(300)])
    classes, retrieval, sts = (mini(task) for task in load(folder))
    assert [mini(task).digest() for task in load(folder)] == [classes.digest(), retrieval.digest(), sts.digest()]
    assert sts.n == 250
    assert all(text == f"text {gold:.0f}" for text, gold in zip(sts.documents, sts.gold, strict=False))
    assert (classes.train, classes.n) == (7 * 80, 500)
    assert retrieval.n == 100
    assert 100 < len(retrieval.documents) < 250
    assert sum(map(len, retrieval.documents)) <= MINI_CORPUS
    for query, gains in zip(retrieval.queries, retrieval.relevant, strict=True):
        ((document, gain),) = gains.items()
        assert retrieval.documents[document].startswith(f"d{query[1:]} ")
        assert gain == 1


@pytest.mark.parametrize(("labels", "each"), [(2, 80), (10, 80), (20, 40), (77, 10), (100, 10)])
def test_mini_has_more_texts_of_a_label_where_there_are_few(put, labels, each):
    for half in ("train", "test"):
        folder = put(f"x/{half}", [{"text": f"{half} {i}", "label": f"l{i % labels}"} for i in range(100 * labels)])
    (task,) = load(folder)
    few = mini(task)
    assert Counter(few.gold[: few.train]) == {f"l{i}": each for i in range(labels)}
    assert all(text.startswith("train") for text in few.documents[: few.train])
    assert all(text.startswith("test") for text in few.documents[few.train :])


def test_a_small_task_stays_whole(put):
    put("x/corpus", CORPUS)
    put("x/queries", QUERIES)
    (task,) = load(put("x/qrels", QRELS))
    assert mini(task) == task


def test_suites(put):
    put("short/test", [PAIR | {"score": i} for i in range(300)])
    put("long/corpus", [{"id": i, "text": f"d{i} " * 3000} for i in range(200)])
    put("long/queries", [{"id": i, "text": f"q{i}"} for i in range(90)])
    tasks = load(put("long/qrels", [{"qid": i, "did": i, "rel": 1} for i in range(90)]))
    assert sample(tasks, "full") == tasks
    assert [task.name for task in sample(tasks, "mini")] == ["long", "short"]
    (long,) = sample(tasks, "long")
    assert len(long.documents) == 40
    assert 0 < len(long.queries) < 40
    for query, gains in zip(long.queries, long.relevant, strict=True):
        assert long.documents[min(gains)].startswith(f"d{query[1:]} ")
    with pytest.raises(InputError, match="no retrieval task has documents of 8,000 characters and more"):
        sample(tasks[1:], "long")


@pytest.mark.parametrize(
    ("rows", "alike"),
    [
        ([{"s1": "a", "s2": f"b{i}", "label": int(i == 7)} for i in range(3000)], "0"),
        ([{"text": f"t{i}", "label": "spam" if i == 7 else "ham"} for i in range(3000)], "ham"),
    ],
)
def test_a_sample_of_one_label_is_refused(put, rows, alike):
    """It would score 0 or 100 whatever the vectors."""
    tasks = load(put("x/test", rows))
    with pytest.raises(InputError, match=rf"x: all in the sample of \d+ are {alike}; --suite full takes all"):
        sample(tasks, "mini")
    assert sample(tasks, "full") == tasks


def test_a_train_file_without_rows_is_not_clustering(put):
    put("x/train", [], raw="\n")
    folder = put("x/test", [{"text": "a", "label": "l"}, {"text": "b", "label": "m"}])
    with pytest.raises(InputError, match=r"train.jsonl.gz: holds no rows"):
        load(folder)
    (folder / "x" / "train.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"has both train.jsonl.gz and train.jsonl"):
        load(folder)


def test_a_byte_order_mark_is_no_matter(put):
    rows = "\r\n".join(json.dumps(PAIR | {"score": i}) for i in range(3))
    (task,) = load(put("x/test", [], raw="\ufeff" + rows))
    assert task.gold == (0, 1, 2)


def test_another_split_is_other_data():
    task = Task("t", "classification", ("a", "b", "c"), gold=(0, 1, 0), train=1)
    assert task.digest() != dataclasses.replace(task, train=2).digest()
