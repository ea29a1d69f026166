"""Attention kernels that also return the log-sum-exp of the logits, which the closed form needs.

On a CPU torch's own, which is private to torch; on NVIDIA GPUs of 2020 or later, in half precision, flash attention for
texts of many lengths. Where there is none, `kvembed.attention` uses the prepended form. The GPU's has not been run on a
GPU yet: its logic is tested with a stand-in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch.nn.attention import varlen
except ImportError:  # torch < 2.10
    varlen = None  # type: ignore[assignment]

__all__ = ["causal_with_lse", "full_with_lse", "has_causal", "has_varlen", "varlen_with_lse"]

_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_VARLEN = varlen is not None and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def has_causal(query: Tensor) -> bool:
    """Whether `causal_with_lse` takes queries like this one (and values of the same head size)."""
    return _CPU is not None if query.device.type == "cpu" else has_varlen(query)


def has_varlen(query: Tensor) -> bool:
    """Whether `varlen_with_lse` takes queries like this one (and values of the same head size)."""
    if not _VARLEN or query.device.type != "cuda" or torch.version.hip:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def causal_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain causal attention.

    Args:
        query, key, value: (B,Hq,n,D), (B,Hkv,n,D), (B,Hkv,n,D).
        scale: factor of the logits.

    Returns:
        out (B,Hq,n,D); the natural log-sum-exp of each token's logits (B,Hq,n) float32.
    """
    if query.device.type == "cpu" and _CPU is not None:
        out, lse = _CPU(query, key, value, 0.0, True, scale=scale)
        return out, lse
    texts, heads, n, dim = query.shape
    q, k, v = (part.transpose(0, 1).flatten(1, 2)[None] for part in (query, key, value))  # (1,H,B*n,D)
    ends = torch.arange(1, texts + 1, device=query.device) * n
    out, lse = varlen_with_lse(q, k, v, ends, n, scale)
    return out.view(heads, texts, n, dim).transpose(0, 1), lse.view(heads, texts, n).transpose(0, 1)


def full_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key.

    Args:
        query, key, value: (1,Hq,T,D), (1,Hkv,p,D), (1,Hkv,p,D).
        scale: factor of the logits.

    Returns:
        out (1,Hq,T,D); lse (1,Hq,T) float32, as in `causal_with_lse`.
    """
    if query.device.type == "cpu" and _CPU is not None:
        out, lse = _CPU(query, key, value, 0.0, False, scale=scale)
        return out, lse
    queries, keys = (torch.tensor([part.shape[2]], device=query.device) for part in (query, key))
    return _varlen(query, key, value, queries, keys, query.shape[2], key.shape[2], scale, (-1, -1))


def varlen_with_lse(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Plain causal attention within each of several texts that lie behind one another.

    Args:
        query, key, value: (1,Hq,T,D), (1,Hkv,T,D), (1,Hkv,T,D).
        ends: (texts,) integers, where in T each text ends; the next begins there.
        longest: tokens of the longest text.
        scale: factor of the logits.

    Returns:
        out (1,Hq,T,D); lse (1,Hq,T) float32, as in `causal_with_lse`.
    """
    return _varlen(query, key, value, ends, ends, longest, longest, scale, (-1, 0))


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The kernel's own call; `window`: (-1, 0) for causal attention, (-1, -1) for full."""
    first, second = (nn.functional.pad(ends, (1, 0)).to(torch.int32) for ends in (query_ends, key_ends))
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (T,H,D)
    options: dict[str, Any] = {"scale": scale, "window_size": window, "enable_gqa": True}
    out, lse = varlen.varlen_attn(
        q, k, v, first, second, most_queries, most_keys, return_aux=varlen.AuxRequest(lse=True), **options
    )
    # The kernel gives lse as (Hq,T); its documentation says (T,Hq).
    lse = lse if lse.shape == (q.shape[1], q.shape[0]) else lse.T
    return out.transpose(0, 1)[None], lse[None]
