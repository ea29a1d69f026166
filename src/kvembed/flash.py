"""Attention kernels that also return the log-sum-exp of the logits, which the closed form needs.

On a CPU torch's own, which is private to torch; on NVIDIA GPUs of 2020 or later, in half precision, flash attention for
texts of many lengths. Where there is none, `kvembed.attention` uses the prepended form. The GPU's has not been run on a
GPU yet: its logic is tested with a stand-in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention import varlen
except ImportError:  # torch < 2.10
    varlen = None  # type: ignore[assignment]

__all__ = ["causal_with_lse", "full_with_lse", "has_causal", "has_varlen", "serves", "varlen_with_lse"]

_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_VARLEN = varlen is not None and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def has_causal(query: Tensor) -> bool:
    """Whether `causal_with_lse` takes queries like this one (and values of the same head size)."""
    return _CPU is not None if query.device.type == "cpu" else has_varlen(query)


def has_varlen(query: Tensor) -> bool:
    """Whether `varlen_with_lse` takes queries like this one (and values of the same head size)."""
    return serves(query.device, query.dtype) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for texts of many lengths, for heads that it takes."""
    if not _VARLEN or device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
    starts = torch.arange(texts + 1, dtype=torch.int32, device=query.device) * n
    out, lse = varlen_with_lse(q, k, v, starts, n, scale)
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
    # Made on the device: a copy from here would wait for all that was launched before it, in every layer.
    none_and_all = torch.arange(2, dtype=torch.int32, device=query.device)
    queries, keys = (none_and_all * part.shape[2] for part in (query, key))
    return _varlen(query, key, value, queries, keys, query.shape[2], key.shape[2], scale, (-1, -1))


def varlen_with_lse(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Plain causal attention within each of several texts that lie behind one another.

    Args:
        query, key, value: (1,Hq,T,D), (1,Hkv,T,D), (1,Hkv,T,D).
        starts: (texts + 1,) int32, where in T each text starts, and T.
        longest: tokens of the longest text.
        scale: factor of the logits.

    Returns:
        out (1,Hq,T,D); lse (1,Hq,T) float32, as in `causal_with_lse`.
    """
    return _varlen(query, key, value, starts, starts, longest, longest, scale, (-1, 0))


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The kernel's own call; `window`: (-1, 0) for causal attention, (-1, -1) for full."""
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (T,H,D)
    options: dict[str, Any] = {"scale": scale, "window_size": window, "enable_gqa": True}
    out, lse = varlen.varlen_attn(
        q,
        k,
        v,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        return_aux=varlen.AuxRequest(lse=True),
        **options,
    )
    # The kernel gives lse as (Hq,T); its documentation says (T,Hq).
    lse = lse if lse.shape == (q.shape[1], q.shape[0]) else lse.T
    return out.transpose(0, 1)[None], lse[None]
