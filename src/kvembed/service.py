"""An embedder as a service: inputs checked and tokenised, embedded in batches with those of others, and counted."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .batcher import Batcher
from .batching import blocks
from .config import Role
from .device import is_device_lost
from .embedder import Embedder
from .errors import InputError, TextTooLong
from .openai_api import ApiError, Input
from .prompts import Prompt

__all__ = ["Limits", "Service", "check_names"]

_PIECE = 2**15  # characters that are tokenised at a time, some hundredths of a second
_CHARACTERS_PER_TOKEN = 4  # about, in English
BYTES_PER_TOKEN = 16  # a text with more bytes than that for each token it may have is refused before it is tokenised

Prompts = tuple[Prompt, ...]  # a text's, one for each template


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        queue_tokens: that may wait, over all requests; so also the most for one.
        requests: being read or waiting at the same time.
        body_bytes: of one request.
        held_bytes: of the bodies and answers of all requests together; the text of a body may take six times as much.
        body_seconds: for a body to arrive, and for a client to take what it is sent.
    """

    queue_tokens: int = 2**18
    requests: int = 512
    body_bytes: int = 2**23
    held_bytes: int = 2**27
    body_seconds: float = 30.0


class Service:
    """The embedder, its queue, and what is counted."""

    def __init__(self, embedder: Embedder, names: Sequence[str], limits: Limits, registry: CollectorRegistry) -> None:
        check_names(names)
        self.embedder, self.names, self.limits = embedder, names, limits
        self.batcher: Batcher[Prompts, NDArray[np.float32]] = Batcher(
            self._embed,
            batch_tokens=embedder.batch_tokens,
            queue_tokens=limits.queue_tokens,
            packed=embedder.backbone.packs,
            is_fatal=is_device_lost,
        )
        # What the first texts would wait for: trials, kernels, the beginning that a role's texts share. Two, since one
        # alone is computed whole the first time, which in half precision gives it another vector than later.
        for role in get_args(Role):
            embedder.encode(["first", "second"], role=role)
        self.readers = ThreadPoolExecutor(2, "kvembed-tokenizing")
        self._expected_tokens = 0  # of requests that are being read
        self._texts = Counter("kvembed_texts", "Texts embedded.", registry=registry)
        self._tokens = Counter("kvembed_tokens", "Tokens embedded, as usage counts them.", registry=registry)
        sizes = tuple(2**i for i in range(12))
        self._sizes = Histogram("kvembed_batch_texts", "Texts in a batch.", buckets=sizes, registry=registry)
        self._seconds = Histogram("kvembed_batch_seconds", "Time of a batch.", registry=registry)
        waiting = Gauge("kvembed_waiting_tokens", "Tokens that wait.", registry=registry)
        waiting.set_function(lambda: self.batcher.waiting_tokens)

    def _embed(self, role: Any, batch: list[Prompts]) -> Sequence[NDArray[np.float32]]:
        started = time.perf_counter()
        encoded = self.embedder.encode_prompts(batch, role=role)
        self._seconds.observe(time.perf_counter() - started)
        self._sizes.observe(len(batch))
        self._texts.inc(len(batch))
        self._tokens.inc(int(encoded.token_counts.sum()))
        return list(encoded.vectors)

    def model(self, name: str) -> Role | None:
        """The role that a model's name asks for, or None for either. Raises `ApiError` for another model."""
        plain, _, role = name.rpartition(":")
        if name in self.names:
            return None
        if plain in self.names and role in ("query", "document"):
            return cast(Role, role)
        raise ApiError(
            404, f"There is no such model here; there is {self.names[0]}.", param="model", code="model_not_found"
        )

    async def read(self, inputs: Sequence[Input], role: Role, truncate: bool) -> list[Prompts]:
        """Tokenise, away from the event loop, in pieces, so that requests take turns.

        Raises:
            ApiError: for what can't be embedded.
            QueueFull: no room for it beside what waits and what else is being read.
        """
        loop, most = asyncio.get_running_loop(), self.limits.queue_tokens
        if len(inputs) > 1 and sum(map(len, inputs)) > BYTES_PER_TOKEN * most:
            raise _too_much(most, len(inputs))
        # Refused before it is tokenised, if it must be; what is alone need only fit when it has been.
        expected = sum(len(one) // _CHARACTERS_PER_TOKEN if isinstance(one, str) else len(one) for one in inputs)
        alone = not (self._expected_tokens or self.batcher.waiting_tokens)
        self.batcher.check_room(0 if alone else self._expected_tokens + expected)
        self._expected_tokens += expected
        found: list[Prompts] = []
        total = 0
        try:
            for piece in blocks(inputs, len, most_characters=_PIECE):
                prompts = await loop.run_in_executor(self.readers, self._read, piece, len(found), role, truncate)
                total += sum(prompt.tokens for one in prompts for prompt in one)
                if total > most:
                    raise _too_much(most, len(inputs))
                found += prompts
        finally:
            self._expected_tokens -= expected
        return found

    def _read(self, inputs: Sequence[Input], first: int, role: Role, truncate: bool) -> list[Prompts]:
        found: list[Prompts] = []
        most = BYTES_PER_TOKEN * min(self.embedder.max_tokens, self.limits.queue_tokens)
        for index, text in enumerate(inputs, first):
            size = len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else len(text)
            if size > most:
                unit = "bytes" if isinstance(text, str) else "tokens"
                raise _bad_input(
                    f"input[{index}] has {size:,} {unit}; the limit for any text is {most:,}", too_long=True
                )
            try:
                (prompts,) = self.embedder.prompts([text], role=role, truncate=truncate)
            except InputError as error:
                message = str(error).removeprefix("text 0").lstrip(": ")
                raise _bad_input(f"input[{index}]: {message}", too_long=isinstance(error, TextTooLong)) from None
            found.append(tuple(prompt.without_text() for prompt in prompts))
        return found

    async def vectors(self, prompts: Sequence[Prompts], role: Role) -> NDArray[np.float32]:
        """(n, dim). Raises `QueueFull`."""
        # Packed, a text's templates share a batch; padded, they take turns, and the longest decides how many fit.
        size = sum if self.batcher.packed else max
        lengths = [size(prompt.tokens for prompt in one) for one in prompts]
        return np.stack(await self.batcher.submit(role, prompts, lengths))


def check_names(names: Sequence[str]) -> None:
    """Raises `InputError` for names of a model that clients could not tell apart, or from a role."""
    if "" in names or len({*names}) < len(names):
        raise InputError("--name: every name of the model must be another, and none empty")
    for name in names:
        if name.endswith((":query", ":document")):
            raise InputError(f"--name {name}: the end of a name says the role, so none may be called so")


def _too_much(most: int, inputs: int) -> ApiError:
    way = "; split it" if inputs > 1 else ""
    return _bad_input(f"the request has more than {most:,} tokens in all{way}", too_long=True)


def _bad_input(message: str, too_long: bool) -> ApiError:
    return ApiError(400, f"{message}.", param="input", code="context_length_exceeded" if too_long else None)
