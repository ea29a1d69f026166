"""KV-Embedding from its definition, in float64, one unpadded text at a time, with no transformers code: the oracle.

Covers the llama, mistral, qwen2 and gemma3 families, enough to hold the package's real forwards against.
"""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float, factor: float = 1.0, offset: int = 0) -> Tensor:
    """Rotary embedding of (H, n, D), halves convention, first position `offset`."""
    n, d = x.shape[1:]
    frequency = theta ** (-torch.arange(0, d, 2, dtype=F64) / d) / factor
    angle = (torch.arange(n, dtype=F64) + offset)[:, None] * frequency  # (n, D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def project(x: Tensor, weights: dict[str, Tensor], name: str, count: int, size: int) -> Tensor:
    """Linear layer, with a bias if there is one, split into heads: (n, D) -> (count, n, size)."""
    y = x @ weights[f"{name}.weight"].to(F64).T
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"].to(F64)
    return y.view(len(x), count, size).transpose(0, 1)


def rerouted_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot: tuple[Tensor, Tensor] | None, bias: float, window: int | None
) -> Tensor:
    """(H, n, D) each, slot (H, D) each -> (H, n, D); row by row, straight from the definition."""
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = 0 if window is None else max(0, i - window + 1)
            logits, values = k[head, first : i + 1] @ q[head, i] * scale, v[head, first : i + 1]
            if slot is not None:
                logits = torch.cat([(slot[0][head] @ q[head, i] * scale + bias)[None], logits])
                values = torch.cat([slot[1][head][None], values])
            out[head, i] = logits.softmax(0) @ values
    return out


def states(
    weights: dict[str, Tensor], config, ids: list[int], layers: set[int], bias: float = 1.0, first: bool = False
) -> Tensor:
    """Last hidden states after the final norm: (n, D) float64.

    Args:
        weights: the state dict of a transformers base model (`embed_tokens.weight`, `layers.0...`), any dtype.
        config: its configuration object, read for plain numbers only.
        ids: one text's token ids.
        layers: layers to re-route.
        bias: of the slot.
        first: turn the slot's key back to position 0.
    """
    w = lambda name: weights[name].to(F64)  # noqa: E731
    gemma = config.model_type.startswith("gemma3")
    one = 1.0 if gemma else 0.0
    eps = config.rms_norm_eps
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    scale = config.query_pre_attn_scalar**-0.5 if gemma else size**-0.5
    rope = config.rope_parameters

    x = weights["embed_tokens.weight"][torch.tensor(ids)].to(F64)
    if gemma:
        x = x * config.hidden_size**0.5
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)[layer]
        sliding = kind == "sliding_attention" or (config.model_type == "mistral" and config.sliding_window)
        numbers = rope[kind] if gemma else rope
        theta, factor = numbers["rope_theta"], numbers.get("factor") or 1.0

        h = rms_norm(x, w(at + "input_layernorm.weight") + one, eps)

        q, k, v = (
            project(h, weights, f"{at}self_attn.{name}", count, size)
            for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        )
        if gemma:
            q = rms_norm(q, w(at + "self_attn.q_norm.weight") + 1, eps)
            k = rms_norm(k, w(at + "self_attn.k_norm.weight") + 1, eps)
        plain_k = k.repeat_interleave(heads // kv_heads, 0)
        q, k = rotate(q, theta, factor), rotate(k, theta, factor)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        slot = None
        if layer in layers:
            slot = (plain_k if first else k)[:, -1], v[:, -1]
        mixed = rerouted_attention(q, k, v, scale, slot, bias, config.sliding_window if sliding else None)
        h = mixed.transpose(0, 1).reshape(len(ids), -1) @ w(at + "self_attn.o_proj.weight").T
        if gemma:
            x = x + rms_norm(h, w(at + "post_attention_layernorm.weight") + 1, eps)
            h = rms_norm(x, w(at + "pre_feedforward_layernorm.weight") + 1, eps)
            gate = torch.nn.functional.gelu(h @ w(at + "mlp.gate_proj.weight").T, approximate="tanh")
        else:
            x = x + h
            h = rms_norm(x, w(at + "post_attention_layernorm.weight"), eps)
            gate = torch.nn.functional.silu(h @ w(at + "mlp.gate_proj.weight").T)
        h = (gate * (h @ w(at + "mlp.up_proj.weight").T)) @ w(at + "mlp.down_proj.weight").T
        x = x + (rms_norm(h, w(at + "post_feedforward_layernorm.weight") + 1, eps) if gemma else h)
    return rms_norm(x, w("norm.weight") + one, eps)


def hybrid(states: Tensor) -> Tensor:
    """normalize((last + mean) / 2): (n, D) -> (D,)."""
    vector = (states[-1] + states.mean(0)) / 2
    return vector / vector.norm()


def fast_attention(q, k, v, scale, slot, bias, window):
    """`rerouted_attention` for long texts: one head at a time, whole matrices; tested against the loop."""
    n = q.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    hidden = (j > i) | ((j <= i - window) if window else torch.zeros(n, n, dtype=torch.bool))
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        logits = (q[head] @ k[head].T * scale).masked_fill(hidden, -torch.inf)
        values = v[head]
        if slot is not None:
            logits = torch.cat([(q[head] @ slot[0][head] * scale + bias)[:, None], logits], 1)
            values = torch.cat([slot[1][head][None], values])
        out[head] = logits.softmax(1) @ values
    return out
