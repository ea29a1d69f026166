"""Notices in a LlamaIndex index. `python examples/with_llamaindex.py [MODEL]`; needs llama-index-core."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from pydantic import PrivateAttr

from kvembed import Embedder

HERE = Path(__file__).parent


class KvembedEmbedding(BaseEmbedding):
    """LlamaIndex's interface. Texts come in batches of the largest size it allows, not of ten, its default."""

    _embedder: Embedder = PrivateAttr()

    def __init__(self, embedder: Embedder, name: str) -> None:
        super().__init__(model_name=name, embed_batch_size=2048)
        self._embedder = embedder

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._embedder.encode_query(query).tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._embedder.encode_document(texts).tolist()
        return vectors

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def index_notices(model: str) -> VectorStoreIndex:
    """Embed the notices, one node each. Metadata of a node would be embedded with it, unless it is excluded there."""
    nodes = [TextNode(text=notice) for notice in (HERE / "notices.txt").read_text().splitlines()]
    embedder = Embedder.from_pretrained(model, method="auto")
    return VectorStoreIndex(nodes, embed_model=KvembedEmbedding(embedder, model))


def main(model: str = "smollm2") -> None:
    """Ask the first query; no LLM is asked for an answer."""
    index = index_notices(model)
    query = (HERE / "queries.txt").read_text().splitlines()[0]
    print(query)
    for found in index.as_retriever(similarity_top_k=3).retrieve(query):
        print(f"{found.score:.3f}  {found.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
