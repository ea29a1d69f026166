"""Fewer bits: what they cost, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvembed import Embedder, InputError
from kvembed.quantize import dequantize, quantize
from kvembed.subjects import embedder_subject, quantized_subject


def unit(count, dim, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@given(count=st.integers(0, 5), dim=st.integers(1, 40), seed=st.integers(0, 99))
def test_int8_keeps_the_cosine(count, dim, seed):
    x = unit(count, dim, seed)
    codes = quantize(x, "int8")
    assert codes.dtype == np.int8
    assert codes.shape == x.shape
    back = dequantize(codes, "int8", dim)
    np.testing.assert_allclose((back * x).sum(1), 1, atol=1e-3)
    assert np.abs(codes).max(initial=0) <= 127


@given(count=st.integers(0, 5), dim=st.integers(1, 40), seed=st.integers(0, 99))
def test_binary_is_the_signs_and_cosine_is_hamming(count, dim, seed):
    x = unit(count, dim, seed)
    codes = quantize(x, "binary")
    assert codes.dtype == np.uint8
    assert codes.shape == (count, -(-dim // 8))
    back = dequantize(codes, "binary", dim)
    assert np.array_equal(back > 0, x > 0)
    hamming = np.unpackbits(codes[:, None] ^ codes[None], axis=2).sum(2)
    np.testing.assert_allclose(back @ back.T, 1 - 2 * hamming / dim, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_one_vector_is_as_a_row_of_many(precision):
    rows = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    codes = quantize(rows, precision)
    assert np.array_equal(quantize(rows[1], precision), codes[1])
    assert np.array_equal(dequantize(codes[1], precision, 20), dequantize(codes, precision, 20)[1])


def test_zeros_and_other_words():
    for precision in ("float32", "int8"):
        assert not quantize(np.zeros((2, 3), np.float32), precision).any()
    with pytest.raises(InputError, match="precision must be one of float32, int8, binary, not 'int4'"):
        quantize(unit(1, 2), "int4")


def test_what_is_scored_is_what_is_rounded(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, method="mean")
    plain = embedder_subject(embedder, "tiny")
    assert quantized_subject(plain, "float32") is plain
    rounded = quantized_subject(plain, "binary")
    assert rounded.cached_as == plain.identity != rounded.identity
    assert rounded.config["precision"] == "binary"
    found = plain.encode(["one", "another thing"], "document").vectors
    bits = np.where(found > 0, 1, -1) / np.sqrt(found.shape[1])
    np.testing.assert_allclose(rounded.finish(found, "document"), bits, atol=1e-6)
