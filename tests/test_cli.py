"""The command as a user types it: output, exit codes, one line for every mistake, no traceback ever."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import MANY, NOTICES, tiny
from typer.testing import CliRunner

from kvembed import Embedder, InputError
from kvembed.cli import app
from kvembed.console import check_run_ids, print_json
from kvembed.options import parse_layers
from kvembed.saved import default_method
from kvembed.terminal import stop

KVEMBED = [sys.executable, "-m", "kvembed"]


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    """Its `kv` layers spelled out, so that they are not looked for."""
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


@pytest.fixture
def run(folder):
    def run(*args, stdin=None):
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_embed_files_to_every_output(run, folder, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(NOTICES) + "\n")
    expected = Embedder.from_pretrained(folder).encode(NOTICES)
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        done = run("embed", tmp_path / "in.txt", "-o", tmp_path / name, "--model", folder)
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path / name}: {len(NOTICES)} texts, 48 dimensions\n")
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


def test_embed_composes_with_pipes(run, folder):
    result = run("embed", "--model", folder, "--role", "query", stdin="one\ntwo\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = Embedder.from_pretrained(folder).encode_query(["one", "two"])
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)
    assert result.stderr == ""


def test_embed_keeps_ids(run, folder, tmp_path):
    (tmp_path / "a.csv").write_text("text;key\none;a1\n")
    (tmp_path / "b.csv").write_text("key,text\nb1,two\n")
    done = run("embed", tmp_path / "a.csv", tmp_path / "b.csv", "--id-field", "key", "--model", folder)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["a1", "b1"]
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert np.array_equal(vectors, Embedder.from_pretrained(folder).encode(["one", "two"]))
    refused = run("embed", tmp_path / "a.csv", "--id-field", "key", "-o", tmp_path / "out.npy", "--model", folder)
    assert "has no place for ids" in refused.stderr


def test_a_text_that_is_the_name_of_a_file_is_told(run, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("one\n")
    for command in (("similarity", tmp_path / "notes.txt", "two"), ("explain", tmp_path / "notes.txt")):
        done = run(*command, "--model", folder)
        assert done.exit_code == 0
        assert "there is a file of this name" in done.stderr
    assert run("similarity", "one", "two", "--model", folder).stderr == ""


def test_embed_in_fewer_bits(run, folder, tmp_path):
    whole = Embedder.from_pretrained(folder).encode(["one", "two"])
    result = run("embed", "--model", folder, "--precision", "int8", stdin="one\ntwo\n")
    rows = np.array([json.loads(line)["embedding"] for line in result.stdout.splitlines()])
    assert rows.dtype.kind == "i"
    assert np.abs(rows / np.linalg.norm(rows, axis=1, keepdims=True) - whole).max() < 0.01
    run("embed", "--model", folder, "--precision", "binary", "-o", tmp_path / "bits.npy", stdin="one\ntwo\n")
    assert np.array_equal(np.load(tmp_path / "bits.npy"), np.packbits(whole > 0, axis=1))


def test_options_reach_the_config(run, folder):
    result = run(
        *("explain", "some text", "--json", "--model", folder, "--method", "kv", "--layers", "0,3-4", "--bias", "2.5"),
        *("--max-tokens", "40", "--role", "query"),
    )
    explanation = json.loads(result.stdout)
    config = explanation["config"]
    assert (config["layers"], config["bias"], config["max_tokens"]) == ([0, 3, 4], 2.5, 40)
    assert explanation["prompt"] == "Query: some text\nCompress the Query in one word:"
    assert list(explanation["beta"]) == ["0", "3", "4"]


def test_explain_for_people(run, folder):
    text = run("explain", "some [bold]text", "--model", folder).stdout
    assert "some [bold]text" in text
    assert "layers    1, 2 re-routed" in text
    assert "none re-routed" in run("explain", "text", "--model", folder, "--layers", "none").stdout
    text = run("explain", "", "--model", folder, "--method", "knowledge").stdout
    assert re.search(r"the text's own are none; the first \d\d\d? are computed once for all texts\n", text)


def test_similarity(run, folder):
    found = json.loads(run("similarity", "--json", "--model", folder, *NOTICES[:3]).stdout)
    vectors = Embedder.from_pretrained(folder).encode(NOTICES[:3])
    np.testing.assert_allclose(found["similarity"], vectors @ vectors.T, atol=1e-5)
    ranked = json.loads(
        run("similarity", "--json", "--model", folder, "-q", "a", "-q", "b", "--top", "2", stdin="x\ny\nz\n").stdout
    )
    assert [entry["query"] for entry in ranked] == ["a", "b"]
    assert all(len(entry["hits"]) == 2 and entry["hits"][0]["score"] >= entry["hits"][1]["score"] for entry in ranked)
    assert "[red]x" in run("similarity", "--model", folder, "[red]x", "y").stdout
    assert "nearest to: [a" in run("similarity", "--model", folder, "-q", "[a", "y").stdout
    shown = run("similarity", "--model", folder, "--top", "2", *NOTICES[:11], NOTICES[3]).stdout.splitlines()
    assert "nearest pairs" in shown[1]
    scores = [line.split()[0] for line in shown[3:] if re.match(r" *[01]\.\d{3} ", line)]
    assert (len(scores), scores[0]) == (2, "1.000")


@pytest.mark.parametrize("columns", ["40", "80", "0"])
def test_tables_show_all_numbers_however_narrow_the_terminal(folder, columns):
    env = os.environ | {"COLUMNS": columns}
    command = [*KVEMBED, "similarity", "--model", str(folder)]
    lines = "".join(f"text {number}\n" for number in range(10))
    shown = subprocess.run(command, input=lines, env=env, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\d\.\d{3}", shown)) == 10 * 10
    assert "text 9" in shown


def test_a_text_does_not_steer_the_terminal(run, folder):
    evil = "\x1b]0;title\x07\x1b[31mred \u202eback"
    for args in (("similarity", evil, "b"), ("similarity", "-q", evil, "b"), ("explain", evil)):
        shown = run(*args, "--model", folder).stdout
        assert not re.search("[\x07\x1b\u202e]", shown)
        assert "title" in shown


def test_letters_that_the_output_has_not(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written := io.BytesIO(), "ascii", errors="replace"))
    print_json({"é": "漢"})
    sys.stdout.flush()
    assert json.loads(written.getvalue()) == {"é": "漢"}
    with pytest.raises(InputError, match="the output's encoding, ascii, can't hold the id 'café'"):
        check_run_ids(["a", "café"])


def test_numbers_that_json_has_not_are_null(capsys):
    print_json({"a": [float("inf"), 1.5], "b": "é"})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": "é"}\n'


def test_layers(run, folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(NOTICES))
    for plot in ("curve.svg", "curve.png"):
        args = ("layers", "--model", folder, "--texts", tmp_path / "texts.txt", "--plot", tmp_path / plot, "--json")
        profile = json.loads(run(*args).stdout)
    assert (profile["model"], profile["count"], len(profile["curve"])) == ("tiny", len(NOTICES), 5)
    svg = (tmp_path / "curve.svg").read_text()
    assert svg.startswith("<?xml")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = run("layers", "--model", folder, "--texts", tmp_path / "texts.txt").stdout
    assert f"--layers {','.join(map(str, profile['layers']))}" in text


def test_pull_prints_the_folder(run, folder):
    assert run("pull", folder).stdout == f"{folder}\n"


def test_a_revision_of_what_is_no_hub_id_is_refused(run, folder):
    for name in (folder, "smollm2"):
        result = run("pull", f"{name}@main")
        assert result.exit_code == 1
        assert result.stderr == f"kvembed: a revision is of a hub id, and {name} is none: leave '@main' out\n"


def test_a_lone_surrogate_in_a_file_is_named_by_its_line(run, folder, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "fine"}\n\n{"text": "a\\ud83d"}\n')
    result = run("embed", file, "--model", folder, "-o", tmp_path / "out.npy")
    assert result.exit_code == 1
    place = f"{file}, line 3"
    assert result.stderr == f"kvembed: {place} holds a lone surrogate (U+D83D) at character 1: not valid Unicode\n"
    assert [*tmp_path.iterdir()] == [file]


def test_an_option_that_does_nothing_is_refused(run, folder, tmp_path):
    assert "method static runs no layer" in run("layers", "--method", "static", "--model", folder).stderr
    (tmp_path / "x.txt").write_text("a\n")
    told = run("embed", tmp_path / "x.txt", "--field", "body", "--model", folder, "-o", tmp_path / "x.npy").stderr
    assert "lines of text have no field 'body'" in told


def test_json_lines_from_a_pipe_are_told(run, folder):
    done = run("embed", "--model", folder, stdin='{"text": "a"}\n{"text": "b"}\n')
    assert "standard input: its lines are JSON, and taken as texts as they are" in done.stderr
    assert done.stdout.count("\n") == 2
    assert "JSON" not in run("embed", "--model", folder, stdin="{a\n").stderr


def test_parse_layers():
    assert parse_layers("6-9") == (6, 7, 8, 9)
    assert parse_layers("4,5,10-12") == (4, 5, 10, 11, 12)
    assert parse_layers("none") == ()
    assert parse_layers("auto") is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--bias", "nan"), "bias must be a finite number, not nan"),
        (("--method", "mean", "--bias", "2"), "--bias has no effect: method mean re-routes nothing"),
        (("--method", "static", "--layers", "1"), "--layers: method static runs no layer"),
        (("--method", "mean", "--dim", "8"), "method mean has no best dimensions to keep"),
        (("--layers", "9"), "layer 9 is out of range: llama has layers 0 to 4"),
        (("--layers", "9-6"), "--layers takes 6-9 or 4,5,10 or none or all or auto, not '9-6'"),
        (("--layers", "4,9-6"), "--layers takes"),
        (("--layers", "4,99999"), "--layers takes"),
        (("--layers", "-1"), "--layers takes"),
        (("--layers", ""), "--layers takes"),
        (("--method", "best"), "unknown method 'best'; choose from kv,"),
        (("--max-tokens", "3"), "max_tokens is 3, but the template alone takes"),
        (("--max-tokens", "0"), "max_tokens must be a whole number from 1"),
        (("--devices", ""), "device '' can't be used"),
        (("-o", "out.bin"), "out.bin: can't write .bin"),
        (("--model", "./gone"), "no such file or folder"),
        (("--method", "auto", "--fitted", "gone"), "kvembed: gone: no such file or directory"),
    ],
)
def test_every_mistake_is_one_line_and_exit_1(run, folder, args, message):
    model = () if "--model" in args else ("--model", folder)
    result = run("embed", *args, *model, stdin="text\n")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvembed: ")
    assert message in line


def test_bad_input_files(run, folder, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    (tmp_path / "lone.jsonl").write_text('{"text": "\\ud800"}\n')
    for name, message in [("gone.txt", "no such file"), ("bad.txt", "line 1: not UTF-8"), ("lone.jsonl", "lone surr")]:
        result = run("embed", tmp_path / name, "-o", tmp_path / "out.npy", "--model", folder)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.npy").exists()


def test_a_very_long_text_is_cut_and_said(run, folder):
    result = run("embed", "--model", folder, stdin="word " * 100_000)
    assert json.loads(result.stdout)["tokens"] == 1024
    assert result.stderr == "kvembed: 1 of 1 texts were cut to 1024 tokens\n"


def test_wrong_usage_is_exit_2(run):
    assert run("embed", "--nonsense").exit_code == 2
    assert run("embed", "--role", "reader").exit_code == 2
    assert run("embed", "--dtype", "int4").exit_code == 2
    assert run("embed", "--batch-tokens", "0").exit_code == 2


def environment(**more):
    return os.environ | {"PYTHONWARNINGS": "default"} | more


def test_help_is_quick_and_names_every_command():
    def run(*command):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        return time.perf_counter() - started, done.stdout

    # A ratio of interleaved runs: 0.4 s against 0.16 on a quiet machine, twice that on a busy one; torch takes seconds.
    ours, bare = [], []
    for _ in range(3):
        seconds, told = run(*KVEMBED, "--help")
        ours.append(seconds)
        bare.append(run(sys.executable, "-c", "import typer, rich.table")[0])
    for command in ("embed", "similarity", "layers", "explain", "serve", "pull"):
        assert re.search(rf"\b{command}\b", told)
    assert min(ours) < 4 * min(bare), (ours, bare)


def test_a_closed_pipe_is_no_error(folder):
    command = f"yes text | head -500 | {' '.join(KVEMBED)} embed --model {folder} --layers none | head -c 5"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.stdout == '{"ind'
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "seconds", "code", "told"),
    [
        *((signal.SIGINT, seconds, 130, "kvembed: interrupted\n") for seconds in (0.7, 2, None)),
        *((signal.SIGTERM, seconds, 143, "kvembed: terminated\n") for seconds in (2, None)),
    ],
)
def test_a_signal_is_one_line_and_no_file(folder, tmp_path, number, seconds, code, told):
    """At any moment: while libraries are imported (0.7 s, 2 s) and while texts are embedded (None)."""
    (tmp_path / "in.txt").write_text("some words to embed\n" * 200_000)
    with subprocess.Popen(
        [*KVEMBED, "embed", tmp_path / "in.txt", "-o", tmp_path / "out.npy", "--model", folder],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Ignored, and so inherited, where tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        if seconds is None:
            while len([*tmp_path.iterdir()]) == 1 and process.poll() is None:  # the output's scratch file is to come
                time.sleep(0.05)
        time.sleep(seconds or 0.5)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error == told
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_turns_into_an_error_is_told_as_the_signal(run, folder, monkeypatch, number, code):
    monkeypatch.setattr("kvembed.terminal._asked_to_stop", [])

    def importing(*_, **__):
        usual = signal.signal(number, stop)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            signal.signal(number, usual)
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from None

    monkeypatch.setattr(Embedder, "encode_stream", importing)
    result = run("embed", "--model", folder, stdin="x\n")
    assert result.exit_code == code
    assert result.stderr == f"kvembed: {'terminated' if code == 143 else 'interrupted'}\n"


def test_version(run):
    from kvembed import __version__

    assert run("--version").stdout == f"{__version__}\n"


def test_an_unexpected_error_is_one_line_too(run, folder, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(Embedder, "encode_stream", broken)
    result = run("embed", "--model", folder, stdin="x\n")
    assert result.exit_code == 1
    assert result.stderr == "kvembed: unexpected ZeroDivisionError: division by zero (KVEMBED_DEBUG=1 shows more)\n"


def test_where_an_error_came_from_is_shown_if_asked(folder):
    done = shell(f"echo a | {sys.executable} -m kvembed embed --model /tmp/nosuch", KVEMBED_DEBUG="1")
    assert done.returncode == 1
    assert "standard output" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("kvembed.errors.ModelNotFound: /tmp/nosuch: no such file")


def test_a_bias_without_a_slot_is_told_before_a_fit(run, folder, monkeypatch):
    monkeypatch.setattr("kvembed.models.load", lambda *_, **__: pytest.fail("it loads the model"))
    told = run("tune", folder, "--bias", "2").stderr
    assert told == "kvembed: --bias has no effect: method auto re-routes nothing\n"


def shell(command, **variables):
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=environment(**variables)
    )


def test_odd_streams(folder, tmp_path):
    """Closed or full streams and terminals of another age: a line or nothing, never a traceback."""
    kvembed = f"{sys.executable} -m kvembed"
    closed = shell(f"{kvembed} --version >&-", PYTHONWARNINGS="ignore")
    assert closed.stderr == ""
    assert shell(f"{kvembed} embed --model {folder} <&-").stderr == "kvembed: standard input is closed\n"
    full = shell(f"echo hi | {kvembed} embed --model {folder} > /dev/full")
    assert (full.returncode, full.stderr) == (1, "kvembed: standard output: no space left on device\n")
    ascii_only = shell(f"{kvembed} explain 'é 漢' --model {folder}", PYTHONIOENCODING="ascii")
    assert (ascii_only.returncode, ascii_only.stderr) == (0, "")
    gone = shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; {kvembed} embed --model {folder}")
    assert (gone.returncode, gone.stderr) == (1, "kvembed: the working directory is gone\n")
    full = shell(f"{kvembed} --version > /dev/full")
    assert (full.returncode, full.stderr.lower()) == (1, "kvembed: standard output: no space left on device\n")
    left = shell(f"{kvembed} --version | true; exit ${{PIPESTATUS[0]}}")
    assert (left.returncode in (0, 1), left.stderr) == (True, "")


def test_a_pipe_is_read_once(folder):
    done = shell(f"{sys.executable} -m kvembed embed <(echo one) /dev/stdin --model {folder} --layers none <<< two")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["index"] for line in done.stdout.splitlines()] == [0, 1]


def test_outputs_that_would_do_harm(run, folder, tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text('{"text": "a"}\n')
    result = run("embed", path, "-o", path, "--model", folder)
    assert "same.jsonl is an input too" in result.stderr
    assert path.read_text() == '{"text": "a"}\n'
    (tmp_path / "folder.svg").mkdir()
    assert "is a folder" in run("layers", "--model", folder, "--plot", tmp_path / "folder.svg").stderr
    assert "out of range" in run("embed", "--layers", "0-99999999999", "--model", folder, stdin="a\n").stderr
    assert ":dog:" in run("similarity", "-q", ":dog:", "a", "--model", folder).stdout


def test_eval_prints_scores_and_keeps_a_ledger(run, folder, tmp_path):
    (tmp_path / "data" / "tiny-sts").mkdir(parents=True)
    rows = [{"s1": NOTICES[i], "s2": NOTICES[i + 1], "score": i % 5} for i in range(12)]
    (tmp_path / "data" / "tiny-sts" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("eval", "--data", tmp_path / "data", "--model", folder, "--results", tmp_path / "results")
    shown = run(*options, "--name", "mine")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"tiny-sts +spearman +-?\d+\.\d\d +-?\d+\.\d to -?\d+\.\d +12 +0", shown.stdout)
    assert re.search(r"mine, kv: mean -?\d+\.\d\d over 1 task, at most 1,024 tokens, config [0-9a-f]{16}", shown.stdout)
    (path,) = (tmp_path / "results").glob("mini/mine/kv-*/tiny-sts.json")
    (row,) = json.loads(run(*options, "--name", "mine", "--json").stdout)
    assert row == json.loads(path.read_text())
    reference = run("eval", "--data", tmp_path / "data", "--reference", "tf-idf")
    assert "tf-idf, tf-idf: mean" in reference.stdout


def test_vectors_of_several_limits_are_refused(run, tokenizer, tmp_path):
    tiny(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "long").mkdir(parents=True)
    for name, row in {
        "corpus": {"id": "d", "title": "", "text": "The ferry leaves. " * 1000},
        "queries": {"id": "q", "text": "When?"},
        "qrels": {"qid": "q", "did": "d", "rel": 1},
    }.items():
        (tmp_path / "data" / "long" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    args = ("--suite", "long", "--method", "mean", "--vectors", tmp_path / "v")
    result = run("eval", "--model", tmp_path / "model", "--data", tmp_path / "data", *args)
    assert result.exit_code == 1
    assert "--vectors holds one limit of tokens" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "say what to score on: --data FOLDER, or --mteb TASK"),
        (["--data", ".", "--mteb", "STSBenchmark"], "--data and --mteb are two runs: give one of them"),
        (["--data", "/nowhere"], "/nowhere: no such folder"),
        (
            ["--mteb", "Banking77Classification", "--reference", "tf-idf"],
            "--task, --suite, --results, --vectors, --reference and --precision are for --data",
        ),
        (
            ["--data", ".", "--reference", "tf-idf", "--layers", ""],
            "--reference stands instead of a method: it takes no --method, --layers, --bias, --dtype, --dim, --fitted, "
            "--max-tokens, --batch-tokens",
        ),
        (
            ["--data", ".", "--reference", "tf-idf", "--name", "mine"],
            "--reference tf-idf has no model: it takes no --model and no --name",
        ),
        (
            ["--data", ".", "--reference", "sentence-transformer", "--model", "smollm2"],
            "--reference sentence-transformer needs its --model; smollm2 is none",
        ),
    ],
)
def test_eval_says_what_is_wrong(run, folder, args, message):
    result = run("eval", "--model", folder, *args)
    assert result.exit_code == 1
    assert result.stderr == f"kvembed: {message}\n"


def test_report_is_one_page(run, folder, tmp_path):
    (tmp_path / "data" / "tiny-sts").mkdir(parents=True)
    rows = [{"s1": NOTICES[i], "s2": NOTICES[i + 1], "score": i % 5} for i in range(12)]
    (tmp_path / "data" / "tiny-sts" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", "--data", tmp_path / "data", "--model", folder, "--results", tmp_path / "results", "--name", "mine")
    (tmp_path / "few.txt").write_text("\n".join(NOTICES[:3]))
    page = tmp_path / "page.html"
    options = ("--text", "a <b>", "--texts", tmp_path / "few.txt", "--model", folder)
    shown = run("report", tmp_path / "results", "-o", page, *options)
    assert (shown.exit_code, shown.stdout) == (0, f"{page}\n"), shown.stderr
    text = page.read_text()
    for title in ("mine, suite mini", "Attention to the slot", "Similarity"):
        assert title in text
    assert "<b>" not in text
    for idle in (("--method", "kv"), ("--layers", "3"), ("--dtype", "float32"), ("--model", folder)):
        assert "are for --text or --texts" in run("report", tmp_path / "results", "-o", page, *idle).stderr
    empty = run("report", tmp_path / "data", "-o", page)
    assert empty.exit_code == 1
    assert "holds no results of mini or full; `kvembed eval --results" in empty.stderr
    run("report", tmp_path / "results", "-o", page, "--text", "a", "--model", folder, "--method", "mean")
    assert "Method mean re-routes nothing, so no token reads a slot." in page.read_text()


def test_tune_and_its_file(run, folder, tmp_path):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "t.safetensors"
    corpus.write_text("\n".join(MANY))
    told = run("tune", folder, "--texts", corpus, "-o", out, "--dtype", "float32")
    assert told.exit_code == 0, told.stderr
    assert "read      mean over the text's own tokens, after layer 0" in told.stdout
    assert f"to use    kvembed embed --model {folder} --method auto --fitted {out}\n" in told.stdout
    kept = run("tune", folder, "--texts", corpus, "--dtype", "float32", "--layers", "1-2", "--bias", "2").stdout
    assert "-o FILE writes it to a file" in kept
    assert f"embed --model {folder} --method auto --layers 1,2 --bias 2 --fitted FILE\n" in kept
    half = run("tune", folder, "--method", "static", "--texts", corpus, "-o", out, "--dtype", "float16").stdout
    command = half.rpartition("to use    kvembed ")[2].split()
    assert run(*command, stdin="one\n").exit_code == 0
    info = json.loads(run("tune", folder, "--texts", corpus, "-o", out, "--json").stdout)
    assert (info["texts"], info["dim"], len(info["views"])) == ("given", 48, 3)
    options = ["--model", folder, "--method", "auto", "--fitted", out]
    rows = [json.loads(line) for line in run("embed", *options, "--dim", 9, stdin="one\ntwo\n").stdout.splitlines()]
    expected = Embedder.from_pretrained(folder, method="auto", fitted=out, dim=9).encode(["one", "two"])
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    assert "given texts" in run("explain", "text", *options).stdout
    assert run("similarity", "a", "b", *options).exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "kv"], "kv has nothing to fit; static and auto have"),
        (["-o", "t.npy"], "a transform is a .safetensors file"),
        (["--texts", "few.txt"], "on 100 different texts or more, not 2"),
        (["--texts", "no.txt"], "no.txt"),
    ],
)
def test_tune_told_wrong(run, folder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    result = run("tune", folder, *args)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") <= 2


def test_the_default_method_is_auto_or_a_folders_own(folder, tmp_path):
    assert default_method("smollm2") == default_method(str(tmp_path)) == "auto"
    assert default_method(str(folder)) is None


def test_few_compiled_products_are_kept(monkeypatch):
    """torch's own default fills 600 MB with batches of all lengths; a user who says otherwise is heard."""
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    code = "import json, os, kvembed.cli as cli\ntry: cli.main()\nfinally: print(json.dumps(dict(os.environ)))"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["LRU_CACHE_CAPACITY"], told["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("32", "7")
    assert told["MALLOC_TRIM_THRESHOLD_"] == str(256 << 20)  # for the processes that it starts
