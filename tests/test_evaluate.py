"""A run that can be stopped, a ledger that repeats nothing, vectors that score the same elsewhere; references."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import NOTICES
from scipy.stats import spearmanr

from kvembed import Embedder, InputError, ModelNotFound
from kvembed import evaluate as module
from kvembed.evaluate import evaluate
from kvembed.results import Result, read_results
from kvembed.subjects import embedder_subject, sentence_transformer_subject, tfidf_subject
from kvembed.tasks import Task

STS = Task("sts", "sts", tuple(NOTICES[:20]), gold=tuple(float(i * 7 % 10) for i in range(10)))
RETRIEVAL = Task(
    "ret", "retrieval", tuple(NOTICES[10:30]), tuple(NOTICES[:4]), relevant=tuple({i: 1, i + 5: 2} for i in range(4))
)


@pytest.fixture
def subject(llama, tokenizer):
    return embedder_subject(Embedder.from_model(llama, tokenizer, method="mean", max_tokens=12), "tiny")


def recording(subject, calls):
    def encode(texts, role):
        calls.extend((role, text) for text in texts)
        return subject.encode(texts, role)

    return dataclasses.replace(subject, encode=encode)


def run(subject, *tasks, **options):
    return list(evaluate(subject, tasks, suite="full", **options))


def test_a_result_tells_all(subject, tmp_path):
    (result,) = run(subject, RETRIEVAL, results=tmp_path)
    encoded = [subject.encode(RETRIEVAL.documents, "document"), subject.encode(RETRIEVAL.queries, "query")]
    assert (result.model, result.method, result.task, result.suite) == ("tiny", "mean", "ret", "full")
    assert (result.metric, result.kind, result.n, result.texts) == ("ndcg_at_10", "retrieval", 4, 24)
    assert result.tokens == sum(part.token_counts.sum() for part in encoded)
    assert result.truncated == sum(part.truncated for part in encoded) > 0
    assert result.low <= result.score <= result.high
    assert result.passes == 1
    assert result.device.startswith("cpu, ")
    assert result.device.endswith(" threads, float32")
    assert result.config["max_tokens"] == 12
    assert read_results(tmp_path) == [result]
    assert result.seconds > 0


def test_nothing_is_done_twice(subject, tmp_path, monkeypatch):
    calls = []
    counted = recording(subject, calls)
    first = run(counted, STS, RETRIEVAL, results=tmp_path)
    assert len(calls) == len({*calls}) == len(first) * 0 + 20 + 20 + 4 - 10  # ten notices are in both tasks
    monkeypatch.setattr(module, "score", lambda *_: pytest.fail("scored again"))
    assert run(counted, STS, RETRIEVAL, results=tmp_path) == first
    assert len(calls) == 34


def test_other_data_or_another_config_is_another_result(subject, llama, tokenizer, tmp_path):
    (first,) = run(subject, STS, results=tmp_path)
    (second,) = run(subject, dataclasses.replace(STS, gold=STS.gold[::-1]), results=tmp_path)
    assert first.data != second.data
    assert read_results(tmp_path) == [second]
    other = embedder_subject(Embedder.from_model(llama, tokenizer, method="mean", max_tokens=13), "tiny")
    run(other, STS, results=tmp_path)
    assert len(read_results(tmp_path)) == 2


def test_a_stopped_run_goes_on_where_it_was(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 300)
    whole = run(subject, STS, vectors=tmp_path / "whole")
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "other"))
    calls = []

    def stop_at(limit):
        def encode(texts, role):
            if len(calls) >= limit:
                raise KeyboardInterrupt
            calls.extend(texts)
            return subject.encode(texts, role)

        return dataclasses.replace(subject, encode=encode)

    with pytest.raises(KeyboardInterrupt):
        run(stop_at(8), STS)
    assert 8 <= len(calls) < 20
    again = run(stop_at(1000), STS, vectors=tmp_path / "again")
    assert sorted(calls) == sorted(STS.documents)
    assert again[0].score == whole[0].score
    vectors = [np.load(tmp_path / name / "sts" / "document.npy") for name in ("whole", "again")]
    np.testing.assert_allclose(*vectors, atol=1e-6)


def test_exported_vectors_score_the_same(subject, tmp_path):
    (result,) = run(subject, STS, vectors=tmp_path)
    vectors = np.load(tmp_path / "sts" / "document.npy")
    texts = [json.loads(line)["text"] for line in (tmp_path / "sts" / "document.jsonl").read_text().splitlines()]
    assert tuple(texts) == STS.documents
    cosine = (vectors[:10] * vectors[10:]).sum(1)
    assert result.score == pytest.approx(100 * spearmanr(cosine, STS.gold).statistic, abs=1e-4)
    run(subject, RETRIEVAL, vectors=tmp_path)
    assert np.load(tmp_path / "ret" / "query.npy").shape == (4, 48)


def test_a_broken_ledger_file(subject, tmp_path):
    run(subject, STS, results=tmp_path)
    (path,) = tmp_path.glob("*/*/*/*.json")
    path.write_text("{}")
    with pytest.raises(InputError, match=r"sts\.json is not a result"):
        read_results(tmp_path)


def test_a_result_survives_json(subject, tmp_path):
    (result,) = run(subject, STS)
    (tmp_path / "x").write_text(result.to_json())
    assert Result.from_json(tmp_path / "x") == result


def test_tfidf_is_fitted_on_each_task(tmp_path):
    other = dataclasses.replace(STS, name="other", documents=tuple(text.upper()[::-1] for text in STS.documents))
    alone = run(tfidf_subject(), other)
    both = run(tfidf_subject(), STS, other, results=tmp_path)
    assert both[1].score == alone[0].score
    assert both[0].model == "tf-idf"


@pytest.mark.filterwarnings("ignore:The .* method is deprecated")
def test_a_chat_template_does_not_reach_a_baseline(llama, tokenizer, tmp_path):
    """The trap: sentence-transformers sends plain text through the chat template of any tokenizer that has one."""
    from sentence_transformers import SentenceTransformer

    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = "{% for m in messages %}<|im_end|>system: {{ m['content'] }}{% endfor %}"
    try:
        llama.model.save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
    finally:
        tokenizer.chat_template = tokenizer.pad_token = None
    trapped = SentenceTransformer(str(tmp_path / "m"), device="cpu").encode(NOTICES[:6], normalize_embeddings=True)
    clean = Embedder.from_model(llama, tokenizer, method="mean").encode(NOTICES[:6])
    assert np.abs(trapped - clean).max() > 1e-2  # else this test would prove nothing
    subject = sentence_transformer_subject(tmp_path / "m")
    encoded = subject.encode(NOTICES[:6], "document")
    np.testing.assert_allclose(encoded.vectors, clean, atol=1e-5)
    expected = [len(ids) for ids in tokenizer(NOTICES[:6])["input_ids"]]
    assert encoded.token_counts.tolist() == expected
    assert (subject.model, subject.method) == ("m", "sentence-transformer")


def test_no_such_reference(tmp_path):
    with pytest.raises(ModelNotFound, match="can't be opened with sentence-transformers"):
        sentence_transformer_subject(tmp_path / "nowhere")
