"""Several processes give what one gives, in order, also when one of them dies."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NOTICES
from test_bulk import vectors
from test_cli import KVEMBED

from kvembed import Embedder, InputError, KvembedError, batching
from kvembed.backbone import Backbone
from kvembed.workers import Recipe, check_devices, encode_on, move_to_cpu, named_devices, run_on

TWO = ["cpu", "cpu"]


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


@pytest.fixture
def recipe(folder):
    return Recipe.of(Embedder.from_pretrained(folder, dtype="float32", max_tokens=450), str(folder))


def test_pieces_are_those_of_one_process_and_errors_name_the_text(recipe, monkeypatch, caplog):
    monkeypatch.setattr(batching, "_BLOCK_ITEMS", 7)
    texts = [*NOTICES[:20], "a long one " * 100]
    expected = list(recipe.load("cpu").encode_stream(texts))
    caplog.clear()
    found = list(encode_on(TWO, recipe, texts))
    assert [len(piece.vectors) for piece in found] == [7, 7, 7]
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
        assert np.array_equal(one.token_counts, other.token_counts)
        assert np.array_equal(one.tokens_cut, other.tokens_cut)
    assert [record.message for record in caplog.records] == ["1 of 21 texts were cut"]
    pieces = encode_on(TWO, recipe, [*NOTICES[:10], "a lone \ud800 surrogate"])
    assert len(next(pieces).vectors) == 7
    with pytest.raises(InputError, match="text 10"):
        next(pieces)


def holds_interrupts(*_):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupt_is_the_parents_from_the_first_moment(recipe):
    """While a worker imports, it would print a traceback of its own."""
    assert list(run_on(TWO, recipe, holds_interrupts, [1, 2])) == [True, True]
    assert not holds_interrupts()


def dying(embedder, job):
    """Item 3 kills its worker: once, if `job` names a file that tells whether it has."""
    item, flag = job
    if item == 3 and (flag is None or not Path(flag).exists()):
        if flag:
            Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item, embedder.dim


def test_a_dead_workers_items_are_done_again_once(recipe, tmp_path, caplog):
    items = [(i, str(tmp_path / "died")) for i in range(9)]
    assert list(run_on(TWO, recipe, dying, items)) == [(i, 48) for i in range(9)]
    assert [record.message for record in caplog.records] == ["the worker on cpu died; its work is done again"]


@pytest.mark.slow
def test_a_worker_that_always_dies_is_an_error_after_what_came_before(recipe):
    found = run_on(["cpu"], recipe, dying, [(i, None) for i in range(9)])
    assert [next(found)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KvembedError, match="the worker on cpu died twice"):
        next(found)


@pytest.mark.parametrize(
    ("devices", "message"),
    [([], "no devices"), (["cpu", ""], "device '' can't be used"), (["quantum:1"], "'quantum:1' can't be used")],
)
def test_bad_devices(devices, message):
    with pytest.raises(InputError, match=message):
        check_devices(devices)


def test_devices_on_the_command_line():
    assert named_devices("cpu, cpu") == ["cpu", "cpu"]
    with pytest.raises(InputError, match="device '' can't be used"):
        named_devices("")


def test_a_worker_that_cannot_open_the_model_says_why(recipe, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    recipe = dataclasses.replace(recipe, name=str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(KvembedError, match="safetensors"):
        next(run_on(["cpu"], recipe, dying, [(0, None)]))


def test_a_worker_whose_device_has_no_room_says_so(recipe):
    """Whatever `load` raises, the cause is told and not that a worker died, or has no model."""
    broken = dataclasses.replace(recipe, config="nothing")
    with pytest.raises(KvembedError, match="the model can't be loaded on cpu: AttributeError: 'str' object"):
        next(run_on(["cpu"], broken, dying, [(0, None)]))


def sleeping(embedder, item):
    Path(item).with_name(f"{os.getpid()}.pid").touch()
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_workers_go_with_their_parent(recipe, folder, tmp_path, ending):
    script = tmp_path / "parent.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored, if the tests run in the background
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from kvembed import Embedder\n"
        "from kvembed.workers import Recipe, run_on\n"
        "from test_workers import sleeping\n"
        "if __name__ == '__main__':\n"
        f"    recipe = Recipe.of(Embedder.from_pretrained({str(folder)!r}), {str(folder)!r})\n"
        f"    list(run_on(['cpu', 'cpu'], recipe, sleeping, [{str(tmp_path / 'a')!r}] * 2))\n"
    )
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        parent.send_signal(ending)
        parent.wait(60)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        parent.kill()
        parent.wait()


def until(holds, seconds=120):
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.2)


@pytest.mark.slow
def test_command_line(folder, tmp_path):
    def run(*command):
        result = subprocess.run([*KVEMBED, *map(str, command)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    source = tmp_path / "in.txt"
    source.write_text("\n".join(NOTICES))
    model = ["--model", folder, "--dtype", "float32"]
    for name, options in (("one", []), ("two", ["--devices", "cpu,cpu"])):
        run("embed", source, "-o", tmp_path / f"{name}.npy", *model, *options)
        run("bulk", source, tmp_path / name, "--shard-rows", 9, *model, *options)
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    one, two = (pq.read_table(tmp_path / name) for name in ("one", "two"))
    assert one["id"].to_pylist() == two["id"].to_pylist()
    np.testing.assert_allclose(vectors(one), vectors(two), atol=1e-5)
    assert len(list((tmp_path / "two").glob("*.parquet"))) == -(-len(NOTICES) // 9)


def test_workers_get_the_device_and_batches_stay_as_they_were(llama, tokenizer, monkeypatch):
    embedder = Embedder.from_model(llama, tokenizer, method="mean")
    assert move_to_cpu(embedder) is embedder
    moved = []
    monkeypatch.setattr(Backbone, "device", property(lambda self: torch.device("cpu" if moved else "cuda")))
    monkeypatch.setattr(type(llama), "to", lambda model, device: moved.append(device))
    assert embedder.batch_tokens == 16_384
    assert move_to_cpu(embedder).batch_tokens == 16_384
    assert moved == ["cpu"]
