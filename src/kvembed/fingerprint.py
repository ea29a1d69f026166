# ruff: noqa: RUF001 (letters of many scripts)
"""Fingerprint: tells models apart, so that nothing that was made with one is taken for another's."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .backbone import Backbone
from .errors import InputError
from .probe import has_adapter
from .prompts import UNLIMITED, Prompter

__all__ = ["COMPILED", "fingerprint", "staying_packed", "tokenizer_told"]

# Cased, accented and composed letters, white space, digits, code, scripts: a rule changed for any shows in the ids.
_PROBE = (
    "The QUICK brown fox's naïve re\u0301sume\u0301 of 1,234.56 USD\u00a0\u2014 isn't it?\n\n\tdef f(x): return x ** 2 "
    "# TODO\r\n  Größe, façade, İstanbul; Привет, мир! Γειά σου 你好世界 こんにちは 안녕하세요 مرحبا שלום नमस्ते "
    "ﬁne ① Ａ \u200b👩\u200d🔬 unbelievably antidisestablishmentarianism zzxqj https://example.org/a_b?c=d&e=%20"
)
COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's weights
_PIECE = 2**20  # values that are rounded at a time


def fingerprint(backbone: Backbone, prompter: Prompter) -> str:
    """16 hex digits that tell models apart: by every weight, the adapters in use, how positions rotate, the tokenizer.

    Whatever a checkpoint holds is a weight, buffers and packed integers too. What else a configuration says, a window
    or a norm's epsilon changed by hand, is not seen. Weights are taken in bfloat16, and each row by the sum of its bits
    as 64-bit integers, which has no rounding: so it is the same whether they were loaded as float32 or bfloat16, and on
    any device; float16 rounds otherwise. The tokenizer is known by its size, its marks of beginning and end, and the
    ids that it makes of a text of many scripts. A billion weights in memory take about half a second in float32, and a
    fifth of it in bfloat16.

    Raises:
        InputError: weights that are offloaded can't be read.
    """
    digest = hashlib.sha256(backbone.model_type.encode())
    with staying_packed(backbone.decoder):
        tensors = dict(backbone.decoder.named_parameters())
        kept = {id(parameter) for parameter in tensors.values()}
        for name, value in backbone.decoder.state_dict(keep_vars=True).items():
            tensors |= {f"{name}{place}": part for place, part in _tensors(value) if id(part) not in kept}
        rotations = {name: tensor for name, tensor in backbone.decoder.named_buffers() if name.endswith("inv_freq")}
        for name in rotations:
            if (first := name.removesuffix("inv_freq") + "original_inv_freq") in rotations:
                tensors[first] = rotations[first]  # the other may change with a long text
            else:
                tensors[name] = rotations[name]
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise InputError(
                    "the model's weights are offloaded, so nothing can be chosen or fitted for them: give layers=..., "
                    "and no method with a transform"
                )
            digest.update(
                f"{name.replace(COMPILED, '')}{tuple(tensor.shape)}".encode() + _sums(tensor).numpy().tobytes()
            )
    for name, module in backbone.decoder.named_modules():
        if has_adapter(module):
            scales = getattr(module, "scaling", None)
            scales = scales if isinstance(scales, dict) else {}  # the attention's own factor, behind a wrapper
            active = [] if module.disable_adapters else [(one, scales.get(one)) for one in module.active_adapters]
            digest.update(f"{name}{active}".encode())
    digest.update(tokenizer_told(prompter).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def staying_packed(model: nn.Module) -> Iterator[None]:
    """Weights of 4 bits stay as bitsandbytes packs them for a CPU at their first forward: its `state_dict` unpacks them
    where they are, and the next forward would pack them wrongly.
    """
    kept = []
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            kept.append((weight, weight.data, copy.copy(state)))
    try:
        yield
    finally:
        for weight, data, state in kept:
            weight.data, weight.quant_state = data, state


def tokenizer_told(prompter: Prompter) -> str:
    """What tells a tokenizer from others: its size and marks, and the ids that it makes of a text of many scripts."""
    (probe,) = prompter([_PROBE], "{text}", UNLIMITED)
    return repr((prompter.size, prompter.marks, probe.ids))


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Those of a module's saved state: it is one, or a tuple that holds packed weights, or says how they are packed."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{place}.{index}")


@torch.no_grad()
def _sums(tensor: Tensor) -> Tensor:
    """(rows,) int64 of a matrix, (1,) of a vector: sums, modulo 2**64, of its bits, four values to a number."""
    if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):  # torch's own, or a library's wrapped one
        tensor = tensor.dequantize()
    rows = tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
    kind = torch.bfloat16 if rows.is_floating_point() else torch.int16
    found = []
    for piece in torch.split(rows, max(1, _PIECE // max(1, rows.shape[1]))):
        words = pad(piece.to(kind), (0, -piece.shape[1] % 4)).contiguous().view(torch.int64)
        found.append(words.sum(1).cpu())
    return torch.cat(found)
