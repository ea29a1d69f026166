"""Checks of values that come from outside."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InputError

__all__ = ["check_unicode", "each_text", "is_whole", "list_texts"]


def check_unicode(text: str, place: str) -> None:
    """Raises `InputError` for a lone surrogate, which JSON can hold and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{place} holds a lone surrogate (U+{code:04X}) at character {error.start}: not valid Unicode"
        ) from None


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of NumPy or Python; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def each_text(texts: Any) -> Iterable[Any]:
    """The texts one by one. Raises `InputError` for what is no list of them, also for what can be gone through, but
    not text by text: a table gives its columns' names, a dict its keys.
    """
    if isinstance(texts, str | bytes):
        raise InputError(f"texts must be strings in a list, not one {type(texts).__name__}")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise InputError(f"texts must be strings in a list, not a {type(texts).__name__}; of a table, give one column")
    try:
        iter(texts)
    except TypeError:
        raise InputError(f"texts must be strings in a list, not a {type(texts).__name__}") from None
    listed: Iterable[Any] = texts.to_pylist() if hasattr(texts, "to_pylist") else texts  # pyarrow's are no strings
    return listed


def list_texts(texts: Any) -> list[Any]:
    """`each_text` at once."""
    return list(each_text(texts))
