"""Reading: prompts -> views. Batches of one beginning, chunks, static vectors; pooled at once, checked to be finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .backbone import Backbone
from .batching import run_batches
from .config import EmbedConfig, Readout
from .errors import InputError, not_finite
from .pooling import pool
from .prefix import Placement, Prefix, PrefixCache
from .prompts import UNLIMITED, Prompt
from .vectors import Encoded

__all__ = ["Reader", "refuse_training"]


class Reader:
    """Reads prompts as a config says.

    Args:
        backbone: the model.
        config: layers spelled out, read-outs counted from the bottom.
        vocabulary: how many tokens the tokenizer has.
    """

    def __init__(self, backbone: Backbone, config: EmbedConfig, vocabulary: int) -> None:
        self._backbone = backbone
        self._config = config
        self._vocabulary = vocabulary
        self.prefixes = PrefixCache(backbone.prefix, backbone.embedded)
        self._run_readouts = [one for one in config.readouts if one.pooling != "static"]
        needed = [one.output_layer for one in self._run_readouts]
        self._top = None if None in needed else max((layer for layer in needed if layer is not None), default=None)
        self._run_config = config.replace(output_layer=self._top)  # runs the model as high as any read-out needs

    def __call__(
        self,
        by_template: Sequence[Sequence[Prompt]],
        batch_tokens: int,
        report: Callable[[int], Any] | None = None,
    ) -> Encoded:
        """Read texts.

        Args:
            by_template: for each template, a prompt for each of n texts.
            batch_tokens: as in `Embedder`.
            report: called after every batch with the number of texts that are done.

        Returns:
            `vectors` being the views, (n, templates * read-outs, D) float32.

        Raises:
            InputError: the model is in training mode, or has no embedding of a token.
            OutOfMemory: a single text does not fit.
            KvembedError: states that are not finite.
        """
        whole = [prompt for rendered in by_template for prompt in rendered]
        self._check(whole)
        count = _whole_texts(report, len(by_template))
        prompts = [chunk for prompt in whole for chunk in prompt.chunks or (prompt,)]
        chunks = np.array([len(prompt.chunks) or 1 for prompt in whole], np.int64)
        owner = np.repeat(np.arange(len(whole)), chunks)
        begins = np.diff(owner, prepend=-1)  # 1 for a prompt's first chunk
        static = [index for index, one in enumerate(self._config.readouts) if one.pooling == "static"]
        others = [index for index, one in enumerate(self._config.readouts) if one.pooling != "static"]
        states = np.zeros((len(whole), len(self._config.readouts), self._backbone.dim), np.float32)
        if static:
            for batch, rows in self._static(whole, batch_tokens):
                states[np.ix_(batch, static)] = rows[:, None]
                if not others:
                    count(len(batch))
        if others:
            summed = np.zeros((len(whole), len(others), self._backbone.dim), np.float32)
            for batch, rows in self._run(prompts, batch_tokens):
                np.add.at(summed, owner[batch], rows)
                count(int(begins[batch].sum()))
            states[:, others] = summed / chunks[:, None, None]
        if not np.isfinite(states).all():
            raise not_finite(self._backbone.dtype)
        shape = len(by_template), len(by_template[0])
        tokens = np.array([prompt.tokens for prompt in whole], np.int64).reshape(shape).sum(0)
        cut = np.array([prompt.tokens_cut for prompt in whole], np.int64).reshape(shape).max(0)
        views = states.reshape(*shape, *states.shape[1:]).swapaxes(0, 1)  # (n, templates, read-outs, D)
        return Encoded(views.reshape(shape[1], shape[0] * states.shape[1], states.shape[2]), tokens, cut)

    def betas(self, prompt: Prompt) -> dict[int, Tensor]:
        """Of each re-routed layer the share of attention on the slot, (1,Hq,n) float32. Errors as of reading."""
        self._check([prompt])
        found: dict[int, Tensor] = {}
        if self._config.layers and self._config.forward_passes:
            for _ in run_batches([len(prompt.ids)], 1, lambda _: self._forward([prompt], betas=found)):
                pass
        return found

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Raises `InputError` for a model in training mode, and for a token that it has no embedding of, before a
        device stumbles over that.
        """
        refuse_training(self._backbone.model)
        rows = getattr(self._backbone.decoder.get_input_embeddings(), "num_embeddings", UNLIMITED)
        if self._vocabulary > rows:
            highest = max((max(prompt.ids) for prompt in prompts), default=0)
            if highest >= rows:
                raise InputError(f"the tokenizer gives token {highest:,}, but the model embeds only {rows:,}")

    def _static(self, prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Rows (B,D) of whole texts, not their chunks: there is no limit, and a word that comes again counts less."""
        content = [prompt.content_ids for prompt in prompts]
        vectors = self._backbone.static

        def run(batch: Sequence[int]) -> Tensor:
            with torch.autocast(self._backbone.device.type, enabled=False):
                return vectors([content[index] for index in batch]).cpu()

        for batch, rows in run_batches([*map(len, content)], batch_tokens, run, packed=True):
            yield batch, rows.numpy()

    def _run(self, prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Rows (B,R,D) of the read-outs that need a forward, for prompts that share a prefix together."""
        packed = len(prompts) > 1 and self._backbone.packs
        placement = (self._backbone.device, self._backbone.model.dtype)
        alike = self.prefixes.groups(prompts, placement)
        if len(alike) > 1 and not self._backbone.can_share:
            alike = [((), list(range(len(prompts))))]
        for prefix, places in alike:
            own = [len(prompts[place].ids) - len(prefix) for place in places]
            run = partial(self._batch, [prompts[place] for place in places], prefix, placement)
            for batch, rows in run_batches(own, batch_tokens, run, self._backbone.rope_border, packed=packed):
                yield [places[index] for index in batch], rows.numpy()

    def _batch(
        self, prompts: Sequence[Prompt], prefix: tuple[int, ...], placement: Placement, batch: Sequence[int]
    ) -> Tensor:
        some = [prompts[index] for index in batch]
        return (self.prefixes.run(prefix, placement, some, self._forward) if prefix else self._forward(some)).cpu()

    @torch.inference_mode()
    def _forward(
        self, prompts: Sequence[Prompt], prefix: Prefix | None = None, betas: dict[int, Tensor] | None = None
    ) -> Tensor:
        """One forward of the decoder, pooled by the read-outs that are not static: (B,R,D) float32.

        With a `prefix`, prompts are what follows it.
        """
        pooled: dict[Readout, Tensor] = {}
        ids, lengths = self._backbone.pad([prompt.ids for prompt in prompts])  # (B,n), (B,)
        placeholders = torch.tensor([prompt.placeholder or 0 for prompt in prompts])  # (B,)
        spans = torch.tensor([prompt.span for prompt in prompts])  # (B,2)

        def read(layer: int | None, states: Tensor) -> None:
            """Pools at once, so that no layer's states (B,n,D) outlive it."""
            with torch.autocast(states.device.type, enabled=False):
                for one in self._run_readouts:
                    if one.output_layer == layer:
                        device = states.device
                        found = pool(states, lengths.to(device), spans.to(device), one.pooling, one.mean_tokens)
                        pooled[one] = found.to(self._backbone.device)

        below = {one.output_layer for one in self._run_readouts} - {None, self._top}
        readers = {layer: partial(read, layer) for layer in below if layer is not None}
        states = self._backbone.states(ids, lengths, self._run_config, betas, placeholders, readers, prefix)
        read(self._top, states)
        return torch.stack([pooled[one] for one in self._run_readouts], 1)


def refuse_training(model: PreTrainedModel) -> None:
    """Raises `InputError` for a model in training mode."""
    # What joined the model after eval() is in training mode, which matters to dropout alone.
    if model.training or any(_drops(module) for module in model.modules() if module.training):
        raise InputError("the model is in training mode, so dropout would change its states: call model.eval()")


def _drops(module: torch.nn.Module) -> bool:
    """Whether a module in training mode has dropout: is one, or holds the share as a number for its own attention."""
    if isinstance(module, torch.nn.Dropout):
        return module.p > 0
    return any("dropout" in name and isinstance(x, float) and x > 0 for name, x in vars(module).items())


def _whole_texts(report: Callable[[int], Any] | None, templates: int) -> Callable[[int], None]:
    """Takes numbers of prompts that are done, and reports numbers of texts, which have one for each template."""
    done = 0

    def count(prompts: int) -> None:
        nonlocal done
        before, done = done, done + prompts
        if report is not None:
            report(done // templates - before // templates)

    return count
