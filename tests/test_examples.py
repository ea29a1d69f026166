"""Every example, run as one would, with the real package: its vectors, its results, and no network."""

from __future__ import annotations

import asyncio
import importlib
import json
import runpy
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NOTICES

from kvembed import Embedder, device

EXAMPLES = Path(__file__).parent.parent / "examples"
QUERY = (EXAMPLES / "queries.txt").read_text().splitlines()[0]
FRAMEWORKS = ["langchain", "llamaindex", "haystack", "chroma", "lancedb"]


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, method="kv", layers=[1, 2])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 on every machine: vectors are compared, and bfloat16 rounds a text's by the batch that it is in."""
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda device: False)


@pytest.fixture
def expected(folder):
    """What the examples load."""
    return Embedder.from_pretrained(folder, method="auto")


@pytest.fixture
def documents(expected):
    return expected.encode_document(NOTICES)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """All that Python itself would connect to; telemetry swallows the error, so the attempt is kept."""
    attempts = []

    def connect(self, address):
        attempts.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: attempts.append(address) or [])
    yield
    assert not attempts


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: importlib.import_module(f"with_{name}")


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5, rtol=0)


def check_query(found, expected, text=QUERY):
    same(found, expected.encode_query(text))
    assert np.abs(np.asarray(found) - expected.encode_document(text)).max() > 1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_run_as_a_program(framework, folder, expected, documents, monkeypatch, capsys):
    """The three nearest notices, as a plain product of vectors finds them."""
    monkeypatch.setattr(sys, "argv", ["", str(folder)])
    runpy.run_path(str(EXAMPLES / f"with_{framework}.py"), run_name="__main__")
    cosines = documents @ expected.encode_query(QUERY)
    nearest = [f"{cosines[index]:.3f}  {NOTICES[index]}" for index in (-cosines).argsort()[:3]]
    assert capsys.readouterr().out.splitlines() == [QUERY, *nearest]


def test_langchain(example, folder, expected, documents):
    store = example("langchain").store_notices(str(folder))
    rows = {row["text"]: row["vector"] for row in store.store.values()}
    same([rows[notice] for notice in NOTICES], documents)
    adapter = store.embeddings
    check_query(adapter.embed_query(QUERY), expected)
    check_query(adapter.embed_query("two\nlines"), expected, "two\nlines")
    check_query(asyncio.run(adapter.aembed_query(QUERY)), expected)


def test_llamaindex(example, folder, expected, documents):
    index = example("llamaindex").index_notices(str(folder))
    nodes = index.docstore.docs
    rows = {nodes[name].text: vector for name, vector in index.vector_store.data.embedding_dict.items()}
    same([rows[notice] for notice in NOTICES], documents)
    adapter = index._embed_model
    check_query(adapter.get_query_embedding(QUERY), expected)
    check_query(asyncio.run(adapter.aget_query_embedding("two\nlines")), expected, "two\nlines")
    same(asyncio.run(adapter.aget_text_embedding_batch(NOTICES)), documents)
    same(adapter.get_text_embedding(NOTICES[0]), expected.encode_document(NOTICES[0]))


def test_haystack(example, folder, expected, documents):
    module = example("haystack")
    store = module.store_notices(str(folder))
    rows = {document.content: document.embedding for document in store.filter_documents()}
    same([rows[notice] for notice in NOTICES], documents)
    check_query(module.KvembedTextEmbedder(str(folder)).run(text=QUERY)["embedding"], expected)
    written = module.search_pipeline(str(folder), store).dumps()
    again = module.Pipeline.loads(written, allowed_modules=["with_haystack"])
    assert again.get_component("embedder").model == str(folder)


def test_chroma(example, folder, expected, documents, tmp_path):
    module = example("chroma")
    module.store_notices(module.connect(tmp_path), str(folder))
    again = module.connect(tmp_path).get_collection("notices")
    kept = again.get(include=["embeddings", "documents"])
    assert kept["documents"] == NOTICES
    same(kept["embeddings"], documents)
    function = again.configuration["embedding_function"]
    assert json.loads(json.dumps(function.get_config())) == {"model": str(folder)}
    check_query(function.embed_query([QUERY])[0], expected)
    by_words = again.query(query_texts=[QUERY], n_results=5)
    by_vector = again.query(query_embeddings=[expected.encode_query(QUERY)], n_results=5)
    assert by_words["ids"] == by_vector["ids"]


def test_lancedb(example, folder, expected, documents, tmp_path):
    table = example("lancedb").store_notices(tmp_path, expected).to_arrow()
    assert table["text"].to_pylist() == NOTICES
    same(table["vector"].to_pylist(), documents)
    assert table.schema.field("vector").type.list_size == expected.dim


def test_auto_in_german(folder, tmp_path, monkeypatch):
    """What it saves asks in German, and is fitted for that."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{notice} {number}\n" for number in range(5) for notice in NOTICES))
    monkeypatch.setattr(sys, "argv", ["", str(folder), str(tmp_path / "german"), str(texts)])
    runpy.run_path(str(EXAMPLES / "auto_in_german.py"), run_name="__main__")
    saved = Embedder.from_pretrained(tmp_path / "german")
    (document,), (query,) = saved.config.templates("document"), saved.config.templates("query")
    assert document.startswith(
        "Kontext: Ein Jockey reitet ein Pferd.\nFasse den Kontext in einem Wort zusammen: Reitsport\n\n"
    )
    assert query.endswith("Impfung\n\nAnfrage: {text}\nFasse die Anfrage in einem Wort zusammen:")
    assert saved.transform.info["texts"] == "given"
    assert saved.encode(NOTICES).shape == (len(NOTICES), saved.dim)


@pytest.mark.real
def test_the_default_model_finds_the_bicycle(example, capsys):
    example("lancedb").main()
    assert "A bicycle travels on the ferry" in capsys.readouterr().out
