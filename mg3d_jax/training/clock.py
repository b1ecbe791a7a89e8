"""Times a run: throughput, the share of time spent waiting for data, and the seconds trained over all restarts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """`trained` seconds so far (restored from a checkpoint) and rates since the last `rates()`."""

    def __init__(self, trained: float = 0.0):
        self._before, self._start = trained, time.monotonic()
        self._mark, self._samples, self._waited = self._start, 0, 0.0

    @property
    def trained(self) -> float:
        return self._before + time.monotonic() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def count(self, samples: int) -> None:
        self._samples += samples

    def rates(self) -> dict[str, float]:
        """`samples_per_second` and `data_wait_share` since the last call."""
        now = time.monotonic()
        elapsed = max(now - self._mark, 1e-9)
        rates = {"samples_per_second": self._samples / elapsed, "data_wait_share": self._waited / elapsed}
        self._mark, self._samples, self._waited = now, 0, 0.0
        return rates
