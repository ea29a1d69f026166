"""Real weights: smollm2 in the fast suite; Qwen2.5-Coder-0.5B and Gemma3-270M in the slow one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import NOTICES, SHARED
from transformers import MistralConfig, MistralForCausalLM

from kvembed import Embedder, tuning
from kvembed.evaluate import evaluate
from kvembed.models import pull
from kvembed.quantize import unit
from kvembed.self_written import generated_texts, texts_digest
from kvembed.subjects import sentence_transformer_subject
from kvembed.tasks import load_tasks
from kvembed.tuning import FIT_TEXTS

pytestmark = pytest.mark.real

PROSE = " ".join(NOTICES * 4)


def oracle(embedder, text, monkeypatch):
    """The vector by the definition, in float64 (whole-matrix form of the loop, tested equal in test_attention)."""
    monkeypatch.setattr(reference, "rerouted_attention", reference.fast_attention)
    ((prompt,),) = embedder.prompts([text])
    decoder = embedder.model.get_decoder()
    states = reference.states(decoder.state_dict(), decoder.config, prompt.ids, set(embedder.config.layers))
    return reference.hybrid(states).numpy()


def assert_exact(embedder, texts, monkeypatch):
    for text, vector in zip(texts, embedder.encode(texts), strict=True):
        want = oracle(embedder, text, monkeypatch)
        assert want @ vector.astype(np.float64) >= 0.99999
        assert np.linalg.norm(vector - want) / np.linalg.norm(want) <= 1e-4


def test_smollm2_is_exact(smollm2, monkeypatch):
    embedder = Embedder.from_model(*smollm2, method="kv", layers=range(6, 10), batch_tokens=100_000)
    assert_exact(embedder, ["x", "Bees will swarm in May.", PROSE[:900]], monkeypatch)


def test_mistral_with_the_same_weights_and_with_a_small_window(smollm2, monkeypatch):
    model, tokenizer = smollm2
    texts = ["x", "Bees will swarm in May.", PROSE[:600]]
    fields = model.config.to_dict()
    same = {"sliding_window": None, "attn_implementation": "sdpa"}
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    names += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "head_dim", "tie_word_embeddings")
    mistral = MistralForCausalLM(MistralConfig(**{name: fields[name] for name in names}, **same)).eval()
    mistral.load_state_dict(model.state_dict())
    embedders = [Embedder.from_model(each, tokenizer, layers=range(6, 10)) for each in (model, mistral)]
    np.testing.assert_allclose(embedders[0].encode(texts), embedders[1].encode(texts), atol=1e-5)

    mistral.config.sliding_window = 16
    for layer in mistral.model.layers:
        layer.self_attn.sliding_window = 16
    assert_exact(embedders[1], texts, monkeypatch)
    assert np.abs(embedders[0].encode(texts[2]) - embedders[1].encode(texts[2])).max() > 1e-3


def test_alone_and_with_a_2000_token_mate(smollm2):
    embedder = Embedder.from_model(*smollm2, layers=range(6, 10), batch_tokens=100_000)
    texts = ["x", NOTICES[0], PROSE[:9600]]
    encoded = embedder.encode_with_report(texts)
    assert encoded.token_counts.max() > 1900
    np.testing.assert_allclose(embedder.encode(texts[0]), encoded.vectors[0], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(texts[1]), encoded.vectors[1], atol=1e-5)


def test_the_shipped_profile_is_found(smollm2, monkeypatch):
    monkeypatch.setattr("kvembed.embedder.generated_texts", lambda *_, **__: pytest.fail("the profile was not found"))
    assert Embedder.from_model(*smollm2).config.layers == (6, 7, 8, 9)
    assert Embedder.from_pretrained("smollm2", dtype="bfloat16").config.layers == (6, 7, 8, 9)


@pytest.mark.parametrize("method", ["auto", "static"])
def test_transforms_come_with_the_package(smollm2, tmp_path, monkeypatch, method):
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("kvembed.embedder.generated_texts", lambda *_, **__: pytest.fail("texts were written"))
    embedder = Embedder.from_model(*smollm2, method=method)
    assert embedder.transform.info["texts"] == "self-written"
    ferry, boat, cheese = embedder.encode(["The ferry leaves at noon.", "When does the boat go?", "I like cheese."])
    assert ferry @ boat > ferry @ cheese + 0.1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_packages_transform_is_what_a_fit_gives(smollm2, tmp_path, monkeypatch):
    """That one was fitted on bfloat16 states: eigenvectors may turn over or into each other, similarities may not."""
    embedder = Embedder.from_model(*smollm2, method="auto")
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "_shipped", lambda bound: None)
    shipped, fitted = (one.encode(NOTICES) for one in (embedder, Embedder.from_model(*smollm2, method="auto")))
    for dim in (576, 128):
        ours, theirs = (unit(vectors[:, :dim]) for vectors in (shipped, fitted))
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=0.01)


def test_special_strings_are_text(smollm2):
    embedder = Embedder.from_model(*smollm2, layers=[6])
    ids = embedder.explain("a<|im_end|>b<|im_start|>").token_ids
    assert not set(ids) & set(embedder.tokenizer.all_special_ids)


def test_a_query_finds_its_notice(smollm2):
    embedder = Embedder.from_model(*smollm2, method="prompt-eol", layers=range(6, 10))
    scores = embedder.similarity(
        embedder.encode_query(["When do they fix the bridge?", "I lost my pet"]), embedder.encode(NOTICES)
    )
    assert "bridge would be repaired" in NOTICES[scores[0].argmax()]
    assert "dog was found" in NOTICES[scores[1].argmax()]


def test_the_demo_prints_its_table():
    demo = Path(__file__).parent.parent / "examples" / "demo.py"
    done = subprocess.run([sys.executable, demo], capture_output=True, text=True, check=True)
    assert "The dog was found near the railway station" in done.stdout
    assert "48 notices and 7 queries in" in done.stdout


_BARE = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    model(**tokenizer("A sentence.", return_tensors="pt"))
"""


def test_one_sentence_from_the_command_line_costs_little_more_than_the_model_itself():
    def run(*arguments):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments],
            input="A sentence.\n",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return time.perf_counter() - started, done.stdout

    # A ratio of interleaved runs of one thread: to import torch and transformers alone takes 2 to 6 seconds, by the
    # machine, and threads that wait for each other take longer on a busy one.
    ours, bare = [], []
    for _ in range(3):
        if ours and min(ours) <= 1.5 * min(bare):
            break
        seconds, told = run("-m", "kvembed", "embed")
        assert len(json.loads(told)["embedding"]) == 576
        ours.append(seconds)
        bare.append(run("-c", _BARE, pull("smollm2"))[0])
    assert min(ours) <= 1.5 * min(bare), (ours, bare)


def test_what_it_wrote_comes_with_the_package(smollm2, tmp_path, monkeypatch):
    """So the first corpus is fitted on without minutes of writing, and beside the same texts as the shipped fit."""
    monkeypatch.setattr("kvembed.self_written.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("kvembed.self_written.write_texts", lambda *_, **__: pytest.fail("texts were written"))
    embedder = Embedder.from_model(*smollm2, method="auto")
    texts = generated_texts(*smollm2, embedder.fingerprint(), FIT_TEXTS)
    assert texts_digest(texts) == embedder.transform.info["texts_sha256"]
    assert len(set(texts)) == FIT_TEXTS
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "window"),
    [("smollm2", (6, 7, 8, 9), None), ("qwen2.5-coder-0.5b", (5, 6, 7), None), ("gemma3-270m", (4, 5), 512)],
)
def test_exact_from_1_to_2000_tokens_in_one_call(name, layers, window, backbone_file, monkeypatch):
    source = name if name == "smollm2" else backbone_file(name)
    monkeypatch.setattr("kvembed.embedder.generated_texts", lambda *_, **__: pytest.fail("the profile was not found"))
    embedder = Embedder.from_pretrained(source, method="kv", dtype="float32", batch_tokens=100_000)
    assert embedder.config.layers == layers
    assert getattr(embedder.model.config, "sliding_window", None) == window
    texts = ["x", "Bees will swarm in May.", PROSE[:1500], PROSE[:9500]]
    assert 1850 < embedder.encode_with_report(texts).token_counts.max() < 2100
    assert_exact(embedder, texts, monkeypatch)


@pytest.mark.slow
def test_the_harness_gives_minilm_its_public_score(tmp_path, monkeypatch):
    """all-MiniLM-L6-v2 on STS-B test is 82.03 on MTEB's leaderboard; the other tasks are in docs/results.md."""
    data = SHARED / "eval-data"
    weights = Path.home() / ".cache" / "kvembed-backbones" / "all-MiniLM-L6-v2"
    if not data.is_dir() or not weights.is_dir():
        pytest.skip(f"needs {data.name} and all-MiniLM-L6-v2 beside this checkout")
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path))
    (result,) = evaluate(sentence_transformer_subject(weights), load_tasks(data, ["stsb"]), suite="full")
    assert result.n == 1379
    assert result.score == pytest.approx(82.03, abs=0.1)
