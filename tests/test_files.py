"""Every input kind gives the same texts; every output kind the same vectors; every bad file one line that names it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvembed import Encoded, InputError
from kvembed.extras import import_extra
from kvembed.files import atomic_write, check_writable
from kvembed.texts import read_lines, read_rows, read_texts, stream_rows
from kvembed.vectors import check_output, write_vectors

TEXTS = ["plain", 'quotes "and", commas', "émoji 🙂", "", "line\u2028separator"]


def write(folder, suffix, field="text"):
    path = folder / f"in{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in TEXTS))
    elif suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", field], *([1, text] for text in TEXTS)])
    else:
        pq.write_table(pa.table({"id": range(len(TEXTS)), field: TEXTS}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_kind_gives_the_same_texts(tmp_path, suffix):
    assert read_texts([write(tmp_path, suffix)]) == TEXTS
    if suffix != ".txt":
        assert read_texts([write(tmp_path, suffix, "body")], "body") == TEXTS
        with pytest.raises(InputError, match=r"in\..*body.*--field"):
            read_texts([write(tmp_path, suffix, "body")])


def test_several_files_windows_line_ends_and_bom(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_text('"three"\n\n{"text": "four"}\n')
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one", "two", "three", "four"]


def test_csv_after_blank_lines(tmp_path):
    (tmp_path / "x.csv").write_text("\n\nid;text\n1;a\n\n2;b\n")
    rows = list(read_rows(tmp_path / "x.csv", id_field="id"))
    assert [(row.text, row.id, row.line) for row in rows] == [("a", "1", 4), ("b", "2", 6)]
    assert [row.text for row in read_rows(tmp_path / "x.csv", start=rows[0].next)] == ["b"]


def test_parquet_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "n", "n"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert [row.text for row in read_rows(tmp_path / "x.parquet")] == ["a"]
    with pytest.raises(InputError, match=r"x\.parquet: column 'n' is there more than once"):
        list(read_rows(tmp_path / "x.parquet", others=True))


def test_a_name_that_is_too_long_is_said(tmp_path):
    with pytest.raises(InputError, match="x: file name too long"):
        stream_rows([Path("x" * 300)])
    with pytest.raises(InputError, match="does not exist"):
        check_writable(Path("x" * 300) / "y.npy")


def test_csv_of_old_line_ends(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'id,text\r1,one\r\r2,"two\rlines"\r')
    assert read_texts([tmp_path / "x.csv"]) == ["one", "two\rlines"]
    assert [row.line for row in read_rows(tmp_path / "x.csv")] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt: no texts in it"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: no texts in it"),
        ("x.csv", b"text\n", r"x\.csv: no texts in it"),
        ("x.txt", b"ok\nnot \xff utf-8", r"x\.txt, line 2: not UTF-8 text \(byte 0xff\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": 5}', r"x\.jsonl, line 1: field 'text' holds 5, not text"),
        ("x.jsonl", b'{"text": null}', r"x\.jsonl, line 1: field 'text' holds null, not text"),
        ("x.jsonl", b'{"n": 5}', r"x\.jsonl, line 1: no text in field 'text'; it has n"),
        ("x.jsonl", b"[1]", r"x\.jsonl, line 1: a line is an object or a string, not \[1\]"),
        ("x.txt", "a".encode("utf-16"), r"x\.txt: is UTF-16, as Excel's Unicode text; save it as UTF-8"),
        ("x.csv", b"id, text\n1,a", r"x\.csv: no column 'text'; it has id, ' text' \(choose"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: not JSON"),
        ("x.csv", b"a,b\n1,2\n", r"x\.csv: no column 'text'; it has a, b"),
        ("x.csv", b"", r"x\.csv: no texts in it"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv: column 'text' is there more than once"),
        ("x.csv", b"id,text\n1\n", r"x\.csv, line 2: no value in column 'text'"),
        ("x.csv", b'text\n"open\n', r"x\.csv, line \d: not CSV"),
        ("x.csv", b"id,text\n1,a,\n2,Hello, world\n", r"x\.csv, line 3: 3 values for 2 columns; .* in quotes"),
        ("x.parquet", b"PAR1 not really", r"x\.parquet: can't be read as Parquet"),
        ("x.parquet", b"", r"x\.parquet: can't be read as Parquet"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_texts([tmp_path / name])
    assert "\n" not in str(error.value)


def test_a_parquet_column_that_is_not_text(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="row 2: column 'text' holds null"):
        read_texts([tmp_path / "x.parquet"])


def test_a_parquet_column_with_dates_that_python_does_not_reach(tmp_path):
    """As what stands for "never": 9999-12-31 23:59 in UTC is the year 10000 in Tokyo."""
    until = pa.array([0, 253402300799], pa.timestamp("s", "Asia/Tokyo"))
    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, 2], "until": until}), tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet", others=True))
    assert [row.others["n"] for row in rows] == [1, 2]
    assert [str(row.others["until"])[:10] for row in rows] == ["1970-01-01", "10000-01-0"]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such file or directory"):
        read_texts([tmp_path / "gone.txt"])
    with pytest.raises(InputError, match="is a directory"):
        read_texts([tmp_path])


@pytest.fixture
def encoded():
    random = np.random.default_rng(0)
    return Encoded(
        random.standard_normal((7, 5)).astype(np.float32), np.arange(7, dtype=np.int64), np.array([0, 0, 3, 0, 0, 0, 0])
    )


def test_every_output_holds_exactly_the_same_vectors(tmp_path, encoded):
    for suffix in (".npy", ".jsonl", ".parquet"):
        write_vectors([encoded], tmp_path / f"out{suffix}")
    assert np.array_equal(np.load(tmp_path / "out.npy"), encoded.vectors)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), encoded.vectors)
    table = pq.read_table(tmp_path / "out.parquet")
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), encoded.vectors)
    assert [row["tokens_cut"] for row in rows] == table["tokens_cut"].to_pylist() == encoded.tokens_cut.tolist()
    assert [row["index"] for row in rows] == table["index"].to_pylist() == list(range(7))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pieces_are_one_file(tmp_path, dtype):
    """More of them than a header of .npy would hold if it were written for the first alone."""
    whole = np.arange(2400).reshape(1200, 2).astype(dtype)
    pieces = [Encoded(part, part[:, 0].astype(np.int64), part[:, 1].astype(np.int64)) for part in np.split(whole, 100)]
    for suffix in (".npy", ".jsonl", ".parquet"):
        write_vectors(iter(pieces), tmp_path / f"out{suffix}")
    assert np.array_equal(np.load(tmp_path / "out.npy"), whole)
    assert np.load(tmp_path / "out.npy").dtype == dtype
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "out.parquet")
    assert [row["index"] for row in rows] == table["index"].to_pylist() == list(range(1200))
    assert [row["embedding"] for row in rows] == table["embedding"].to_pylist() == whole.tolist()


def test_no_pieces_are_an_error_and_no_file(tmp_path):
    with pytest.raises(InputError, match="no texts"):
        write_vectors([], tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_texts_are_counted_and_then_streamed(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('"three"\n')
    rows, count = stream_rows([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert (count, [row.text for row in rows]) == (3, ["one", "two", "three"])
    (tmp_path / "b.jsonl").write_text('"three"\n4\n')
    with pytest.raises(InputError, match="line 2: a line is"):  # before anything is embedded
        stream_rows([tmp_path / "a.txt", tmp_path / "b.jsonl"])


def test_blank_texts_are_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\n\n \ntwo\n")
    assert len(list(stream_rows([tmp_path / "a.txt"])[0])) == 4
    assert "2 of 4 texts are blank" in caplog.text


def test_ids_stand_beside_the_vectors(tmp_path, encoded):
    ids = ["a", "\u00fc", *"cdefg"]
    halves = [Encoded(*(part[some] for part in vars(encoded).values())) for some in (slice(3), slice(3, None))]
    for suffix in (".jsonl", ".parquet"):
        write_vectors(halves, tmp_path / f"out{suffix}", iter(ids))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ids
    assert "index" not in rows[0]
    with pytest.raises(InputError, match=r"\.npy has no place for ids"):
        write_vectors(halves, tmp_path / "out.npy", iter(ids))
    with pytest.raises(InputError, match="strings here and whole numbers there"):
        write_vectors(halves, tmp_path / "mixed.parquet", iter([*ids[:3], 4, 5, 6, 7]))
    assert not (tmp_path / "mixed.parquet").exists()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_header_says_the_delimiter(tmp_path, delimiter):
    rows = [["id", "text"], ["1", "one, two; three"], ["2", "a\tb"]]
    path = tmp_path / ("x.tsv" if delimiter == "\t" else "x.csv")
    path.write_text("".join(delimiter.join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    assert read_texts([path]) == ["one, two; three", "a\tb"]
    assert [row.id for row in stream_rows([path], id_field="id")[0]] == ["1", "2"]
    with pytest.raises(InputError, match=r"no column 'body'.*--field"):
        read_texts([path], "body")


def test_a_tsv_whose_quotes_mean_nothing_is_not_read_as_one_row(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('id\ttext\n1\t"Hello there\n2\tplain\n3\tworld"\n')
    with pytest.raises(InputError, match=r"x\.tsv, line 2: a quote that opens a cell here closes in another line"):
        read_texts([path])
    path.write_text('id\ttext\n1\t"two\nlines"\n')
    assert read_texts([path]) == ["two\nlines"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.json", "JSON is read line by line"),
        ("x.md", "`kvembed index` takes documents"),
        ("x.jsonl.gz", "is compressed; decompress it first"),
        ("x.PDF", "has to be taken out first"),
    ],
)
def test_what_does_not_hold_a_text_a_line_is_refused(tmp_path, name, message):
    (tmp_path / name).write_text("some text\n")
    with pytest.raises(InputError, match=message):
        read_texts([tmp_path / name])
    if name == "x.md":
        assert [row.text for row in read_lines(tmp_path / name)] == ["some text"]
    else:
        with pytest.raises(InputError, match=message):
            next(read_lines(tmp_path / name))


def test_a_file_keeps_its_permissions_and_a_link_its_place(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, encoded, monkeypatch, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    name = {".npy": "_write_npy", ".jsonl": "_write_jsonl", ".parquet": "_write_parquet"}[suffix]

    def fail(pieces, file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"kvembed.vectors.{name}", fail)
    with pytest.raises(InputError, match="no space left on device"):
        write_vectors([encoded], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.txt", r"can't write \.txt; choose from \.npy, \.jsonl, \.parquet"),
        ("x", "can't write a file without an ending"),
        ("gone/x.npy", "the folder .*gone does not exist"),
        ("folder.npy", "is a folder"),
        ("pipe.npy", "is a pipe or a device"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, path, message):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(InputError, match=message):
        check_output(tmp_path / path)
    check_output(None)
    check_output(Path("-"))


@pytest.mark.parametrize("stem", [249 * "a", 83 * "長"])
def test_an_output_with_the_longest_name_that_can_be(tmp_path, encoded, stem):
    write_vectors([encoded], tmp_path / f"{stem}.jsonl")
    assert [path.stem for path in tmp_path.iterdir()] == [stem]


def test_a_missing_extra_says_the_pip_line():
    with pytest.raises(InputError, match=r"this needs nonesuch: pip install 'kvembed\[parquet\]'"):
        import_extra("nonesuch.thing", "parquet")
