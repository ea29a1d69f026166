"""Prompts: a text in its template -> token ids, with the span of tokens that are the text's own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from .checks import check_unicode, is_whole
from .errors import InputError, UnsupportedModel

__all__ = ["UNLIMITED", "Prompt", "Prompter", "check_texts"]

# Stands for a template's {pst} while a prompt is tokenised: one of Unicode's noncharacters, which no text should hold.
_PLACEHOLDER = "\ufdd0"
_WORD = 8  # tokens, of a long word
UNLIMITED = 2**31  # tokens


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One rendered and tokenised text.

    Attributes:
        text: the rendered prompt, after any cutting.
        ids: token ids, special tokens that the tokenizer adds (BOS) included; at least one.
        offsets: per token the `(start, end)` characters of `text` it stands for; `(0, 0)` for added special tokens.
        span: first token of the text's own and one past its last; a token that straddles template and text is the
            text's. If the template holds the text more than once, of its last copy.
        own: first character of that copy in `text` and one past its last.
        tokens_cut: tokens of the text that were left out to fit `max_tokens`; 0 if it is whole.
        placeholder: position of the template's `{pst}`, whose id is 0 and means nothing; None if it has none.
        prefix_tokens: tokens at the beginning that all texts share and that are not counted (see `kvembed.prefix`).
        chunks: what is read instead of a long text, as whole prompts, without the white space at their ends; empty
            where the text is read at once.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    span: tuple[int, int]
    own: tuple[int, int] = (0, 0)
    tokens_cut: int = 0
    placeholder: int | None = None
    prefix_tokens: int = 0
    chunks: tuple[Prompt, ...] = ()

    @property
    def tokens(self) -> int:
        """How many it has, but for what is shared; with its template once, however many chunks there are."""
        return len(self.ids) - self.prefix_tokens

    def without_text(self) -> Prompt:
        """What embedding needs of it: the token ids and their spans, without the characters."""
        chunks = tuple(chunk.without_text() for chunk in self.chunks)
        return dataclasses.replace(self, text="", offsets=(), chunks=chunks)

    @property
    def content_ids(self) -> tuple[int, ...]:
        """Ids of the text's own tokens; all ids, if it has none."""
        return self.ids[slice(*self.span)] or self.ids


class Prompter:
    """Renders and tokenises texts with a copy of a tokenizer's rules; safe in several threads.

    Args:
        tokenizer: a fast tokenizer (one that gives character offsets); it stays as it is.
        limit: the most tokens that the model takes, shared ones included; no chunk is longer.

    Attributes:
        size: how many tokens the tokenizer has.
        marks: its ids of beginning and end (BOS, EOS); None for one that it does not have.

    Raises:
        UnsupportedModel: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int = UNLIMITED) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer (tokenizer.json) is needed"
            )
        self._limit = limit
        self._rules: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._rules.no_padding()
        self._rules.no_truncation()
        self._rules.encode_special_tokens = True  # as plain text, that is
        _keep_white_space(self._rules)
        added = tokenizer.added_tokens_decoder
        named = {*tokenizer.all_special_ids}
        if tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            named.discard(tokenizer.pad_token_id)  # may be an ordinary piece that was set for padding's sake
        self._special = named | {index for index, token in added.items() if token.special}
        self._unknown = tokenizer.unk_token_id
        self.size = len(tokenizer)
        self.marks: tuple[int | None, int | None] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._start = next((token for token in self.marks if token is not None), None)

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
        prefix_tokens: int = 0,
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
            prefix_tokens: tokens of the template's beginning that all texts share.
            chunk_tokens: texts with more tokens of their own are given `Prompt.chunks`, and so are those whose prompt
                is longer than the model takes. None: none are.

        Raises:
            InputError: a text is no string, holds a lone surrogate, or can't be tokenised as plain text; there is no
                room for any text beside the template; or a text is empty, the template too, and there is no BOS or EOS.
        """
        check_texts(texts, first)
        for index, text in enumerate(texts, first):
            if _PLACEHOLDER in text and "{pst}" in template:
                raise InputError(f"text {index} holds the noncharacter U+FDD0, which stands for {{pst}}")
        prompts = self._tokenize(texts, template, prefix_tokens, first)
        found = [
            prompt if prompt.tokens <= max_tokens else self._cut(prompt, template, max_tokens) for prompt in prompts
        ]
        return found if chunk_tokens is None else [self._chunked(prompt, template, chunk_tokens) for prompt in found]

    def decode(self, ids: Iterable[Any]) -> str:
        """The text that token ids stand for, so that an array of ids is embedded exactly as its text is.

        Special tokens that the tokenizer itself puts around a text (BOS, EOS) are taken off.

        Raises:
            InputError: an id that the vocabulary does not have, a special token, or bytes that make no whole character.
        """
        before, after = self._around
        own = list(ids)
        if odd := [token for token in own if not is_whole(token)]:
            raise InputError(f"a text is a string or a list of token ids, and {odd[0]!r:.60} is no id")
        own = [int(token) for token in own]
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
        again = self._rules.encode(text, add_special_tokens=False).ids
        if "\ufffd" in text and again != own:
            raise InputError("the tokens do not make whole characters: the array was cut inside one")
        # Some decoders take a space off the front, whether the tokenizer had put it there or the text.
        spaced = again != own and self._rules.encode(f" {text}", add_special_tokens=False).ids == own
        return f" {text}" if spaced else text

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer adds before and after any text."""
        for text in ("a", "A", "1", "."):  # a vocabulary need not have them all
            encoded = self._rules.encode(text)
            if own := [place for place, special in enumerate(encoded.special_tokens_mask) if not special]:
                return encoded.ids[: own[0]], encoded.ids[own[-1] + 1 :]
        return [], []

    @functools.cached_property
    def _rules_with_placeholder(self) -> Tokenizer:
        rules = copy.deepcopy(self._rules)
        rules.add_tokens([AddedToken(_PLACEHOLDER, normalized=False)])
        rules.encode_special_tokens = True  # a copy does not keep it
        return rules

    def _tokenize(self, texts: Sequence[str], template: str, prefix_tokens: int, first: int = 0) -> list[Prompt]:
        if not texts:
            return []
        before, *between = template.replace("{pst}", _PLACEHOLDER).split("{text}")
        suffix = between[-1]
        rendered = [before + "".join(text + part for part in between) for text in texts]
        rules = self._rules_with_placeholder if "{pst}" in template else self._rules
        placeholder = rules.token_to_id(_PLACEHOLDER) if "{pst}" in template else None
        prompts = []
        for index, (own, text, encoded) in enumerate(zip(texts, rendered, rules.encode_batch(rendered), strict=True)):
            ids, offsets = encoded.ids, encoded.offsets
            for token, (a, b) in zip(ids, offsets, strict=True):
                if b > a and token in self._special and token != self._unknown:  # Unigram's ordinary pieces
                    raise InputError(
                        f"text {first + index} holds {text[a:b]!r}, which this tokenizer can't read as plain text"
                    )
            if not ids:
                if self._start is None:
                    raise InputError("an empty text needs a template: the tokenizer has neither a BOS nor an EOS token")
                ids, offsets = [self._start], [(0, 0)]
            end = len(text) - len(suffix)
            start = end - len(own)
            span = _span(offsets, start, end)
            place = None if placeholder is None else ids.index(placeholder)
            ids = [0 if position == place else token for position, token in enumerate(ids)]
            shown = text if place is None else text.replace(_PLACEHOLDER, "▮")  # of one character, for the offsets
            prompts.append(
                Prompt(
                    shown,
                    tuple(ids),
                    tuple(offsets),
                    span,
                    (start, end),
                    placeholder=place,
                    prefix_tokens=prefix_tokens,
                )
            )
        return prompts

    def _cut(self, prompt: Prompt, template: str, max_tokens: int) -> Prompt:
        copies = template.count("{text}")
        start, end = prompt.span
        own, past = prompt.own
        around = prompt.tokens - copies * (end - start)  # about, for a copy in the middle may merge otherwise
        keep = min((max_tokens - around) // copies, end - start)
        while keep > 0:
            last = min(prompt.offsets[start + keep - 1][1], past)
            while last < past and unicodedata.combining(prompt.text[last]):
                last += 1  # where the tokenizer composes letters, a token's place is that of the first part alone
            (shorter,) = self._tokenize([prompt.text[own:last]], template, prompt.prefix_tokens)
            excess = shorter.tokens - max_tokens
            if excess <= 0:
                lost = sum(offset > last for _, offset in prompt.offsets[start:end])
                return dataclasses.replace(shorter, tokens_cut=max(lost, 1))
            keep -= -(-excess // copies)  # cutting can split a merge in two, so a shorter text may still be too long
        (empty,) = self._tokenize([""], template, prompt.prefix_tokens)
        if max_tokens > empty.tokens:  # room, but not for the first character, which takes several tokens
            return dataclasses.replace(empty, tokens_cut=end - start)
        raise self._no_room(max_tokens, empty.tokens, prompt.prefix_tokens)

    def _chunked(self, prompt: Prompt, template: str, tokens: int) -> Prompt:
        copies, limit = template.count("{text}"), self._limit - prompt.prefix_tokens
        start, end = prompt.span
        own = end - start
        around = prompt.tokens - copies * own
        if own <= tokens and prompt.tokens <= limit:
            return prompt
        room = (limit - around) // copies
        if own < 2 or room < 1:
            raise self._no_room(limit, around, prompt.prefix_tokens)
        count = max(-(-own // max(min(tokens, room - _WORD), 1)), 2)
        while count <= max(own, 2):
            inner = {_border(prompt, start + own * chunk // count, own // count) for chunk in range(1, count)}
            first, last = prompt.own
            borders = [first, *sorted(border for border in inner if first < border < last), last]
            # Without the white space between them, which would stand where no text has it.
            parts = [part for a, b in itertools.pairwise(borders) if (part := prompt.text[a:b].strip())]
            chunks = tuple(self._tokenize(parts or [""], template, prompt.prefix_tokens))
            if all(chunk.tokens <= limit for chunk in chunks):
                return dataclasses.replace(prompt, chunks=chunks)
            count += 1 + count // 8
        raise self._no_room(limit, around, prompt.prefix_tokens)

    def _no_room(self, most: int, around: int, prefix_tokens: int) -> InputError:
        if most + prefix_tokens < self._limit:
            return InputError(f"max_tokens is {most}, but the template alone takes {around} tokens")
        return InputError(
            f"the model takes {most + prefix_tokens} tokens, but the template alone takes {around + prefix_tokens}"
        )


def _keep_white_space(rules: Tokenizer) -> None:
    """Let tokens be where they are: a post-processor may leave the white space that begins a token out of its place."""
    if (processor := rules.post_processor) is not None:
        told = processor.__getstate__().decode()
        kept = re.sub(r'"trim_offsets":\s*true', '"trim_offsets":false', told)
        if kept != told:
            processor.__setstate__(kept.encode())
            rules.post_processor = processor


def check_texts(texts: Sequence[Any], first: int = 0) -> None:
    """Raises `InputError` for what is not a string of valid Unicode; `first` is the first one's number."""
    for index, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise InputError(f"text {index} is a {type(text).__name__}, not a string")
        check_unicode(text, f"text {index}")


def _border(prompt: Prompt, token: int, length: int) -> int:
    """The character at which a token begins, or one of the few before it that begins a word; some scripts have none."""
    back = min(_WORD, length)
    starts = [prompt.offsets[place][0] for place in range(token, max(token - back, prompt.span[0]), -1)]
    words = (start for start in starts if prompt.text[start].isspace() or prompt.text[start - 1].isspace())
    return next(words, starts[0])


def _span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that overlap characters `[start, end)`; empty and in place if the text has none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if inside:
        return inside[0], inside[-1] + 1
    after = next((i for i, (a, b) in enumerate(offsets) if a >= start and b > a), len(offsets))
    return after, after
