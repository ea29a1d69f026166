"""Static vectors: a text's tokens as the model's input embeddings, whitened and weighted by rarity. No forward.

    x_t = unit((e_t - m) W)                        W W^T = C^(-1)
    y   = sum_t (1 + ln n_t) (1 + ln(1 + t/1000)) x_t      over the different tokens t of a text, n_t times each

Raw embeddings share a few loud directions, which say how frequent a token is rather than what it means; so the mean m
and the covariance C of the vocabulary, taken as often as text has its tokens, are taken off. How often that is follows
from the vocabulary alone: byte-pair encoding and unigram models number their tokens by frequency, so an id is a rank,
and frequency falls with rank as p_t ~ 1 / (t + 1000) (Zipf's law with Mandelbrot's offset; by rank also Model2Vec,
Tulkens & van Dongen 2024). The two weights are the logarithmic term frequency and the inverse frequency of search
(Salton & Buckley 1988), the latter being 1 + ln(p_0 / p_t).

Letters: B texts, D the model's width, U different tokens in a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["StaticVectors"]

OFFSET = 1000
RANKS = 16384  # tokens that mean and covariance are taken of; more change nothing that could be measured
SHRINK = 0.1  # of the covariance, towards its mean variance


class StaticVectors:
    """Makes static vectors of token ids.

    Args:
        embedding: token ids (n,) -> input embeddings (n,D).
        vocabulary: how many tokens there are.
        device: where ids go.
    """

    def __init__(self, embedding: Callable[[Tensor], Tensor], vocabulary: int, device: torch.device) -> None:
        self._embedding, self._device = embedding, device
        ranks = torch.arange(min(vocabulary, RANKS), device=device)
        share = 1 / (ranks + OFFSET).float()
        share = share / share.sum()
        rows = embedding(ranks).float()
        self._mean = share @ rows  # (D,)
        centred = (rows - self._mean) * share.sqrt()[:, None]
        covariance = centred.T @ centred
        floor = covariance.diagonal().mean().clip(1e-20)
        covariance = (1 - SHRINK) * covariance + SHRINK * floor * torch.eye(len(covariance)).to(covariance)
        # Any W with W W^T = C^(-1) gives the same cosines; this one costs least.
        lower = torch.linalg.cholesky(covariance)
        self._whiten = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False).T

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B texts -> (B,D) float32, not yet normalised. A text without tokens gives zeros."""
        counts = [Counter(text) for text in texts]
        found = sorted(set().union(*counts))
        column = {token: index for index, token in enumerate(found)}
        weights = torch.zeros(len(texts), len(found), dtype=torch.float32)
        for row, count in zip(weights, counts, strict=True):
            row[[column[token] for token in count]] = 1 + torch.tensor([*count.values()], dtype=torch.float32).log()
        ids = torch.tensor(found, dtype=torch.long)
        weights *= 1 + (ids.float() / OFFSET).log1p()
        ids, weights = ids.to(self._device), weights.to(self._device)
        vectors = (self._embedding(ids).float() - self._mean) @ self._whiten
        return weights @ torch.nn.functional.normalize(vectors, dim=-1)
