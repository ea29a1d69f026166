"""Every word of a folder is in one document, at the line that it says; fields have the type that holds them all."""

from __future__ import annotations

import datetime
import decimal
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvembed import InputError
from kvembed.documents import Corpus, converted
from kvembed.passages import PASSAGE, passages

LINES = st.lists(
    st.one_of(
        st.sampled_from(
            ["", "  ", "# Title", "## Sub", "```", "~~~ python", "# not a title", "word " * 300, "x" * 3000]
        ),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=2000),
    ),
    max_size=30,
)


def numbered(lines):
    return list(enumerate(lines, 1))


@given(lines=LINES, headings=st.booleans())
def test_nothing_is_lost_but_white_space(lines, headings):
    lines = ["first", *lines]  # or it might be front matter
    found = list(passages(numbered(lines), headings=headings))
    assert "".join("".join(text for _, text in found).split()) == "".join("".join(lines).split())
    for line, text in found:
        assert 0 < len(text) <= PASSAGE
        assert text.split("\n")[0].split()[0] in lines[line - 1]


def test_headings_begin_a_passage():
    code = ["```", "# comment", "", "## comment", "```"]
    text = ["# A", "## B", "first", "", "second", "### C", "third", *code, "fourth", "#no heading"]
    assert list(passages(numbered(text), headings=True)) == [
        (1, "# A\n\n## B\n\nfirst\n\nsecond"),
        (6, "### C\n\nthird\n\n```\n# comment\n\n## comment\n```\n\nfourth\n#no heading"),
    ]
    assert [line for line, _ in passages(numbered(text))] == [1]


def test_front_matter_is_about_the_text():
    text = ["---", "title: Ferry", "---", "first", "", "---", "second"]
    assert list(passages(numbered(text), headings=True)) == [(4, "first\n\n---\nsecond")]
    assert list(passages(numbered(text))) == [(1, "---\ntitle: Ferry\n---\nfirst\n\n---\nsecond")]
    for open_or_late in (text[:2], ["a", *text]):
        assert [line for line, _ in passages(numbered(open_or_late), headings=True)] == [1]


def test_paragraphs_fill_a_passage():
    paragraph = "word " * 100  # 499 characters without the last space
    lines = [line for _ in range(5) for line in (paragraph, "")]
    assert [(line, len(text)) for line, text in passages(numbered(lines))] == [(1, 1000), (5, 1000), (9, 499)]
    sentences = "This is one. " * 200
    assert all(text.endswith("one.") for _, text in passages([(1, sentences)]))


def test_what_is_read_of_a_folder(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "folder"
    (folder / "in" / ".git").mkdir(parents=True)
    (folder / "db").mkdir()
    for name in ("b.txt", "a.MD", "in/c.rst", "in/.git/d.txt", ".e.txt", "page.html", "db/f.txt", "LICENSE"):
        (folder / name).write_text(f"text of {name}")
    (folder / "db" / "kvembed-index.json").write_text("{}")
    os.symlink(outside, folder / "link.txt")
    os.symlink(tmp_path, folder / "loop")
    os.symlink(folder / "b.txt", folder / "z.txt")
    corpus = Corpus([folder])
    names = [os.path.relpath(x.file, folder) for x in corpus.read(corpus.documents)]
    assert names == ["a.MD", "b.txt", "in/c.rst"]
    assert corpus.passed_over == {".html": 1, "without ending": 1, "link out of its folder": 1}
    assert (corpus.files, corpus.duplicates) == (4, 1)  # a link within the folder is the same text
    assert Corpus([folder / "LICENSE", folder, folder / "b.txt"]).files == 5
    with pytest.raises(InputError, match=r"page\.html: its text has to be taken out first"):
        Corpus([folder / "page.html"])


def test_lines_of_plain_text_as_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "b.md").write_text("four\nfive\n")
    corpus = Corpus([tmp_path], lines=True)
    found = [(document.text, document.line) for document in corpus.read(corpus.documents)]
    assert found == [("one", 1), ("two", 3), ("three", 4), ("four\nfive", 1)]
    assert corpus.empty == 1
    assert len(Corpus([tmp_path]).documents) == 2


def test_fields_and_their_types(tmp_path):
    (tmp_path / "a.csv").write_text("text,n,x,zip,e.mail,id\na,1,1,01234,q@r,7\nb,,2.50,56789,,8\n")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "c", "n": 3, "flag": true, "list": [1, "ü"], "big": 9223372036854775808}\n'
    )
    rows = {
        "text": ["d"],
        "day": [datetime.date(2020, 2, 1)],
        "f": [float("nan")],
        "none": pa.array([None], pa.int64()),
        "price": pa.array([decimal.Decimal("1.50")]),
        "count": pa.array([decimal.Decimal("12")]),
        "took": pa.array([datetime.timedelta(seconds=90)]),
    }
    pq.write_table(pa.table(rows), tmp_path / "c.parquet")
    corpus = Corpus([tmp_path])
    kinds = {
        "int64": "n id_ count",
        "float64": "x price",
        "string": "zip e_mail list big day took",
        "bool": "flag",
    }
    assert corpus.kinds == {name: kind for kind, names in kinds.items() for name in names.split()}
    found = {x.text: {k: converted(v, corpus.kinds[k]) for k, v in x.fields.items() if v is not None}
             for x in corpus.read(corpus.documents)}  # fmt: skip
    assert found == {
        "a": {"n": 1, "x": 1.0, "zip": "01234", "e_mail": "q@r", "id_": 7},
        "b": {"x": 2.5, "zip": "56789", "id_": 8},
        "c": {"n": 3, "flag": True, "list": '[1, "ü"]', "big": "9223372036854775808"},
        "d": {"day": "2020-02-01", "price": 1.5, "count": 12, "took": "0:01:30"},
    }
    (tmp_path / "d.csv").write_text("text,n\ne,many\n")
    wide = Corpus([tmp_path])
    assert wide.kinds["n"] == "string"
    assert sorted(converted(x.fields.get("n"), "string") or "" for x in wide.read(wide.documents)) == [
        "",
        "",
        "1",
        "3",
        "many",
    ]


def test_a_pipe_cannot_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: neither a file nor a folder; what is indexed is read twice"):
        Corpus([tmp_path / "pipe"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"text": "\\ud800"}',
            r"x\.jsonl, line 1 holds a lone surrogate \(U\+D800\) at character 0: not valid",
        ),
        ("x.jsonl", '{"text": "a", "b": "\\ud800"}', r"x\.jsonl, line 1 holds a lone surrogate"),
        (
            "x.jsonl",
            '{"text": "a", "b.c": 1, "b_c": 1}',
            r"fields 'b\.c' and 'b_c' would both be called 'b_c'; rename one",
        ),
        ("x.jsonl", '{"body": "a"}', r"x\.jsonl, line 1: no text in field 'text'; it has body \(choose with --field\)"),
        ("x.csv", "text,a,a\nx,1,2\n", r"x\.csv: column 'a' is there more than once"),
    ],
)
def test_what_cannot_be_used_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Corpus([tmp_path])


def test_a_file_that_changes_gives_no_document_that_was_not_planned(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\n")
    corpus = Corpus([path])
    path.write_text("two\n")
    assert list(corpus.read(corpus.documents)) == []
