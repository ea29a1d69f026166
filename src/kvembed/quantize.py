"""Vectors made unit length, and made smaller: 8-bit integers, or one bit a dimension."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from .config import Precision
from .errors import InputError

__all__ = ["as_vectors", "dequantize", "quantize", "unit"]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every row (n, dim) at norm 1; zeros stay zeros."""
    found: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-12)
    return found


def quantize(vectors: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
    """Round unit vectors to fewer bits.

    Args:
        vectors: (n, dim) float32, or one of (dim,).
        precision: `"float32"`: as they are, 4 bytes a dimension. `"int8"`: each vector times 127 over its own largest
            entry, rounded, 1 byte; cosine similarity does not ask for a vector's length, so no scale need be kept.
            `"binary"`: the sign of every entry, 8 to a byte, the first in the highest bit, for Hamming distance. Signs
            say little of vectors that all point the same way, as those of most methods do; a transform centres them.

    Returns:
        (n, dim) float32 or int8, or (n, ceil(dim / 8)) uint8; likewise of one.

    Raises:
        InputError: another precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
    if precision == "binary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "int8":
        largest = np.abs(vectors).max(-1, keepdims=True, initial=1e-12)
        codes: NDArray[np.int8] = np.rint(vectors * (127 / largest)).astype(np.int8)
        return codes
    return vectors


def dequantize(codes: NDArray[Any], precision: Precision, dim: int) -> NDArray[np.float32]:
    """Unit vectors float32, (n, dim) or (dim,), of `quantize`d ones; bits are 1 and -1: cosine is Hamming, rescaled."""
    bits = precision == "binary"
    found = np.unpackbits(codes, axis=-1, count=dim).astype(np.float32) * 2 - 1 if bits else codes.astype(np.float32)
    return unit(found)


def as_vectors(given: Any) -> NDArray[np.float32]:
    """(n, dim) float32. Raises `InputError` for what is no vectors, or those whose bits are packed."""
    try:
        found = np.atleast_2d(np.asarray(given))
        kind = found.dtype
        found = found.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"vectors (n, dim) are compared, as `encode` gives them: {error}") from None
    if found.ndim != 2:
        raise InputError(f"vectors (n, dim) are compared, not an array of shape {found.shape}")
    if kind == np.uint8:
        raise InputError("binary vectors are compared by Hamming distance, bit by bit; cosine needs `dequantize` first")
    return found
