"""kvembed: any frozen decoder-only language model as a text-embedding model, with no training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EmbedConfig, Readout, Role
    from .embedder import Embedder
    from .errors import InputError, KvembedError, ModelNotFound, OutOfMemory, TextTooLong, UnsupportedModel
    from .explanation import Explanation
    from .methods import METHODS
    from .vectors import Encoded

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "EmbedConfig",
    "Embedder",
    "Encoded",
    "Explanation",
    "InputError",
    "KvembedError",
    "ModelNotFound",
    "OutOfMemory",
    "Readout",
    "Role",
    "TextTooLong",
    "UnsupportedModel",
    "__version__",
]

_HOMES = {
    "METHODS": "methods",
    "EmbedConfig": "config",
    "Embedder": "embedder",
    "Encoded": "vectors",
    "Explanation": "explanation",
    "Readout": "config",
    "Role": "config",
    "InputError": "errors",
    "KvembedError": "errors",
    "ModelNotFound": "errors",
    "OutOfMemory": "errors",
    "TextTooLong": "errors",
    "UnsupportedModel": "errors",
}


if not TYPE_CHECKING:  # or else a type checker would take any name

    def __getattr__(name: str) -> Any:
        # Lazy, so that `kvembed --help` does not pay for importing torch.
        if name not in _HOMES:
            raise AttributeError(f"module 'kvembed' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
