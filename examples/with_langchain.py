"""Notices in a LangChain vector store. `python examples/with_langchain.py [MODEL]`; needs langchain-core."""

from __future__ import annotations

import sys
from pathlib import Path

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from kvembed import Embedder

HERE = Path(__file__).parent


class KvembedEmbeddings(Embeddings):
    """LangChain's interface. Its asynchronous methods call these in threads, which an `Embedder` allows."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """All texts at once: they are batched by tokens, so there is nothing to gain by splitting them up before."""
        vectors: list[list[float]] = self.embedder.encode_document(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """A query has a template of its own."""
        vector: list[float] = self.embedder.encode_query(text).tolist()
        return vector


def store_notices(model: str) -> InMemoryVectorStore:
    """Embed the notices and keep them in memory; every store of LangChain takes the same `Embeddings`."""
    store = InMemoryVectorStore(KvembedEmbeddings(Embedder.from_pretrained(model, method="auto")))
    store.add_texts((HERE / "notices.txt").read_text().splitlines())
    return store


def main(model: str = "smollm2") -> None:
    """Ask the first query."""
    store = store_notices(model)
    query = (HERE / "queries.txt").read_text().splitlines()[0]
    print(query)
    for document, cosine in store.similarity_search_with_score(query, k=3):
        print(f"{cosine:.3f}  {document.page_content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
