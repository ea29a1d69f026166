"""A run that can be stopped, a ledger that repeats nothing, vectors that score the same elsewhere; references."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from scipy.stats import spearmanr

from kvembed import Embedder, InputError, ModelNotFound
from kvembed import evaluate as module
from kvembed.evaluate import evaluate
from kvembed.mteb_encoder import MtebEncoder
from kvembed.results import Result, read_results
from kvembed.subjects import at_limits, embedder_subject, sentence_transformer_subject, tfidf_subject
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


def test_a_result_tells_all(subject, tmp_path, caplog):
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
    assert caplog.text == ""  # that texts were cut is told once, in the result


def test_nothing_is_done_twice(subject, tmp_path, monkeypatch):
    calls = []
    counted = recording(subject, calls)
    first = run(counted, STS, results=tmp_path)
    assert sorted(calls) == sorted(("document", text) for text in STS.documents)
    run(counted, STS)  # no ledger, but the vectors are there
    assert len(calls) == 20
    monkeypatch.setattr(module, "score", lambda *_: pytest.fail("scored again"))
    assert run(counted, STS, results=tmp_path) == first


def test_other_chunks_are_read_anew(llama, tokenizer):
    auto = Embedder.from_model(llama, tokenizer, method="auto", texts=MANY)
    kept = {embedder_subject(auto.replace(chunk_tokens=size), "tiny").cached_as for size in (8, 16, None)}
    assert len(kept) == 3


def test_views_are_read_once_for_every_transform_and_number_of_dimensions(llama, tokenizer, tmp_path):
    auto = Embedder.from_model(llama, tokenizer, method="auto", texts=MANY)
    few = auto.replace(dim=5)
    calls = []
    run(recording(embedder_subject(auto, "tiny"), calls), RETRIEVAL, results=tmp_path)
    assert len(calls) == 24
    run(recording(embedder_subject(few, "tiny"), calls), RETRIEVAL, results=tmp_path, vectors=tmp_path / "vectors")
    assert len(calls) == 24
    assert len(read_results(tmp_path)) == 2
    exported = np.load(tmp_path / "vectors" / "ret" / "document.npy")
    np.testing.assert_allclose(exported, few.encode(RETRIEVAL.documents), atol=1e-5)
    exported = np.load(tmp_path / "vectors" / "ret" / "query.npy")
    np.testing.assert_allclose(exported, few.encode_query(RETRIEVAL.queries), atol=1e-5)


def test_batch_mates_do_not_depend_on_what_is_stored(subject, tmp_path, monkeypatch):
    """In bfloat16 they matter a little, so a task's chunks are the same whether some of its texts are known or not."""
    calls = []
    run(subject, STS)
    run(recording(subject, calls), RETRIEVAL)
    assert [text for role, text in calls if role == "document"] == sorted(RETRIEVAL.documents, key=len, reverse=True)


def test_another_model_under_the_same_name_is_another_result(subject, tokenizer, tmp_path):
    other = embedder_subject(Embedder.from_model(tiny(seed=1), tokenizer, method="mean", max_tokens=12), "tiny")
    (first,), (second,) = run(subject, STS, results=tmp_path), run(other, STS, results=tmp_path)
    assert first.score != second.score
    assert len(read_results(tmp_path)) == 2


def test_a_model_that_changed_is_another(tokenizer, tmp_path):
    """Its weights are its owner's: nothing is scored, or kept, as what they were before."""
    model = tiny()
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    asked_before = embedder.fingerprint()
    (before,) = run(embedder_subject(embedder, "m"), STS, results=tmp_path)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    (after,) = run(embedder_subject(embedder, "m"), STS, results=tmp_path)
    (fresh,) = run(embedder_subject(Embedder.from_model(model, tokenizer, method="mean"), "m"), STS)
    assert after.identity == fresh.identity != before.identity
    assert after.score == fresh.score != before.score
    assert MtebEncoder(embedder).mteb_model_meta.revision == embedder.fingerprint(anew=True) != asked_before


@pytest.mark.parametrize("name", ["..", ".", "", "x" * 300])
def test_a_name_that_can_be_no_folder(subject, tmp_path, name):
    with pytest.raises(InputError, match="can't be the name of a folder in the ledger"):
        run(dataclasses.replace(subject, model=name), STS, results=tmp_path)
    run(dataclasses.replace(subject, model="../../org/name"), STS, results=tmp_path / "inside")
    assert not list(tmp_path.glob("*.json"))
    assert len(read_results(tmp_path / "inside")) == 1


def test_places_that_can_not_be_written_to(subject, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: file exists"):
        run(subject, STS, results=tmp_path / "file")
    with pytest.raises(InputError, match="not a directory"):
        run(subject, STS, vectors=tmp_path / "file" / "x")
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "file"))
    assert len(run(subject, STS)) == 1
    assert "a stopped run will start afresh" in caplog.text
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path))
    (tmp_path / "embeddings").mkdir()
    stored = tmp_path / "embeddings" / f"{subject.identity}.sqlite"
    run(subject, STS)
    caplog.clear()
    opened = module.sqlite3.connect
    with monkeypatch.context() as patch:
        read_only = {str(stored): f"file:{stored}?mode=ro"}
        patch.setattr(module.sqlite3, "connect", lambda path, **_: opened(read_only.get(path, path), uri=True))
        assert len(run(subject, STS)) == 1
    assert "readonly database): a stopped run will start afresh" in caplog.text
    stored.write_text("garbage " * 100)
    with pytest.raises(InputError, match="file is not a database; delete it"):
        run(subject, STS)


def test_another_config_is_another_result_and_other_data_is_refused(subject, llama, tokenizer, tmp_path):
    (first,) = run(subject, STS, results=tmp_path)
    turned, calls = dataclasses.replace(STS, gold=STS.gold[::-1]), []
    with pytest.raises(InputError, match=r"sts.json is of another task of this name, with other texts or gold: move"):
        run(recording(subject, calls), RETRIEVAL, turned, results=tmp_path)
    assert calls == []
    assert read_results(tmp_path) == [first]
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
    assert json.loads((tmp_path / "sts" / "gold.json").read_text())["gold"] == list(STS.gold)
    run(subject, RETRIEVAL, vectors=tmp_path)
    assert np.load(tmp_path / "ret" / "query.npy").shape == (4, 48)


def test_a_broken_ledger_file(subject, tmp_path):
    run(subject, STS, results=tmp_path)
    (path,) = tmp_path.glob("*/*/*/*.json")
    good = json.loads(path.read_text())
    for bad in ({}, [], 3, good | {"score": "x"}, good | {"replicates": []}, good | {"low": float("nan")}):
        path.write_text(json.dumps(bad))
        with pytest.raises(InputError, match=r"sts\.json is not a result: \w+ is missing or not what it should be"):
            read_results(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"sts\.json is not a result: "):
        read_results(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_results(tmp_path / "nowhere")


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


def test_tfidf_that_does_not_fit_in_memory_says_so(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 10}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    with pytest.raises(InputError, match=r"TF-IDF of 20 texts with .* would take 0 GiB of memory; --suite mini"):
        run(tfidf_subject(), STS)


def test_tfidf_has_scikit_learns_words_and_pairs_where_there_are_no_spaces():
    from sklearn.feature_extraction.text import TfidfVectorizer

    def vectors(*texts: str) -> np.ndarray:
        subject = tfidf_subject()
        subject.fit(texts)
        return subject.encode(texts, "document").vectors

    spaced = [*NOTICES, "Ein Café für 3 €, x_1, und Москва, 한국어 글"]
    plain = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    assert np.array_equal(vectors(*spaced), plain.fit_transform(spaced).toarray())
    pairs = vectors("日本語", "日本 and 本語", "語本日")  # its pairs apart; turned round
    assert pairs.shape[1] == 2 + 1 + 2
    assert pairs[0] @ pairs[1] > 0.5
    assert pairs[0] @ pairs[2] == 0


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


@pytest.mark.filterwarnings("ignore:The .* method is deprecated")
def test_a_reference_is_known_by_all_that_decides_its_vectors(llama, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer.pad_token = "</s>"
    try:
        llama.model.save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
    finally:
        tokenizer.pad_token = None

    def identity(change=lambda model: None, pooling="mean"):
        model = SentenceTransformer(modules=[Transformer(str(tmp_path / "m")), Pooling(48, pooling)], device="cpu")
        change(model)
        model.save(str(tmp_path / "saved"))
        return sentence_transformer_subject(tmp_path / "saved").identity

    def last_weight(model):
        with torch.no_grad():
            next(iter(model.parameters()))[-1, -1] += 1

    changes = [{}, {"pooling": "cls"}, {"change": last_weight}]
    changes.append({"change": lambda model: model.prompts.update(query="query: ")})
    assert len({identity(**change) for change in changes}) == len(changes)
    assert identity() == identity()


def test_no_such_reference(tmp_path):
    with pytest.raises(ModelNotFound, match="can't be opened with sentence-transformers"):
        sentence_transformer_subject(tmp_path / "nowhere")


def test_long_texts_are_read_at_every_limit_that_an_embedder_can_take(tokenizer):
    """In chunks, more than its model takes at once, but never more than it was told."""
    whole = Embedder.from_model(tiny(max_position_embeddings=2000), tokenizer, method="mean")
    in_chunks = whole.replace(chunk_tokens=256)
    assert [one.max_tokens for one in at_limits(whole, "long")] == [512, 1024]
    assert [one.max_tokens for one in at_limits(in_chunks, "long")] == [512, 1024, 2048, 4096, 16_384]
    assert [one.max_tokens for one in at_limits(in_chunks.replace(max_tokens=600), "long")] == [512]
    assert [one.max_tokens for one in at_limits(whole, "full")] == [2000]
    exact = Embedder.from_model(tiny(max_position_embeddings=1024), tokenizer, method="mean")
    assert [one.max_tokens for one in at_limits(exact, "long")] == [512, 1024]
