"""Batches by tokens, not by rows: length-sorted, within a token budget, halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from .device import empty_device_cache, is_out_of_memory
from .errors import OutOfMemory

__all__ = [
    "blocks",
    "characters",
    "computed_tokens",
    "run_batches",
    "token_batches",
]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_BLOCK_ITEMS, _BLOCK_CHARACTERS = 1024, 1 << 20


def blocks(
    items: Iterable[Item],
    characters: Callable[[Item], int],
    *,
    most_items: int | None = None,
    most_characters: int | None = None,
) -> Iterator[list[Item]]:
    """Cut a stream into lists that bound memory, and yet hold enough texts to group by length.

    Args:
        items: texts, or rows that hold one.
        characters: the length of an item's text.
        most_items, most_characters: of a block; a single longer text still gets one. Default: 1,024 and a million.
    """
    most_items, most_characters = most_items or _BLOCK_ITEMS, most_characters or _BLOCK_CHARACTERS
    block: list[Item] = []
    size = 0
    for item in items:
        length = characters(item)
        if block and (len(block) == most_items or size + length > most_characters):
            yield block
            block, size = [], 0
        block.append(item)
        size += length
    if block:
        yield block


def characters(text: Any) -> int:
    """A text's length; 0 for what is not a string, which is told when it is tokenised."""
    return len(text) if isinstance(text, str) else 0


def computed_tokens(texts: int, longest: int, tokens: int, *, packed: bool) -> int:
    """Tokens that a batch computes: packed, those of its texts; padded, as many as the longest for each."""
    return tokens if packed else texts * longest


def token_batches(
    lengths: Sequence[int], batch_tokens: int, border: int | None = None, *, packed: bool = False
) -> list[list[int]]:
    """Group texts of similar length; the tokens that a batch computes stay within the budget.

    Args:
        lengths: tokens of each text.
        batch_tokens: the budget in tokens; a single longer text still gets a batch of its own.
        border: texts longer than this never share a batch with others (see `Backbone.rope_border`).
        packed: nothing is padded, so that a batch computes the tokens of its texts; else rows x longest.

    Returns:
        Lists of indices into `lengths`; every index once, longest texts first, so that memory runs out early or never.
    """
    batches: list[list[int]] = []
    longest = used = 0  # tokens of the last batch's longest text, and of all its texts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens = lengths[index]
        mixed = border is not None and tokens <= border < longest
        more = len(batches[-1]) + 1 if batches else 1
        if batches and not mixed and computed_tokens(more, longest, used + tokens, packed=packed) <= batch_tokens:
            batches[-1].append(index)
            used += tokens
        else:
            batches.append([index])
            longest = used = tokens
    return batches


def run_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    run: Callable[[list[int]], torch.Tensor],
    border: int | None = None,
    *,
    packed: bool = False,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Run every batch; one that does not fit in memory is halved, with a warning, and so are the batches after it.

    Args:
        lengths, batch_tokens, border, packed: as in `token_batches`.
        run: takes indices, returns one row each.

    Yields:
        `(indices, rows)`, every index once.

    Raises:
        OutOfMemory: a single text does not fit.
    """
    todo = token_batches(lengths, batch_tokens, border, packed=packed)[::-1]
    while todo:
        batch = todo.pop()
        try:
            rows = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            longest = max(lengths[i] for i in batch)
            if len(batch) == 1:
                raise OutOfMemory(
                    f"a text of {longest:,} tokens does not fit in memory; set max_tokens or chunk_tokens lower"
                ) from error
            rows = None
        # Outside the handler: the traceback would keep the failed batch's tensors alive.
        if rows is None:
            empty_device_cache()
            used = computed_tokens(len(batch), longest, sum(lengths[i] for i in batch), packed=packed)
            budget = (used + longest) // 2  # a half, but never less than the longest text
            logger.warning("out of memory: batches cut from %d tokens to %d", used, budget)
            left = [index for waiting in (batch, *todo[::-1]) for index in waiting]
            smaller = token_batches([lengths[index] for index in left], budget, border, packed=packed)
            todo = [[left[i] for i in part] for part in smaller][::-1]
            continue
        yield batch, rows
