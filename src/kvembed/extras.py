"""Optional packages: imported where they are needed, and named with the pip line where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import InputError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> Any:
    """Import an optional dependency. Raises `InputError` with the pip line if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"this needs {module.split('.')[0]}: pip install 'kvembed[{extra}]'") from None
