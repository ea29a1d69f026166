"""Explanation: what happens to a text, token by token."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from .config import EmbedConfig
from .prompts import Prompt

__all__ = ["Explanation", "token_texts"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `Embedder.explain` gives.

    Attributes:
        prompt: the rendered prompt.
        tokens: the piece of the prompt that each token stands for; an added special token by its name. A character of
            several tokens is the first one's; the others have none.
        token_ids: their ids.
        span: first token of the text's own and one past its last.
        tokens_cut: tokens of the text that were left out.
        config: the embedder's, layers spelled out.
        beta: layer -> for each token the share of its attention that goes to the slot, mean over heads, 0 to 1.
        fitted_on: the transform's `info` and `digest`, or None if the config has no transform.
        chunks: how many the text is read in; of several, the first is shown.
        shared: tokens at the beginning that are the same for all texts, and computed once for them.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    span: tuple[int, int]
    tokens_cut: int
    config: EmbedConfig
    beta: dict[int, tuple[float, ...]]
    fitted_on: dict[str, Any] | None = None
    chunks: int = 1
    shared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "span": list(self.span),
            "config": self.config.to_dict(),
            "beta": {str(layer): list(values) for layer, values in self.beta.items()},
        }


def token_texts(prompt: Prompt, names: Sequence[str]) -> tuple[str, ...]:
    """The piece of the prompt that each token stands for, as in `Explanation.tokens`; `names` are the vocabulary's."""
    ends = [0, *itertools.accumulate((end for _, end in prompt.offsets), max)]
    return tuple(
        prompt.text[max(start, before) : end] if end > start else name
        for (start, end), before, name in zip(prompt.offsets, ends[:-1], names, strict=True)
    )
