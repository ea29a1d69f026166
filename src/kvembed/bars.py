"""Progress: a bar on a terminal; where there is none, a line a minute in the log."""

from __future__ import annotations

import logging
import time
from typing import Any

from tqdm import tqdm

__all__ = ["Bar"]

logger = logging.getLogger(__name__)

_SECONDS = 60.0  # between two lines


class Bar(tqdm):  # type: ignore[type-arg]  # its type parameter is for what it iterates over
    """tqdm's, without iterating.

    Args:
        progress: whether to show anything.
        options: tqdm's: `desc`, `unit`, `total`, ...
    """

    def __init__(self, *, progress: bool, **options: Any) -> None:
        super().__init__(disable=None if progress else True, **options)
        self._in_log = progress and self.disable
        self._what, self._unit = options["desc"], options["unit"]
        self._first, self._started = self.n, time.monotonic()
        self._told = self._started

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's: `n` more are done."""
        if not self._in_log:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self._told >= _SECONDS:
            self._told = now
            message = f"{self.n:,.0f}"
            if self.total:
                pace = max(self.n - self._first, 1e-9) / max(now - self._started, 1e-9)
                left = self.format_interval(max(self.total - self.n, 0) / pace)
                message += f" of {self.total:,.0f} {self._unit}s, {left} left"
            else:
                message += f" {self._unit}s"
            logger.info("%s: %s", self._what, message)
        return None
