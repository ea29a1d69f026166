"""What is evaluated: an embedder of ours, or a reference (a trained sentence-transformers model, TF-IDF) beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import Precision, Role
from .errors import InputError, ModelNotFound
from .extras import import_extra
from .files import json_hash
from .models import bars_off
from .quantize import dequantize, quantize
from .tasks import LIMITS
from .vectors import Encoded

if TYPE_CHECKING:
    from .embedder import Embedder

__all__ = [
    "Subject",
    "at_limits",
    "digest",
    "embedder_subject",
    "marked",
    "quantized_subject",
    "sentence_transformer_subject",
    "tfidf_subject",
]

_UNSPACED = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Of letters and digits: of such a script, or two and more of others, as scikit-learn has it.
_RUNS = re.compile(rf"{_UNSPACED.pattern}+|(?:(?!{_UNSPACED.pattern})\w){{2,}}")
_TFIDF_BYTES = 20  # of a text and a word: a number in float32, and two in float64 for scoring


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something that embeds texts, as `kvembed.evaluate` sees it.

    Attributes:
        model: its name in tables.
        method: a preset, or one of `kvembed.results.REFERENCES`.
        config: what else decides its vectors, plain JSON types.
        config_hash: 16 hex digits.
        identity: 16 hex digits that tell vectors apart: model weights, dtype and config.
        passes: forward passes for a text.
        device: where it runs, for the ledger.
        encode: (texts, role) -> vectors and token counts.
        fit: if given, called with all texts of a task before they are encoded; such vectors are not cached.
        finish: if given, makes vectors (n,dim) of what `encode` gives and the cache keeps, for a role.
        cached_as: the identity of what is cached, if that is not the vectors themselves.
    """

    model: str
    method: str
    config: dict[str, Any]
    config_hash: str
    identity: str
    passes: int
    device: str
    encode: Callable[[Sequence[str], Role], Encoded]
    fit: Callable[[Sequence[str]], None] | None = None
    finish: Callable[[NDArray[np.float32], Role], NDArray[np.float32]] | None = None
    cached_as: str | None = None


def embedder_subject(embedder: Embedder, model: str) -> Subject:
    """An `Embedder` as its model is now, under the name that `model` has in tables."""
    import torch

    device = embedder.model.device.type
    if device == "cpu":
        device += f", {torch.get_num_threads()} threads"

    def encode(texts: Sequence[str], role: Role) -> Encoded:
        with _without_warnings("kvembed.embedder"):  # cut texts are in the result
            return embedder.encode_with_report(texts, role=role)

    def encode_views(texts: Sequence[str], role: Role) -> Encoded:
        read = embedder.encode_views(texts, role=role)
        return dataclasses.replace(read, vectors=read.vectors.reshape(len(read.vectors), -1))

    def join(flat: NDArray[np.float32], role: Role) -> NDArray[np.float32]:
        return embedder.join(flat.reshape(len(flat), -1, embedder.backbone.dim), role=role)

    fingerprint = embedder.fingerprint(anew=True)  # or the cache would give out another's vectors
    identity = f"{fingerprint}-{embedder.dtype}-{embedder.config.hash()}-{embedder.max_tokens}"
    fitted = {}
    views = None
    if embedder.transform is not None:
        # Another transform of the same views, or fewer of its dimensions, needs no new forward.
        from .tuning import fitted_for

        views = f"{fitted_for(fingerprint, embedder.config)}-{embedder.dtype}-{embedder.max_tokens}"
        if embedder.config.chunk_tokens:  # they don't bear on a fit, but on what is read
            views += f"-{embedder.config.chunk_tokens}"
        views = digest(views)
        identity += f"-{embedder.transform.digest()}"
        told_of = ("texts", "texts_sha256", "count", "self_written")
        info = embedder.transform.info
        fitted = {"fitted_on": {name: info[name] for name in told_of if name in info}}
    return Subject(
        model=model,
        method=embedder.config.method,
        config=embedder.config.to_dict() | fitted,
        config_hash=embedder.config.hash(),
        identity=digest(identity),
        passes=embedder.config.forward_passes,
        device=f"{device}, {embedder.dtype}",
        encode=encode_views if views else encode,
        finish=join if views else None,
        cached_as=views,
    )


def quantized_subject(subject: Subject, precision: Precision) -> Subject:
    """The same, with its vectors rounded; the cache is that of the vectors as they were."""
    if precision == "float32":
        return subject
    before = subject.finish

    def finish(found: NDArray[np.float32], role: Role) -> NDArray[np.float32]:
        vectors = found if before is None else before(found, role)
        return dequantize(quantize(vectors, precision), precision, vectors.shape[1])

    return marked(subject, "precision", precision, finish=finish, cached_as=subject.cached_as or subject.identity)


def marked(subject: Subject, name: str, value: str, **changes: Any) -> Subject:
    """Another subject than `subject`, told from it by one more entry of its config; `changes` are of its fields."""
    return dataclasses.replace(
        subject,
        config=subject.config | {name: value},
        config_hash=digest(f"{subject.config_hash} {value}"),
        identity=digest(f"{subject.identity} {value}"),
        **changes,
    )


def at_limits(embedder: Embedder, suite: str) -> list[Embedder]:
    """The embedder at each of a suite's limits of tokens that it can take; as it is if there is none."""
    # Read in chunks, a text may have more tokens than the model takes, unless it was told how many.
    free = embedder.config.chunk_tokens is not None and embedder.config.max_tokens is None
    limits = [limit for limit in LIMITS[suite] if free or limit <= embedder.max_tokens]
    return [embedder.replace(max_tokens=limit) for limit in limits] or [embedder]


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def sentence_transformer_subject(folder: str | os.PathLike[str], name: str | None = None) -> Subject:
    """A sentence-transformers model from a folder or the hub, with its own pooling, prompts and length limit.

    sentence-transformers puts plain text in a chat template wherever the tokenizer has one; an embedding baseline must
    not be measured so, and the template is taken off.

    Raises:
        ModelNotFound: it can't be opened.
    """
    library = import_extra("sentence_transformers", "eval")
    try:
        with bars_off():
            model = library.SentenceTransformer(os.fspath(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{folder}: can't be opened with sentence-transformers ({error})") from None
    transformer = model[0]
    if {"message", "text"} <= {*getattr(transformer, "modality_config", ())}:
        del transformer.modality_config["message"]
        transformer.input_formatter.supported_modalities.remove("message")
    limit = model.max_seq_length

    def encode(texts: Sequence[str], role: Role) -> Encoded:
        prompt_name = role if role in model.prompts else None
        vectors = model.encode(list(texts), prompt_name=prompt_name, normalize_embeddings=True, batch_size=16)
        whole = model.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in whole], np.int64)
        cut = (lengths - (limit or 2**31)).clip(0)
        return Encoded(np.asarray(vectors, np.float32), lengths - cut, cut)

    name = name or Path(folder).name
    return _reference(name, "sentence-transformer", {"max_tokens": limit}, _st_identity(model), encode)


def _st_identity(model: Any) -> str:
    """A hash of all that decides a sentence-transformers model's vectors: weights, modules, prompts, tokenizer."""
    found = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        found.update(key.encode() + tensor.float().numpy().tobytes())
    modules: list[tuple[str, Any]] = [
        (type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in model
    ]
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # by call
    rest = [modules, model.prompts, rules]
    found.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return found.hexdigest()


def tfidf_subject() -> Subject:
    """TF-IDF (scikit-learn's defaults, sublinear term frequency), fitted on each task's own texts, without labels.

    In Chinese and Japanese, which have no spaces, a word is any two characters in a row, as in search engines.
    """
    text = import_extra("sklearn.feature_extraction.text", "eval")
    vectorizer = text.TfidfVectorizer(sublinear_tf=True, dtype=np.float32, tokenizer=_words, token_pattern=None)
    analyse = vectorizer.build_analyzer()

    def encode(texts: Sequence[str], role: Role) -> Encoded:
        vectors = vectorizer.transform(texts).toarray()
        return Encoded(vectors, np.array([len(analyse(x)) for x in texts], np.int64), np.zeros(len(texts), np.int64))

    def fit(texts: Sequence[str]) -> None:
        try:
            vectorizer.fit(texts)
        except ValueError as error:
            raise InputError(f"TF-IDF of {len(texts)} texts, the first {texts[0]!r:.60}: {error}") from None
        words = len(vectorizer.vocabulary_)
        needed = _TFIDF_BYTES * len(texts) * words
        if hasattr(os, "sysconf") and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise InputError(
                f"TF-IDF of {len(texts):,} texts with {words:,} different words would take {needed / 2**30:,.0f} GiB "
                "of memory; --suite mini takes fewer texts"
            )

    return _reference("tf-idf", "tf-idf", {"sublinear_tf": True, "unspaced": "bigrams"}, "", encode, fit)


def _words(text: str) -> list[str]:
    found = []
    for run in _RUNS.findall(text):
        found += [run[i : i + 2] for i in range(max(1, len(run) - 1))] if _UNSPACED.match(run) else [run]
    return found


def _reference(
    model: str,
    method: str,
    config: dict[str, Any],
    weights: str,
    encode: Callable[[Sequence[str], Role], Encoded],
    fit: Callable[[Sequence[str]], None] | None = None,
) -> Subject:
    config_hash = json_hash(config | {"method": method})
    return Subject(model, method, config, config_hash, digest(weights + config_hash), 1, "cpu, float32", encode, fit)


def digest(text: str) -> str:
    """16 hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
