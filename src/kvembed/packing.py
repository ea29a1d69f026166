"""Packing: texts behind one another in one row, so that a forward computes no padding.

Attention sees each text apart (`kvembed.attention.Reroute.packed`); everything else in a decoder works token by token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

__all__ = ["Packed", "pack"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Texts in one row, the longest first.

    Attributes:
        ids: (1,T) int64, T being the real tokens of all texts, and of the one that fills up, if there is one.
        positions: (1,T) int64, each token's place in its text.
        lengths: tokens of each text, falling; of what fills up, too.
        rows: (T,) int64, the padded row of each token; B of what fills up.
        starts: (B,) int64, where in T each padded row begins.
        shape: (B,n), the padded one.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    starts: Tensor
    shape: tuple[int, int]

    def unpack(self, states: Tensor) -> Tensor:
        """(1,T,D) -> (B,n,D), zero where the padding is."""
        texts, width = self.shape
        padded = states.new_zeros(len(self.lengths), max(width, self.lengths[0]), states.shape[-1])
        padded[self.rows.to(states.device), self.positions[0].to(states.device)] = states[0]
        return padded[:texts, :width]


def pack(ids: Tensor, lengths: Tensor, multiple: int = 1) -> Packed:
    """Take the padding out.

    Args:
        ids: (B,n) int64, right-padded.
        lengths: (B,) int64, real tokens, all >= 1.
        multiple: T is rounded up to a multiple of it, by one dummy text at the end.
    """
    shape = ids.shape[0], ids.shape[1]
    if multiple > 1 and (filling := -int(lengths.sum()) % multiple):
        ids = nn.functional.pad(ids, (0, max(0, filling - shape[1]), 0, 1))
        lengths = nn.functional.pad(lengths, (0, 1), value=filling)
    order = lengths.argsort(descending=True, stable=True)  # equal lengths side by side: attention takes them at once
    width = torch.arange(ids.shape[1], device=ids.device)
    row, positions = (width < lengths[order, None]).nonzero(as_tuple=True)  # (T,), (T,)
    rows = order[row]
    starts = torch.empty_like(lengths)
    starts[order] = lengths[order].cumsum(0) - lengths[order]
    return Packed(
        ids=ids[rows, positions][None],
        positions=positions[None],
        lengths=tuple(lengths[order].tolist()),
        rows=rows,
        starts=starts[: shape[0]],
        shape=shape,
    )
