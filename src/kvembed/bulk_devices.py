"""Bulk jobs on several devices of one machine: each makes whole shards."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from .bulk import Engine, Job, Report, ShardMaker, Written
from .embedder import Embedder
from .shards import Shard
from .workers import Recipe, run_on

__all__ = ["devices_engine"]


def devices_engine(devices: Sequence[str], model: str) -> Engine:
    """An engine for `bulk` that makes shards on several devices.

    Args:
        devices: as in `kvembed.workers.run_on`; errors too.
        model: a bundled name, a hub id, a folder or a `.gguf` file.
    """

    def run(job: Job, embedder: Embedder, shards: Sequence[Shard], report: Report) -> Iterator[Written]:
        recipe = Recipe.of(embedder, model)
        made = run_on(devices, recipe, functools.partial(_make, job), shards)
        for shard, written in zip(shards, made, strict=True):
            report(shard.rows, written.tokens)
            yield written

    return run


def _make(job: Job, embedder: Embedder, shard: Shard) -> Written:
    return ShardMaker(job, embedder)(shard)
