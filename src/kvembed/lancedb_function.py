"""An Embedder as LanceDB's embedding function `kvembed`: tables that embed what is added to them, and what is asked.

    import kvembed.lancedb_function                      # registers it, in every program that opens such a table
    from lancedb.embeddings import get_registry

    kvembed = get_registry().get("kvembed").create(name="smollm2", method="kv")

    class Note(LanceModel):
        text: str = kvembed.SourceField()
        vector: Vector(kvembed.ndims()) = kvembed.VectorField()

LanceDB stores the arguments of `create` with the table, and with them what the vectors depend on besides: the same name
with another model, another config or another transform is refused when the table is used again.
"""

from __future__ import annotations

import functools
from typing import Any

from .embedder import Embedder
from .errors import InputError
from .extras import import_extra
from .files import json_hash
from .identity import identity

import_extra("lancedb", "search")

from lancedb.embeddings import TextEmbeddingFunction, register  # noqa: E402 (without it, the line above says how)

__all__ = ["KvembedFunction"]


@register("kvembed")  # type: ignore[no-untyped-call]
class KvembedFunction(TextEmbeddingFunction):
    """Queries get the query template, sources the document template.

    Attributes:
        name: of the model, as in `Embedder.from_pretrained`.
        method: a preset. Default: the folder's own, or kv.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        fitted: a file with a transform.
        options: fields of `EmbedConfig` to change.
        made_with: hash of all that decides the vectors; set when a table is made.
    """

    name: str = "smollm2"
    method: str | None = None
    dtype: str = "auto"
    fitted: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    made_with: str | None = None

    @functools.cached_property
    def embedder(self) -> Embedder:
        """Loaded when first needed. Raises `InputError` if a table was made with another."""
        embedder = Embedder.from_pretrained(
            self.name, method=self.method, dtype=self.dtype, fitted=self.fitted, **self.options
        )
        if self.made_with not in (None, json_hash(identity(embedder))):
            raise InputError(f"the table was made with another model, or another config, than {self.name} has now")
        return embedder

    def ndims(self) -> int:
        """Length of a vector."""
        return self.embedder.dim

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Vectors of documents."""
        return list(self.embedder.encode_document(list(texts)))

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The vector of a query."""
        return list(self.embedder.encode_query(self.sanitize_input(query)))

    def compute_query_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Without another try: what fails here fails again."""
        return self.compute_query_embeddings(*args, **kwargs)

    def compute_source_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Likewise."""
        return list(self.compute_source_embeddings(*args, **kwargs))

    def safe_model_dump(self) -> dict[str, Any]:
        """What LanceDB stores with a table."""
        given: dict[str, Any] = super().safe_model_dump()  # type: ignore[no-untyped-call]
        return given | {"dtype": self.embedder.dtype, "made_with": json_hash(identity(self.embedder))}
