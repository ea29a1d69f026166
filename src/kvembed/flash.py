"""Attention kernels that also return the log-sum-exp of the logits, which the closed form needs.

Both are torch's own, and private to it: one for CPUs; and for NVIDIA GPUs of 2020 or later, in half precision, flash
attention for texts of many lengths, which is used once a trial on the GPU has agreed with the definition. Where there
is none, `kvembed.reroute` uses the prepended form. The GPU's has not been run on a GPU yet: its logic is tested with
a stand-in.

Letters as there; packed texts (`kvembed.packing`) have T tokens together.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .device import is_out_of_memory

__all__ = [
    "causal_with_lse",
    "full_with_lse",
    "packed_with_lse",
    "serves",
    "slots_with_lse",
    "takes_causal",
    "takes_packed",
]

logger = logging.getLogger(__name__)

_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
# What `torch.nn.attention.varlen` calls, which is not in torch < 2.10, and takes no grouped heads in torch < 2.12.
_GPU = getattr(torch.ops.aten, "_flash_attention_forward", None)


def takes_causal(query: Tensor) -> bool:
    """Whether `causal_with_lse` takes queries like this one (and values of the same head size)."""
    return _CPU is not None if query.device.type == "cpu" else takes_packed(query)


def takes_packed(query: Tensor) -> bool:
    """Whether `packed_with_lse` takes queries like this one (and values of the same head size)."""
    return serves(query.device, query.dtype) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


@functools.cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for texts of many lengths, for heads that it takes; tried once."""
    if _GPU is None or device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    with torch.autocast(device.type, enabled=False):  # the caller's would change what it is compared with
        return torch.cuda.get_device_capability(device) >= (8, 0) and _agrees(device, dtype)


@torch.inference_mode()
def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GPU's kernel does here what this file takes it to do, tried on three short texts."""
    lengths, heads, kv_heads, dim, scale = [7, 4, 1], 4, 2, 16, 0.25
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, h, sum(lengths), dim, generator=random, device="cpu").to(device, dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    last = starts[1:].long() - 1
    place = torch.arange(sum(lengths), device=device)
    text = torch.bucketize(place, last)
    own, apart = text[:, None] == text, place[:, None] - place
    causal = own & (apart >= 0)
    slots = key[:, :, last], value[:, :, last]
    try:
        tried = [  # what is seen, out, lse
            (causal, *packed_with_lse(query, key, value, starts, 7, scale)),
            (causal & (apart < 3), *packed_with_lse(query, key, value, starts, 7, scale, window=3)),
            (torch.ones_like(own), *full_with_lse(query, key, value, scale)),
            (own & (place == last[text][:, None]), *slots_with_lse(query, *slots, starts, 7, scale)),
        ]
    except Exception as error:  # another signature, or nothing behind it
        if is_out_of_memory(error):
            raise
        tried = []
    whole_key, whole_value = (part.float().repeat_interleave(heads // kv_heads, 1) for part in (key, value))
    logits = query.float() @ whole_key.transpose(-1, -2) * scale  # (1,Hq,T,T)
    near = functools.partial(torch.allclose, atol=2e-2, rtol=2e-2)
    alike = []
    for mask, out, lse in tried:
        seen = logits.masked_fill(~mask, float("-inf"))
        alike.append(lse.shape == seen.shape[:-1] and near(lse, seen.logsumexp(-1)))
        alike.append(near(out.float(), seen.softmax(-1) @ whole_value))
    if alike and all(alike):
        return True
    logger.warning("flash attention of torch %s is not as expected; a slower form is used", torch.__version__)
    return False


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
    out, lse = packed_with_lse(q, k, v, starts, n, scale)
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
    return _on_gpu(query, key, value, queries, keys, query.shape[2], key.shape[2], scale, causal=False)


def packed_with_lse(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Plain causal attention within each of several texts, on a GPU.

    Args:
        query, key, value: (1,Hq,T,D), (1,Hkv,T,D), (1,Hkv,T,D).
        starts: (texts + 1,) int32, where in T each text starts, and T.
        longest: tokens of the longest text.
        scale: factor of the logits.
        window: how many tokens a token sees, itself among them; None for all up to it.

    Returns:
        out (1,Hq,T,D); lse (1,Hq,T) float32, as in `causal_with_lse`.
    """
    return _on_gpu(query, key, value, starts, starts, longest, longest, scale, causal=True, window=window)


def slots_with_lse(
    query: Tensor, slot_key: Tensor, slot_value: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of packed texts' queries to their own text's slot alone, on a GPU: its value, and its logit.

    Args:
        query, slot_key, slot_value: (1,Hq,T,D), (1,Hkv,texts,D), (1,Hkv,texts,D).
        starts, longest, scale: as in `packed_with_lse`.

    Returns:
        The slot's value for each query (1,Hq,T,D); its logit (1,Hq,T) float32.
    """
    keys = torch.arange(len(starts), dtype=torch.int32, device=query.device)
    return _on_gpu(query, slot_key, slot_value, starts, keys, longest, 1, scale, causal=False)


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel's own call."""
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (T,H,D)
    places = query_starts, key_starts, most_queries, most_keys
    # Tokens that are seen before and after; -1: all. With one query a text, causal and full are the same; as causal
    # the kernel keeps its usual output layout.
    before, after = -1 if window is None else window - 1, 0 if causal or most_queries == 1 else -1
    options = {"scale": scale, "window_size_left": before, "window_size_right": after}
    out, lse, *_ = _GPU(q, k, v, *places, 0.0, causal, False, **options)  # type: ignore[misc]
    return out.transpose(0, 1)[None], lse[None]
