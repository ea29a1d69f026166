"""Progress where there is no terminal: lines in the log, now and then."""

from __future__ import annotations

import logging

import pytest

from kvembed.bars import Bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("kvembed.bars.time", clock)
    return clock


def run(clock, **options):
    with Bar(unit="text", **options) as bar:
        for _ in range(10):
            clock.now += 25
            bar.update(100)
        return bar.n


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"total": 2000},
            [
                f"embedding: {n} of 2,000 texts, {left} left"
                for n, left in ((300, "07:05"), (600, "05:50"), (900, "04:35"))
            ],
        ),
        (
            {"total": 2000, "initial": 1000},
            [
                f"embedding: 1,{n} of 2,000 texts, {left} left"
                for n, left in ((300, "02:55"), (600, "01:40"), (900, "00:25"))
            ],
        ),
        ({}, ["embedding: 300 texts", "embedding: 600 texts", "embedding: 900 texts"]),
    ],
)
def test_a_line_a_minute_with_the_time_left(clock, caplog, options, lines):
    with caplog.at_level(logging.INFO, "kvembed.bars"):
        assert run(clock, desc="embedding", progress=True, **options) == 1000 + options.get("initial", 0)
    assert caplog.messages[: len(lines)] == lines
    assert len(caplog.messages) == 3


def test_nothing_where_nothing_is_asked_for(clock, caplog):
    with caplog.at_level(logging.INFO, "kvembed.bars"):
        run(clock, desc="embedding", progress=False, total=2000)
    assert not caplog.messages
