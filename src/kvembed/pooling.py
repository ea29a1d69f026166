"""Pooling: token states -> one vector a text. Every kind is a row of weights over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MeanTokens, Pooling

__all__ = ["pool", "token_weights"]


def token_weights(lengths: Tensor, spans: Tensor, width: int, pooling: Pooling, mean_tokens: MeanTokens) -> Tensor:
    """How much each token counts; each row sums to 1.

    Args:
        lengths: (B,) int64, real tokens of each right-padded text, all >= 1.
        spans: (B, 2) int64, first token of the text's own and one past its last.
        width: n, the padded length.
        pooling: see `EmbedConfig`.
        mean_tokens: see `EmbedConfig`.

    Returns:
        (B, n) float32.
    """
    position = torch.arange(width, device=lengths.device)  # (n,)
    real = position < lengths[:, None]  # (B, n)
    last = (position == lengths[:, None] - 1).float()
    if pooling == "last":
        return last
    chosen = real
    if mean_tokens == "content":
        content = (position >= spans[:, :1]) & (position < spans[:, 1:])
        chosen = torch.where(content.any(1, keepdim=True), content, real)
    weights = chosen * ((position + 1).float() if pooling == "weighted-mean" else torch.ones_like(last))
    weights = weights / weights.sum(1, keepdim=True)
    return (last + weights) / 2 if pooling == "hybrid" else weights


def pool(states: Tensor, lengths: Tensor, spans: Tensor, pooling: Pooling, mean_tokens: MeanTokens) -> Tensor:
    """Pool token states into one vector a text, in float32 whatever the model's dtype.

    Args:
        states: (B, n, D) any float dtype, right-padded.
        lengths, spans, pooling, mean_tokens: as in `token_weights`.

    Returns:
        (B, D) float32, not yet normalised.
    """
    weights = token_weights(lengths, spans, states.shape[1], pooling, mean_tokens)
    if states.dtype == torch.float16:  # padding may have overflowed, and 0 times infinity is no number
        states = states.masked_fill(weights[..., None] == 0, 0)
    return torch.einsum("bn,bnd->bd", weights, states.float())
