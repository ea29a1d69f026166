"""Causal attention of packed texts, slot and all, as a few large matrix products: for bfloat16 on a CPU.

Where a processor has no AMX, torch's fused kernel multiplies bfloat16 far below its rate; plain batched products of the
same numbers take a third of the time (docs/decisions.md). So tokens are laid out in tiles:

    short texts    as many as fit share a tile of 128, 64 or 32 tokens; all such tiles are one product
    a long text    is cut into pieces of its own, each with all keys up to its end

In a layer that is re-routed a tile's keys have its texts' slots in front; where texts share a beginning that is not
computed with them (`kvembed.prefix`), the beginning's keys. Sizes are rounded, so that shapes recur from batch to
batch: one that is new costs more than the product itself.

Logits are rounded to bfloat16, to which large ones would lose their differences (Qwen2.5's keys share a bias that puts
logits in the hundreds). Softmax does not change when all keys of a text are moved by the same vector, so their mean is
taken off first; with that, states are as near to float32's as the fused kernel's are.

Letters: T tokens of all texts, Hq query heads, Hkv key-value heads, G = Hq / Hkv, N shared tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tiles", "suits"]

TILES = (32, 64, 128)  # tokens
_MOST_PIECES = 16  # of a text: each is another shape
_STEP = 16  # columns in front come in multiples of it
_HIDDEN = float("-inf")


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles are the fastest way there."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return device.type == "cpu" and dtype == torch.bfloat16 and not has_amx()


@dataclasses.dataclass(frozen=True)
class _Long:
    """A text with pieces of its own: where its rows begin among queries and keys, and their number."""

    query: int
    key: int
    tokens: int
    piece: int  # tokens of a piece; the last one is filled up


class Tiles:
    """The layout of a batch of packed texts, for layers that are re-routed or for those that are not.

    Args:
        lengths: tokens of each text, in the order in which they lie behind one another.
        bias, slot_self: see `EmbedConfig`.
        routed: let tokens see their text's slot.
        prefix: tokens of a beginning that all texts share, if they are not routed.
    """

    def __init__(self, lengths: Sequence[int], bias: float, slot_self: bool, routed: bool, prefix: int = 0) -> None:
        limits = torch.finfo(torch.bfloat16)
        self._bias, self._slot_self = min(max(bias, limits.min), limits.max), slot_self
        self._lengths = torch.tensor(lengths)
        # The smallest that holds every text; and a few tokens in all, one query say, need no more.
        tile = next((size for size in TILES if size >= max(lengths)), TILES[-1])
        self._tile = min(tile, _up(sum(lengths), _STEP))
        self._text = torch.arange(len(lengths)).repeat_interleave(self._lengths)  # (T,)
        starts = (self._lengths.cumsum(0) - self._lengths).tolist()
        shared: list[list[int]] = []  # texts of each shared tile
        room = 0
        for text, tokens in enumerate(lengths):
            if tokens <= self._tile:
                if tokens > room:
                    shared.append([])
                    room = self._tile
                shared[-1].append(text)
                room -= tokens
        self._shared = len(shared)
        # Columns in front: in a shared tile, in a long text's piece, and how many of the latter are in use.
        self._routed = routed
        self._width, self._front, self._used = _up(prefix, _STEP), _up(prefix, _STEP), prefix
        if routed:
            self._width, self._front, self._used = _up(max(map(len, shared), default=0), _STEP), _STEP, 1
        before = list(range(sum(lengths), sum(lengths) + prefix))  # its keys come after all others
        queries, keys = [], []  # for each row the token that it is; -1 for filling
        slots = []  # for each key row the text whose slot it is, or -1
        for texts in shared:
            tokens_here = [token for text in texts for token in range(starts[text], starts[text] + lengths[text])]
            queries += _filled(tokens_here, self._tile)
            lasts = [starts[text] + lengths[text] - 1 for text in texts]
            keys += _filled(lasts if routed else before, self._width)
            keys += _filled(tokens_here, self._tile)
            slots += _filled(texts if routed else [], self._width) + [-1] * self._tile
        self._long = []
        for text, tokens in enumerate(lengths):
            if tokens > self._tile:
                piece = _up(-(-tokens // _MOST_PIECES), self._tile)
                self._long.append(_Long(len(queries), len(keys), tokens, piece))
                here = list(range(starts[text], starts[text] + tokens))
                queries += _filled(here, _up(tokens, piece))
                keys += _filled(here[-1:] if routed else before, self._front) + _filled(here, _up(tokens, piece))
                slots += _filled([text] if routed else [], self._front) + [-1] * _up(tokens, piece)
        query, key = torch.tensor(queries), torch.tensor(keys)
        self._queries, self._keys, self._slots = query.clip(0), key.clip(0), torch.tensor(slots)
        self._places = torch.empty(sum(lengths), dtype=torch.long)  # token -> its row among queries
        self._places[query[query >= 0]] = (query >= 0).nonzero()[:, 0]
        self._mask = self._shared_mask(query, key)
        self._corners = {
            piece: torch.full((piece, piece), _HIDDEN, dtype=torch.bfloat16).triu(1)[:, None]
            for piece in {long.piece for long in self._long}
        }

    def _shared_mask(self, query: Tensor, key: Tensor) -> Tensor:
        """(N,tile,1,width + tile) bfloat16, additive: what each token of a shared tile sees; 1 is for the heads."""
        rows = query[: self._shared * self._tile].view(self._shared, self._tile, 1)
        columns = key[: self._shared * (self._width + self._tile)].view(self._shared, 1, self._width + self._tile)
        tokens = len(self._text)
        same = self._text[rows.clip(0)] == self._text[columns.clip(0, tokens - 1)]
        is_slot = (torch.arange(columns.shape[-1]) < self._width) & self._routed
        is_last = rows == (self._lengths.cumsum(0) - 1)[self._text[rows.clip(0)]]
        seen = same & (columns >= 0) & torch.where(is_slot, self._slot_self | ~is_last, columns <= rows)
        seen |= columns >= tokens  # the common beginning
        seen |= rows < 0  # a row of nothing is thrown away, but must not be NaN on its way: that is slow
        mask = torch.where(seen, torch.where(is_slot, self._bias, 0.0), _HIDDEN)
        return mask.to(torch.bfloat16)[:, :, None]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        slot_key: Tensor | None = None,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One layer's attention.

        Args:
            query, key, value: (1,Hq,T,Dk), (1,Hkv,T,Dk), (1,Hkv,T,Dv).
            scale: factor of the logits.
            slot_key: (texts,Hkv,Dk), if it is not the last token's key.
            before: keys (Hkv,p,Dk) and values (Hkv,p,Dv) of the common beginning, if there is one.

        Returns:
            (1,T,Hq,Dv).
        """
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        # A token's heads that share keys stay side by side: (Hkv,rows,G*Dk)
        rows = query[0].transpose(0, 1).reshape(-1, heads, groups * query.shape[-1])
        rows = rows.transpose(0, 1).index_select(1, self._queries)
        keys = self._moved(key[0].float(), scale, slot_key, before)  # (Hkv,columns,Dk)
        values = value[0] if before is None else torch.cat([value[0], before[1]], 1)
        values = values.index_select(1, self._keys)  # (Hkv,columns,Dv)
        out = rows.new_empty(heads, rows.shape[1], groups * value.shape[-1])
        if self._shared:
            tokens, columns = self._shared * self._tile, self._shared * (self._width + self._tile)
            q = rows[:, :tokens].reshape(heads * self._shared, self._tile * groups, -1)
            k, v = (part[:, :columns].reshape(heads * self._shared, -1, part.shape[-1]) for part in (keys, values))
            logits = torch.bmm(q, k.transpose(1, 2)).view(heads, self._shared, self._tile, groups, -1)
            logits += self._mask
            found = torch.bmm(logits.softmax(-1).view(len(q), -1, k.shape[1]), v)
            out[:, :tokens] = found.view(heads, tokens, -1)
        for long in self._long:
            for start in range(0, long.tokens, long.piece):
                here = slice(long.query + start, long.query + start + long.piece)
                there = slice(long.key, long.key + self._front + start + long.piece)
                q = rows[:, here].reshape(heads, long.piece * groups, -1)
                logits = torch.bmm(q, keys[:, there].transpose(1, 2)).view(heads, long.piece, groups, -1)
                logits[..., self._used : self._front] = _HIDDEN
                if self._routed:
                    logits[..., 0] += self._bias
                    if not self._slot_self and start + long.piece >= long.tokens:
                        logits[:, long.tokens - 1 - start, :, 0] = _HIDDEN
                logits[..., -long.piece :] += self._corners[long.piece]
                found = torch.bmm(logits.softmax(-1).view(heads, q.shape[1], -1), values[:, there])
                out[:, here] = found.view(heads, long.piece, -1)
        out = out.transpose(0, 1).index_select(0, self._places)  # (T,Hkv,G*Dv)
        return out.view(1, len(out), query.shape[1], -1)

    def _moved(
        self, key: Tensor, scale: float, slot_key: Tensor | None, before: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Keys in their places (Hkv,columns,Dk), times `scale`, their text's mean, or the beginning's, taken off."""
        if before is not None:  # all texts see it, so all are moved by its mean
            first = before[0].float()
            moved = (torch.cat([key, first], 1) - first.mean(1, keepdim=True)) * scale
            return moved.to(torch.bfloat16).index_select(1, self._keys)
        mean = key.new_zeros(key.shape[0], len(self._lengths), key.shape[-1]).index_add_(1, self._text, key)
        mean /= self._lengths[:, None]  # (Hkv,texts,Dk)
        moved = (key - mean.index_select(1, self._text)) * scale
        keys = moved.to(torch.bfloat16).index_select(1, self._keys)
        if slot_key is not None:
            slots = (slot_key.float().transpose(0, 1) - mean) * scale
            columns = self._slots >= 0
            keys[:, columns] = slots.to(torch.bfloat16)[:, self._slots[columns]]
        return keys


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _filled(numbers: list[int], size: int) -> list[int]:
    """Cut if there is no room for them all."""
    return (numbers + [-1] * size)[:size]
