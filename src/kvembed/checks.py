"""Checks of values that come from outside."""

from __future__ import annotations

import numbers

from .errors import InputError

__all__ = ["check_unicode", "is_whole"]


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
