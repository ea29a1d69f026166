"""The server's batches: budget, turns, no waiting when idle, room, cancelling, blame."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvembed.batcher import Batcher, QueueFull, _Request


class Recorder:
    """Doubles numbers; keeps the batches; can be held."""

    def __init__(self):
        self.batches = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, group, items):
        self.batches.append((group, items))
        self.open.wait(10)
        if "bad" in items:
            raise ValueError("bad item")
        return [2 * item for item in items]


class DeviceLostError(RuntimeError):
    """All that comes after it fails, too."""


def batcher(run, batch_tokens=100, queue_tokens=10_000, packed=False):
    return Batcher(run, batch_tokens=batch_tokens, queue_tokens=queue_tokens, packed=packed)


async def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


@given(lengths=st.lists(st.integers(1, 60), max_size=20), wanted=st.integers(1, 60))
def test_what_is_nearest_in_length_comes_first(lengths, wanted):
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    request = _Request("a", lengths, lengths, waiting, {}, None)
    found = list(request.nearest(wanted))
    assert sorted(place for _, _, place in found) == sorted(waiting)
    assert [apart for apart, _, _ in found] == sorted(abs(length - wanted) for length in lengths)
    assert all(apart == abs(lengths[place] - wanted) for apart, _, place in found)


@settings(max_examples=50)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 150), min_size=0, max_size=12)), max_size=8
    ),
    budget=st.integers(1, 300),
    packed=st.booleans(),
)
def test_every_item_is_answered_in_order_within_the_budget_and_its_group(requests, budget, packed):
    run = Recorder()

    async def main():
        async with batcher(run, budget, packed=packed) as queue:
            return await asyncio.gather(*(queue.submit(group, lengths, lengths) for group, lengths in requests))

    assert asyncio.run(main()) == [[2 * length for length in lengths] for _, lengths in requests]
    sizes = [(len(items), sum(items) if packed else len(items) * max(items)) for _, items in run.batches]
    assert all(count == 1 or size <= budget for count, size in sizes)
    given_out = sorted((group, item) for group, items in run.batches for item in items)
    assert given_out == sorted((group, length) for group, lengths in requests for length in lengths)


def test_an_idle_server_does_not_wait_and_a_busy_one_collects():
    run = Recorder()

    async def main():
        async with batcher(run) as queue:
            started = time.perf_counter()
            await queue.submit("a", [5], [5])
            assert time.perf_counter() - started < 0.5
            run.open.clear()
            first = asyncio.ensure_future(queue.submit("a", [6], [6]))
            await until(lambda: len(run.batches) == 2)
            more = [asyncio.ensure_future(queue.submit("a", [n], [n])) for n in (7, 8, 9)]
            await until(lambda: queue.waiting_tokens == 24)
            run.open.set()
            await asyncio.gather(first, *more)

    asyncio.run(main())
    assert [sorted(items) for _, items in run.batches] == [[5], [6], [7, 8, 9]]


def test_a_large_request_does_not_hold_up_a_small_one_and_lengths_are_matched():
    run = Recorder()
    order = []

    async def main():
        async with batcher(run, 100) as queue:

            async def ask(name, lengths):
                await queue.submit("a", lengths, lengths)
                order.append(name)

            run.open.clear()
            large = asyncio.ensure_future(ask("large", [50, 10] * 40))
            await until(lambda: run.batches)
            small = asyncio.ensure_future(ask("small", [11]))
            await until(lambda: queue.waiting_tokens > 2000)
            run.open.set()
            await asyncio.gather(large, small)

    asyncio.run(main())
    assert order == ["small", "large"]
    assert run.batches[0][1] == [50, 50]
    assert any(11 in items for _, items in run.batches[:3])
    assert sum(len(items) * max(items) - sum(items) for _, items in run.batches) < 100  # hardly any padding


def test_calls_take_turns_with_batches():
    async def main():
        run, calls = Recorder(), []
        async with batcher(run) as queue:
            run.open.clear()
            first = asyncio.create_task(queue.submit("a", [1], [10]))
            await until(lambda: run.batches)
            others = [
                asyncio.create_task(queue.call(lambda n=n: calls.append((n, len(run.batches))))) for n in range(3)
            ]
            late = [asyncio.create_task(queue.submit("a", [n], [90])) for n in (2, 3)]
            others[1].cancel()
            await asyncio.sleep(0.01)
            run.open.set()
            await asyncio.gather(first, *late, others[0], others[2])
            with pytest.raises(ZeroDivisionError):
                await queue.call(lambda: 1 / 0)
        return calls

    assert asyncio.run(main()) == [(0, 1), (2, 2)]


def test_a_full_queue_says_when_to_come_back():
    run = Recorder()

    async def main():
        async with batcher(run, 10, 30) as queue:
            run.open.clear()
            taken = [asyncio.ensure_future(queue.submit("a", [10], [10]))]
            await until(lambda: run.batches)
            taken += [asyncio.ensure_future(queue.submit("a", [10], [10])) for _ in range(3)]
            await until(lambda: queue.waiting_tokens == 30)
            with pytest.raises(QueueFull) as full:
                await queue.submit("a", [1], [1])
            assert 1 <= full.value.retry_after <= 60
            run.open.set()
            assert await asyncio.gather(*taken) == [[20]] * 4
            assert await queue.submit("a", [1], [1]) == [2]

    asyncio.run(main())


def test_a_cancelled_request_is_taken_out():
    run = Recorder()

    async def main():
        async with batcher(run) as queue:
            run.open.clear()
            first = asyncio.ensure_future(queue.submit("a", [60], [60]))
            await until(lambda: run.batches)
            gone = asyncio.ensure_future(queue.submit("a", [61], [61]))
            await until(lambda: queue.waiting_tokens == 61)
            gone.cancel()
            await asyncio.wait([gone])
            assert queue.waiting_tokens == 0
            run.open.set()
            assert await first == [120]
            assert await queue.submit("a", [1], [1]) == [2]

    asyncio.run(main())
    assert [items for _, items in run.batches] == [[60], [1]]


def test_only_the_request_to_blame_fails():
    run = Recorder()

    async def main():
        async with batcher(run) as queue:
            run.open.clear()
            first = asyncio.ensure_future(queue.submit("a", [1], [1]))
            await until(lambda: run.batches)
            others = [asyncio.ensure_future(queue.submit("a", [item, 3], [3, 3])) for item in (2, "bad", 4)]
            await until(lambda: queue.waiting_tokens == 18)
            run.open.set()
            return await asyncio.gather(first, *others, return_exceptions=True)

    first, two, bad, four = asyncio.run(main())
    assert (first, two, four) == ([2], [4, 6], [8, 6])
    assert isinstance(bad, ValueError)


def test_a_lost_device_fails_all_that_wait_and_no_more_is_taken():
    run = Recorder()

    def lost(group, items):
        run(group, items)
        raise DeviceLostError("device-side assert")

    async def main():
        stops = Batcher(
            lost, batch_tokens=10, queue_tokens=100, is_fatal=lambda error: isinstance(error, DeviceLostError)
        )
        async with stops as queue:
            assert queue.running
            answers = await asyncio.gather(
                *(queue.submit(group, [1, 2], [6, 6]) for group in "ab"), queue.call(int), return_exceptions=True
            )
            await until(lambda: not queue.running)
            with pytest.raises(DeviceLostError):
                await queue.submit("a", [1], [1])
            with pytest.raises(DeviceLostError):
                await queue.call(int)
        return answers

    answers = asyncio.run(main())
    assert [type(answer) for answer in answers] == [DeviceLostError] * 3
    assert len(run.batches) == 1
