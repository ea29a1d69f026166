"""The command line's process: what torch frees stays with it for the next batch, up to a bound."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_for_the_next_batch"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_OWN_MAPPING = 32 << 20  # bytes; the most that every glibc takes
_KEPT = 256 << 20  # bytes


def keep_for_the_next_batch() -> None:
    """Set limits of this process and those that it starts, where the user has not: for programs, not for libraries.

    By default glibc gives the memory of a layer's larger tensors back to the system as they are freed, and gets it anew
    for the next layer's, page by page; a batch of 2,048 tokens took a sixth longer (docs/decisions.md). And torch keeps
    1,024 compiled matrix products, one for each length of a batch and shape of a weight: 600 MB.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    limits = {
        "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, _OWN_MAPPING),
        "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, _KEPT),
    }
    if limits.keys() & os.environ.keys():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    for name, (limit, size) in limits.items():
        mallopt(limit, size)
        os.environ[name] = str(size)
