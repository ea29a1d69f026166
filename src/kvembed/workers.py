"""Several devices of one machine: a process for each, with a model of its own; results in order.

A worker that dies is replaced, and what it was given is done again, once. A worker whose parent dies goes too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from .bars import Bar
from .batching import blocks, characters
from .config import EmbedConfig, Role
from .device import empty_device_cache, usable_device
from .embedder import Embedder
from .errors import InputError, KvembedError
from .models import load, local_path
from .process import quiet
from .transform import Transform
from .vectors import Encoded

__all__ = ["Recipe", "check_devices", "encode_on", "move_to_cpu", "named_devices", "run_on"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2  # items that a worker has: one in work, and one to go on with


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How another process gets the embedder that this one has. Make one with `of`."""

    name: str
    dtype: str
    config: EmbedConfig
    transform: Transform | None
    batch_tokens: int
    fingerprint: str

    @classmethod
    def of(cls, embedder: Embedder, name: str) -> Recipe:
        """Of an embedder whose model was loaded by `name`: a bundled name, a hub id, a folder or a `.gguf` file."""
        local = local_path(name)
        return cls(
            name=name if local is None else str(local.resolve()),
            dtype=embedder.dtype,
            config=embedder.config,
            transform=embedder.transform,
            batch_tokens=embedder.batch_tokens,
            fingerprint=embedder.fingerprint(anew=True),
        )

    def load(self, device: str = "auto") -> Embedder:
        """The same embedder. Raises `InputError` if the model or its tokenizer is another here."""
        model, tokenizer = load(self.name, dtype=self.dtype, device=device)
        embedder = Embedder(model, tokenizer, self.config, batch_tokens=self.batch_tokens, transform=self.transform)
        if embedder.fingerprint() != self.fingerprint:
            raise InputError(f"{self.name} is another model on a worker, or has another tokenizer, than at the start")
        return embedder


def move_to_cpu(embedder: Embedder) -> Embedder:
    """Move its model to the CPU, off a device that workers want for theirs. Returns the embedder."""
    if embedder.backbone.device.type == "cpu":
        return embedder
    embedder.batch_tokens = embedder.batch_tokens  # or else it would go by the CPU from now on
    embedder.model.to("cpu")
    empty_device_cache()
    return embedder


def named_devices(listed: str) -> list[str]:
    """The command line's `cuda:0,cuda:1` as a list. Raises `InputError` as `check_devices`."""
    devices = [device.strip() for device in listed.split(",")]
    check_devices(devices)
    return devices


def check_devices(devices: Sequence[str]) -> None:
    """Raises `InputError` for none, or one that this machine does not have. `cpu` may come several times."""
    if not devices:
        raise InputError("no devices: give for example cuda:0,cuda:1 or cpu,cpu")
    for device in devices:
        usable_device(device)


def encode_on(
    devices: Sequence[str],
    recipe: Recipe,
    texts: Iterable[str],
    *,
    role: Role = "document",
    total: int | None = None,
    progress: bool = False,
) -> Iterator[Encoded]:
    """`Embedder.encode_stream` on several devices: the same pieces, in the same order.

    Args:
        devices: torch devices, for example `["cuda:0", "cuda:1"]`, or `["cpu", "cpu"]` for two processes.
        recipe: of the embedder.
        texts, role, total, progress: as there.

    Raises:
        InputError: as there, or a device that can't be used.
        KvembedError: a worker died twice.
    """

    def numbered() -> Iterator[tuple[int, list[str], Role]]:
        first = 0
        for block in blocks(texts, characters):
            yield first, block, role
            first += len(block)

    seen = cut = 0
    with Bar(total=total, desc="embedding", unit="text", progress=progress) as bar:
        for piece in run_on(devices, recipe, _encode, numbered()):
            bar.update(len(piece.vectors))
            seen, cut = seen + len(piece.vectors), cut + piece.truncated
            yield piece
    if cut:
        logger.warning("%d of %d texts were cut", cut, seen)


def _encode(embedder: Embedder, job: tuple[int, list[str], Role]) -> Encoded:
    first, texts, role = job
    return embedder.encode_prompts(embedder.prompts(texts, role=role, first=first), role=role)


def run_on(
    devices: Sequence[str], recipe: Recipe, work: Callable[[Embedder, Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`work(embedder, item)` for every item, on whichever device is free; results in the order of `items`.

    Args:
        devices: a process for each.
        recipe: of the embedder that each makes for itself.
        work: a function of a module, since its name is sent to the processes.
        items: taken as they are needed, a few ahead.

    Raises:
        InputError: a device that can't be used; or what `work` raises, when its item's turn comes.
        KvembedError: a worker died twice.
    """
    check_devices(devices)
    threads = max(1, torch.get_num_threads() // len(devices))  # those on GPUs tokenise, too
    workers = [_Worker(device, recipe, threads) for device in devices]
    tasks: deque[_Task] = deque()  # begun, and not handed out yet; in order
    source = iter(items)
    try:
        while True:
            busy = {worker: sum(task.open for task in tasks if task.worker is worker) for worker in workers}
            freest = min(busy, key=busy.__getitem__)
            if busy[freest] < _AHEAD and len(tasks) < 2 * _AHEAD * len(workers):
                with contextlib.suppress(StopIteration):
                    tasks.append(_Task(freest, work, next(source)))
                    continue
            if not tasks:
                return
            if tasks[0].open:
                wait([task.future for task in tasks if task.open], return_when=FIRST_COMPLETED)
            for worker in {task.worker for task in tasks if task.lost}:
                worker.replace()
                for task in tasks:
                    if task.worker is worker and (task.open or task.lost):
                        task.start()
            if not (tasks[0].open or tasks[0].lost):  # it may have been lost since, to another death
                yield tasks.popleft().future.result()
    finally:
        for worker in workers:
            worker.stop()


class _Task:
    """An item and the worker that has it."""

    def __init__(self, worker: _Worker, work: Callable[[Embedder, Any], Any], item: Any) -> None:
        self.worker, self._work, self._item = worker, work, item
        self.start()

    def start(self) -> None:
        self.future = self.worker.submit(self._work, self._item)

    @property
    def open(self) -> bool:
        return not self.future.done()

    @property
    def lost(self) -> bool:
        return not self.open and isinstance(self.future.exception(), BrokenProcessPool)


class _Worker:
    """A process on one device."""

    def __init__(self, device: str, recipe: Recipe, threads: int) -> None:
        self._device, self._recipe, self._threads = device, recipe, threads
        self._died = False
        self._start()

    def _start(self) -> None:
        # Not forked: a copy of this process would have its CUDA state and its threads' locks.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with _interrupts_held():
            self._process = self._pool.submit(_begin, self._threads)
        self._pool.submit(_open, self._recipe, self._device)

    def submit(self, work: Callable[[Embedder, Any], Any], item: Any) -> Future[Any]:
        try:
            return self._pool.submit(_run, work, item)
        except BrokenProcessPool as error:  # it died since the last one was sent
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def replace(self) -> None:
        if self._died:
            raise KvembedError(f"the worker on {self._device} died twice; was it out of memory?")
        self._died = True
        logger.warning("the worker on %s died; its work is done again", self._device)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._start()

    def stop(self) -> None:
        """Not asked to finish: what it does now, be it loading the model, is not wanted any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError, BrokenProcessPool, CancelledError):
            os.kill(self._process.result(), signal.SIGTERM)


_opened: Embedder | KvembedError | None = None  # a worker process's own


def _begin(threads: int) -> int:
    """The first thing that a worker does; returns its process id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(threads)
    return os.getpid()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process that is started meanwhile never sees Ctrl-C, not even while it imports, before `_begin`."""
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _open(recipe: Recipe, device: str) -> None:
    global _opened
    try:
        _opened = recipe.load(device)
    except KvembedError as error:
        _opened = error
    except Exception as error:  # a device without room for the model, say
        _opened = KvembedError(f"the model can't be loaded on {device}: {type(error).__name__}: {error}")


def _leave_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run(work: Callable[[Embedder, Any], Any], item: Any) -> Any:
    if not isinstance(_opened, Embedder):
        raise _opened or KvembedError("the worker has no model")
    return work(_opened, item)
