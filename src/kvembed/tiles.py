"""Causal attention of packed texts, slot and all, as a few large matrix products: for bfloat16 on a CPU.

Where a processor has no AMX, torch's fused kernel multiplies bfloat16 far below its rate; plain batched products of the
same numbers take a third of the time (docs/experiments.md). So tokens are laid out in tiles:

    short texts    as many as fit share a tile of 128, 64 or 32 tokens; all such tiles are one product
    a long text    is cut into tiles of its own, each with all keys up to its end

In a layer that is re-routed a tile's keys have its texts' slots in front; where texts share a beginning that is not
computed with them (`kvembed.prefix`), the beginning's keys. Sizes are rounded, so that shapes are few and recur: one
that is new, or was forgotten by torch meanwhile, costs more than the product itself. And softmax is slow where columns
do not come in whole vectors. In a layer with a sliding window what is out of it is hidden, but computed.

Logits are rounded to bfloat16, to which large ones would lose their differences (Qwen2.5's keys share a bias that puts
logits in the hundreds). Softmax does not change when all keys of a text are moved by the same vector, so their mean is
taken off first; with that, states are as near to float32's as the fused kernel's are.

Letters: T tokens of all texts, Hq query heads, Hkv key-value heads, G = Hq / Hkv, N shared tiles.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Tiles", "prefers_tiles"]

TILES = (32, 64, 128)  # tokens
# Widths that a long text's tiles may have: each compiles two matrix products, and the command line keeps 32 of them
# (`kvembed.process`).
_MOST_WIDTHS = 8
_AT_ONCE = 2  # long texts: heads may be too few for all processors, but logits must not outgrow their cache
_ROW = 100  # a row's fixed cost, as a number of columns; measured (docs/experiments.md)
_STEP = 32  # columns in front come in multiples of it: numbers in a vector
_HIDDEN = float("-inf")


def prefers_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles are the fastest way there."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return device.type == "cpu" and dtype == torch.bfloat16 and not has_amx()


@dataclasses.dataclass(frozen=True)
class _Long:
    """Texts with as many tiles of their own: where their rows begin among queries and keys, and how many each has."""

    query: int
    key: int
    tokens: tuple[int, ...]
    rows: int  # the last tile's are filled up
    step: int  # a tile's columns come in multiples of it, apart from those in front


class _Places(NamedTuple):
    """Where a token's head is among the rows of all heads, and back; each of a layout's parts lies head by head.

    Attributes:
        queries: (Hkv*rows,) int64, which of the T*Hkv each row is.
        keys: (Hkv*columns,) int64, the same for keys and values, a beginning's among them.
        tokens: (T*Hkv,) int64, the row of each.
        slots: (slots*Hkv,) int64, the key rows that are slots.
        slot_texts: (slots*Hkv,) int64, which of the texts*Hkv slots they are.
    """

    queries: Tensor
    keys: Tensor
    tokens: Tensor
    slots: Tensor
    slot_texts: Tensor


class Tiles:
    """The layout of a batch of packed texts, for layers that are re-routed or for those that are not.

    Args:
        lengths: tokens of each text, in the order in which they lie behind one another.
        bias, slot_self: see `EmbedConfig`.
        routed: let tokens see their text's slot.
        prefix: tokens of a beginning that all texts share, if they are not routed.
        window: how many tokens a token sees, itself among them, beside its slot; None for all up to it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        bias: float,
        slot_self: bool,
        routed: bool,
        prefix: int = 0,
        window: int | None = None,
    ) -> None:
        self._window = window
        limits = torch.finfo(torch.bfloat16)
        self._bias, self._slot_self = min(max(bias, limits.min), limits.max), slot_self
        self._lengths = torch.tensor(lengths)
        # Of those that hold every text the one that costs least; and a few tokens in all, one query say, need no more.
        sizes = [size for size in TILES if size >= max(lengths)] or [TILES[-1]]
        layouts = [_share(lengths, min(size, _up(sum(lengths), _STEP)), routed, prefix) for size in sizes]
        self._tile, self._width, shared = min(layouts, key=_cost)
        self._text = torch.arange(len(lengths)).repeat_interleave(self._lengths)  # (T,)
        starts = (self._lengths.cumsum(0) - self._lengths).tolist()
        self._shared = len(shared)
        # Columns in front of a long text's own, and how many of them are in use.
        self._routed = routed
        self._front, self._used = (_STEP, 1) if routed else (_up(prefix, _STEP), prefix)
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
        alike = defaultdict(list)  # texts by their size
        for text, tokens in enumerate(lengths):
            if tokens > self._tile:
                alike[_up(tokens, self._tile)].append(text)
        for rows, same in alike.items():
            step = _up(-(-rows // _MOST_WIDTHS), self._tile)
            for texts in (same[first : first + _AT_ONCE] for first in range(0, len(same), _AT_ONCE)):
                tokens_of = tuple(lengths[text] for text in texts)
                self._long.append(_Long(len(queries), len(keys), tokens_of, rows, step))
                for text in texts:
                    here = list(range(starts[text], starts[text] + lengths[text]))
                    queries += _filled(here, rows)
                    keys += _filled(here[-1:] if routed else before, self._front) + _filled(here, rows)
                    slots += _filled([text] if routed else [], self._front) + [-1] * rows
        self._queries, self._keys, self._slots = torch.tensor(queries), torch.tensor(keys), torch.tensor(slots)
        self._places: dict[int, _Places] = {}  # by Hkv
        self._mask = self._shared_mask()
        self._corner = torch.full((self._tile, self._tile), _HIDDEN, dtype=torch.bfloat16).triu(1)[:, None]

    def _shared_mask(self) -> Tensor:
        """(N,tile,1,width + tile) bfloat16, additive: what each token of a shared tile sees; 1 is for the heads."""
        width, tokens = self._width + self._tile, len(self._text)
        rows = self._queries[: self._shared * self._tile].view(self._shared, self._tile, 1)
        columns = self._keys[: self._shared * width].view(self._shared, 1, width)
        row_text, column_text = self._text[rows.clip(0)], self._text[columns.clip(0, tokens - 1)]
        starts = self._lengths.cumsum(0) - self._lengths
        is_slot = (torch.arange(width) < self._width) & self._routed
        is_last = rows == (starts + self._lengths - 1)[row_text]
        same = row_text == column_text
        seen = same & (columns >= 0) & torch.where(is_slot, self._slot_self | ~is_last, columns <= rows)
        seen |= columns >= tokens  # the common beginning
        if self._window is not None:
            row, column = rows - starts[row_text], columns - starts[column_text]  # places in their text
            column = torch.where(columns >= tokens, columns - tokens - self._used, column)  # before all texts
            seen &= is_slot | (row - column < self._window)
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
        at = self._places_of(heads)
        moved, slot_key = self._moved(key, slot_key, before)
        values = _tokens_first(value, before and before[1])
        # Tokens come first, as projections leave them, so that a row is what one token's heads that share keys have.
        q = query[0].transpose(0, 1).reshape(-1, groups * query.shape[-1]).index_select(0, at.queries)
        k, v = (part.flatten(0, 1).index_select(0, at.keys) for part in (moved, values))
        if slot_key is not None:
            k[at.slots] = slot_key.flatten(0, 1).index_select(0, at.slot_texts)
        out = q.new_empty(len(q), groups * value.shape[-1])
        if self._shared:
            count = heads * self._shared
            rows, columns = count * self._tile, count * (self._width + self._tile)
            shared = q[:rows].view(count, self._tile * groups, -1)
            logits = _logits(shared, k[:columns].view(count, -1, k.shape[-1]), scale)
            logits.view(heads, self._shared, self._tile, groups, -1).add_(self._mask)
            found = torch.bmm(logits.softmax(-1), v[:columns].view(count, -1, v.shape[-1]))
            out[:rows] = found.view(rows, -1)
        for long in self._long:
            count, columns = heads * len(long.tokens), self._front + long.rows
            here = slice(heads * long.query, heads * long.query + count * long.rows)
            there = slice(heads * long.key, heads * long.key + count * columns)
            own, outs = (part[here].view(count, long.rows, -1) for part in (q, out))
            k_long, v_long = (part[there].view(count, columns, -1) for part in (k, v))
            self._attend_long(long, own, k_long, v_long, scale, outs)
        return out.index_select(0, at.tokens).view(1, -1, query.shape[1], value.shape[-1])

    def _attend_long(self, long: _Long, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
        """Tile by tile, N being heads times texts: (N,rows,G*Dk), (N,front + rows,Dk or Dv) -> out (N,rows,G*Dv)."""
        count, groups = len(key), query.shape[-1] // key.shape[-1]
        for start in range(0, long.rows, self._tile):
            stop = start + self._tile
            end, width = self._front + stop, self._front + min(_up(stop, long.step), long.rows)
            rows = query[:, start:stop].reshape(count, self._tile * groups, -1)
            logits = _logits(rows, key[:, :width], scale).view(count, self._tile, groups, width)
            if self._used < self._front:
                logits[..., self._used : self._front] = _HIDDEN
            if end < width:
                logits[..., end:] = _HIDDEN
            if self._routed:
                logits[..., 0] += self._bias
                if not self._slot_self and stop == long.rows:
                    lasts = torch.tensor(long.tokens).repeat(count // len(long.tokens)) - 1 - start
                    logits[torch.arange(count), lasts, :, 0] = _HIDDEN
            logits[..., end - self._tile : end] += self._corner
            if self._window is not None:
                self._hide_far(logits, start, self._window)
            found = torch.bmm(logits.softmax(-1).view(count, -1, width), value[:, :width])
            out[:, start:stop] = found.view(count, self._tile, -1)

    def _hide_far(self, logits: Tensor, start: int, window: int) -> None:
        """What is out of sight for a long text's tile that begins at `start`; (N,tile,G,width), changed in place."""
        first = self._front if self._routed else 0  # slots are always seen
        stop = self._front + start + self._tile - window
        if stop > first:
            column = torch.arange(first, stop) - self._front  # the beginning's are below 0, filling behind it
            column[: self._front - first] += self._front - self._used
            far = torch.arange(start, start + self._tile)[:, None] - column >= window  # (tile,columns)
            logits[..., first:stop].masked_fill_(far[:, None], _HIDDEN)

    def _moved(
        self, key: Tensor, slot_key: Tensor | None, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Keys (T+p,Hkv,Dk) and slots (texts,Hkv,Dk), their text's mean, or the beginning's, taken off."""
        if before is not None:  # all texts see it, so all are moved by its mean
            return _tokens_first(key, before[0]) - before[0].float().mean(1).to(key.dtype), None
        keys = _tokens_first(key)
        total = torch.zeros(len(self._lengths), keys[0].numel(), dtype=torch.float32).index_add_(
            0, self._text, keys.flatten(1).float()
        )
        mean = (total / self._lengths[:, None]).to(key.dtype).view(-1, *keys.shape[1:])
        return keys - mean.index_select(0, self._text), None if slot_key is None else slot_key - mean

    def _places_of(self, heads: int) -> _Places:
        if heads not in self._places:
            rows = [self._shared * self._tile, *(len(long.tokens) * long.rows for long in self._long)]
            columns = [self._shared * (self._width + self._tile)]
            columns += [len(long.tokens) * (self._front + long.rows) for long in self._long]
            head = torch.arange(heads)[:, None]
            queries, keys, slots = (  # filling stays negative
                torch.cat([(part * heads + head).flatten() for part in torch.split(index, sizes)])
                for index, sizes in ((self._queries, rows), (self._keys, columns), (self._slots, columns))
            )
            tokens = torch.empty(len(self._text) * heads, dtype=torch.long)
            tokens[queries[queries >= 0]] = (queries >= 0).nonzero()[:, 0]
            used = (slots >= 0).nonzero()[:, 0]
            self._places[heads] = _Places(queries.clip(0), keys.clip(0), tokens, used, slots[used])
        return self._places[heads]


def _tokens_first(own: Tensor, before: Tensor | None = None) -> Tensor:
    """(1,Hkv,T,D), and (Hkv,p,D) behind it -> (T+p,Hkv,D)."""
    rows = own[0].transpose(0, 1)
    return rows if before is None else torch.cat([rows, before.transpose(0, 1)])


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(N,rows,D), (N,columns,D) -> (N,rows,columns)."""
    return torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)


def _share(lengths: Sequence[int], tile: int, routed: bool, prefix: int) -> tuple[int, int, list[list[int]]]:
    """For tiles of so many tokens: `tile`, columns in front, and the texts in each shared one, behind one another."""
    shared: list[list[int]] = []
    room = 0
    for text, tokens in enumerate(lengths):
        if tokens <= tile:
            if tokens > room:
                shared.append([])
                room = tile
            shared[-1].append(text)
            room -= tokens
    return tile, _up(max(map(len, shared), default=0) if routed else prefix, _STEP), shared


def _cost(layout: tuple[int, int, list[list[int]]]) -> int:
    tile, width, shared = layout
    return len(shared) * tile * (width + tile + _ROW)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _filled(numbers: list[int], size: int) -> list[int]:
    """Cut if there is no room for them all."""
    return (numbers + [-1] * size)[:size]
