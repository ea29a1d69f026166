"""The errors kvembed raises on purpose. The command line prints their message as one line."""

from __future__ import annotations

__all__ = [
    "InputError",
    "KvembedError",
    "ModelNotFound",
    "OutOfMemory",
    "TextTooLong",
    "UnsupportedModel",
    "not_finite",
]


class KvembedError(Exception):
    """Base of every error raised on purpose; the message says what to do."""


class InputError(KvembedError, ValueError):
    """A text, a file or an option can't be used as given."""


class TextTooLong(InputError):
    """A text has more tokens than there may be, and must not be cut."""


class ModelNotFound(KvembedError, OSError):
    """A model could not be found, downloaded, read or converted."""


class UnsupportedModel(KvembedError, TypeError):
    """The model or its tokenizer can't do what is asked, or would do it wrongly; the message says which and why."""


class OutOfMemory(KvembedError, MemoryError):
    """A single text does not fit in memory, so halving the batch can't help."""


def not_finite(dtype: str) -> KvembedError:
    """What to raise for states that are not finite, in a dtype by its name."""
    way = "try dtype=bfloat16 or float32" if dtype == "float16" else "its weights may be damaged"
    return KvembedError(f"the model's states are not finite in {dtype}; {way}")
