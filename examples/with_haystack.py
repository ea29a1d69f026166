"""Notices in a Haystack document store. `python examples/with_haystack.py [MODEL]`; needs haystack-ai."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # is read when haystack is imported

from haystack import Document, Pipeline, component
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from kvembed import Embedder

HERE = Path(__file__).parent


@functools.cache
def load(model: str) -> Embedder:
    """One copy of the model for both components, which hold its name only and so can be written to YAML."""
    return Embedder.from_pretrained(model, method="auto")


@component
class KvembedDocumentEmbedder:
    """Haystack's interface for documents."""

    def __init__(self, model: str) -> None:
        self.model = model

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """The documents, with their vectors."""
        vectors = load(self.model).encode_document([document.content or "" for document in documents])
        pairs = zip(documents, vectors, strict=True)
        return {"documents": [dataclasses.replace(document, embedding=vector.tolist()) for document, vector in pairs]}


@component
class KvembedTextEmbedder:
    """Haystack's interface for queries."""

    def __init__(self, model: str) -> None:
        self.model = model

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """The query's vector."""
        return {"embedding": load(self.model).encode_query(text).tolist()}


def store_notices(model: str) -> InMemoryDocumentStore:
    """Embed the notices and keep them in memory."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    notices = [Document(content=notice) for notice in (HERE / "notices.txt").read_text().splitlines()]
    store.write_documents(KvembedDocumentEmbedder(model).run(documents=notices)["documents"])
    return store


def search_pipeline(model: str, store: InMemoryDocumentStore) -> Pipeline:
    """Query -> vector -> the nearest documents."""
    pipeline = Pipeline()
    pipeline.add_component("embedder", KvembedTextEmbedder(model))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=3))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return pipeline


def main(model: str = "smollm2") -> None:
    """Ask the first query."""
    pipeline = search_pipeline(model, store_notices(model))
    query = (HERE / "queries.txt").read_text().splitlines()[0]
    print(query)
    for document in pipeline.run({"embedder": {"text": query}})["retriever"]["documents"]:
        print(f"{document.score:.3f}  {document.content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
