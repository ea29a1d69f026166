"""The beginning that many prompts share, a template's examples say, computed once: its keys and values serve them all.

In a causal model the states of a prompt's beginning do not depend on what follows. So a batch's own tokens are all that
is computed; in every layer they see the beginning's keys and values in front of their own text's.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import EmbedConfig, Readout
from .prompts import Prompt

__all__ = ["Placement", "Prefix", "PrefixCache", "can_share_prefix", "shared_prefix", "without"]

_SHORTEST = 16  # tokens; a shorter beginning is not worth the extra keys
_LONGEST_REST = 16  # times the beginning; with a longer rest, sharing saves too little to leave the causal kernel for
_MOST = 16  # beginnings that are kept; one of 200 tokens takes 9 MB in float32 for smollm2
# By how much a probe's read-outs may change, relatively: more than rounding does in another batch.
_ROUNDING = {torch.float32: 5e-3, torch.float64: 5e-3}
_ROUNDING_OF_OTHERS = 5e-2  # half precision

Placement = tuple[torch.device, torch.dtype]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A beginning, as attention sees it.

    Attributes:
        tokens: p, how many there are.
        layers: for every attention call of a forward, in order, post-rotary keys (Hkv,p,Dk) and values (Hkv,p,Dv).
        seen: given a list, a forward adds the last text's first key (Hkv*Dk,) and value (Hkv*Dv,) of every call.
    """

    tokens: int
    layers: list[tuple[Tensor, Tensor]]
    seen: list[Tensor] | None = None


def can_share_prefix(template: str, config: EmbedConfig) -> bool:
    """Whether what stands before the text can be computed once for all texts.

    Only where no token of it is read, or counted, and nothing in it changes with the text, as a slot would.
    """
    changed = config.layers != () or config.prepend_layers or template.count("{text}") > 1
    return not changed and bool(config.forward_passes) and all(map(_reads_own, config.readouts))


def shared_prefix(prompt: Prompt) -> tuple[int, ...]:
    """Token ids of what stands before the text in a prompt, if it is worth computing apart; else none."""
    start, end = prompt.span
    own = len(prompt.ids) - start
    # A text without a token of its own has its mean taken over all.
    return prompt.ids[:start] if start >= _SHORTEST and end > start and own <= _LONGEST_REST * start else ()


class PrefixCache:
    """Shared prefixes as they were computed, kept for the texts to come.

    A model's weights and adapters are their owner's, and may change between calls. So a probe goes with every batch, a
    text of one token, whose read-outs, keys and values must come out as they did when the beginning was computed, but
    for half a percent (in half precision 5); or else it is computed again. Read-outs alone would not tell: the probe
    attends mostly to the beginning as it is kept.

    The probe is the beginning's last token alone, so the embeddings of all of them are compared too.

    Args:
        compute: a forward of token ids.
        embed: their embeddings (n,D).
    """

    def __init__(self, compute: Callable[[Sequence[int]], Prefix], embed: Callable[[Sequence[int]], Tensor]) -> None:
        self._compute, self._embed = compute, embed
        self._kept: dict[tuple[tuple[int, ...], Placement], _Kept | None] = {}

    def groups(self, prompts: Sequence[Prompt], placement: Placement) -> list[tuple[tuple[int, ...], list[int]]]:
        """Which prompts to compute together: token ids of the beginning they share, which may be none, and indices.

        A single prompt is as quick computed whole, the first time.

        Args:
            prompts: in any order, of any templates; those with `Prompt.prefix_tokens` have a beginning.
            placement: the model's device and dtype.
        """
        begun: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            begun[shared_prefix(prompt) if prompt.prefix_tokens else ()].append(index)
        alone = begun.pop((), [])
        shared = []
        for ids, some in begun.items():
            if len(some) == 1 and (ids, placement) not in self._kept:
                self._keep(ids, placement, None)
                alone += some
            else:
                shared.append((ids, some))
        return [((), sorted(alone)), *shared]

    def run(
        self,
        ids: tuple[int, ...],
        placement: Placement,
        prompts: Sequence[Prompt],
        forward: Callable[[Sequence[Prompt], Prefix], Tensor],
    ) -> Tensor:
        """Rows (B,R,D) of prompts that begin with `ids`, as `forward` gives them for what comes after a `Prefix`."""
        probe = Prompt("", ids[-1:], ((0, 0),), (0, 1))
        rest = [*(without(prompt, len(ids)) for prompt in prompts), probe]
        embedded = self._embed(ids)

        def probed(prefix: Prefix) -> tuple[Tensor, list[Tensor]]:
            seen: list[Tensor] = []
            rows = forward(rest, dataclasses.replace(prefix, seen=seen))
            return rows[:-1], [rows[-1].clone(), *seen]  # not the whole batch's rows

        kept = self._kept.get((ids, placement))
        if kept and torch.equal(embedded, kept.embedded):
            rows, found = probed(kept.prefix)
            if all(_same(*pair, placement) for pair in zip(found, kept.probed, strict=True)):
                return rows
        prefix = self._compute(ids)
        rows, found = probed(prefix)
        self._keep(ids, placement, _Kept(prefix, found, embedded))
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # it would take a device with it to another process

    def _keep(self, ids: tuple[int, ...], placement: Placement, kept: _Kept | None) -> None:
        self._kept[ids, placement] = kept
        for oldest in list(self._kept)[:-_MOST]:  # a list at once, since other threads may add to it
            self._kept.pop(oldest, None)


@dataclasses.dataclass(frozen=True)
class _Kept:
    prefix: Prefix
    probed: list[Tensor]  # the probe's read-outs (R,D), keys and values
    embedded: Tensor


def _same(found: Tensor, expected: Tensor, placement: Placement) -> bool:
    """Whether vectors (...,D) differ by rounding only."""
    apart = (found - expected).norm(dim=-1)
    return bool((apart <= _ROUNDING.get(placement[1], _ROUNDING_OF_OTHERS) * expected.norm(dim=-1)).all())


def without(prompt: Prompt, tokens: int) -> Prompt:
    """The same prompt, but for its first tokens."""
    start, end = prompt.span
    ids, offsets = prompt.ids[tokens:], prompt.offsets[tokens:]
    return dataclasses.replace(prompt, ids=ids, offsets=offsets, span=(start - tokens, end - tokens), prefix_tokens=0)


def _reads_own(readout: Readout) -> bool:
    """Whether it is the same for a text's own tokens alone; a weighted mean counts from the beginning."""
    if readout.pooling in ("mean", "hybrid"):
        return readout.mean_tokens == "content"
    return readout.pooling in ("last", "static")
