"""LongRoPE (Phi-3): a batch's longest text decides the angles that all of it is turned by, kept in the model itself."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = ["alone", "rope_border"]

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def rope_border(model: PreTrainedModel) -> int | None:
    """The length in tokens above which a batch is turned by other angles; None for every other rotary embedding."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return next(
        (kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"), None
    )


def alone(decoder: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """To be held during a forward: those of a model with LongRoPE must not overlap, in whatever threads."""
    if rope_border(decoder) is None:
        return contextlib.nullcontext()
    with _MAKING:
        return _LOCKS.setdefault(decoder, threading.Lock())
