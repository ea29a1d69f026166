"""Batches for a server: whatever waits, up to a token budget, requests taking turns; never a wait for more to come."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import heapq
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, Generic, TypeVar

from .batching import computed_tokens

__all__ = ["Batcher", "QueueFull"]

Item = TypeVar("Item")
Row = TypeVar("Row")
Answer = TypeVar("Answer")


class QueueFull(Exception):
    """No room now.

    Attributes:
        retry_after: seconds after which there may be.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclasses.dataclass(eq=False)
class _Request(Generic[Item, Row]):
    """Items that came together; `waiting` are the places of those not taken yet, shortest first."""

    group: Hashable
    items: Sequence[Item]
    lengths: Sequence[int]
    waiting: list[int]
    rows: dict[int, Row]
    done: asyncio.Future[None]

    def nearest(self, length: int) -> Iterator[tuple[int, _Request[Item, Row], int]]:
        """Of what waits, shortest first as it is: how far from a length, the request, and the place; nearest first."""
        after = bisect.bisect_left(self.waiting, length, key=self.lengths.__getitem__)
        shorter = ((length - self.lengths[place], self, place) for place in reversed(self.waiting[:after]))
        longer = ((self.lengths[place] - length, self, place) for place in self.waiting[after:])
        return heapq.merge(shorter, longer, key=itemgetter(0))

    def fail(self, error: Exception) -> None:
        self.waiting.clear()
        if not self.done.done():
            self.done.set_exception(error)


class Batcher(Generic[Item, Row]):
    """One thread that runs batches of items from many requests. All methods belong to one event loop.

    A batch is headed by the longest item of the request whose turn it is, and filled with those waiting that are
    nearest to it in length, so little is padded when many wait, and a large request holds nobody up.

    Args:
        run: given a group and items of it, gives a row each; runs in the thread.
        batch_tokens: what a batch computes stays within it; a longer item is a batch of its own.
        queue_tokens: how many tokens may wait.
        packed: a batch computes the tokens of its items; else items x longest, as padding is computed too.
        is_fatal: whether an error of `run` means that every batch to come will fail too. Then no more are taken.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Item]], Sequence[Row]],
        *,
        batch_tokens: int,
        queue_tokens: int,
        packed: bool = False,
        is_fatal: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens
        self.packed = packed
        self._run, self._is_fatal = run, is_fatal
        self._fatal: Exception | None = None
        self._turns: deque[_Request[Item, Row]] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._tokens_per_second = 0.0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "kvembed-batches")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher[Item, Row]:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(cancel_futures=True)

    @property
    def running(self) -> bool:
        """Whether batches are being taken."""
        return self._task is not None and not self._task.done()

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait; what is in the thread is not counted."""
        return sum(request.lengths[place] for request in self._turns for place in request.waiting)

    async def submit(self, group: Hashable, items: Sequence[Item], lengths: Sequence[int]) -> list[Row]:
        """A row for each item, in order. Cancelled, it takes back what has not been run.

        Args:
            group: only items of the same group share a batch.
            items: any number.
            lengths: tokens of each.

        Raises:
            QueueFull: there is no room for all of them.
            Exception: what `run` raised for them, or what stopped the batches.
        """
        if self._fatal:
            raise self._fatal
        self.check_room(sum(lengths))
        if not items:
            return []
        order = sorted(range(len(items)), key=lengths.__getitem__)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request: _Request[Item, Row] = _Request(group, items, lengths, order, {}, done)
        self._turns.append(request)
        self._arrived.set()
        try:
            await done
        finally:
            request.waiting.clear()
        return [request.rows[place] for place in range(len(items))]

    def check_room(self, tokens: int) -> None:
        """Raises `QueueFull` if so many more can't wait."""
        waiting = self.waiting_tokens
        if waiting + max(1, tokens) > self.queue_tokens:
            seconds = waiting / self._tokens_per_second if self._tokens_per_second else 1.0
            raise QueueFull(round(min(60.0, max(1.0, seconds / 2))))  # by then half has been done

    async def call(self, function: Callable[[], Answer]) -> Answer:
        """Run something else in the thread; between two batches, one such call at most. Cancelled, it is left out."""
        if self._fatal:
            raise self._fatal
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls.append((function, done))
        self._arrived.set()
        return await done

    async def _work(self) -> None:
        while self._fatal is None:
            await self._arrived.wait()
            batch = self._take()
            if batch:
                started = time.perf_counter()
                await self._answer(batch)
                speed = sum(request.lengths[place] for request, place in batch) / (time.perf_counter() - started)
                self._tokens_per_second = 0.8 * (self._tokens_per_second or speed) + 0.2 * speed
            if self._calls:
                await self._call(*self._calls.popleft())
            elif not batch:
                self._arrived.clear()

    async def _call(self, function: Callable[[], Any], done: asyncio.Future[Any]) -> None:
        if done.done():
            return
        try:
            answer = await self._in_thread(function)
        except Exception as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(answer)

    async def _in_thread(self, function: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _take(self) -> list[tuple[_Request[Item, Row], int]]:
        """The next batch: requests and places in them; empty if nothing waits."""
        while self._turns and not self._turns[0].waiting:
            self._turns.popleft()
        if not self._turns:
            return []
        head = self._turns[0]
        self._turns.rotate(-1)  # the next turn is another's
        first = head.waiting.pop()
        batch = [(head, first)]
        wanted = longest = used = head.lengths[first]
        same = [request.nearest(wanted) for request in self._turns if request.group == head.group]
        for _, request, place in heapq.merge(*same, key=itemgetter(0)):  # not all that waits has to be looked at
            longest, used = max(longest, request.lengths[place]), used + request.lengths[place]
            if computed_tokens(len(batch) + 1, longest, used, packed=self.packed) > self.batch_tokens:
                break
            batch.append((request, place))
        for request, place in batch[1:]:
            request.waiting.remove(place)
        return batch

    async def _answer(self, batch: Sequence[tuple[_Request[Item, Row], int]]) -> None:
        group, items = batch[0][0].group, [request.items[place] for request, place in batch]
        try:
            rows = await self._in_thread(lambda: self._run(group, items))
        except Exception as error:
            if self._is_fatal(error):
                self._fatal = error
                for request in [*(one[0] for one in batch), *self._turns]:
                    request.fail(error)
                for _, done in self._calls:
                    if not done.done():
                        done.set_exception(error)
            elif len(batch) > 1:  # one item may be to blame, and the others must not pay for it
                for one in batch:
                    if not one[0].done.done():  # a retry before it may have failed them all
                        await self._answer([one])
            else:
                batch[0][0].fail(error)
            return
        for (request, place), row in zip(batch, rows, strict=True):
            request.rows[place] = row
            if len(request.rows) == len(request.items) and not request.done.done():
                request.done.set_result(None)
