"""Notices in a Chroma collection on disk. `python examples/with_chroma.py [MODEL]`; needs chromadb."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import chromadb
from chromadb.api import ClientAPI
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.config import Settings
from chromadb.utils.embedding_functions import register_embedding_function

from kvembed import Embedder

HERE = Path(__file__).parent


@functools.cache
def load(model: str) -> Embedder:
    """One copy of the model: Chroma makes a function anew whenever it looks at a collection's configuration."""
    return Embedder.from_pretrained(model, method="auto")


@register_embedding_function
class KvembedFunction(EmbeddingFunction[Documents]):
    """Chroma's interface. A collection keeps name and configuration, and makes the function of them when re-opened."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, input: Documents) -> Embeddings:
        """Documents, those of one `add` in one go."""
        return list(load(self.model).encode_document(input))

    def embed_query(self, input: Documents) -> Embeddings:
        """Queries, which without this method would be embedded as documents."""
        return list(load(self.model).encode_query(input))

    @staticmethod
    def name() -> str:
        """What a collection keeps."""
        return "kvembed"

    def get_config(self) -> dict[str, Any]:
        """What it keeps besides, as JSON: how to load the model, not the model."""
        return {"model": self.model}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> KvembedFunction:
        """The inverse of `get_config`."""
        return KvembedFunction(**config)

    def default_space(self) -> Space:
        """Vectors are of unit length."""
        return "cosine"


def connect(folder: str | Path) -> ClientAPI:
    """A client of collections in a folder, without telemetry."""
    return chromadb.PersistentClient(str(folder), Settings(anonymized_telemetry=False))


def store_notices(client: ClientAPI, model: str) -> None:
    """Embed the notices and write them."""
    notices = (HERE / "notices.txt").read_text().splitlines()
    function = KvembedFunction(model)
    collection = client.create_collection("notices", embedding_function=function)  # type: ignore[arg-type] # no images
    collection.add(ids=[str(number) for number in range(len(notices))], documents=notices)


def main(model: str = "smollm2") -> None:
    """Ask the first query, of a collection that is opened again by its name alone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store_notices(connect(folder), model)
        query = (HERE / "queries.txt").read_text().splitlines()[0]
        found = connect(folder).get_collection("notices").query(query_texts=[query], n_results=3)
    print(query)
    for notice, distance in zip((found["documents"] or [[]])[0], (found["distances"] or [[]])[0], strict=True):
        print(f"{1 - distance:.3f}  {notice}")


if __name__ == "__main__":
    main(*sys.argv[1:])
