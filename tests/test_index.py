"""What is indexed is what is there, once, whatever happens in between; what is found is what is nearest."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvembed import Embedder, InputError, ModelNotFound, indexing
from kvembed.cli import app
from kvembed.documents import Corpus
from kvembed.index import Index

ROWS = [
    {"key": f"k{i}", "text": text, "lang": "de" if i % 3 == 0 else "en", "year": 2000 + i, "tags": ["a", i]}
    for i, text in enumerate(NOTICES[:12])
]


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def made(embedder, folder, *paths, **options):
    """An index of some files, and what was done."""
    index = Index.create(folder / "db", embedder, model="tiny")
    return index, index.update(Corpus(paths, **options))


def rows_of(index):
    """All that an index holds, by text, without its vectors."""
    rows = index.table.search().to_arrow().drop_columns(["vector"]).to_pylist()
    return sorted(rows, key=lambda row: (row["text"], row["id"]))


def texts_of(index):
    return [row["text"] for row in rows_of(index)]


@pytest.fixture
def index(embedder, tmp_path):
    return made(embedder, tmp_path, jsonl(tmp_path / "in.jsonl", ROWS), id_field="key")[0]


def test_vector_search_is_the_cosine_of_all_vectors(embedder, index):
    expected = embedder.encode_query(["the ferry"]) @ embedder.encode([row["text"] for row in ROWS]).T
    hits = index.search("the ferry", top=5, mode="vector")
    assert [hit.id for hit in hits] == [f"k{i}" for i in np.argsort(-expected[0])[:5]]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(expected[0], reverse=True)[:5], atol=1e-5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    best = next(row for row in ROWS if row["key"] == hits[0].id)
    assert (hits[0].text, hits[0].line) == (best["text"], ROWS.index(best) + 1)
    assert hits[0].fields == {"lang": best["lang"], "year": best["year"], "tags": json.dumps(best["tags"])}


def test_text_and_hybrid(index):
    word = "bicycle"
    having = {row["key"] for row in ROWS if word in row["text"]}
    assert having
    assert {hit.id for hit in index.search(f"{word}s xyzzy", mode="text")} == having  # by its stem
    vector = [hit.id for hit in index.search(word, mode="vector", top=100)]
    hybrid = index.search(word, mode="hybrid", top=100)
    words = [hit.id for hit in index.search(word, mode="text", top=2**40)]
    fused = {key: sum(1 / (61 + ids.index(key)) for ids in (vector, words) if key in ids) for key in vector}
    assert [hit.score for hit in hybrid] == pytest.approx(sorted(fused.values(), reverse=True))
    assert all(hit.score == pytest.approx(fused[hit.id]) for hit in hybrid)
    cosines = {hit.id: hit.score for hit in index.search(word, mode="vector", top=100)}
    matches = {hit.id: hit.score for hit in index.search(word, mode="text", top=100)}
    assert [hit.cosine for hit in hybrid] == pytest.approx([cosines[hit.id] for hit in hybrid])
    assert [hit.bm25 for hit in hybrid] == [matches.get(hit.id) for hit in hybrid]
    assert all(hit.bm25 is None and hit.cosine == hit.score for hit in index.search(word, mode="vector"))
    assert index.search("!!! \"( * ' --", mode="text") == []


def test_text_search_needs_no_model(index):
    other = Index.open(index.folder, model="/nowhere")
    assert other.search("ferry", mode="text")
    with pytest.raises(OSError, match="--model says where"):
        other.search("ferry", mode="vector")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("lang = 'de'", {0, 3, 6, 9}),
        ("lang = 'de' AND year > 2003", {6, 9}),
        ("year IN (2001, 2002)", {1, 2}),
        ("tags LIKE '%\"a\", 5]%'", {5}),
        ("id = 'k7'", {7}),
        ("file LIKE '%in.jsonl' AND line <= 2", {0, 1}),
        ("lang = 'fr'", set()),
    ],
)
@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_filters(index, where, expected, mode):
    said = " ".join(NOTICES[:12])
    hits = index.search(said, mode=mode, where=where, top=12)
    assert {hit.id for hit in hits} == {f"k{i}" for i in expected}


@pytest.mark.parametrize(
    "where", ["lang = ", "nosuch = 1", "1", "drop table", "id = 3", "", "lang = 'fr'; DELETE FROM documents"]
)
@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_a_bad_filter_is_one_line(index, where, mode):
    with pytest.raises(InputError, match=re.escape(f"where {where!r}: ")) as caught:
        index.search("ferry", mode=mode, where=where)
    assert "\n" not in str(caught.value)
    assert ".rs" not in str(caught.value)
    assert len(index) == 12


def test_only_what_changed_is_embedded(embedder, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    index, done = made(embedder, tmp_path, source, id_field="key")
    assert (done.documents, done.embedded, done.unchanged) == (12, 12, 0)
    embedded = []
    original = embedder.prompts
    monkeypatch.setattr(embedder, "prompts", lambda texts, **more: embedded.extend(texts) or original(texts, **more))
    update = lambda: index.update(Corpus([source], id_field="key"))  # noqa: E731
    version = index.table.version
    assert (update().unchanged, index.table.version, embedded) == (12, version, [])
    jsonl(source, [ROWS[1] | {"year": 1999, "new": True}, ROWS[2] | {"text": "changed"}, *ROWS[3:]])
    done = update()
    assert embedded == ["changed"]
    assert (done.documents, done.embedded, done.changed, done.removed) == (11, 1, 10, 1)
    found = {row["id"]: row for row in rows_of(index)}
    assert set(found) == {f"k{i}" for i in range(1, 12)}
    assert (found["k1"]["year"], found["k1"]["new"], found["k5"]["new"]) == (1999, True, None)
    assert (found["k2"]["text"], found["k5"]["line"]) == ("changed", 5)
    expected = embedder.encode([found[key]["text"] for key in sorted(found)])
    stored = {row["id"]: row["vector"] for row in index.table.search().to_list()}
    np.testing.assert_allclose([stored[key] for key in sorted(stored)], expected, atol=1e-5)
    assert index.search("changed", mode="text")[0].id == "k2"


def test_a_moved_and_a_deleted_file(embedder, tmp_path, monkeypatch):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("# One\n\nfirst\n\n# Two\n\nsecond\n")
    (folder / "b.txt").write_text("third\n")
    index, done = made(embedder, tmp_path, folder)
    assert texts_of(index) == ["# One\n\nfirst", "# Two\n\nsecond", "third"]
    monkeypatch.setattr(embedder, "prompts", None)  # nothing may be embedded
    (folder / "a.md").rename(folder / "c.md")
    done = index.update(Corpus([folder]))
    assert (done.changed, done.removed) == (2, 0)
    assert {Path(row["file"]).name for row in rows_of(index)} == {"b.txt", "c.md"}
    (folder / "b.txt").unlink()
    assert index.update(Corpus([folder])).removed == 1
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"notes: no such file or folder$"):
        Corpus([folder])
    assert index.update(Corpus([folder], may_be_gone=True)).removed == 2
    assert (len(index), index.search("x", mode="text")) == (0, [])
    with pytest.raises(InputError, match=r"no such file or folder, and .* has nothing from it"):
        index.update(Corpus([folder], may_be_gone=True))


def test_other_paths_stay(embedder, tmp_path):
    one, two = jsonl(tmp_path / "one.jsonl", ROWS[:3]), jsonl(tmp_path / "two.jsonl", ROWS[3:5])
    index, _ = made(embedder, tmp_path, one)
    assert index.update(Corpus([two])).documents == 5
    jsonl(one, ROWS[:1])
    assert index.update(Corpus([one])).documents == 3


def test_an_id_of_another_path_is_not_overwritten(embedder, tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [{"k": "x", "text": "here first"}])
    two = jsonl(tmp_path / "two.jsonl", [{"k": "x", "text": "came later"}])
    index, _ = made(embedder, tmp_path, one, id_field="k")
    with pytest.raises(InputError, match=r"two\.jsonl, line 1: id 'x' is in .*one\.jsonl, line 1, with other content"):
        index.update(Corpus([two], id_field="k"))
    assert texts_of(index) == ["here first"]
    one.unlink()  # the id has moved to another file, then
    index.update(Corpus([two], id_field="k"))
    assert texts_of(index) == ["came later"]


def test_a_document_of_two_paths_stays_with_the_first(embedder, tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [{"text": "in both"}])
    two = jsonl(tmp_path / "two.jsonl", [{"text": "in both"}, {"text": "in one"}])
    index, _ = made(embedder, tmp_path, one)
    assert index.update(Corpus([two])).changed == 0
    jsonl(two, [{"text": "in one"}])
    assert index.update(Corpus([two])).removed == 0
    assert [(row["text"], Path(row["file"]).name) for row in rows_of(index)] == [
        ("in both", "one.jsonl"),
        ("in one", "two.jsonl"),
    ]


def test_the_same_text_twice(embedder, tmp_path):
    """Without ids one document, at its first place; with ids as many as there are, of one vector."""
    (tmp_path / "a.txt").write_text("same\n")
    (tmp_path / "b.md").write_text("same\n")
    rows = jsonl(tmp_path / "c.jsonl", [{"text": "same"}, {"text": "same", "lang": "de"}, {"text": " "}])
    index, done = made(embedder, tmp_path, *(tmp_path / name for name in ("a.txt", "b.md", "c.jsonl")))
    assert (done.documents, done.duplicates, done.empty, done.embedded, done.changed) == (2, 2, 1, 1, 1)
    assert {Path(row["file"]).name: row["lang"] for row in rows_of(index)} == {"a.txt": None, "c.jsonl": "de"}
    (tmp_path / "a.txt").write_text("other\n")
    index.update(Corpus([tmp_path / "a.txt", tmp_path / "b.md", rows]))
    assert [(row["text"], Path(row["file"]).name) for row in rows_of(index)] == [
        ("other", "a.txt"),
        *sorted([("same", "b.md"), ("same", "c.jsonl")], key=lambda x: x[1] != rows_of(index)[1]["file"][-len(x[1]) :]),
    ]


def test_an_id_for_two_rows(embedder, tmp_path):
    rows = jsonl(tmp_path / "x.jsonl", [{"k": 1, "text": "a"}, {"k": 1, "text": "a"}, {"k": "1", "text": "b"}])
    with pytest.raises(InputError, match=r"x\.jsonl, line 3: id '1' is in .*x\.jsonl, line 1, with other content"):
        Corpus([rows], id_field="k")


def test_a_column_that_widens(embedder, tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"text": "a", "n": 1, "x": 1, "y": 2.0}, {"text": "b", "n": 2, "x": None}])
    index, _ = made(embedder, tmp_path, source)
    assert [hit.text for hit in index.search("a", mode="vector", where="n > 1")] == ["b"]
    other = jsonl(tmp_path / "y.jsonl", [{"text": "c", "n": "three", "x": 0.5, "y": "?"}])
    index.update(Corpus([other]), language="German")
    assert [(row["n"], row["x"]) for row in rows_of(index)] == [("1", 1.0), ("2", None), ("three", 0.5)]
    at_once, _ = made(embedder, tmp_path / "at once", source, other)
    assert [row["y"] for row in rows_of(index)] == [row["y"] for row in rows_of(at_once)] == ["2.0", None, "?"]
    assert [hit.text for hit in index.search("c", mode="text", where="n = 'three'")] == ["c"]


def test_a_column_that_widens_while_another_comes(embedder, tmp_path):
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "x.jsonl", [{"text": "a", "n": 1}]))
    index.update(Corpus([jsonl(tmp_path / "y.jsonl", [{"text": "b", "n": "two", "lang": "en"}])]))
    assert [(row["n"], row["lang"]) for row in rows_of(index)] == [("1", None), ("two", "en")]


def test_a_column_that_widens_while_two_paths_share_a_document(embedder, tmp_path):
    shared = {"text": "a", "n": 1}
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "x.jsonl", [shared]))
    index.update(Corpus([jsonl(tmp_path / "y.jsonl", [shared, {"text": "b", "n": "two"}])]))
    assert [(row["text"], row["n"]) for row in rows_of(index)] == [("a", "1"), ("b", "two")]


def test_a_number_that_becomes_text_is_as_its_file_has_it(embedder, tmp_path):
    """Also where the file is not among those that are read when the column widens."""
    one, other, source = tmp_path / "a.csv", tmp_path / "b.csv", jsonl(tmp_path / "c.jsonl", [{"text": "c"}])
    one.write_text("app,version,text\nferry,1.10,the ferry\n")
    other.write_text("app,version,text\nmoth,2.0.1,the moth\n")
    index, _ = made(embedder, tmp_path, one, source)
    index.update(Corpus([other]))
    done = index.update(Corpus([one, other, source]))
    assert (done.embedded, done.changed, done.unchanged) == (0, 1, 2)
    assert [row["version"] for row in rows_of(index)] == [None, "1.10", "2.0.1"]
    assert index.update(Corpus([one, other, source])).changed == 0


def test_a_stop_while_a_column_widens_keeps_the_language(embedder, tmp_path, monkeypatch):
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "x.jsonl", [{"text": "Die Katzen schlafen", "n": 1}]))
    first, other = Corpus([tmp_path / "x.jsonl"]), jsonl(tmp_path / "y.jsonl", [{"text": "Hund", "n": "drei"}])
    index.update(first, language="German")
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_index_words", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.update(Corpus([other]))
    index.update(Corpus([other]))
    assert [hit.text for hit in index.search("Katze", mode="text")] == ["Die Katzen schlafen"]


def interrupted(*_):
    raise KeyboardInterrupt


WORDS = [
    "Fähren fahren nach Spiekeroog",
    "паромы уходят",
    "我喜欢喝咖啡",
    "コーヒーを飲む",
    "naïve café 🚢",
    "a\u2028b \0 c'd\"",
    "snake_case",
]


def test_long_words(embedder, tmp_path, monkeypatch):
    """LanceDB leaves out those of 40 bytes and more; an index that was made so is mended by the next update."""
    words = ["достопримечательность", "საქართველოსათვის", 32 * "c0", "Rindfleischetikettierungsüberwachung" * 2]
    corpus = Corpus([jsonl(tmp_path / "x.jsonl", [{"text": f"{word} und mehr"} for word in words])])
    importing = indexing.import_extra

    def with_its_limit(name, extra):
        if name != "lancedb.index":
            return importing(name, extra)
        return SimpleNamespace(FTS=lambda **options: importing(name, extra).FTS(**options | {"max_token_length": 40}))

    index = Index.create(tmp_path / "db", embedder, model="tiny")
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "import_extra", with_its_limit)
        index.update(corpus)
    assert [len(index.search(word, mode="text")) for word in words] == [0, 0, 0, 0]
    assert index.update(corpus).changed == 0
    assert [len(index.search(word, mode="text")) for word in words] == [1, 1, 1, 1]


def test_every_script(embedder, tmp_path):
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "x.jsonl", [{"text": x, "Größe (cm)": "ü'"} for x in WORDS]))
    assert texts_of(index) == sorted(WORDS)
    for word, text in [("咖啡", 2), ("飲む", 3), ("Паромы", 1), ("cafe", 4), ("snake", 6), ("fahren", 0)]:
        assert [hit.text for hit in index.search(word, mode="text")] == [WORDS[text]]
    assert len(index.search("x", mode="vector", where="Größe__cm_ = 'ü'''")) == 7
    assert index.search("Fähre", mode="text") == []
    index.update(Corpus([tmp_path / "x.jsonl"]), language="german")
    assert [hit.text for hit in index.search("Fähre", mode="text")] == [WORDS[0]]
    index.update(Corpus([tmp_path / "x.jsonl"]))  # stays what it was
    assert [hit.text for hit in index.search("Fähre", mode="text")] == [WORDS[0]]
    index.update(Corpus([tmp_path / "x.jsonl"]), language="none")
    assert index.search("Fähre", mode="text") == []
    with pytest.raises(InputError, match="text search has no stems for language 'Klingon'; choose from Arabic, "):
        index.update(Corpus([tmp_path / "x.jsonl"]), language="Klingon")


def test_a_model_that_was_changed_in_memory_is_another(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("A ferry.")
    mine = Embedder.from_model(tiny(), tokenizer, layers=[1, 2])
    index, _ = made(mine, tmp_path, tmp_path / "x.txt")
    with torch.no_grad():
        next(mine.model.parameters()).mul_(2)
    with pytest.raises(InputError, match="was made with fingerprint"):
        Index.create(index.folder, mine)


def test_another_model_or_config_is_refused(embedder, index, tokenizer, folder, tmp_path):
    for other, message in [
        (embedder.replace(bias=2.0), "bias 1.0, not 2.0"),
        (embedder.replace(layers=[1]), r"layers \[1, 2\], not \[1\]"),
        (embedder.replace(max_tokens=40), "max_tokens null, not 40"),
        (Embedder.from_model(tiny(seed=1), tokenizer, layers=[1, 2]), 'fingerprint "[0-9a-f]+", not "[0-9a-f]+"'),
    ]:
        with pytest.raises(InputError, match=f"db was made with {message}; --refit embeds"):
            Index.create(index.folder, other)
    tiny(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"with other weights, or another tokenizer, than those of .*other: name"):
        Index.open(index.folder, model=str(tmp_path / "other")).search("x")
    words = ["index", str(tmp_path), "--db", str(index.folder), "--model", str(tmp_path / "other")]
    asked = CliRunner().invoke(app, words)
    assert "was made with other weights" in asked.output  # though there is nothing to embed
    moved = Index.open(index.folder, model=str(folder))
    assert moved.search("ferry") == index.search("ferry")
    file = index.folder / "kvembed-index.json"
    told = json.loads(file.read_text())
    told["made_with"]["weights"] = told["made_with"].pop("fingerprint")  # as earlier versions wrote it
    file.write_text(json.dumps(told))
    for path in (*index.folder.glob("documents-*"), *index.folder.glob("transform-*")):
        path.rename(path.with_name(path.name.replace(index.name, Index.open(index.folder).name)))
    with pytest.raises(InputError, match="was made with other weights, or another tokenizer"):
        Index.open(index.folder, model=str(folder)).search("x")


def test_a_corpus_that_outgrew_its_fit_is_told_once(llama, tokenizer, tmp_path, caplog):
    static = Embedder.from_model(llama, tokenizer, method="static")
    rows = [{"text": f"{notice} {number}"} for number in range(3) for notice in NOTICES]
    source = jsonl(tmp_path / "in.jsonl", rows[:9])
    index, _ = made(static, tmp_path, source)
    jsonl(source, rows[:120])
    with caplog.at_level("INFO", "kvembed"):
        index.update(Corpus([source]))
        assert "120 documents: enough to fit the transform on them too; --refit does" in caplog.text
        caplog.clear()
        jsonl(source, rows)
        index.update(Corpus([source]))
    assert "--refit" not in caplog.text


def test_everything_anew(embedder, tokenizer, tmp_path):
    """The old index is searched until the new one is whole."""
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    index, _ = made(embedder, tmp_path, source)
    other = Index.create(index.folder, embedder.replace(bias=2.0), model="tiny", refit=True)
    assert Index.open(index.folder).made_with == index.made_with
    assert len(Index.open(index.folder)) == 12
    with pytest.raises(InputError, match=r"also has documents from .*in\.jsonl; to embed all anew, name all paths"):
        other.update(Corpus([jsonl(tmp_path / "x.jsonl", ROWS[:1])]))
    assert other.update(Corpus([source])).embedded == 12
    assert Index.open(index.folder).made_with == other.made_with
    assert [path.stem for path in index.folder.glob("*.lance")] == [other.name]
    with pytest.raises(InputError, match=r"bias 2\.0, not 1\.0"):
        Index.create(index.folder, embedder)


def test_a_transform_is_kept_with_the_index(llama, tokenizer, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", [{"text": text} for text in MANY])
    corpus = Corpus([source])
    embedder = Embedder.from_model(llama, tokenizer, method="auto", texts=corpus.sample, dim=7)
    assert embedder.transform.info["texts"] == "given"
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    index = Index.create(tmp_path / "db", embedder, model=str(tmp_path / "model"))
    index.update(corpus)
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "other cache"))
    again = Index.open(index.folder)
    assert [hit.id for hit in again.search("ferry")] == [hit.id for hit in index.search("ferry")]
    assert again.embedder.transform.digest() == embedder.transform.digest()
    index.transform_file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match="is not a transform of kvembed"):
        Index.open(index.folder).search("ferry")


def test_what_is_no_index(embedder, index, tmp_path):
    with pytest.raises(InputError, match=r"gone: no index here; `kvembed index PATH --db .*gone` makes one"):
        Index.open(tmp_path / "gone")
    with pytest.raises(InputError, match=r"in\.jsonl is a file, not a folder"):
        Index.create(tmp_path / "in.jsonl", embedder)
    with pytest.raises(InputError, match=r"holds no index but other files \(db\)"):
        Index.create(tmp_path, embedder)
    path = index.folder / "kvembed-index.json"
    told = json.loads(path.read_text())
    hostile = told | {"made_with": told["made_with"] | {"fingerprint": "../../../outside"}}
    for broken in (
        "",
        "[]",
        "{}",
        '{"made_with": {}, "model": 1}',
        '{"made_with": {"config": {"x": 1}}, "model": "m"}',
    ):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"kvembed-index\.json is not of an index of kvembed"):
            Index.open(index.folder)
    path.write_text(json.dumps(hostile))
    assert re.fullmatch(r"documents-[0-9a-f]{16}", Index.open(index.folder).name)  # names come from a hash
    with pytest.raises(InputError, match="nothing has been indexed yet"):
        Index.open(index.folder).search("x", mode="text")
    empty = Index.create(tmp_path / "empty", embedder)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: no documents in it"):
        empty.update(Corpus([tmp_path / "none"]))
    for query in ("", "  "):
        with pytest.raises(InputError, match="the query is empty"):
            index.search(query)


def test_one_writer(embedder, index, tmp_path):
    with FileLock(index.folder / "_lock"), pytest.raises(InputError, match="another process is writing to it"):
        index.update(Corpus([tmp_path / "in.jsonl"]))
    index.update(Corpus([tmp_path / "in.jsonl"], id_field="key"))


LINES = st.lists(st.sampled_from(["alpha beta", "gamma", "", "# Title", "delta epsilon zeta", "ü 'q'"]), max_size=5)
FOLDERS = st.dictionaries(st.sampled_from(["a.md", "b.txt", "in/c.md", "d.jsonl"]), LINES, max_size=4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states=st.lists(FOLDERS, min_size=1, max_size=4))
def test_after_any_edits_the_index_is_the_folder(embedder, tmp_path_factory, states):
    """The unique documents, each with the vector that it has alone; and no more is embedded than texts are new."""
    base = tmp_path_factory.mktemp("edits")
    folder = base / "folder"
    index = Index.create(base / "db", embedder)
    jsonl(base / "seed.jsonl", [{"text": "seed", "line": 0}])
    index.update(Corpus([base / "seed.jsonl"]))
    for state in states:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        for name, lines in state.items():
            rows = [json.dumps({"text": line, "length": len(line)}) for line in lines]
            (folder / name).write_text("\n".join(rows if name.endswith("jsonl") else lines))
        corpus = Corpus([folder])
        before = set(texts_of(index))
        done = index.update(corpus)
        documents = {x.id: (x.text, x.file, x.line) for x in corpus.read(corpus.documents)}
        documents |= {row["id"]: ("seed", row["file"], row["line"]) for row in rows_of(index) if row["text"] == "seed"}
        assert {row["id"]: (row["text"], row["file"], row["line"]) for row in rows_of(index)} == documents
        assert len(index) == len(documents) == done.documents
        assert done.embedded <= len({text for text, *_ in documents.values()} - before)
    vectors = {row["text"]: row["vector"] for row in index.table.search().to_list()}
    np.testing.assert_allclose(list(vectors.values()), embedder.encode(list(vectors)), atol=1e-5)


WRITER = """
import sys
import kvembed.indexing as indexing
from kvembed.documents import Corpus
from kvembed.index import Index
indexing._BLOCK_DOCUMENTS, indexing._COMMIT_SECONDS = 4, 0.0  # many small commits
print(Index.open(sys.argv[1]).update(Corpus([sys.argv[2]], id_field="key")).embedded)
"""


def writer(index, source):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(index.folder), str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def big(embedder, folder, tmp_path):
    """An index of its first row alone, and a file of 96."""
    rows = [{"key": f"{i} {text[:20]}", "text": f"{i} {text}"} for i in range(2) for text in NOTICES]
    index = Index.create(tmp_path / "db", embedder, model=str(folder))
    index.update(Corpus([jsonl(tmp_path / "in.jsonl", rows[:1])], id_field="key"))
    return index, jsonl(tmp_path / "in.jsonl", rows), rows


def test_a_killed_writer_goes_on(big, embedder):
    """Killed at any moment, it opens, holds whole documents, and embeds only what is missing."""
    index, source, rows = big
    draw = random.Random(0)
    for there in (9, 33):
        with writer(index, source) as process:
            while process.poll() is None and len(index) < there:
                time.sleep(0.002)
            time.sleep(draw.random() / 50)
            process.send_signal(signal.SIGKILL)
        left = len(Index.open(index.folder))
        assert there <= left
        assert index.search("ferry", mode="vector", top=3)
    with writer(index, source) as process:
        assert int(process.communicate(timeout=120)[0]) == len(rows) - left
    assert [row["id"] for row in rows_of(index)] == [row["key"] for row in sorted(rows, key=lambda row: row["text"])]
    vectors = {row["text"]: row["vector"] for row in index.table.search().to_list()}
    np.testing.assert_allclose(list(vectors.values()), embedder.encode(list(vectors)), atol=1e-5)


def test_one_writes_and_one_searches(big):
    """No document is found twice, none is lost, none is half of the old and half of the new."""
    index, source, rows = big
    with writer(index, source) as process:
        assert int(process.communicate(timeout=120)[0]) == 95
    changed = [row | {"text": f"{row['text']} anew"} for row in rows]
    jsonl(source, changed)
    allowed = {(row["key"], row["text"]) for row in [*rows, *changed]}
    seen = set()
    with writer(index, source) as process:
        while process.poll() is None:
            for mode in ("vector", "text", "hybrid"):
                hits = index.search("ferry anew", mode=mode, top=200)
                assert len({hit.id for hit in hits}) == len(hits)
                assert {(hit.id, hit.text) for hit in hits} <= allowed
                if mode == "vector":
                    assert len(hits) == 96
                    seen.add(sum(hit.text.endswith("anew") for hit in hits))
    assert process.returncode == 0
    assert {hit.text for hit in index.search("x", mode="vector", top=200)} == {row["text"] for row in changed}
    assert len(seen) > 2, "it never searched in the middle"


@pytest.mark.slow
def test_ten_thousand_documents_in_a_tenth_of_a_second(tokenizer, tmp_path):
    """Of smollm2's width, each time another query. Processor time, since a busy machine is no failure."""
    model = tiny(hidden_size=576, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    texts = [f"{i} {NOTICES[i % 48][:30]}" for i in range(10_000)]
    index, done = made(embedder, tmp_path, jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts]))
    assert (done.documents, done.dim) == (10_000, 576)
    for mode in ("vector", "text", "hybrid"):
        index.search("warm up", mode=mode)
        times = []
        for query in NOTICES:
            started = time.process_time()
            assert len(index.search(query, mode=mode)) == 10
            times.append(time.process_time() - started)
        assert np.median(times) < 0.1, mode


def test_a_full_disk_is_one_line_and_keeps_what_is_done(folder, notes):
    """No file may grow to more than the room that the table's first commit takes."""
    command = [sys.executable, "-m", "kvembed", "index", "notes", "--db", "db", "--model", str(folder)]
    limit = (1500, 1500)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].lower().startswith("kvembed: db: ")
    assert "file too large" in done.stderr.splitlines()[-1].lower()
    assert ".rs" not in done.stderr
    assert "9 texts embedded" in run("index", "notes", "--db", "db").stdout


def run(*args, stdin=None):
    done = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "in").mkdir(parents=True)
    (tmp_path / "notes" / "ferry.md").write_text(f"# Ferry\n\n{NOTICES[0]}\n\n# Other\n\n{NOTICES[1]}\n")
    jsonl(tmp_path / "notes" / "in" / "more.jsonl", [{"text": x, "year": 2000 + i} for i, x in enumerate(NOTICES[2:9])])
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes" / "latin.txt").write_bytes(b"caf\xe9")
    return tmp_path


def test_the_commands(folder, notes, embedder):
    done = run("index", "notes", "--db", "db", "--model", folder, "--dtype", "float32")
    assert done.stdout == (
        "db: 9 documents of 48 dimensions; 2 files read, 9 texts embedded; passed over: 1 .png, 1 not UTF-8\n"
    )
    assert "latin.txt, line 1: not UTF-8 text (byte 0xe9)" in done.stderr
    assert "0 texts embedded" in run("index", "notes", "--db", "db").stdout  # what is not said is as it was
    shown = run("search", NOTICES[0], "--db", "db", "--top", "2", "--mode", "text").stdout
    assert "notes/ferry.md:1" in shown
    assert "# Ferry" in shown
    hits = [
        json.loads(line) for line in run("search", NOTICES[4], "--db", "db", "--json", "--top", "3").stdout.splitlines()
    ]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    first = next(hit for hit in hits if hit["text"] == NOTICES[4])
    assert (first["fields"], first["line"]) == ({"year": 2002}, 3)
    wrong = run("search", "x", "--db", "db", "--where", "yeer > 2005", "--mode", "text").stderr
    assert "No field named yeer. Valid fields are `id`, `file`, `line`, `text`, `year`." in wrong
    where = run("search", "x", "--db", "db", "--where", "year > 2005", "--mode", "vector", "--json").stdout
    assert [json.loads(line)["text"] for line in where.splitlines()] == [NOTICES[8]]
    assert run("search", "xyzzy", "--db", "db", "--mode", "text").stdout == "nothing found for: xyzzy\n"


def test_many_queries(folder, notes, embedder):
    """A run file has what the library finds, for each query under its id."""
    jsonl(notes / "corpus.jsonl", ROWS)
    run("index", "corpus.jsonl", "--db", "db", "--id-field", "key", "--model", folder, "--dtype", "float32")
    jsonl(notes / "queries.jsonl", [{"qid": f"q{i}", "body": text} for i, text in enumerate(NOTICES[12:15])])
    options = ("--db", "db", "--mode", "vector", "--top", "4")
    done = run("search", "--queries", "queries.jsonl", "--field", "body", "--id-field", "qid", "--trec", *options)
    found = [line.split() for line in done.stdout.splitlines()]
    scores = embedder.encode_query(NOTICES[12:15]) @ embedder.encode([row["text"] for row in ROWS]).T
    expected = [(f"q{q}", f"k{d}") for q in range(3) for d in np.argsort(-scores[q])[:4]]
    assert [(query, document) for query, _, document, *_ in found] == expected
    assert [rank for *_, rank, _, _ in found] == ["1", "2", "3", "4"] * 3
    np.testing.assert_allclose([float(x[4]) for x in found], -np.sort(-scores)[:, :4].ravel(), atol=1e-5)
    piped = run("search", "--queries", "-", "--json", *options, stdin="\n".join(NOTICES[12:15]))
    rows = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [(f"q{row['query_id']}", row["id"]) for row in rows] == expected


def test_auto_is_fitted_on_the_corpus(folder, notes, monkeypatch):
    monkeypatch.setattr("kvembed.embedder.generated_texts", lambda *_, **__: MANY[:200])
    jsonl(notes / "many.jsonl", [{"text": f"{i} {text}"} for i in range(3) for text in NOTICES])
    options = ("--model", folder, "--method", "auto", "--dtype", "float32")
    run("index", "many.jsonl", "--db", "db", *options)
    index = Index.open("db")
    info = index.embedder.transform.info
    assert (info["texts"], info["count"], info["self_written"]) == ("given", 320, 200)
    jsonl(notes / "many.jsonl", [{"text": f"{i} {text}"} for i in range(1, 4) for text in NOTICES])
    again = run("index", "many.jsonl", "--db", "db", *options)
    assert "144 documents of 48 dimensions; 1 file read, 48 texts embedded, 48 removed" not in again.stdout
    assert Index.open("db").name == index.name  # the transform stays
    refit = run("index", "many.jsonl", "--db", "db", "--refit", *options)
    assert "144 texts embedded" in refit.stdout
    assert Index.open("db").name != index.name


def test_a_refit_keeps_what_is_not_said(folder, notes, monkeypatch):
    options = ("--method", "mean", "--layers", "1-2", "--dtype", "float32", "--max-tokens", "30")
    (notes / "notes" / "in" / "german.txt").write_text("die Katzen schlafen\n")
    run("index", "notes", "--db", "db", "--model", folder, "--language", "german", *options)
    before = Index.open("db")
    run("index", "notes", "--db", "db", "--refit")
    assert (Index.open("db").made_with, Index.open("db").model) == (before.made_with, before.model)
    run("index", "notes", "--db", "db", "--refit", "--max-tokens", "20")
    now = Index.open("db")
    assert now.config == before.config.replace(max_tokens=20)
    assert (now.made_with["dtype"], now.model) == ("float32", before.model)
    assert '"die Katzen schlafen"' in run("search", "katze", "--db", "db", "--mode", "text", "--json").stdout
    monkeypatch.setattr("kvembed.options.import_models", lambda: pytest.fail("nothing need be loaded to refuse it"))
    refused = run("index", "notes/ferry.md", "--db", "db", "--refit", "--bias", "2")
    assert refused.exit_code == 1
    assert "also has documents from" in refused.stderr


def test_letters_in_two_characters_are_found_by_letters_in_one(embedder, tmp_path):
    words = ["crème brûlée", "Zürich im Winter", "một hai ba tiếng"]
    rows = [{"text": unicodedata.normalize("NFD", one)} for one in words]
    assert rows[0]["text"] != words[0]
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "nfd.jsonl", rows))
    for query, found in [("crème", words[0]), ("zurich", words[1]), ("tiếng", words[2])]:
        for form in ("NFC", "NFD"):
            (hit,) = index.search(unicodedata.normalize(form, query), mode="text")
            assert hit.text == found
    with pytest.raises(InputError, match="query 1 is a list, not a string"):
        index.search(["a"])


def test_layers_by_the_model_are_an_option_too(folder, notes, monkeypatch):
    monkeypatch.setattr("kvembed.layers._TEXTS", 60)
    options = ("--method", "kv", "--dtype", "float32")
    run("index", "notes", "--db", "db", "--model", folder, *options, "--layers", "none")
    refused = run("index", "notes", "--db", "db", "--layers", "auto")
    assert refused.exit_code == 1
    assert re.search(r"db was made with layers \[\], not \[\d", refused.stderr)
    run("index", "notes", "--db", "db", "--refit", "--layers", "auto")
    assert run("index", "notes", "--db", "db", "--layers", "auto").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("search", "x", "--db", "gone"), "gone: no index here; `kvembed index PATH --db gone` makes one"),
        (("search", "--db", "db"), "say what to look for: a question, or --queries FILE"),
        (("search", "x", "--queries", "notes/ferry.md", "--db", "db"), "a question or --queries, not both"),
        (("search", "x", "--db", "db", "--json", "--trec"), "--json or --trec, not both"),
        (("search", "x", "--db", "db", "--where", "lang = "), "where 'lang = ': "),
        (("search", " ", "--db", "db"), "the query is empty"),
        (("search", "--queries", "none.txt", "--db", "db"), "none.txt holds no queries"),
        (
            ("search", "--queries", "twice.jsonl", "--id-field", "id", "--trec", "--db", "db"),
            "twice.jsonl: two queries have the id '7', which a run file can't tell apart",
        ),
        (
            ("search", "--queries", "spaced.jsonl", "--id-field", "id", "--trec", "--db", "db"),
            "an id that is empty or has white space can't stand in a run file: 'a b'",
        ),
        (("search", "--queries", "gone.txt", "--db", "db"), "gone.txt: no such file or directory"),
        (("search", "x", "--db", "db", "--model", "./gone"), "no such file or folder"),
        (("index", "gone", "--db", "db"), "gone: no such file or folder, and db has nothing from it"),
        (("index", "gone", "--db", "new"), "gone: no such file or folder"),
        (("index", "notes", "--db", "notes"), "notes holds no index but other files (ferry.md)"),
        (("index", "notes", "--db", "db", "--method", "echo"), 'db was made with method "kv", not "echo"; --refit'),
        (("index", "notes", "--db", "db", "--bias", "2"), "db was made with bias 1.0, not 2.0"),
        (("index", "notes", "--db", "db", "--field", "body"), "line 1: no text in field 'body'; it has text, year"),
    ],
)
def test_mistakes_are_one_line(folder, notes, args, message):
    (notes / "notes" / "latin.txt").unlink()
    (notes / "none.txt").write_text("")
    jsonl(notes / "twice.jsonl", [{"id": 7, "text": "one"}, {"id": 7, "text": "two"}])
    jsonl(notes / "spaced.jsonl", [{"id": "a b", "text": "one"}])
    run("index", "notes", "--db", "db", "--model", folder, "--dtype", "float32")
    done = run(*args)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvembed: ")
    assert message in line


def test_a_line_that_repeats_itself(embedder, tmp_path):
    path = tmp_path / "notes" / "a.txt"
    path.parent.mkdir()
    path.write_text(f"Above.\n{'=-' * 3000}\nBelow.\n")
    index, _ = made(embedder, tmp_path, path.parent)
    path.write_text("A line more.\n" + path.read_text())
    index.update(Corpus([path.parent]))
    ids = [row["id"] for row in rows_of(index)]
    assert len(ids) == len({*ids}) == len(Corpus([path.parent]).documents)


def test_a_slow_model_commits_as_often_as_a_fast_one(embedder, tmp_path, monkeypatch):
    """At some 300 characters a second."""
    from kvembed import indexing

    now, commits, read = 0.0, [], embedder.encode_prompts

    def slowly(prompts, **options):
        nonlocal now
        now += sum(len(one.content_ids) for (one,) in prompts) / 75
        return read(prompts, **options)

    commit = indexing._Writer._commit
    rows = [{"text": f"{number} {text} " * 9} for number in range(4) for text in NOTICES]
    index = Index.create(tmp_path / "db", embedder, model="tiny")
    with monkeypatch.context() as patch:
        patch.setattr(indexing.time, "monotonic", lambda: now)
        patch.setattr(embedder, "encode_prompts", slowly)
        patch.setattr(indexing._Writer, "_commit", lambda self: (commits.append(now), commit(self)))
        index.update(Corpus([jsonl(tmp_path / "a.jsonl", rows)]))
        gaps = np.diff([0, *commits])
        assert len(gaps) > 5
        assert gaps[1:].max() < 1.6 * indexing._COMMIT_SECONDS
        commits.clear()  # the known ones, which take no time, come first
        index.update(Corpus([jsonl(tmp_path / "a.jsonl", rows + [{"text": "new " + x["text"]} for x in rows])]))
        assert np.diff(commits).max() < 1.6 * indexing._COMMIT_SECONDS
    assert len(index) == 2 * len(rows)


def test_what_did_not_change_needs_no_model(folder, notes):
    options = ("--db", "db", "--model", folder, "--dtype", "float32")
    (notes / "notes" / "latin.txt").unlink()
    run("index", "notes", *options)
    told = json.loads((notes / "db" / "kvembed-index.json").read_text())
    (notes / "db" / "kvembed-index.json").write_text(json.dumps(told | {"model": str(notes / "Gone")}))
    (notes / "notes" / "ferry.md").unlink()
    done = run("index", "notes", "--db", "db")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "0 texts embedded, 2 removed" in done.stdout
    (notes / "notes" / "ferry.md").write_text("# new")
    done = run("index", "notes", "--db", "db")
    assert done.exit_code == 1
    assert "Gone: no such file or folder (--model says where the index's model is now)" in done.stderr
    with pytest.raises(ModelNotFound):
        Index.open("db").update(Corpus(["notes"]))


def test_a_search_in_an_index_without_documents_says_so(folder, notes):
    options = ("--db", "db", "--model", folder, "--dtype", "float32")
    (notes / "notes" / "latin.txt").unlink()
    run("index", "notes", *options)
    shutil.rmtree(notes / "notes")
    run("index", "notes", *options)
    done = run("search", "ferry", "--db", "db")
    assert (done.exit_code, done.stdout) == (0, "nothing found for: ferry\n")
    assert done.stderr == "kvembed: db has no documents yet; kvembed index puts them in\n"


def test_a_file_of_many_commits_keeps_its_vectors_and_is_all_there(embedder, tmp_path, monkeypatch):
    from kvembed import indexing

    monkeypatch.setattr(indexing, "_COMMIT_DOCUMENTS", 4)
    monkeypatch.setattr(indexing, "_BLOCK_DOCUMENTS", 2)
    index, _ = made(embedder, tmp_path, jsonl(tmp_path / "a.jsonl", ROWS))
    jsonl(tmp_path / "a.jsonl", [row | {"more": 1} for row in ROWS])
    found = []
    commit = indexing._Writer._commit
    monkeypatch.setattr(indexing._Writer, "_commit", lambda self: (commit(self), found.append(index.search("ferry"))))
    done = index.update(Corpus([tmp_path / "a.jsonl"]))
    assert (done.embedded, done.changed, len(index)) == (0, len(ROWS), len(ROWS))
    assert len(found) > 2
    assert all(len(hits) == 10 for hits in found)


def test_a_file_that_cannot_be_read_is_not_taken_for_gone(embedder, tmp_path, monkeypatch):
    from kvembed import documents

    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"The notice of {name}.\n")
    index, _ = made(embedder, tmp_path, folder)
    read = documents.read_lines

    def failing(path, *args, **options):
        if path.name == "b.txt":
            try:
                raise PermissionError(13, "Permission denied")
            except OSError:
                raise InputError(f"{path}: permission denied") from None
        yield from read(path, *args, **options)

    monkeypatch.setattr(documents, "read_lines", failing)
    with pytest.raises(InputError, match=r"b\.txt: permission denied"):
        index.update(Corpus([folder]))
    assert len(index) == 2


def test_what_is_known_of_a_file_stays_while_it_is_half_written(embedder, tmp_path, caplog):
    folder = tmp_path / "notes"
    folder.mkdir()
    texts = ["Das Café.", "Ein Tisch."]
    jsonl(folder / "a.jsonl", [{"text": text} for text in texts])
    whole = (folder / "a.jsonl").read_bytes()
    index, _ = made(embedder, tmp_path, folder)
    (folder / "a.jsonl").write_bytes(whole[: whole.index("é".encode()) + 1])
    done = index.update(Corpus([folder]))
    assert (done.removed, done.documents, done.passed_over) == (0, 2, {"not UTF-8": 1})
    (folder / "a.jsonl").write_bytes(whole)
    assert index.update(Corpus([folder])).embedded == 0
    assert texts_of(index) == texts


def test_a_long_list_of_what_is_gone_goes_in_parts(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_COMMIT_DOCUMENTS", 4)
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in NOTICES[:15]])
    index, _ = made(embedder, tmp_path, path)
    jsonl(path, [{"text": text} for text in NOTICES[14:20]])
    assert index.update(Corpus([path])).removed == 14
    assert texts_of(index) == sorted(NOTICES[14:20])


def test_options_are_checked_before_the_corpus_is_read(folder, notes):
    jsonl(notes / "bad.jsonl", [{"text": "a"}, {"text": 3}])
    for wrong, message in [
        (("--method", "kx"), "unknown method"),
        (("--max-tokens", "0"), "max_tokens must be"),
        (("--language", "xx"), "has no stems for language 'xx'"),
        (("--fitted", "no.safetensors"), "no.safetensors: no such file"),
    ]:
        done = run("index", "bad.jsonl", "--db", "db", "--model", folder, *wrong)
        assert done.exit_code == 1
        assert message in done.stderr
        assert not (notes / "db").exists()


def test_an_index_by_a_config_file(folder, notes):
    mine = notes / "mine.json"
    mine.write_text('{"document": "Notice: {text}", "pooling": "last"}')
    made = ("index", ".", "--db", "db", "--model", folder, "--method", "mine.json")
    assert run(*made).exit_code == 0
    assert Index.open(notes / "db").config.method == "mine"
    assert run(*made).exit_code == 0
    mine.write_text('{"document": "Notes: {text}", "pooling": "last"}')
    done = run(*made)
    assert done.exit_code == 1
    assert "was made with" in done.stderr


def test_a_table_that_was_half_made_is_made_anew(embedder, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in NOTICES[:3]])
    index = Index.create(tmp_path / "db", embedder, model="tiny")
    (index.folder / f"{index.name}.lance" / "_transactions").mkdir(parents=True)
    (index.folder / f"{index.name}.lance" / "_transactions" / "0.txn").write_bytes(b"x")
    assert not Index.is_filled(index.folder)
    assert index.update(Corpus([path])).documents == 3


def test_a_search_that_a_refit_overtakes_says_so(llama, tokenizer, folder, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in NOTICES[:3]])
    static = Embedder.from_model(llama, tokenizer, method="static", texts=MANY[:120])
    made(static, tmp_path, path)
    slow = Index.open(tmp_path / "db", model=str(folder))
    mean = Index.create(tmp_path / "db", Embedder.from_model(llama, tokenizer, method="mean"), model="tiny", refit=True)
    mean.update(Corpus([path]))
    with pytest.raises(InputError, match="--refit has replaced this index; open it again"):
        slow.search("ferry", mode="vector")


def test_a_damaged_index_says_so(embedder, tmp_path):
    (tmp_path / "a.txt").write_text("The ferry leaves.\n")
    index, _ = made(embedder, tmp_path, tmp_path / "a.txt")
    shutil.rmtree(index.folder / f"{index.name}.lance" / "_versions")
    again = Index.open(index.folder)
    with pytest.raises(InputError, match="the index is damaged") as caught:
        again.search("ferry", mode="text")
    assert "\n" not in str(caught.value)


def test_odd_names_and_broken_links_are_passed_over(embedder, tmp_path, caplog):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("The ferry leaves.\n")
    for name in ("b.txt", "b.jsonl", "b.parquet"):
        (folder / name).symlink_to(folder / "gone")
    (folder / "latin.csv").write_bytes(b"text,lang\nCaf\xe9,fr\n")
    os.mkfifo(folder / "c.txt")
    odd = os.fsencode(folder) + b"/caf\xe9.txt"
    with open(odd, "w") as file:
        file.write("Coffee.\n")
    _, done = made(embedder, tmp_path, folder)
    told = {"broken link": 3, "not UTF-8": 1, "name not UTF-8": 1, "no regular file": 1}
    assert (done.documents, done.passed_over) == (1, told)
    assert "its name is not UTF-8" in caplog.text
    with pytest.raises(InputError, match="its name is not UTF-8"):
        Corpus([os.fsdecode(odd)])


def test_an_open_index_says_that_it_was_replaced(embedder, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS[:3])
    before, _ = made(embedder, tmp_path, path)
    other = embedder.replace(bias=3.0)
    Index.create(tmp_path / "db", other, model="tiny", refit=True).update(Corpus([path]))
    for use in (lambda: before.search("ferry"), lambda: before.update(Corpus([path]))):
        with pytest.raises(InputError, match="refit has replaced this index"):
            use()
    assert Index.open(tmp_path / "db").made_with == Index.create(tmp_path / "db", other).made_with


def test_a_fit_survives_an_update_of_the_index_that_it_is_to_replace(embedder, llama, tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS[:3])
    before, _ = made(embedder, tmp_path, path)
    static = Embedder.from_model(llama, tokenizer, method="static")
    after = Index.create(tmp_path / "db", static, model="tiny", refit=True)
    before.update(Corpus([path]))
    assert not after.transform_file.exists()
    after.update(Corpus([path]))
    assert after.transform_file.exists()


def test_nothing_to_index_leaves_no_index(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    args = ["index", str(tmp_path / "notes"), "--db", str(tmp_path / "db"), "--model", str(folder), "--method"]
    assert "no documents in it" in CliRunner().invoke(app, [*args, "mean"]).stderr
    assert not Index.exists(tmp_path / "db")
    (tmp_path / "notes" / "a.txt").write_text("The ferry leaves.\n")
    assert CliRunner().invoke(app, [*args, "last"]).exit_code == 0
