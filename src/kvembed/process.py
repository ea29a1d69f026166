"""The command line's process: imports are quick, freed memory stays for the next batch, idle threads go."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

__all__ = ["import_models", "is_importing", "keep_freed_memory", "quiet", "release_openmp_threads"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_OWN_MAPPING = 32 << 20  # bytes; the most that every glibc takes
_KEPT = 256 << 20  # bytes
_importing = False


def keep_freed_memory() -> None:
    """Set limits of this process and those that it starts, where the user has not: for programs, not for libraries.

    By default glibc gives the memory of a layer's larger tensors back to the system as they are freed, and gets it anew
    for the next layer's, page by page; a batch of 2,048 tokens took a sixth longer (docs/decisions.md). And torch keeps
    1,024 compiled matrix products, one for each length of a batch and shape of a weight: 600 MB.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")
    limits = {
        "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, _OWN_MAPPING),
        "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, _KEPT),
    }
    if limits.keys() & os.environ.keys():
        return
    if mallopt := _loaded("mallopt"):
        for name, (limit, size) in limits.items():
            mallopt(limit, size)
            os.environ[name] = str(size)


def import_models() -> None:
    """torch, transformers and what of ours stands on them, `quiet` then.

    Meanwhile there is no garbage collection, which would go through all that stays again and again. Nor is any of it
    looked at later, when the process ends for one: that makes a third of the time in which one sentence is embedded
    (docs/decisions.md).
    """
    global _importing
    first = "torch" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    _importing = True
    try:
        quiet()
        from . import embedder  # noqa: F401
    finally:
        _importing = False
        if first:
            gc.freeze()
            gc.enable()


def is_importing() -> bool:
    """Whether `import_models` is at work, in any thread."""
    return _importing


def release_openmp_threads() -> None:
    """Call in a thread that has run torch and will run no more.

    OpenMP keeps a team of threads for each thread that ever computed. Where that makes more than there are processors,
    GNU's puts a team to sleep at the end of every tensor operation and wakes it for the next; a server that had loaded
    its model in one thread and embedded in another was a fifth slower (docs/decisions.md).
    """
    if pause := _loaded("omp_pause_resource_all"):  # OpenMP 5.0, section 3.2.44
        pause(1)  # soft: a team is made again where one is needed


def quiet() -> None:
    """transformers' own warnings are not ours to show."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()


def _loaded(function: str) -> Any:
    """A C function of the libraries that the process has loaded, if they have it."""
    try:
        return getattr(ctypes.CDLL(None), function, None)
    except (OSError, TypeError):  # Windows
        return None
