"""Progress of long work: a bar with ETA on a terminal, a plain line every few seconds elsewhere (logs, CI, SLURM)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")
PLAIN_INTERVAL_SECONDS = 10.0


def format_seconds(seconds: float) -> str:
    """`3725 -> '1:02:05'`, `65 -> '1:05'`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


class Progress:
    """`with Progress("prepare", total=n, unit="volumes") as p: p.advance(1, note="12 bad")`.

    `initial` is what an earlier, interrupted run has already done: it counts as done but not for the rate.
    """

    def __init__(self, label: str, total: int, *, unit: str = "", initial: int = 0, interactive: bool | None = None):
        self.label, self.total, self.unit, self.done, self._initial = label, total, unit, initial, initial
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self._start = self._last_print = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.interactive:
            from rich.console import Console

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, n: int = 1, *, note: str = "") -> None:
        """`n` more units are done; `note` (a loss, a count of bad files) is shown beside the bar."""
        self.done += n
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last_print >= PLAIN_INTERVAL_SECONDS or self.done == self.total:
            self._last_print = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._initial) / elapsed
        eta = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        unit = f" {self.unit}" if self.unit else ""
        text = f"{self.label}: {self.done}/{self.total}{unit}, {rate:.3g}/s, {format_seconds(elapsed)}, ETA {eta}"
        return f"{text}, {note}" if note else text

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Iterable[T], label: str, total: int, *, unit: str = "") -> Iterator[T]:
    """Yields `items` and shows how far it is."""
    with Progress(label, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
