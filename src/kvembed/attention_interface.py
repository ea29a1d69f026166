"""The door to any model: transformers' attention interface, which every attention of a decoder goes through.

While `attending(decoder, f)` is open, this thread's forwards of that decoder call `f` for attention. Other threads that
use the same model meanwhile get the model's own, and the model's configuration is put back when the last user leaves.
Shapes are named as in `kvembed.attention`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UnsupportedModel

__all__ = ["Attention", "attending", "changes_logits", "eager_function", "float_mask", "stock_attention", "unfit"]

# The call of transformers' attention interface: (module, q (B,Hq,n,Dk), k (B,Hkv,n,Dk), v (B,Hkv,n,Dv), mask, **kwargs)
# -> (out (B,n,Hq,Dv), weights or None); q, k and v are after rotary embedding, k and v before they are repeated for G.
Attention = Callable[..., tuple[Tensor, Tensor | None]]

# Arguments that change the logits or their normalisation; only the model's own eager function knows how.
_LOGIT_CHANGES = ("softcap", "s_aux", "sinks", "position_bias")

# What else models pass to their attention that leaves the logits alone (a window is in the mask). Anything unknown is
# refused: a sparse indexer's `indices`, say, would be ignored without a word.
_HARMLESS = frozenset(
    """scaling dropout is_causal sliding_window position_ids output_attentions use_cache cache_position past_key_values
    past_key_value layer_idx output_router_logits return_dict""".split()  # noqa: SIM905 (a list would take 13 lines)
)

_ACTIVE: ContextVar[tuple[Attention, Callable[..., Any]] | None] = ContextVar("kvembed_attention", default=None)
_SWITCHED: dict[int, tuple[int, str | None]] = {}  # id(config) -> users now, the model's own implementation
_SWITCH_LOCK = threading.Lock()


@contextlib.contextmanager
def attending(
    decoder: nn.Module, attend: Attention, make_mask: Callable[..., Tensor | None] = sdpa_mask
) -> Iterator[None]:
    """While open, this thread's forwards of `decoder` call `attend` for every attention.

    Masks come as for sdpa: None (plain causal), bool (True = attend) or additive. The decoder's configuration is put
    back on the way out, also after an exception; with several users, when the last one leaves.

    Args:
        decoder: a transformers model.
        attend: an attention function, called as `Attention` says.
        make_mask: makes its masks, called as transformers' own is.
    """
    held = (getattr(module, "config", None) for module in decoder.modules())
    configs: dict[int, Any] = {id(config): config for config in held if hasattr(config, "_attn_implementation")}
    with _SWITCH_LOCK:
        for key, config in configs.items():
            users, stock = _SWITCHED.get(key, (0, config._attn_implementation))
            _SWITCHED[key] = users + 1, stock
            if users == 0:
                config._attn_implementation = {"": _hook(stock or "eager")}  # {"": name} leaves sub-configs alone
    token = _ACTIVE.set((attend, make_mask))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        with _SWITCH_LOCK:
            for key, config in configs.items():
                users, stock = _SWITCHED[key]
                if users > 1:
                    _SWITCHED[key] = users - 1, stock
                else:
                    del _SWITCHED[key]
                    config._attn_implementation = {"": stock}


@functools.cache
def _hook(stock: str) -> str:
    """Register, once, an attention and its mask that stand in for `stock`; returns their name.

    Both must be registered under one name: with the attention alone, transformers silently drops the padding mask.
    Threads without an open `attending` are sent on to `stock`, so a model can be used by others at the same time.
    """
    # Not named after `stock`: words like "flash" or "sdpa" in a name switch other code paths in transformers.
    name = f"kvembed_{_hook.cache_info().currsize}"

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        active = _ACTIVE.get()
        attend = active[0] if active else ALL_ATTENTION_FUNCTIONS.get(stock) or eager_function(module)
        return attend(module, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        active = _ACTIVE.get()
        make = active[1] if active else ALL_MASK_ATTENTION_FUNCTIONS.get(stock)
        return None if make is None else make(*args, **kwargs)

    # A compiled graph can't ask which of a forward's calls this is, and whose.
    AttentionInterface.register(name, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(name, mask)
    return name


def unfit(module: nn.Module, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> str | None:
    """Why an attention call can't be re-routed, or None if it can."""
    if not _is_causal(module, kwargs):
        return "its attention is not causal, so there is nothing to re-route around"
    if key.shape[2] != query.shape[2]:
        return f"its attention sees {key.shape[2]} keys for {query.shape[2]} tokens (compressed or shared keys)"
    if unknown := sorted(name for name in kwargs.keys() - _HARMLESS - {*_LOGIT_CHANGES} if kwargs[name] is not None):
        return f"its attention takes {', '.join(unknown)} (sparse or special), which re-routing would ignore"
    return None


def stock_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Plain causal attention for a layer that is not re-routed, given a mask of the sdpa kind (None, bool or float)."""
    if changes_logits(kwargs):
        return eager_function(module)(module, query, key, value, float_mask(query, key, attention_mask), **kwargs)
    out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return out, None


def float_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Any causal mask of the sdpa kind as an additive one, of 0 and the dtype's lowest number; by default (1,1,n,n)."""
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        # Not -inf: a padding row with no visible key must not become NaN.
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask.to(query.dtype)


def changes_logits(kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention call's arguments do more than softmax of scaled, masked products."""
    return any(kwargs.get(name) is not None for name in _LOGIT_CHANGES)


def _is_causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention call without a mask means causal attention, as transformers decides it."""
    stated = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if stated is None else stated)


def eager_function(module: nn.Module) -> Attention:
    """The attention that the model's own file has. Raises `UnsupportedModel` if there is none."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedModel(f"{type(module).__name__} changes its attention logits and has no eager function to ask")
    return eager  # type: ignore[no-any-return]
