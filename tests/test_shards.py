"""A shard read by itself is what it is when all is read in order, wherever files begin and end; bad rows are named."""

from __future__ import annotations

import csv
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvembed import InputError
from kvembed.shards import ShardReader, check_folders, find_inputs, make_plan
from kvembed.texts import Mark, read_rows

SUFFIXES = [".txt", ".jsonl", ".csv", ".parquet"]


def write(path, texts, ids=None, group=3):
    """Rows of `key` and `text`, with what else such a file may hold: blank lines, CRLF, quoted line ends."""
    ids = ids or [f"id {i}" for i in range(len(texts))]
    if path.suffix == ".txt":
        path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{text}\n" for text in texts).encode())
    elif path.suffix == ".jsonl":
        rows = [json.dumps({"key": i, "text": t}, ensure_ascii=False) for i, t in zip(ids, texts, strict=True)]
        path.write_bytes("".join(f"{row}\r\n\n" for row in rows).encode())
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(
                [["key", "other", "text"], *([i, "", t] for i, t in zip(ids, texts, strict=True))]
            )
    else:
        table = pa.table({"key": ids, "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=group)


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25)
@given(texts=st.lists(st.text(LETTERS, max_size=8), min_size=1, max_size=12))
def test_a_row_can_be_read_from_where_the_one_before_ended(tmp_path_factory, suffix, texts):
    if suffix == ".txt":
        texts = [text.replace("\r", "").replace("\n", "") for text in texts]
    path = tmp_path_factory.mktemp("rows") / f"in{suffix}"
    write(path, texts)
    id_field = None if suffix == ".txt" else "key"
    rows = list(read_rows(path, id_field=id_field))
    assert [row.text for row in rows] == texts
    if id_field:
        assert [row.id for row in rows] == [f"id {i}" for i in range(len(texts))]
    for at, mark in enumerate([Mark(), *(row.next for row in rows)]):
        assert list(read_rows(path, id_field=id_field, start=mark)) == rows[at:]


@pytest.mark.parametrize("shard_rows", [1, 4, 5, 100])
def test_shards_in_any_order(tmp_path, shard_rows):
    texts = [f"text {i}\nof two lines" for i in range(23)]
    names = ["b.jsonl", "a/x.csv", "c.parquet", "a/empty.jsonl", "d.PARQUET"]
    parts = {"a/x.csv": texts[:7], "b.jsonl": texts[7:8], "c.parquet": texts[8:20], "d.PARQUET": texts[20:]}
    (tmp_path / "a").mkdir()
    for name in names:
        write(tmp_path / name, parts.get(name, []))
    (tmp_path / "_skipped.jsonl").write_text("not JSON")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jsonl").write_text("not JSON")
    (tmp_path / "README").write_text("no rows")
    plan = make_plan(tmp_path, field="text", id_field=None, shard_rows=shard_rows)
    assert [file.path for file in plan.inputs] == ["a/empty.jsonl", "a/x.csv", "b.jsonl", "c.parquet", "d.PARQUET"]
    assert [(file.first_row, file.rows) for file in plan.inputs] == [(0, 0), (0, 7), (7, 1), (8, 12), (20, 3)]
    assert plan.rows == sum(shard.rows for shard in plan.shards) == 23
    assert [shard.first_row for shard in plan.shards] == list(range(0, 23, shard_rows))
    reader = ShardReader(plan)
    for shard in [*plan.shards, *random.Random(0).sample(plan.shards, len(plan.shards))]:
        rows = list(reader.read(shard))
        wanted = range(shard.first_row, shard.first_row + shard.rows)
        assert [(row.id, row.text) for row in rows] == [(i, texts[i]) for i in wanted]


def test_what_cannot_be_listed_is_an_error_and_links_to_folders_are_told(tmp_path, monkeypatch, caplog):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", ["a"])
    write(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "in" / "linked.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "in" / "folder").symlink_to(tmp_path)
    with caplog.at_level("INFO"):
        assert find_inputs(tmp_path / "in")[1] == ["a.jsonl", "linked.jsonl"]
    assert "in: 1 links to folders are passed over" in caplog.text
    (tmp_path / "in" / "broken.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"broken\.jsonl: no such file"):
        find_inputs(tmp_path / "in")
    (tmp_path / "in" / "broken.jsonl").unlink()
    (tmp_path / "in" / "closed").mkdir()
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"closed: permission denied"):
        find_inputs(tmp_path / "in")


def test_a_reader_stopped_inside_a_shard_begins_it_again(tmp_path):
    write(tmp_path / "in.jsonl", [str(i) for i in range(9)])
    plan = make_plan(tmp_path / "in.jsonl", field="text", id_field="key", shard_rows=3)
    reader = ShardReader(plan)
    next(reader.read(plan.shards[0]))
    assert [row.text for row in reader.read(plan.shards[1])] == ["3", "4", "5"]
    assert [row.id for row in reader.read(plan.shards[0])] == ["id 0", "id 1", "id 2"]


@pytest.mark.parametrize("change", ["append", "remove"])
def test_a_file_that_changes_meanwhile_is_told(tmp_path, change):
    path = tmp_path / "in.jsonl"
    write(path, ["a", "b", "c"])
    plan = make_plan(path, field="text", id_field=None, shard_rows=2)
    if change == "append":
        path.write_text(path.read_text() + '{"text": "d"}\n')
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"in\.jsonl changed while it was read|in\.jsonl: no such file"):
        list(ShardReader(plan).read(plan.shards[1]))


@pytest.mark.parametrize(
    ("name", "content", "id_field", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": ', None, r"x\.jsonl, line 3: not JSON"),
        ("x.jsonl", '{"text": "a"}\n{"text": 5}', None, r"x\.jsonl, line 2: field 'text' holds 5, not text"),
        ("x.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', None, r"x\.jsonl, line 2 holds a lone surrogate \(U\+D800\)"),
        ("x.jsonl", '{"text": "a", "id": "\\ud800"}', "id", r"x\.jsonl, line 1: the id in 'id' holds a lone surrogate"),
        ("x.jsonl", '{"text": "a"}', "id", r"x\.jsonl, line 1: no field 'id'; it has text \(choose with --id-field\)"),
        ("x.jsonl", '"a"', "id", r"x\.jsonl, line 1: no field 'id'"),
        ("x.jsonl", '{"text": "a", "id": 1.5}', "id", r"x\.jsonl, line 1: the id in 'id' is neither"),
        ("x.jsonl", '{"text": "a", "id": true}', "id", r"x\.jsonl, line 1: the id in 'id' is neither"),
        ("x.jsonl", '{"text": "a", "id": 9223372036854775808}', "id", "whole number of 64 bits"),
        (
            "x.jsonl",
            '{"text": "a", "id": 1}\n{"text": "a", "id": "1"}',
            "id",
            "line 2: the id is '1'; those before it are whole",
        ),
        ("x.csv", "text,id\na\n", "id", r"x\.csv, line 2: no value in column 'id'"),
        ("x.csv", "text,id\na,1\nb,\n", "id", r"x\.csv, line 3: no id in column 'id'"),
        ("x.csv", "text\na\n", "id", r"x\.csv: no column 'id'.*--id-field"),
        ("x.txt", "a\n", "id", "lines of text have no field 'id'"),
        ("x.jsonl", "\n", None, r"x\.jsonl: no texts in it"),
        ("x.csv", "other\n", None, r"x\.csv: no column 'text'"),
        ("x.parquet", "PAR1", None, r"x\.parquet: can't be read as Parquet"),
    ],
)
def test_bad_rows_are_told_before_the_work(tmp_path, name, content, id_field, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        make_plan(tmp_path / name, field="text", id_field=id_field, shard_rows=10)
    assert "\n" not in str(error.value)


def test_parquet_ids(tmp_path):
    write(tmp_path / "x.parquet", ["a", "b"], [7, None])
    with pytest.raises(InputError, match="row 2: the id in 'key' is neither"):
        make_plan(tmp_path, field="text", id_field="key", shard_rows=10)
    write(tmp_path / "x.parquet", ["a", "b"], [7, 8])
    assert make_plan(tmp_path, field="text", id_field="key", shard_rows=10).id_type == "int64"


def test_folders_that_cannot_be(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    with pytest.raises(InputError, match=r"gone: no such file or folder"):
        find_inputs(tmp_path / "gone")
    with pytest.raises(InputError, match=r"in: no \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet files in this folder"):
        check_folders(source, out)
    write(source / "a.jsonl", ["a"])
    check_folders(source, out)
    with pytest.raises(InputError, match="the job would read what it writes"):
        check_folders(source, source / "out")
    out.write_text("")
    with pytest.raises(InputError, match="out is a file, not a folder"):
        check_folders(source, out)
    out.unlink()
    out.mkdir()
    (out / "_lock").write_text("")
    (out / "._manifest.json.abc").write_text("")  # of a process killed at the very beginning
    check_folders(source, out)
    (out / "thesis.doc").write_text("")
    with pytest.raises(InputError, match=r"holds no bulk job but other files \(thesis\.doc\)"):
        check_folders(source, out)
