"""Static vectors against a loop over tokens in float64, and what follows from their being a bag of tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from hypothesis import given
from hypothesis import strategies as st

from kvembed import EmbedConfig, Embedder, InputError, UnsupportedModel
from kvembed.config import Readout
from kvembed.static import RANKS, StaticVectors

TEXTS = st.lists(st.lists(st.integers(0, 399), max_size=30), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def table():
    """(V,D), unlike in scale and all off centre, as real embeddings are"""
    torch.manual_seed(0)
    return torch.nn.Embedding.from_pretrained(torch.randn(400, 24) * torch.logspace(0, 2, 24) + 5)


@pytest.fixture(scope="module")
def static(table):
    return StaticVectors(table, 400, torch.device("cpu"))


def whitened(table):
    """Its rows by the definition, with the inverse root of the covariance for W: cosines are the same."""
    rows = table.weight.numpy().astype(np.float64)
    share = 1 / (np.arange(len(rows)) + 1000)
    share /= share.sum()
    mean = share @ rows
    covariance = np.einsum("t,td,te->de", share, rows - mean, rows - mean)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    made = (rows - mean) @ (vectors / np.sqrt(values)) @ vectors.T
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def defined(rows, text):
    vector = np.zeros(rows.shape[1])
    for token, count in Counter(text).items():
        vector += (1 + np.log(count)) * (1 + np.log(1 + token / 1000)) * rows[token]
    return vector


@given(texts=TEXTS)
def test_the_definition(static, table, texts):
    rows = whitened(table)
    made = static(texts).double().numpy()
    expected = np.array([defined(rows, text) for text in texts])
    np.testing.assert_allclose(made @ made.T, expected @ expected.T, atol=1e-3)


@given(texts=TEXTS, seed=st.integers(0, 9))
def test_neither_order_nor_neighbours_matter(static, texts, seed):
    together = static(texts)
    for text, vector in zip(texts, together, strict=True):
        shuffled = np.random.default_rng(seed).permutation(text).astype(int).tolist()
        torch.testing.assert_close(static([shuffled])[0], vector, atol=1e-4, rtol=0)


def test_a_large_vocabularys_tail_does_not_bear_on_the_rest():
    torch.manual_seed(1)
    some = torch.randn(RANKS, 8)
    one, other = (
        StaticVectors(torch.nn.Embedding.from_pretrained(torch.cat([some, tail])), RANKS + 5, torch.device("cpu"))
        for tail in (torch.zeros(5, 8), torch.full((5, 8), 1e6))
    )
    assert torch.equal(one([[1, 2, 3]]), other([[1, 2, 3]]))


def test_embeddings_that_are_all_the_same_give_no_nan():
    same = torch.nn.Embedding.from_pretrained(torch.ones(50, 8))
    made = StaticVectors(same, 50, torch.device("cpu"))([[1, 2], []])
    assert made.isfinite().all()
    assert not made[1].any()


def test_no_layer_is_run(tokenizer):
    model = tiny(seed=3)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: pytest.fail("a layer was run"))
    with pytest.raises(pytest.fail.Exception):
        Embedder.from_model(model, tokenizer, method="mean")  # its probe is a forward
    model = tiny(seed=3)
    embedder = Embedder.from_model(model, tokenizer, pooling="static", method="mean")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: pytest.fail("a layer was run"))
    vectors = embedder.encode(["", "a", *NOTICES])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert embedder.config.forward_passes == 0


def test_the_template_is_not_the_texts(llama, tokenizer):
    static = Embedder.from_model(llama, tokenizer, method="mean", pooling="static")
    quoted = static.replace(document='Once more: "{text}" (so it said)')
    np.testing.assert_allclose(static.encode(NOTICES), quoted.encode(NOTICES), atol=1e-5)


def test_half_precision_gives_nearly_the_same(tokenizer):
    one, other = (
        Embedder.from_model(tiny().to(t), tokenizer, method="mean", pooling="static") for t in (None, torch.half)
    )
    assert (one.encode(NOTICES) * other.encode(NOTICES)).sum(1).min() > 0.999


def test_as_a_view_beside_others(llama, tokenizer):
    config = EmbedConfig(pooling="last", more_readouts=[Readout(pooling="static")], transform="whiten")
    embedder = Embedder(llama, tokenizer, config, texts=MANY)
    views = embedder.encode_views(NOTICES).vectors
    alone = [Embedder.from_model(llama, tokenizer, method="mean", pooling=kind) for kind in ("last", "static")]
    for index, one in enumerate(alone):
        np.testing.assert_allclose(views[:, index], one.encode_views(NOTICES).vectors[:, 0], atol=1e-3)


@pytest.mark.parametrize(
    "embeddings",
    [torch.nn.ModuleList([torch.nn.Embedding(400, 48)]), torch.nn.Embedding(400, 24)],
    ids=["several, as in musicgen", "narrower than a state"],
)
def test_what_is_no_table_of_embeddings_is_refused(tokenizer, embeddings, monkeypatch):
    model = tiny()
    embedder = Embedder.from_model(model, tokenizer, method="mean", pooling="static")
    monkeypatch.setattr(model.model, "get_input_embeddings", lambda: embeddings)
    with pytest.raises(UnsupportedModel, match="llama can't give static vectors"):
        embedder.encode("one")
    with pytest.raises(UnsupportedModel, match="llama can't give static vectors"):  # before it writes any text
        Embedder.from_model(model, tokenizer, method="auto")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "static", "output_layer": 2}, "has no output_layer"),
        ({"more_readouts": [{"pooling": "static", "output_layer": 2}], "transform": "whiten"}, "has no output_layer"),
        ({"pooling": "static", "more_readouts": [{"pooling": "last"}], "transform": "whiten"}, "comes last"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        EmbedConfig(**fields)
