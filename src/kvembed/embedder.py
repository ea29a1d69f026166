"""Embedder: texts in, unit vectors out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import models
from .backbone import Backbone
from .bars import Bar
from .batching import blocks, characters
from .checks import each_text, is_whole, list_texts
from .config import EmbedConfig, Role
from .errors import InputError, TextTooLong
from .explanation import Explanation, token_texts
from .fingerprint import fingerprint
from .layers import choose_layers
from .methods import preset
from .prefix import can_share_prefix, shared_prefix
from .prompts import UNLIMITED, Prompt, Prompter, check_texts
from .quantize import as_vectors, unit
from .reading import Reader, refuse_training
from .saved import TRANSFORM_FILE, save_embedder, save_st_files, saved_config, saved_transform
from .self_written import can_write, generated_texts
from .transform import Transform, most_columns
from .tuning import FIT_TOKENS, choose_transform, fitted_for, warn_of_refit
from .vectors import Encoded

__all__ = ["Embedder"]

logger = logging.getLogger(__name__)


class Embedder:
    """A frozen language model as an embedding model. Make one with `from_pretrained` or `from_model`.

    Safe to use from several threads, also when several embedders share a model.

    Attributes:
        model: the language model, as it was given.
        tokenizer: its tokenizer, likewise.
        backbone: the model as kvembed sees it.
        transform: what the config's transform was fitted to, or None if it has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EmbedConfig,
        *,
        batch_tokens: int | None = None,
        texts: Sequence[str] | None = None,
        transform: Transform | None = None,
        refit: bool = False,
        rebind: bool = False,
        name: str = "",
        progress: bool = False,
    ) -> None:
        """Prefer `from_pretrained` or `from_model`, which say what the arguments mean.

        Args:
            transform: fitted for this model and config.
            refit: whether another is fitted, with a warning, if `transform` is for another config; or else it is
                refused.
            rebind: whether `transform` is taken although the model is not quite the one it was fitted for, having been
                rounded or trained since; or else it is refused.
        """
        self._batch_tokens: int | None = None
        if batch_tokens is not None:
            self.batch_tokens = batch_tokens
        _check_loaded(model, tokenizer)
        refuse_training(model)
        texts = None if texts is None else list_texts(texts)
        check_texts(texts or ())
        if transform is not None and config.transform == "none":
            raise InputError(f"method {config.method} has no transform, so it can't take a fitted one")
        self.model = model
        self.tokenizer = tokenizer
        self.backbone = Backbone(model)
        limit = None
        if config.forward_passes:
            limit = self.backbone.max_tokens
            if limit is None and tokenizer.model_max_length < 1e9:  # 1e30 stands for "not known"
                limit = tokenizer.model_max_length
        self._limit = limit or UNLIMITED
        self._prompter = Prompter(tokenizer, self._limit)
        # All that can be wrong is told before layers are chosen and a transform is fitted, which may take minutes.
        depth = len(self.backbone.layers)
        changed = self.backbone.changed_layers(config)
        if config.prepend_layers or any(one.output_layer is not None for one in config.readouts):
            self.backbone.check_readable()
        if any(one.pooling == "static" for one in config.readouts):
            self.backbone.check_static()
        if config.prepend_layers and config.prepend_layers[-1] >= depth:
            raise InputError(f"prepend_layers go up to {config.prepend_layers[-1]}; the last layer is {depth - 1}")
        self._config = config = config.replace(
            layers=None if config.layers is None and config.forward_passes else changed,
            output_layer=_from_zero(config.output_layer, depth),
            more_readouts=tuple(
                dataclasses.replace(part, output_layer=_from_zero(part.output_layer, depth))
                for part in config.more_readouts
            ),
        )
        if config.max_tokens and limit and config.max_tokens > limit and not config.chunk_tokens:
            raise InputError(f"max_tokens is {config.max_tokens}, but the model takes at most {limit}")
        self._prefixes: dict[str, int] = {}  # template -> tokens of the prefix that its texts share
        self._max_tokens = config.max_tokens or limit or UNLIMITED
        for role in get_args(Role):
            self._prompts(["a"], role, self._max_tokens)  # templates leave room for a text
            if limit:
                mosts = (self._most(each, self._max_tokens, config.chunk_tokens) for each in config.templates(role))
                self._max_tokens = min(mosts)
        _check_dim(config, most_columns(len(config.views), self.backbone.dim))
        self._check_changes()
        self._texts = texts
        if config.layers is None:
            profile = choose_layers(
                self.fingerprint(),
                self.backbone,
                self._prompter,
                config.templates("document")[0],
                lambda count: self._own_texts(count, progress),
                texts=texts,
                model=name,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
            self._config = config = config.replace(layers=profile.layers)
            self._check_changes()
        self._reader = Reader(self.backbone, config, self._prompter.size)
        self.transform: Transform | None = None
        if config.transform != "none":
            if transform is not None and rebind and transform.info.get("fingerprint") != self.fingerprint():
                transform = transform.bound_to(self.fingerprint())
            self.transform = self._fitted(transform, refit, progress)
            _check_dim(config, self.transform.dim)

    def _check_changes(self) -> None:
        """Raises `InputError` if changed layers are above all that is read, `UnsupportedModel` for keys that stay."""
        read = [one.output_layer for one in self._config.readouts if one.pooling != "static"]
        top = max((len(self.backbone.layers) if layer is None else layer for layer in read), default=-1)
        for name in ("layers", "prepend_layers"):
            layers = getattr(self._config, name)
            if layers and read and min(layers) > top:
                told = ", ".join(map(str, layers))
                raise InputError(f"{name} {told} would change nothing: only the states of layer {top} are read")
        self.backbone.turned_layers(self._config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        method: str | EmbedConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        batch_tokens: int | None = None,
        texts: Sequence[str] | None = None,
        fitted: str | os.PathLike[str] | None = None,
        compile: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Embedder:
        """Load a model and make it an embedder.

        Args:
            name: a bundled name (`"smollm2"`), a hub id, `id@revision`, a folder or a `.gguf` file. What
                `save_pretrained` wrote is opened as it was saved, also from a hub.
            method: a preset, see `kvembed.METHODS`, or a config of your own (or the name of a `.json` file of one, see
                `EmbedConfig.read`). Default: the one saved with the model, or else `"kv"`.
            dtype: `"float32"`, `"bfloat16"`, `"float16"` (or torch's own), or `"auto"`: bfloat16, or float32 where the
                CPU or GPU can't multiply it. Pooling and all after it are in float32.
            device: a torch device, or `"auto"`.
            revision: branch, tag or commit of a hub id, if the name does not tell it.
            batch_tokens: tokens in a batch. Default: 2,048 on a CPU, 16,384 elsewhere.
            texts: unlabelled texts to choose layers by and to fit a transform on, if the method has one (100 and more;
                up to 500 are used for it, beside self-written ones). Default: what is stored for this model, or else
                text that the model writes itself.
            fitted: a file with a transform (`Transform.save`, `kvembed tune -o`), instead of the stored one; then no
                `texts` are needed.
            compile: `torch.compile` parts of the model: seconds to half a minute more before the first vector, and
                faster after that (docs/speed.md); for long jobs. On a CPU it needs a C++ compiler.
            progress: show bars on a terminal while layers are chosen and a transform is fitted.
            options: fields of `EmbedConfig` to change, for example `layers=[20, 21, 22]`, `bias=1.0`, `max_tokens=512`.

        Raises:
            ModelNotFound: no such model, or it can't be read.
            UnsupportedModel: it can't be re-routed; the message says why.
            InputError: bad option.
        """
        if not isinstance(name, str | os.PathLike):
            raise InputError(f"a model's name or path is needed, not a {type(name).__name__}; from_model takes a model")
        source, dtype = os.fspath(name), str(dtype).removeprefix("torch.")
        source += f"@{revision}" if revision is not None else ""
        as_saved = saved_config(source)
        if method is None and as_saved is not None:
            config = as_saved.replace(**options)
        else:
            config = preset(method or "kv", **options)
        transform = _loaded(fitted, config, texts)
        has_its_own = as_saved is not None and as_saved.transform != "none" and config.transform != "none"
        if has_its_own and fitted is None and texts is None:
            transform = saved_transform(source)
            if transform is None and method is None:  # another fit would make other vectors
                raise InputError(
                    f"{source}: {TRANSFORM_FILE} is missing, its fit: give fitted=..., texts=... or method=..."
                )
        model, tokenizer = models.load(source, dtype=dtype, device=device)
        embedder = cls(
            model,
            tokenizer,
            config,
            batch_tokens=batch_tokens,
            texts=texts,
            transform=transform,
            refit=fitted is None,
            rebind=fitted is None and model.dtype == torch.float16,  # what was saved beside the weights is theirs
            name=models.label(source),
            progress=progress,
        )
        if compile:
            embedder.backbone.compile()
        return embedder

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        method: str | EmbedConfig = "kv",
        batch_tokens: int | None = None,
        texts: Sequence[str] | None = None,
        fitted: str | os.PathLike[str] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Embedder:
        """Embed with a model that is already in memory. Its weights, configuration and hooks stay as they are.

        Args and errors as in `from_pretrained`; dtype and device are the model's own.
        """
        config = preset(method, **options)
        return cls(
            model,
            tokenizer,
            config,
            batch_tokens=batch_tokens,
            texts=texts,
            transform=_loaded(fitted, config, texts),
            progress=progress,
        )

    def replace(self, *, progress: bool = False, **options: Any) -> Embedder:
        """The same model under another config: some fields of `config` changed. Weights are shared, not copied.

        A transform is kept if the change leaves it valid (`dim`, say), though the model was cast or trained since; and
        else fitted anew on the same texts; where these are not at hand (it was loaded), on self-written ones, with a
        warning.

        Raises:
            InputError: bad option; `method`, for which `from_model` starts from the preset.
        """
        if options.get("method", self.config.method) != self.config.method:
            raise InputError(
                "replace changes fields, and a method is many: use from_model(model, tokenizer, method=...)"
            )
        config = self.config.replace(**options)
        return Embedder(
            self.model,
            self.tokenizer,
            config,
            batch_tokens=self._batch_tokens,
            texts=self._texts,
            transform=None if config.transform == "none" else self.transform,
            refit=True,
            rebind=True,
            progress=progress,
        )

    def __repr__(self) -> str:
        kind = f"{self.backbone.model_type}, method={self.config.method!r}, config={self.config.hash()}"
        return f"Embedder({kind}, dim={self.dim}, dtype={self.dtype})"

    @property
    def config(self) -> EmbedConfig:
        """What is done to a text, layers spelled out. To change it, `replace`."""
        return self._config

    @property
    def dim(self) -> int:
        """Length of a vector. To change it, `replace`."""
        return self.backbone.dim if self.transform is None else self.config.dim or self.transform.dim

    @property
    def max_tokens(self) -> int:
        """The longest prompt in tokens, without a beginning that texts share: the config's, or else what that leaves of
        the model's own limit. Where neither says any, or no layer is run, more than any text has (2**31). To change
        it, `replace`.
        """
        return self._max_tokens

    @property
    def dtype(self) -> str:
        """The weights' dtype as `from_pretrained` takes it: float32, bfloat16 or float16."""
        return self.backbone.dtype

    @property
    def batch_tokens(self) -> int:
        """Tokens in a batch; the default goes by where the model is now. May be set."""
        return self._batch_tokens or (2048 if self.backbone.device.type == "cpu" else 16384)

    @batch_tokens.setter
    def batch_tokens(self, value: int) -> None:
        if not (is_whole(value) and value >= 1):
            raise InputError(f"batch_tokens must be a whole number from 1, not {value!r}")
        self._batch_tokens = value

    def encode(
        self, texts: str | Iterable[str], *, role: Role = "document", progress: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: strings; or one string.
            role: `"document"` or `"query"`: which template.
            progress: show a bar on a terminal.

        Returns:
            (n, dim) float32, rows of norm 1, in the order of `texts`; (dim,) for one string. A text's vector does not
            depend on the others. Texts longer than `max_tokens` are cut, and a warning says how many.

        Raises:
            InputError: something that is not a string, a lone surrogate, or no room for the text beside the template.
            OutOfMemory: a single text does not fit.
        """
        vectors = self.encode_with_report(
            [texts] if isinstance(texts, str) else texts, role=role, progress=progress
        ).vectors
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_query(self, texts: str | Iterable[str], *, progress: bool = False) -> NDArray[np.float32]:
        """`encode` with the query template."""
        return self.encode(texts, role="query", progress=progress)

    def encode_document(self, texts: str | Iterable[str], *, progress: bool = False) -> NDArray[np.float32]:
        """`encode` with the document template."""
        return self.encode(texts, role="document", progress=progress)

    def encode_with_report(self, texts: Iterable[str], *, role: Role = "document", progress: bool = False) -> Encoded:
        """`encode`, with the token counts (over all templates, if there are several) and what was cut."""
        texts = list_texts(texts)
        found = Encoded(np.zeros((len(texts), self.dim), np.float32), *np.zeros((2, len(texts)), np.int64))
        done = 0
        for piece in self.encode_stream(texts, role=role, total=len(texts), progress=progress):
            place = slice(done, done := done + len(piece.vectors))
            found.vectors[place], found.token_counts[place] = piece.vectors, piece.token_counts
            found.tokens_cut[place] = piece.tokens_cut
        return found

    def encode_stream(
        self, texts: Iterable[str], *, role: Role = "document", total: int | None = None, progress: bool = False
    ) -> Iterator[Encoded]:
        """`encode_with_report` in pieces, in order, as texts come; memory does not grow with their number.

        A piece is 1,024 texts, or about a million characters. While one is embedded the next one is tokenised.

        Args:
            texts: strings, from anywhere; read two pieces ahead.
            role: as in `encode`.
            total: how many texts there are, for the time left on the bar. None: not known.
            progress: show a bar on a terminal.

        Raises:
            InputError: as `encode`, when the text is reached.
        """
        texts = each_text(texts)
        bar = Bar(total=total, desc="embedding", unit="text", progress=progress)
        seen = cut = 0
        with ThreadPoolExecutor(1, "kvembed-tokenizing") as tokenizing, bar:
            ahead: deque[Future[list[list[Prompt]]]] = deque()
            for block in itertools.chain(blocks(texts, characters), [None]):
                if block is not None:
                    ahead.append(tokenizing.submit(self._prompts, block, role, self.max_tokens, seen))
                    seen += len(block)
                if ahead and (len(ahead) == 2 or block is None):
                    read = self._reader(ahead.popleft().result(), self.batch_tokens, bar.update)
                    cut += read.truncated
                    yield self._joined(read, role)
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, seen, self.max_tokens)

    def encode_views(self, texts: Iterable[str], *, role: Role = "document") -> Encoded:
        """What `encode` makes vectors of: every read-out under every template, `vectors` being (n, V, model's width).

        Neither normalised nor transformed; `join` does the rest. For trying transforms without embedding anew.
        Arguments and errors as in `encode`.
        """
        return self._reader(self._prompts(list_texts(texts), role, self.max_tokens), self.batch_tokens)

    def prompts(
        self,
        texts: Iterable[str | Sequence[int]],
        *,
        role: Role = "document",
        truncate: bool = True,
        first: int = 0,
    ) -> list[tuple[Prompt, ...]]:
        """The first part of `encode`: each text tokenised in each template of its role.

        Args:
            texts: strings, or lists (arrays, tuples) of the tokenizer's ids, embedded as the text that they stand for.
            role: as in `encode`.
            truncate: cut texts that are too long and count what is lost in `Prompt.tokens_cut`; or else refuse them.
            first: the first text's number, for errors.

        Raises:
            InputError: as `encode`; or ids that are not text.
            TextTooLong: a text that must not be cut.
        """
        whole = [self._decoded(text, index) for index, text in enumerate(list_texts(texts), first)]
        by_template = self._prompts(whole, role, self.max_tokens, first, cut=truncate)
        for template, rendered in zip(self.config.templates(role), by_template, strict=True):
            most = self._most(template, self.max_tokens, self.config.chunk_tokens)
            for index, prompt in enumerate(rendered, first):
                if prompt.tokens > most:
                    raise TextTooLong(
                        f"text {index} takes {prompt.tokens:,} tokens with its template; the limit is {most:,}"
                    )
        return list(zip(*by_template, strict=True))

    def encode_prompts(
        self,
        prompts: Sequence[tuple[Prompt, ...]],
        *,
        role: Role = "document",
        report: Callable[[int], Any] | None = None,
    ) -> Encoded:
        """All of `encode` after `prompts`, given what that gave for the same role. Errors as in `encode`.

        `report`, if given, is called after every batch with the number of texts that are done.
        """
        by_template: list[list[Prompt]] = [list(rendered) for rendered in zip(*prompts, strict=True)]
        by_template = by_template or [[] for _ in self.config.templates(role)]
        return self._joined(self._reader(by_template, self.batch_tokens, report), role)

    def join(self, views: NDArray[np.float32], *, role: Role = "document") -> NDArray[np.float32]:
        """The last part of `encode`, what comes after `encode_views`: (n, V, model's width) views -> (n, dim) float32,
        rows of norm 1.

        Raises:
            InputError: views of another shape.
        """
        views = np.asarray(views, np.float32)
        shape = len(self.config.templates(role)) * len(self.config.readouts), self.backbone.dim
        if views.ndim != 3 or views.shape[1:] != shape:
            raise InputError(f"views are of shape (n, {shape[0]}, {shape[1]}) here, not {views.shape}")
        vectors = views.mean(1) if self.transform is None else self.transform(views, role, self.config.dim)
        return unit(vectors)

    def _decoded(self, text: Any, index: int) -> Any:
        if not isinstance(text, list | tuple | np.ndarray):
            return text
        try:
            return self._prompter.decode(text)
        except InputError as error:
            raise InputError(f"text {index}: {error}") from None

    def _joined(self, read: Encoded, role: Role) -> Encoded:
        return dataclasses.replace(read, vectors=self.join(read.vectors, role=role))

    def _fitted(self, transform: Transform | None, refit: bool, progress: bool) -> Transform:
        """`transform` itself, or else the stored one, or one fitted now. Raises `InputError` if it is not for this."""
        if transform is not None:
            if transform.is_for(fitted_for(self.fingerprint(), self.config)):
                return transform
            same_model = transform.info.get("fingerprint") == self.fingerprint()
            if same_model and refit:
                if self._texts is None:
                    warn_of_refit(transform)
                return self._fitted(None, refit, progress)
            if same_model:
                theirs, ours = transform.info.get("method", self.config.method), self.config.method
                apart = f"another config of {ours}" if theirs == ours else f"method {theirs}, and this is {ours}"
                raise InputError(f"the transform was fitted for {apart}; fit one for it, or leave it out")
            rounded = "cast to float16, or saved without its tokenizer: then take float16, or fit anew"
            if self.dtype == "float16":
                rounded = "not in float16, which rounds weights: take float32 or bfloat16, or fit anew"
            raise InputError(f"the transform was fitted for another model, or this one {rounded}")

        def read(texts: Sequence[str], role: Role, templates: Sequence[int]) -> NDArray[np.float32]:
            rendered = self._prompts(["a"], role, UNLIMITED)
            around = max(prompt.tokens - len(prompt.content_ids) for (prompt,) in rendered)
            prompts = self._prompts(texts, role, around + FIT_TOKENS, chunked=False)  # whatever max_tokens is
            return self._reader([prompts[index] for index in templates], self.batch_tokens).vectors

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with Bar(desc="fitting", unit="prompt", delay=1, progress=progress) as bar:
            return choose_transform(
                self.fingerprint(),
                self.config,
                read,
                lambda count: self._own_texts(count, progress),
                texts=self._texts,
                can_write=can_write(self.model, self.tokenizer),
                report=report,
                progress=progress,
            )

    def _own_texts(self, count: int, progress: bool) -> list[str]:
        return generated_texts(self.model, self.tokenizer, self.fingerprint(), count, progress=progress)

    def similarity(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarity of every row of `a` (n, dim) with every row of `b` (m, dim): (n, m) float32 in [-1, 1].

        Raises:
            InputError: rows of unlike lengths, or what is no vectors.
        """
        unit_a, unit_b = (unit(as_vectors(each)) for each in (a, b))
        if unit_a.shape[1] != unit_b.shape[1]:
            raise InputError(f"vectors of {unit_a.shape[1]} and of {unit_b.shape[1]} dimensions can't be compared")
        cosine: NDArray[np.float32] = (unit_a @ unit_b.T).clip(-1, 1).astype(np.float32)
        return cosine

    def explain(self, text: str, *, role: Role = "document") -> Explanation:
        """What happens to a text: its prompt, its tokens, and how much each reads the slot, layer by layer.

        Of several templates, the first is shown; and of several chunks.
        """
        whole = self._prompts([text], role, self.max_tokens)[0][0]
        prompt = (whole.chunks or (whole,))[0]
        betas = self._reader.betas(prompt)  # layer -> (1, Hq, n)
        return Explanation(
            prompt=prompt.text,
            tokens=token_texts(prompt, self.tokenizer.convert_ids_to_tokens(list(prompt.ids))),
            token_ids=prompt.ids,
            span=prompt.span,
            tokens_cut=whole.tokens_cut,
            chunks=len(whole.chunks) or 1,
            config=self.config,
            beta={layer: tuple(betas[layer][0].mean(0).tolist()) for layer in sorted(betas)},
            fitted_on=None if self.transform is None else self.transform.info | {"digest": self.transform.digest()},
            shared=whole.prefix_tokens,
        )

    def fingerprint(self, *, anew: bool = False) -> str:
        """16 hex digits that tell models apart, by weights, positions and tokenizer.

        The same for float32 and bfloat16, on any device; float16 rounds weights otherwise.

        Args:
            anew: as the model is now; else as it was when this was first asked of the embedder.
        """
        return fingerprint(self.backbone, self._prompter) if anew else self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.backbone, self._prompter)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save to a folder that `from_pretrained` and `SentenceTransformer` open (docs/integrations.md).

        Opened with the same dtype, it gives the same vectors. Each file appears whole or not at all.

        Raises:
            InputError: `folder` is a file, or the model is not a plain transformers model.
        """
        save_embedder(folder, self)
        save_st_files(folder)

    def _prompts(
        self,
        texts: Sequence[Any],
        role: Role,
        max_tokens: int,
        first: int = 0,
        cut: bool = True,
        chunked: bool = True,
    ) -> list[list[Prompt]]:
        """For each template, a prompt for each text; `first` is the first text's number, for errors."""
        found = []
        for template in self.config.templates(role):
            chunk_tokens = self.config.chunk_tokens if chunked else None
            most = self._most(template, max_tokens, chunk_tokens) if cut else UNLIMITED
            found.append(self._prompter(texts, template, most, first, self._prefix_tokens(template), chunk_tokens))
        return found

    def _most(self, template: str, max_tokens: int, chunk_tokens: int | None) -> int:
        """The longest prompt in tokens."""
        return max_tokens if chunk_tokens else min(max_tokens, self._limit - self._prefix_tokens(template))

    def _prefix_tokens(self, template: str) -> int:
        """Tokens of the prefix that its texts share. Raises `InputError` if they leave no room in the model."""
        if template not in self._prefixes:
            (prompt,) = self._prompter(["a"], template, UNLIMITED)
            self._prefixes[template] = len(shared_prefix(prompt)) if can_share_prefix(template, self.config) else 0
        if self._prefixes[template] >= self._limit:
            raise InputError(
                f"the template alone takes more than the {self._limit} tokens that the model takes at most"
            )
        return self._prefixes[template]


def _check_dim(config: EmbedConfig, columns: int) -> None:
    """Raises `InputError` for more dimensions than a transform has columns."""
    if config.dim and config.dim > columns:
        raise InputError(f"dim is {config.dim}, but the transform gives {columns} at most")


def _check_loaded(model: Any, tokenizer: Any) -> None:
    if not hasattr(model, "get_decoder"):  # a wrapper, such as an adapter, need not be of transformers' classes
        raise InputError(f"the model is a {type(model).__name__}, not one of transformers; from_pretrained takes names")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__}, not one of transformers")


def _loaded(
    fitted: str | os.PathLike[str] | None, config: EmbedConfig, texts: Sequence[str] | None
) -> Transform | None:
    """The transform in a file, if one is given. Raises `InputError` if there are texts too, which none would use."""
    if fitted is None:
        return None
    if texts is not None and config.transform != "none" and config.layers is not None:
        raise InputError("texts are to fit a transform on, and fitted is one that is made: give one of the two")
    return Transform.load(fitted)


def _from_zero(layer: int | None, depth: int) -> int | None:
    """A layer counted from the bottom. Raises `InputError` for one that is not there."""
    if layer is not None and not -depth <= layer < depth:
        raise InputError(f"output_layer is {layer}; the last layer is {depth - 1}")
    return None if layer is None else layer % depth
