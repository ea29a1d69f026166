"""Bulk jobs on Ray Data: a pool of actors makes the shards, on one machine or a cluster; Ray schedules and retries.

Inputs, OUT and a model's folder must be at the same path on every node (shared storage). What goes over the network is
which shard to make, and that it is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .bulk import Engine, Job, Report, ShardMaker, Written, found_shard
from .embedder import Embedder
from .errors import InputError, KvembedError
from .extras import import_extra
from .shards import InputChanged, Shard
from .workers import Recipe

__all__ = ["ray_engine"]


class _Actor:
    """One of the pool: holds the model, makes shards. A user's mistake comes back as a row, for Ray would wrap it."""

    def __init__(self, job: Job, recipe: Recipe) -> None:
        self._job = job
        self._make: ShardMaker | None = None
        self._error: KvembedError | None = None
        try:
            self._make = ShardMaker(job, recipe.load())
        except KvembedError as error:
            self._error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (index,) = batch["index"].tolist()
        written = Written(index, 0, 0)
        try:
            if self._make is not None:
                # One that is there was made by an actor that died before it could say so, or is still at it.
                shard = self._job.plan.shards[index]
                written = found_shard(self._job, shard) or self._make(shard)
        except KvembedError as error:
            self._error = error
        told = {"error": str(self._error or ""), "changed": isinstance(self._error, InputChanged)}
        row = dataclasses.asdict(written) | told
        return {name: [value] for name, value in row.items()}


def _written(row: dict[str, Any]) -> Written:
    """What an actor made, by its row. Raises `InputError`, or `InputChanged`, for what it met instead."""
    told = dict(row)
    error, changed = told.pop("error"), told.pop("changed")
    if error:
        raise (InputChanged if changed else InputError)(error)
    return Written(**told)


def ray_engine(model: str, *, address: str | None = None, workers: int | None = None) -> Engine:
    """An engine for `bulk` that makes the shards on Ray.

    Args:
        model: a bundled name, a hub id, a folder or a `.gguf` file that every node can load.
        address: of a running cluster, as `ray.init` takes it. Default: `$RAY_ADDRESS`, or else Ray is started on this
            machine for the job.
        workers: how many actors at most, each with a copy of the model. Default: one per GPU, or else one per node.

    Raises:
        InputError: Ray is not installed.
    """
    ray, data = import_extra("ray", "ray"), import_extra("ray.data", "ray")

    def run(job: Job, embedder: Embedder, shards: Sequence[Shard], report: Report) -> Iterator[Written]:
        plan = dataclasses.replace(job.plan, folder=job.plan.folder.resolve())
        sent = dataclasses.replace(job, plan=plan, out=job.out.resolve())
        recipe = Recipe.of(embedder, model)
        with _connected(ray, address):
            data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            count, share = _pool(ray, workers)
            made = data.from_items(
                [{"index": shard.index} for shard in shards], override_num_blocks=len(shards)
            ).map_batches(
                _Actor,
                fn_constructor_args=(sent, recipe),
                batch_size=1,
                # A pool that may shrink: in a fixed one, an actor whose node died could wait for a place for ever, and
                # the shards that were given to it with it.
                compute=data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
                **share,
            )
            try:
                for row in made.iter_rows():
                    written = _written(row)
                    report(job.plan.shards[written.index].rows, written.tokens)
                    yield written
            except ray.exceptions.RayError as error:
                raise KvembedError(f"Ray: {str(error).strip().splitlines()[-1]}; run again to go on") from error

    return run


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """In a cluster, and out of it again; a process that is in one already stays there."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # who asks us for vectors has not agreed to be counted
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError, OverflowError, ray.exceptions.RayError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from None
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it has to tell of lost nodes
        try:
            yield
        finally:
            ray.shutdown()


def _pool(ray: Any, workers: int | None) -> tuple[int, dict[str, int]]:
    """How many actors, and what each takes of its node: a GPU, or else as many CPUs as leave room for all actors."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return min(workers or gpus, gpus), {"num_gpus": 1}
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise InputError("the Ray cluster has neither a GPU nor a CPU to give")
    count = min(workers or len(cpus), sum(cpus))
    share = next(size for size in range(max(cpus), 0, -1) if sum(cpu // size for cpu in cpus) >= count)
    return count, {"num_cpus": share}
