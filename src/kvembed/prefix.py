"""The beginning that many prompts share, a template's examples say, computed once: its keys and values serve them all.

In a causal model the states of a prompt's beginning do not depend on what follows. So a batch's own tokens are all that
is computed; in every layer they see the beginning's keys and values in front of their own text's.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from .config import EmbedConfig, Readout
from .prompts import Prompt

__all__ = ["Prefix", "groups", "without"]

_SHORTEST = 16  # tokens; a shorter beginning is not worth the extra keys
_LONGEST_REST = 16  # times the beginning; of a longer prompt too little is saved to give up the plainest attention


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A beginning, as attention sees it.

    Attributes:
        tokens: p, how many there are.
        layers: for every attention call of a forward, in order, post-rotary keys (Hkv,p,Dk) and values (Hkv,p,Dv).
    """

    tokens: int
    layers: list[tuple[Tensor, Tensor]]


def groups(prompts: Sequence[Prompt], config: EmbedConfig, least_saved: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Which prompts to compute together: token ids of the beginning that they share, which may be none, and indices.

    Only where no token of the beginning is read, or counted, and nothing in it changes with the text, as a slot would.

    Args:
        prompts: in any order, of any templates.
        config: what is done to them.
        least_saved: tokens that a group must save, since it takes a forward of the beginning and batches of its own.
    """
    rest = list(range(len(prompts)))
    if config.layers or config.prepend_layers or not all(map(_reads_own, config.readouts)) or not config.forward_passes:
        return [((), rest)]
    begun: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        start, end = prompt.span
        own = len(prompt.ids) - start
        # A text without a token of its own has its mean taken over all.
        if start >= _SHORTEST and end > start and own <= _LONGEST_REST * start:
            begun[prompt.ids[:start]].append(index)
    shared = [(ids, some) for ids, some in begun.items() if len(ids) * (len(some) - 1) >= least_saved]
    taken = {index for _, some in shared for index in some}
    return [((), [index for index in rest if index not in taken]), *shared]


def _reads_own(readout: Readout) -> bool:
    """Whether it is the same for a text's own tokens alone; a weighted mean counts from the beginning."""
    if readout.pooling in ("mean", "hybrid"):
        return readout.mean_tokens == "content"
    return readout.pooling in ("last", "static")


def without(prompt: Prompt, tokens: int) -> Prompt:
    """The same prompt, but for its first tokens."""
    start, end = prompt.span
    ids, offsets = prompt.ids[tokens:], prompt.offsets[tokens:]
    return dataclasses.replace(prompt, ids=ids, offsets=offsets, span=(start - tokens, end - tokens))
