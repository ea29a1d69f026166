"""THE METHOD: in chosen layers, the last token's key and value become a slot that every token attends to.

KV-Embedding (Tang & Yang 2026, arXiv 2601.01046). With post-rotary queries, keys and values of one text of n tokens,

    K~ = [k_n ; K]     V~ = [v_n ; V]
    logit(i, slot) = scale * q_i . k_n + bias
    logit(i, j)    = scale * q_i . k_j   for j <= i, else -inf

The same thing is written three ways below, and tests hold them equal:

    prepended   the definition: one more key, one more value, one more column in the mask
    closed      softmax splits exactly, so with the log-sum-exp (lse) of the causal logits, which fused kernels return,
                    out = (1 - beta) * out_causal + beta * v_n,   beta = sigmoid(scale * q . k_n + bias - lse)
                no extra key, no mask; exact for full causal attention over right-padded texts with Dk = Dv
                (and once more for packed texts, all in one call; a sliding window may be there, too)
    delegated   prepended, then the model's own eager function, for what changes the logits or their sum
                (soft cap, sinks, position bias)

Packed texts in bfloat16 on a CPU have a faster way to the prepended form, `kvembed.tiles`.

It reaches any model through transformers' attention interface, see `kvembed.attention_interface`.

Letters: B texts, Hq query heads, Hkv key-value heads, G = Hq / Hkv, n tokens, Dk and Dv head sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import flash
from .attention_interface import changes_logits, eager_function, float_mask, stock_attention, unfit
from .errors import UnsupportedModel
from .prefix import Prefix
from .tiles import Tiles, prefers_tiles

__all__ = ["Reroute", "unrotate"]


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
            out = _blend(out, first, torch.sigmoid(first_lse - lse))  # softmax splits here as for the slot
        if layer in self.layers:
            at = self._places(key.device)
            slot_key = self._packed_slot_keys(module, layer, key).transpose(0, 1)[None]  # (1,Hkv,texts,D)
            slot_value = value[:, :, at.final]
            slot, logit = flash.slots_with_lse(query, slot_key, slot_value, at.starts, self.packed[0], scale)
            beta = torch.sigmoid(logit + self.bias - lse)  # (1,Hq,T)
            if not self.slot_self:
                beta[:, :, at.final] = 0.0
            out = _blend(out, slot, beta)
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


def prepended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    mask: Tensor,
    slot_mask: Tensor,
    scale: float,
    want_beta: bool,
) -> tuple[Tensor, Tensor | None]:
    """The definition: the slot is one more key and value in front.

    Args:
        query, key, value: (B,Hq,n,Dk), (B,Hkv,n,Dk), (B,Hkv,n,Dv).
        slot_key, slot_value: (B,Hkv,Dk), (B,Hkv,Dv).
        mask: (B or 1, 1 or Hq, n, n), additive, the model's own.
        slot_mask: (B, 1 or Hq, n), additive: the bias.
        scale: factor of the logits.
        want_beta: also return beta; costs an explicit (B,Hq,n,n+1) of logits.

    Returns:
        out (B,Hq,n,Dv); beta (B,Hq,n) float32 or None.
    """
    key, value, mask = _with_slot(key, value, slot_key, slot_value, mask, slot_mask)  # n+1 keys
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B,Hq,n+1,Dk), (B,Hq,n+1,Dv)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)  # (B,Hq,n,Dv)
    if not want_beta:
        return out, None
    logits = query.float() @ key.float().transpose(-1, -2) * scale + mask  # (B,Hq,n,n+1)
    return out, logits.softmax(-1)[..., 0]


def closed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    scale: float,
    bias: float,
    blind: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same as `prepended` for full causal attention: plain attention, then a blend with the slot's value.

    Args:
        query, key, value, slot_key, slot_value, scale: as in `prepended`, with Dk = Dv.
        bias: added to the slot's logit.
        blind: (B,) position of each text's token that must not see the slot, if any.

    Returns:
        out (B,Hq,n,Dv); beta (B,Hq,n) float32.
    """
    out, lse = flash.causal_with_lse(query, key, value, scale)  # (B,Hq,n,Dv), (B,Hq,n)
    grouped = query.view(len(query), slot_key.shape[1], -1, *query.shape[2:])  # (B,Hkv,G,n,Dk)
    # float32, as lse is: a large logit rounded to half precision would shift beta. (B,Hkv,G,n)
    logit = (slot_key.float()[:, :, None, None] @ grouped.float().transpose(-1, -2))[..., 0, :]
    beta = torch.sigmoid(logit.flatten(1, 2) * scale + bias - lse)  # (B,Hq,n)
    if blind is not None:
        beta[torch.arange(len(blind), device=blind.device), :, blind] = 0.0
    return _blend(out, slot_value.repeat_interleave(grouped.shape[2], 1)[:, :, None], beta), beta


def _blend(out: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """(1 - share) * out + share * other, in the place of `out`: (B,Hq,n,Dv), (B,Hq,1 or n,Dv), share (B,Hq,n)."""
    return out.lerp_(other, share[..., None].to(out.dtype))


def delegated(
    module: nn.Module,
    kwargs: Mapping[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    mask: Tensor,
    slot_mask: Tensor,
    scale: float,
    want_beta: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `prepended`, but the model's own eager function does the attention, with its soft cap, sinks or position bias.

    The bias is added after the soft cap, since the mask is.
    """
    key, value, mask = _with_slot(key, value, slot_key, slot_value, mask, slot_mask)
    kwargs = dict(kwargs)
    if kwargs.get("position_bias") is not None:
        # 0 for the slot, which has no relative position
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (1, 0))

    def attend(value: Tensor) -> Tensor:
        return eager_function(module)(module, query, key, value, mask, scaling=scale, **kwargs)[0]  # (B,n,Hq,Dv)

    out = attend(value).transpose(1, 2)
    if not want_beta:
        return out, None
    # What comes of values that are 1 in the slot and 0 elsewhere: the weights that functions return may lack the sinks.
    slot_alone = torch.zeros_like(value)
    slot_alone[:, :, 0] = 1.0
    return out, attend(slot_alone)[..., 0].transpose(1, 2).float()


def unmasked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, last: Tensor, scale: float, kwargs: Mapping[str, Any]
) -> Tensor:
    """A baseline, not the method: every token attends to every real token, with no causal mask and no window.

    Returns:
        (B,n,Hq,Dv).
    """
    visible = torch.arange(key.shape[2], device=key.device) <= last[:, None]  # (B,n)
    mask = visible[:, None, None].expand(-1, 1, query.shape[2], -1)  # (B,1,n,n)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{type(module).__name__} has a causal position bias; its mask can't be taken off")
    if changes_logits(kwargs):
        mask = float_mask(query, key, mask)
        return eager_function(module)(module, query, key, value, mask, scaling=scale, **kwargs)[0]
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scale, is_causal=False)[0]  # type: ignore[no-any-return]


def unrotate(
    module: nn.Module, layer: int, slot_key: Tensor, rotations: Mapping[Any, tuple[Tensor, Tensor]], last: Tensor
) -> Tensor:
    """Undo the rotary embedding of position `last`: the slot's key (B,Hkv,Dk) as if it stood at position 0.

    Raises:
        UnsupportedModel: the model's rotary embedding is not the common kind.
    """
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    types = getattr(getattr(module, "config", None), "layer_types", None)
    rotation = rotations.get(types[layer] if types else None, rotations.get(None))
    try:
        if rotate is None or rotation is None or rotation[0].shape[-1] != slot_key.shape[-1]:
            raise TypeError("another kind of rotary embedding")
        rows = torch.arange(len(last), device=slot_key.device)
        parts = (part.to(slot_key.device).expand(len(last), -1, -1)[rows, last] for part in rotation)
        cos, sin = (part[:, None].to(slot_key.dtype) for part in parts)
        turned: Tensor = rotate(slot_key[:, :, None], slot_key[:, :, None], cos, -sin)[0]  # (B,Hkv,1,Dk)
    except (TypeError, ValueError, RuntimeError):
        raise UnsupportedModel(
            f"layer {layer} of {type(module).__name__} has no plain rotary embedding; slot_position=first needs one"
        ) from None
    # cos and sin (B,1,Dk) may carry a common factor (YaRN) that was in the key already and has now come in twice.
    return (turned / (cos**2 + sin**2).sqrt()[:, None])[:, :, 0]


def _with_slot(
    key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, mask: Tensor, slot_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    key = torch.cat([slot_key[:, :, None], key], 2)  # (B,Hkv,n+1,Dk)
    value = torch.cat([slot_value[:, :, None], value], 2)  # (B,Hkv,n+1,Dv)
    mask = mask.expand(len(key), *mask.shape[1:])
    return key, value, torch.cat([slot_mask[..., None], mask], -1)  # (B, 1 or Hq, n, n+1)


def _is_plain(key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> bool:
    """Full causal softmax attention with one head size: what the kernels of `kvembed.flash` do."""
    return mask is None and key.shape[-1] == value.shape[-1] and not changes_logits(kwargs)
