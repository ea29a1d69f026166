"""Prompts: a text in its template -> token ids, with the span of tokens that are the text's own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from .errors import InputError, UnsupportedModel

__all__ = ["Prompt", "Prompter"]

# Stands for a template's {pst} while a prompt is tokenised: one of Unicode's noncharacters, which no text should hold.
_PLACEHOLDER = "\ufdd0"
_WORD = 8  # tokens, of a long word


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One rendered and tokenised text.

    Attributes:
        text: the rendered prompt, after any cutting.
        ids: token ids, special tokens that the tokenizer adds (BOS) included; at least one.
        offsets: per token the `(start, end)` characters of `text` it stands for; `(0, 0)` for added special tokens.
        span: first token of the text's own and one past its last; a token that straddles template and text is the
            text's. If the template holds the text more than once, of its last copy.
        tokens_cut: tokens of the text that were left out to fit `max_tokens`; 0 if it is whole.
        placeholder: position of the template's `{pst}`, whose id is 0 and means nothing; None if it has none.
        shared: tokens at the beginning that all texts share and that are not counted (see `kvembed.prefix`).
        chunks: what is read instead of a long text, as whole prompts; empty where the text is read at once.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    span: tuple[int, int]
    tokens_cut: int = 0
    placeholder: int | None = None
    shared: int = 0
    chunks: tuple[Prompt, ...] = ()

    @property
    def tokens(self) -> int:
        """How many it has, but for what is shared; with its template once, however many chunks there are."""
        return len(self.ids) - self.shared

    @property
    def content_ids(self) -> tuple[int, ...]:
        """Ids of the text's own tokens; all ids, if it has none."""
        return self.ids[slice(*self.span)] or self.ids


class Prompter:
    """Renders and tokenises texts with a copy of a tokenizer's rules; safe in several threads.

    Args:
        tokenizer: a fast tokenizer (one that gives character offsets); it stays as it is.

    Raises:
        UnsupportedModel: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer (tokenizer.json) is needed"
            )
        self._rules: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._rules.no_padding()
        self._rules.no_truncation()
        self._rules.encode_special_tokens = True  # as plain text, that is
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._start = next((token for token in starts if token is not None), None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.pop("_rules_with_placeholder", None)
        self._rules.encode_special_tokens = True  # a copy, by pickle too, does not keep it

    def __call__(
        self,
        texts: Sequence[str],
        template: str,
        max_tokens: int,
        first: int = 0,
        shared: int = 0,
        chunk_tokens: int | None = None,
    ) -> list[Prompt]:
        """Tokenise each text in the template.

        The whole prompt is tokenised at once, as if it had been typed, and spans are found by character offsets.
        Strings of special tokens inside a text, such as `<|im_end|>`, are read as plain text. A text too long is cut at
        a token border, never the template, and `tokens_cut` says by how much. An empty text in an empty template
        becomes the tokenizer's BOS (or EOS) token.

        Args:
            texts: any strings.
            template: holds `{text}`, as often as it likes, and before it `{pst}` at most once.
            max_tokens: longest prompt, template and special tokens included, but for what is shared.
            first: the first text's number, for what is said of a bad one.
            shared: tokens of the template's beginning that all texts share.
            chunk_tokens: texts with more tokens of their own are given `Prompt.chunks`. None: none are.

        Raises:
            InputError: a text holds a lone surrogate, or `max_tokens` leaves no room for any text.
        """
        for index, text in enumerate(texts, first):
            if _PLACEHOLDER in text and "{pst}" in template:
                raise InputError(f"text {index} holds the noncharacter U+FDD0, which stands for {{pst}}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text {index} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
                    "not valid Unicode"
                ) from None
        prompts = self._tokenize(texts, template, shared)
        found = [
            prompt if prompt.tokens <= max_tokens else self._cut(text, prompt, template, max_tokens)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        return found if chunk_tokens is None else [self._chunked(prompt, template, chunk_tokens) for prompt in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, so that an array of ids is embedded exactly as its text is.

        Special tokens that the tokenizer itself puts around a text (BOS, EOS) are taken off.

        Raises:
            InputError: an id that the vocabulary does not have, a special token, or bytes that make no whole character.
        """
        before, after = self._around
        own = list(ids)
        if before and own[: len(before)] == before:
            own = own[len(before) :]
        if after and own[-len(after) :] == after:
            own = own[: -len(after)]
        for token in own:
            if not 0 <= token < 2**32 or self._rules.id_to_token(token) is None:
                raise InputError(f"token {token} is not in the model's vocabulary")
            if token in self._special:
                raise InputError(f"token {token} is a special token, {self._rules.id_to_token(token)}, not text")
        text: str = self._rules.decode(own, skip_special_tokens=False)
        if "\ufffd" in text and self._rules.encode(text, add_special_tokens=False).ids != own:
            raise InputError("the tokens do not make whole characters: the array was cut inside one")
        return text

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer adds before and after any text."""
        encoded = self._rules.encode("a")
        own = [place for place, special in enumerate(encoded.special_tokens_mask) if not special]
        return encoded.ids[: own[0]], encoded.ids[own[-1] + 1 :]

    @functools.cached_property
    def _rules_with_placeholder(self) -> Tokenizer:
        rules = copy.deepcopy(self._rules)
        rules.add_tokens([AddedToken(_PLACEHOLDER, normalized=False)])
        rules.encode_special_tokens = True  # a copy does not keep it
        return rules

    def _tokenize(self, texts: Sequence[str], template: str, shared: int) -> list[Prompt]:
        if not texts:
            return []
        before, *between = template.replace("{pst}", _PLACEHOLDER).split("{text}")
        suffix = between[-1]
        rendered = [before + "".join(text + part for part in between) for text in texts]
        rules = self._rules_with_placeholder if "{pst}" in template else self._rules
        placeholder = rules.token_to_id(_PLACEHOLDER) if "{pst}" in template else None
        prompts = []
        for own, text, encoded in zip(texts, rendered, rules.encode_batch(rendered), strict=True):
            ids, offsets = encoded.ids, encoded.offsets
            for token, (first, end) in zip(ids, offsets, strict=True):
                if end > first and token in self._special:  # a Unigram vocabulary holds them as ordinary pieces
                    raise InputError(
                        f"this tokenizer can't read {text[first:end]!r} as plain text; take it out of the text"
                    )
            if not ids:
                if self._start is None:
                    raise InputError("an empty text needs a template: the tokenizer has neither a BOS nor an EOS token")
                ids, offsets = [self._start], [(0, 0)]
            end = len(text) - len(suffix)
            span = _span(offsets, end - len(own), end)
            place = None if placeholder is None else ids.index(placeholder)
            ids = [0 if position == place else token for position, token in enumerate(ids)]
            shown = text if place is None else text.replace(_PLACEHOLDER, "▮")  # of one character, for the offsets
            prompts.append(Prompt(shown, tuple(ids), tuple(offsets), span, placeholder=place, shared=shared))
        return prompts

    def _cut(self, text: str, prompt: Prompt, template: str, max_tokens: int) -> Prompt:
        copies = template.count("{text}")
        start, end = prompt.span
        own = len(prompt.text) - len(template.rpartition("{text}")[2]) - len(text)  # where the last copy starts
        around = prompt.tokens - copies * (end - start)  # about, for a copy in the middle may merge otherwise
        keep = min((max_tokens - around) // copies, end - start)
        while keep > 0:
            last_character = min(prompt.offsets[start + keep - 1][1] - own, len(text))
            (shorter,) = self._tokenize([text[:last_character]], template, prompt.shared)
            excess = shorter.tokens - max_tokens
            if excess <= 0:
                lost = sum(offset > own + last_character for _, offset in prompt.offsets[start:end])
                return dataclasses.replace(shorter, tokens_cut=lost)
            keep -= -(-excess // copies)  # cutting can split a merge in two, so a shorter text may still be too long
        (empty,) = self._tokenize([""], template, prompt.shared)
        if max_tokens > empty.tokens:  # room, but not for the first character, which takes several tokens
            return dataclasses.replace(empty, tokens_cut=end - start)
        raise InputError(f"max_tokens is {max_tokens}, but the template alone takes {empty.tokens} tokens")

    def _chunked(self, prompt: Prompt, template: str, tokens: int) -> Prompt:
        start, end = prompt.span
        count = -(-(end - start) // tokens)
        if count < 2:
            return prompt
        around = template.replace("{pst}", "▮").replace("{text}", "")
        length = (len(prompt.text) - len(around)) // template.count("{text}")  # of the text, after any cutting
        last = len(prompt.text) - len(template.rpartition("{text}")[2])
        first = last - length
        inner = {_word_border(prompt, start + (end - start) * chunk // count) for chunk in range(1, count)}
        borders = [first, *sorted(border for border in inner if first < border < last), last]
        parts = [prompt.text[a:b] for a, b in itertools.pairwise(borders)]
        return dataclasses.replace(prompt, chunks=tuple(self._tokenize(parts, template, prompt.shared)))


def _word_border(prompt: Prompt, token: int) -> int:
    """The character at which a token begins, or one of the few before it that begins a word; some scripts have none."""
    starts = [prompt.offsets[place][0] for place in range(token, max(token - _WORD, prompt.span[0]), -1)]
    words = (start for start in starts if prompt.text[start].isspace() or prompt.text[start - 1].isspace())
    return next(words, starts[0])


def _span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that overlap characters `[start, end)`; empty and in place if the text has none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if inside:
        return inside[0], inside[-1] + 1
    after = next((i for i, (a, b) in enumerate(offsets) if a >= start and b > a), len(offsets))
    return after, after
