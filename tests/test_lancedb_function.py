"""LanceDB's own tables, embedded by kvembed: documents by one template, questions by the other."""

from __future__ import annotations

import lancedb
import numpy as np
import pytest
from conftest import NOTICES, tiny
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

import kvembed.lancedb_function
from kvembed import Embedder, InputError


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


def test_a_table_embeds_what_is_added_and_asked(embedder, folder, tokenizer, tmp_path):
    function = get_registry().get("kvembed").create(name=str(folder), dtype="float32")
    assert isinstance(function, kvembed.lancedb_function.KvembedFunction)

    class Note(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    table = lancedb.connect(tmp_path / "db").create_table("notes", schema=Note)
    table.add([{"text": text} for text in NOTICES[:9]])
    stored = np.array(table.to_arrow()["vector"].to_pylist())
    np.testing.assert_allclose(stored, embedder.encode_document(NOTICES[:9]), atol=1e-5)
    again = lancedb.connect(tmp_path / "db").open_table("notes")
    best = np.argsort(-(embedder.encode_query(["the ferry"]) @ stored.T)[0])
    found = again.search("the ferry").distance_type("dot").limit(3).to_list()
    assert [row["text"] for row in found] == [NOTICES[i] for i in best[:3]]
    model = tiny(seed=3)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="the table was made with another model, or another config"):
        lancedb.connect(tmp_path / "db").open_table("notes").search("the ferry").to_list()
