"""An Embedder as MTEB's encoder: `mteb.evaluate(MtebEncoder(embedder), tasks)`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .extras import import_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mteb.types import Array

    from .embedder import Embedder

__all__ = ["MtebEncoder", "run_mteb"]


class MtebEncoder:
    """mteb 2's `EncoderProtocol`: queries get the query template, all else the document template.

    Args:
        embedder: ours.
        name: the model's name in MTEB's results, which go by it, the model's fingerprint as it is now, the
            config's hash, the dtype and the fit. A model that has changed since needs a new encoder.

    Attributes:
        mteb_model_meta: mteb's `ModelMeta`.
    """

    def __init__(self, embedder: Embedder, name: str = "model", **_: Any) -> None:
        models = _mteb("mteb.models")
        self.embedder = embedder
        config = embedder.config
        self.mteb_model_meta = models.ModelMeta.create_empty(
            overwrites={
                "name": f"kvembed/{name.replace('/', '--')}",
                "revision": embedder.fingerprint(anew=True),
                "embed_dim": embedder.dim,
                "similarity_fn_name": "cosine",
                "modalities": ["text"],
                "experiment_kwargs": {
                    "method": config.method,
                    "config": config.hash(),
                    "dtype": embedder.dtype,
                    **({} if embedder.transform is None else {"transform": embedder.transform.digest()}),
                },
            }
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> NDArray[np.float32]:
        """Embed mteb's batches, each a dict with `text` (a title already joined): (n, dim) float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        query = getattr(prompt_type, "value", prompt_type) == "query"
        return self.embedder.encode(texts, role="query" if query else "document")

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Any:
        """Cosine of every pair, as a tensor (n, m)."""
        return _mteb("mteb.similarity_functions").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Any:
        """Cosine row by row, as a tensor (n,)."""
        return _mteb("mteb.similarity_functions").pairwise_cos_sim(embeddings1, embeddings2)


def run_mteb(embedder: Embedder, name: str, tasks: Sequence[str], *, progress: bool = False) -> dict[str, float]:
    """Run MTEB tasks by name: their data comes from the hub, their results go to mteb's own cache (`$MTEB_CACHE`).

    Returns:
        task -> main score in percent.

    Raises:
        InputError: no such task, or its data can't be had.
    """
    mteb = _mteb("mteb")
    try:
        found = [mteb.get_task(task) for task in tasks]
    except KeyError as error:
        known = "mteb.get_tasks() lists them"
        raise InputError(f"MTEB knows no such task: {str(error.args[0]).rstrip('.')}; {known}") from None
    encoder = MtebEncoder(embedder, name)
    try:
        results = mteb.evaluate(encoder, found, co2_tracker=False, show_progress_bar=progress)
    except OSError as error:  # the hub's, in many classes
        reason = str(error).partition("\n")[0]
        raise InputError(f"MTEB can't get a task's data, which comes from the hub ({reason})") from error
    return {result.task_name: 100 * float(result.get_score()) for result in results.task_results}


def _mteb(module: str) -> Any:
    with warnings.catch_warnings():  # its imports bring others' deprecations with them
        warnings.simplefilter("ignore")
        return import_extra(module, "eval")
