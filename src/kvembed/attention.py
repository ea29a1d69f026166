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
    delegated   prepended, then the model's own eager function, for what changes the logits or their sum
                (soft cap, sinks, position bias)

`kvembed.reroute` calls them from a model's forward, and has the closed form once more, for many packed texts at once;
`kvembed.tiles` is a faster way to the prepended one for packed texts in bfloat16 on a CPU.

Letters: B texts, Hq query heads, Hkv key-value heads, G = Hq / Hkv, n tokens, Dk and Dv head sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import flash
from .attention_interface import changes_logits, eager_function, float_mask
from .errors import UnsupportedModel

__all__ = ["blend", "closed", "delegated", "prepended", "unmasked", "unrotate"]


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
    return blend(out, slot_value.repeat_interleave(grouped.shape[2], 1)[:, :, None], beta), beta


def blend(out: Tensor, other: Tensor, share: Tensor) -> Tensor:
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
