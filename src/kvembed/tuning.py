"""Tuning: the transform for a model and a config, stored, or else fitted now on unlabelled texts and kept."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import EmbedConfig, Role
from .errors import InputError
from .files import atomic_write, cache_folder, json_hash
from .self_written import SELF_WRITTEN, texts_digest
from .transform import FORMULA, LEAST_TEXTS, Transform, check_count, fit

__all__ = ["FIT_TEXTS", "FIT_TOKENS", "QUERY_TEXTS", "choose_transform", "fitted_for", "warn_of_refit"]

logger = logging.getLogger(__name__)

FIT_TOKENS = 256  # of a calibration text, without its template; more would cost time, and say little more
# Fields that don't bear on a fit, and those that bear on nothing where no layer is changed.
_UNBOUND: dict[str, Any] = {"method": "custom", "dim": None, "max_tokens": None, "chunk_tokens": None}
_OF_CHANGED_LAYERS = ("attention", "bias", "slot_position", "slot_self")
FIT_TEXTS = 2000
QUERY_TEXTS = 500  # of these are read as queries too, of which only the mean is wanted
_GIVEN_TEXTS = 500  # where there are self-written ones to go with them
_GIVEN_RULE = 2  # counts changes of how they are used: a stored fit of another is not re-used
_PIECE = 100  # texts that are read at a time, and kept when a run is stopped


def fitted_for(fingerprint: str, config: EmbedConfig) -> dict[str, str]:
    """What a transform is bound to: the model, all of a config that bears on the views it was fitted on, and how views
    are made and a transform of them.
    """
    views = config.replace(**_UNBOUND)
    if not views.forward_passes:
        views = views.replace(layers=())  # none is run
    if not views.layers and views.layers is not None:
        plain = EmbedConfig()
        views = views.replace(**{name: getattr(plain, name) for name in _OF_CHANGED_LAYERS})
    return {"fingerprint": fingerprint, "config_hash": views.hash(), "formula": str(FORMULA)}


def warn_of_refit(transform: Transform) -> None:
    """Say that a fit on given texts is lost, if it was one: it can't be made again."""
    if transform.info.get("texts") != SELF_WRITTEN:
        logger.warning(
            "the transform is not for this config, and was fitted on given texts, which are not at hand: another is "
            "fitted, on self-written text; texts=... gives them again"
        )


def choose_transform(
    fingerprint: str,
    config: EmbedConfig,
    read: Callable[[Sequence[str], Role, Sequence[int]], NDArray[np.float32]],
    write: Callable[[int], list[str]],
    *,
    texts: Sequence[str] | None = None,
    can_write: bool = True,
    report: Callable[[int, int], None] = lambda done, total: None,
    progress: bool = False,
) -> Transform:
    """From the cache or the package, or else fitted now and cached. A run that is stopped keeps what it has read.

    What was read of self-written texts is kept: the next fit on given texts reads those alone.

    Args:
        fingerprint: of the model.
        config: what makes the views. In a template that documents and queries share, each text is read once.
        read: (texts, role, which templates) -> their views (N,V,D), at most `FIT_TOKENS` tokens of each text.
        write: gives that many texts that the model wrote itself; called if nothing is in the cache.
        texts: unlabelled texts, of which at most 500 different ones, drawn at random with a fixed seed, are used beside
            the self-written ones; with a model that can't write, 2,000. The given ones' weight is the part of their
            vectors that is the same in all of them after a fit without them (`Transform.common`): little in ordinary
            text, of which self-written text says more; half in another language than the model's. Queries, which given
            texts are none of, keep the mean of the self-written ones.
        can_write: whether the model can; a fit on given texts alone is kept apart from one beside self-written texts.
        report: called with prompts done and prompts in all.
        progress: whether that is shown; or else a warning says that minutes will go by.

    Raises:
        InputError: too few different texts, or states that do not tell them apart (see `transform.fit`).
    """
    bound = fitted_for(fingerprint, config)
    source = SELF_WRITTEN if texts is None else "given"
    corpus = None if texts is None else json_hash([*texts])
    rule = [FIT_TEXTS, QUERY_TEXTS] if texts is None else [_GIVEN_RULE, *([] if can_write else ["alone"])]
    cached = cache_folder() / "transforms" / f"{json_hash([bound, source, corpus, *rule])}.safetensors"
    if os.path.isfile(cached):  # Path.exists raises for a folder that can't be entered
        try:
            return Transform.load(cached)
        except InputError as error:
            logger.warning("ignoring the damaged transform: %s", error)
    if texts is None and (shipped := _shipped(bound)):
        return shipped
    if texts is not None:
        check_count(len({*texts}))
    level = logging.INFO if progress else logging.WARNING
    logger.log(level, "fitting a transform on %s texts, once; on a CPU that takes minutes", source)
    found = list(dict.fromkeys(write(FIT_TEXTS) if texts is None else texts))
    origin: dict[str, Any] = {
        "method": config.method,
        "texts": source,
        "texts_sha256": texts_digest(found if texts is None else texts),
    }
    check_count(len(found))
    given, own = ([], found) if texts is None else (found, _joined(write, found))
    if texts is not None:
        most = _GIVEN_TEXTS if own else FIT_TEXTS
        given = random.Random(0).sample(given, most) if len(given) > most else given
        origin["self_written"] = len(own)
    views_of_own = cached.with_name(f"views-{json_hash([bound, own, FIT_TOKENS])}")
    templates = config.templates("document")
    pairs = zip(templates, config.templates("query"), strict=True)
    unlike = [index for index, (document, query) in enumerate(pairs) if document != query]
    as_queries = ([] if own else given[:QUERY_TEXTS], own[:QUERY_TEXTS])
    total = len(templates) * (len(given) + len(own)) + len(unlike) * sum(map(len, as_queries))
    pieces: list[Path] = []  # not wanted any more once the transform is fitted
    done = 0

    def gather(role: Role, which: Sequence[int], given: Sequence[str], own: Sequence[str]) -> NDArray[np.float32]:
        """(N, templates, read-outs, D)"""
        nonlocal done
        parts = []
        for all_texts, at in ((given, cached), (own, views_of_own)):
            for start in range(0, len(all_texts), _PIECE):
                some = all_texts[start : start + _PIECE]
                piece = at.with_suffix(f".{role}-{'-'.join(map(str, which))}-{start}.npy")
                parts.append(_kept(piece, lambda: read(some, role, which)))  # noqa: B023 (called at once)
                if all_texts is given:
                    pieces.append(piece)  # the other ones serve every fit
                done += len(some) * len(which)
                report(done, total)
        return np.concatenate(parts).reshape(len(given) + len(own), len(which), len(config.readouts), -1)

    documents = gather("document", range(len(templates)), given, own)
    first = len(given) if own else 0
    queries = documents[first:]
    if unlike:
        queries = queries[:QUERY_TEXTS].copy()
        queries[:, unlike] = gather("query", unlike, *as_queries)
    views: dict[Role, NDArray[np.float32]] = {"document": documents, "query": queries}
    views = {role: part.reshape(len(part), -1, part.shape[-1]) for role, part in views.items()}
    inside = [one.is_inside for _, one in config.views]
    weights = None
    if given and len(own) >= LEAST_TEXTS:
        alone = fit(views | {"document": views["document"][first:]}, inside, {})
        share = alone.common(views["document"][:first])
        weights = np.repeat([share / first, (1 - share) / len(own)], [first, len(own)])
        origin["weight_of_given"] = round(share, 3)
    transform = fit(views, inside, bound | origin, weights)
    try:
        transform.save(cached)
    except OSError as error:
        logger.warning("the transform could not be stored in %s: %s", cached.parent, error)
    with contextlib.suppress(OSError):  # of a cache that can't be written
        for piece in pieces:
            piece.unlink(missing_ok=True)
    return transform


def _joined(write: Callable[[int], list[str]], found: Sequence[str]) -> list[str]:
    """Self-written texts to go with given ones; none, with a warning, from a model that can't write."""
    try:
        known = {*found}
        return [text for text in write(FIT_TEXTS) if text not in known]
    except InputError as error:
        count = min(len(found), FIT_TEXTS)
        logger.warning("fitting on %d given texts alone, which is not as good: %s", count, error)
        return []


def _shipped(bound: dict[str, str]) -> Transform | None:
    """The one that comes with the package, for its default model: fitted on what the model wrote, kept in float16."""
    for entry in (files("kvembed") / "transforms").iterdir():
        with as_file(entry) as path:
            transform = Transform.load(path)
        if transform.is_for(bound):
            return transform
    return None


def _kept(path: Path, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """What a stopped run left in `path`, or else made now and left there."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        kept: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return kept
    made = make()
    with contextlib.suppress(OSError):  # then a stopped run starts again, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, made, allow_pickle=False)
    return made
