"""What decides an embedder's vectors: what was made with another one is noticed, and told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedder import Embedder

__all__ = ["first_difference", "identity"]


def identity(embedder: Embedder, *, anew: bool = True) -> dict[str, Any]:
    """Everything that decides an embedder's vectors, in plain JSON types.

    Args:
        anew: look at the model's weights again; not needed where they have just been loaded.
    """
    return {
        "fingerprint": embedder.fingerprint(anew=anew),
        "dtype": embedder.dtype,
        "config": embedder.config.to_dict(),
        "max_tokens": embedder.max_tokens,
        "transform": None if embedder.transform is None else embedder.transform.digest(),
        "dim": embedder.dim,
    }


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing in which `before` differs from `now`, as in `bias 1.0, not 2.0`; empty if nothing does."""
    for name, new in now.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if deeper := first_difference(old, new):
                return deeper
        elif old != new:
            return f"{name} {json.dumps(old):.80}, not {json.dumps(new):.80}"
    return ""
