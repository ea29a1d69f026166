"""Pooling against its definition, text by text."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvembed.pooling import pool, token_weights


def defined(states, length, span, pooling, mean_tokens):
    own = states[:length].double()
    inside = own[span[0] : span[1]] if mean_tokens == "content" and span[1] > span[0] else own
    first = span[0] if inside is not own else 0
    weights = torch.arange(first + 1, first + 1 + len(inside)).double()
    vector = {
        "last": own[-1],
        "mean": inside.mean(0),
        "weighted-mean": (inside * weights[:, None]).sum(0) / weights.sum(),
        "hybrid": (own[-1] + inside.mean(0)) / 2,
    }[pooling]
    return vector / vector.norm()


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    spans = []
    for length in lengths:
        a = draw(st.integers(0, length))
        spans.append((a, draw(st.integers(a, length))))
    return lengths, spans


@given(
    batch=batches(),
    pooling=st.sampled_from(["last", "mean", "weighted-mean", "hybrid"]),
    mean_tokens=st.sampled_from(["all", "content"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_pool_is_the_definition_whatever_the_padding_holds(batch, pooling, mean_tokens, dtype, seed):
    lengths, spans = batch
    torch.manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths) + 2, 6).to(dtype)
    for row, length in enumerate(lengths):
        states[row, length:] = float("inf") if dtype == torch.float16 else 1e4  # where a model overflows, it does there
    pooled = pool(states, torch.tensor(lengths), torch.tensor(spans), pooling, mean_tokens)
    assert pooled.dtype == torch.float32
    vectors = torch.nn.functional.normalize(pooled, dim=1)
    for row, (length, span) in enumerate(zip(lengths, spans, strict=True)):
        torch.testing.assert_close(
            vectors[row].double(), defined(states[row], length, span, pooling, mean_tokens), atol=1e-5, rtol=0
        )


@given(batch=batches(), pooling=st.sampled_from(["last", "mean", "weighted-mean", "hybrid"]))
def test_weights_sum_to_one_and_leave_padding_out(batch, pooling):
    lengths, spans = batch
    weights = token_weights(torch.tensor(lengths), torch.tensor(spans), max(lengths) + 1, pooling, "content")
    torch.testing.assert_close(weights.sum(1), torch.ones(len(lengths)))
    assert all(bool((weights[row, length:] == 0).all()) for row, length in enumerate(lengths))
