"""One forward's re-routing: an attention function that puts the slot into the layers that want it.

What the slot is, and the forms of attention with it, are in `kvembed.attention`; this is how they are reached from a
batch: padded (B texts of n tokens), or packed (texts of any lengths behind one another in one row of T tokens, perhaps
after a beginning of p tokens that all share). It reaches any model through transformers' attention interface, see
`kvembed.attention_interface`. Letters as in `kvembed.attention`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from . import flash
from .attention import blend, closed, delegated, prepended, unmasked, unrotate
from .attention_interface import changes_logits, float_mask, stock_attention, unfit
from .errors import UnsupportedModel
from .prefix import Prefix
from .tiles import Tiles, prefers_tiles

__all__ = ["Reroute"]


class Places(NamedTuple):
    """Where packed texts lie: each one's length and last token (texts,), both int64; and where each starts, and T, as
    kernels want it: (texts + 1,) int32.
    """

    lengths: Tensor
    final: Tensor
    starts: Tensor


@dataclasses.dataclass
class Reroute:
    """One forward pass's re-routing; call it as an attention function. Not shared between forwards.

    Attributes:
        layers: decoder layers whose attention is changed.
        layer_calls: attention module -> the decoder layer of its first, second, ... call in a forward (see `Backbone`).
        last: (B,) int64, index of each text's last real token; not looked at if `packed`.
        packed: lengths of the texts, falling, if they lie behind one another in one row (see `kvembed.packing`).
        prefix: a beginning that all packed texts share and that is not among their tokens; for a forward in which
            nothing is changed.
        probe: the place in the row of what goes into `prefix.seen`.
        bias, slot_self: see `EmbedConfig`.
        bidirectional: take the causal mask off in `layers`, instead of re-routing there.
        turned: layers whose slot is turned back to position 0: for `slot_position="first"`, those that rotate keys.
        rotations: layer type (None if the model has but one) -> (cos, sin), each (B or 1, n, Dk), of this forward;
            needed for `turned`.
        betas: given a dict, it is filled with layer -> (B, Hq, n) float32, the share of each token's attention that the
            slot takes.
        prefer_closed: use the closed form, or tiles, where they are exact; off, the prepended form everywhere, for
            trials and tests.
    """

    layers: frozenset[int]
    layer_calls: Mapping[nn.Module, tuple[int, ...]]
    last: Tensor
    bias: float = 1.0
    slot_self: bool = True
    bidirectional: bool = False
    turned: frozenset[int] = frozenset()
    rotations: Mapping[Any, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    betas: dict[int, Tensor] | None = None
    prefer_closed: bool = True
    packed: tuple[int, ...] = ()
    prefix: Prefix | None = None
    probe: int = 0
    _calls: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    _kept_places: dict[torch.device, Places] = dataclasses.field(default_factory=dict)
    _kept_masks: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict)
    _tiles: dict[tuple[bool, int | None], Tiles] = dataclasses.field(default_factory=dict)
    _windows: dict[tuple[int, int], tuple[Tensor, bool]] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the interface asks, `Attention` says how; the slot goes into the layers that want it."""
        if reason := unfit(module, query, key, kwargs):  # a compressed attention may show itself in long texts only
            raise UnsupportedModel(f"{type(module).__name__} can't be re-routed: {reason}")
        layer = self.layer_calls[module][self._calls[module]]
        before = self.prefix.layers[self._calls.total()] if self.prefix else None  # (Hkv,p,Dk), (Hkv,p,Dv)
        self._calls[module] += 1
        if self.prefix and self.prefix.seen is not None:
            self.prefix.seen.extend(x[0, :, self.probe].flatten().clone() for x in (key, value))
        if not self.packed:
            last = self.last.to(key.device)
            return self._attend(module, layer, last, query, key, value, attention_mask, scaling, kwargs)
        if extra := [name for name in ("position_bias", "sinks") if kwargs.get(name) is not None]:
            raise UnsupportedModel(f"{type(module).__name__} has {extra[0]} for every token; it takes no packed texts")
        tiled, flashed = prefers_tiles(query.device, query.dtype), flash.takes_packed(query)
        window = kwargs.get("sliding_window") if tiled or (flashed and not before) else None
        if window is not None and not self._is_window(attention_mask, window):
            window = None
        mask = None if window else attention_mask
        plain = _is_plain(key, value, mask, kwargs) and not (self.bidirectional and layer in self.layers)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        fast = tiled or flashed or (before and flash.takes_causal(query))
        if plain and self.prefer_closed and fast:
            return self._attend_packed(module, layer, query, key, value, scale, before, window), None
        if before:
            if attention_mask is None:
                if key.device not in self._kept_masks:
                    ones = torch.ones(self.longest, self.longest, dtype=torch.bool, device=key.device)
                    self._kept_masks[key.device] = ones.tril()[None, None]
                attention_mask = self._kept_masks[key.device]
            elif attention_mask.shape[-1] != self.longest:
                raise UnsupportedModel(f"{type(module).__name__} makes its masks itself; texts can't share a beginning")
        first = self._first
        whole = attention_mask is not None and attention_mask.shape[-1] == key.shape[2] and not before
        outs = []
        # The beginning is copied for every text, so they are taken in parts that have about T keys together.
        for start, q, k, v in self._by_length(query, key, value, most_keys=key.shape[2] if before else None):
            texts, _, n, _ = q.shape
            if before:
                k, v = (torch.cat([x.expand(texts, -1, -1, -1), y], 2) for x, y in zip(before, (k, v), strict=True))
            corner = start if whole else 0  # a model that makes its masks itself makes one for the whole row
            rows, columns = slice(corner + first, corner + first + n), slice(corner, corner + first + n)
            mask = None if attention_mask is None else attention_mask[..., rows, columns]
            last = torch.full((texts,), n - 1, device=key.device)
            outs.append(self._attend(module, layer, last, q, k, v, mask, scaling, kwargs)[0].flatten(0, 1))
        return torch.cat(outs)[None], None  # (1,T,Hq,Dv)

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The mask of a forward, as `sdpa_mask` makes it; of packed texts the longest one's, of which any other's is a
        corner. None where it would be the plain causal one, which transformers itself says of padded batches only.
        """
        if self.packed:
            if self.prefix:
                kwargs["attention_mask"] = None  # of ones, see `Backbone`
            plain = not kwargs.get("use_vmap", False)  # or else it is another
            kwargs |= {"q_length": self.longest, "kv_length": self.longest, "allow_is_causal_skip": plain}
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask

    @property
    def _first(self) -> int:
        """p, tokens of the common beginning."""
        return self.prefix.tokens if self.prefix else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest packed text, a common beginning included."""
        return self._first + self.packed[0]

    def _is_window(self, mask: Tensor | None, window: int) -> bool:
        """Whether a mask, (1,1,p+n,p+n) of the longest text, is causal and hides all that is farther than `window`."""
        if mask is None:
            return False
        known = id(mask), window  # transformers makes one mask for all layers of a kind; kept, so that ids stay unique
        if known not in self._windows:
            place = torch.arange(self.longest, dtype=torch.int32, device=mask.device)  # `apart` is the largest here
            apart = place[:, None] - place
            wanted = (apart >= 0) & (apart < window)
            self._windows[known] = mask, mask.dtype == torch.bool and torch.equal(mask, wanted[None, None])
        return self._windows[known][1]

    def _by_length(self, *tensors: Tensor, most_keys: int | None = None) -> Iterator[tuple[Any, ...]]:
        """Packed tensors (1,H,T,D) cut into texts of one length: where they start, and (texts,H,n,D) without a copy.

        Of texts that have more than `most_keys` keys together, beginning included, a part at a time.
        """
        start = 0
        for n, same in itertools.groupby(self.packed):
            left = len(list(same))
            most = max(1, most_keys // (self._first + n)) if most_keys else left
            while left:
                texts = min(left, most)
                end = start + texts * n
                parts = (part[0, :, start:end].view(-1, texts, n, part.shape[-1]).transpose(0, 1) for part in tensors)
                yield start, *parts
                start, left = end, left - texts

    def _causal_with_lse(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Packed texts' attention to their own tokens, (1,Hq,T,D), and its log-sum-exp, (1,Hq,T)."""
        if flash.takes_packed(query):
            starts = self._places(key.device).starts
            return flash.packed_with_lse(query, key, value, starts, self.packed[0], scale, window)
        outs, lses = [], []
        for _, q, k, v in self._by_length(query, key, value):
            out, lse = flash.causal_with_lse(q, k, v, scale)  # (texts,Hq,n,D), (texts,Hq,n)
            outs.append(out.transpose(0, 1).flatten(1, 2))
            lses.append(lse.transpose(0, 1).flatten(1, 2))
        return torch.cat(outs, 1)[None], torch.cat(lses, 1)[None]

    def _attend_packed(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        before: tuple[Tensor, Tensor] | None,
        window: int | None,
    ) -> Tensor:
        """All packed texts' attention in one layer at once, (1,T,Hq,Dv); arguments as in `__call__`."""
        if prefers_tiles(query.device, query.dtype):
            routed = layer in self.layers
            kind = routed, window
            if kind not in self._tiles:
                self._tiles[kind] = Tiles(self.packed, self.bias, self.slot_self, routed, self._first, window)
            turned = self._packed_slot_keys(module, layer, key) if layer in self.turned else None
            return self._tiles[kind].attend(query, key, value, scale, turned, before)
        out, lse = self._causal_with_lse(query, key, value, scale, window)
        if before:
            first, first_lse = flash.full_with_lse(query, before[0][None], before[1][None], scale)
            out = blend(out, first, torch.sigmoid(first_lse - lse))  # softmax splits here as for the slot
        if layer in self.layers:
            at = self._places(key.device)
            slot_key = self._packed_slot_keys(module, layer, key).transpose(0, 1)[None]  # (1,Hkv,texts,D)
            slot_value = value[:, :, at.final]
            slot, logit = flash.slots_with_lse(query, slot_key, slot_value, at.starts, self.packed[0], scale)
            beta = torch.sigmoid(logit + self.bias - lse)  # (1,Hq,T)
            if not self.slot_self:
                beta[:, :, at.final] = 0.0
            out = blend(out, slot, beta)
        return out.transpose(1, 2).contiguous()

    def _packed_slot_keys(self, module: nn.Module, layer: int, key: Tensor) -> Tensor:
        """(texts,Hkv,Dk) of key (1,Hkv,T,Dk)."""
        at = self._places(key.device)
        slot_key = key[0, :, at.final].transpose(0, 1)
        if layer in self.turned:
            slot_key = unrotate(module, layer, slot_key, self.rotations, at.lengths - 1)
        return slot_key

    def _places(self, device: torch.device) -> Places:
        if device not in self._kept_places:  # once a forward: a GPU waits for what is copied to it
            lengths = torch.tensor(self.packed, device=device)
            starts = nn.functional.pad(lengths.cumsum(0), (1, 0))
            self._kept_places[device] = Places(lengths, starts[1:] - 1, starts.to(torch.int32))
        return self._kept_places[device]

    def _attend(
        self,
        module: nn.Module,
        layer: int,
        last: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention in one layer of a padded batch, or of packed texts of one length, which with a beginning have keys
        (B,Hkv,p+n,Dk) and a mask; arguments as in `__call__`.
        """
        if layer not in self.layers:
            return stock_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.bidirectional:
            return unmasked(module, query, key, value, last, scale, kwargs), None
        slot_key, slot_value = self.slot(module, layer, key, value, last)  # (B,Hkv,Dk), (B,Hkv,Dv)
        if self.prefer_closed and _is_plain(key, value, attention_mask, kwargs) and flash.takes_causal(query):
            blind = None if self.slot_self else last
            out, share = closed(query, key, value, slot_key, slot_value, scale, self.bias, blind)
            beta: Tensor | None = share
        else:
            mask = float_mask(query, key, attention_mask)  # (B or 1, 1 or Hq, n, n)
            limits = torch.finfo(mask.dtype)
            bias = min(max(self.bias, limits.min), limits.max)
            slot_mask = mask.new_full((len(last), mask.shape[1], mask.shape[2]), bias)  # (B, 1 or Hq, n)
            if not self.slot_self:
                slot_mask[torch.arange(len(last), device=last.device), :, last] = limits.min
            form = functools.partial(delegated, module, kwargs) if changes_logits(kwargs) else prepended
            out, beta = form(query, key, value, slot_key, slot_value, mask, slot_mask, scale, self.betas is not None)
        if self.betas is not None and beta is not None:
            self.betas[layer] = beta
        return out.transpose(1, 2).contiguous(), None  # (B,n,Hq,Dv)

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The slot's key (B,Hkv,Dk) and value (B,Hkv,Dv): the last token's, by default."""
        rows = torch.arange(len(last), device=key.device)
        slot_key, slot_value = key[rows, :, last], value[rows, :, last]  # (B,Hkv,Dk), (B,Hkv,Dv)
        if layer in self.turned:
            slot_key = unrotate(module, layer, slot_key, self.rotations, last)
        return slot_key, slot_value


def _is_plain(key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> bool:
    """Full causal softmax attention with one head size: what the kernels of `kvembed.flash` do."""
    return mask is None and key.shape[-1] == value.shape[-1] and not changes_logits(kwargs)
