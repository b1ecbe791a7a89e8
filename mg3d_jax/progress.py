"""Progress of long work: a bar with ETA on a terminal, a plain line every few seconds elsewhere (logs, CI, SLURM)."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
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


def leave_terminal(*, pipes: bool = False) -> None:
    """Sends what is printed to a terminal nowhere from here on: it is gone, and printing would fail.

    `pipes`: whatever else is printed to, too, such as a pipe that nobody reads.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor needs nothing
            if pipes or stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # isatty denies a terminal that has hung up
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Progress:
    """`with Progress("prepare", total=n, unit="volumes") as p: p.advance(1, note="12 bad")`.

    `initial` is what an earlier, interrupted run has already done: it counts as done but not for the rate. Without `shown`
    nothing is printed: what is around shows how far it is.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "",
        initial: int = 0,
        interactive: bool | None = None,
        shown: bool = True,
    ):
        self.label, self.total, self.unit, self.done, self._initial = label, total, unit, initial, initial
        self.shown = shown
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self._start = self._last_print = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.shown and self.interactive:
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
        if not self.shown:
            return
        if now - self._last_print >= PLAIN_INTERVAL_SECONDS or self.done == self.total:
            self._last_print = now
            try:
                print(self._line(now, note), file=sys.stderr, flush=True)
            except OSError:  # nobody reads any more: as if the terminal had been closed, for whoever listens to that
                leave_terminal(pipes=True)
                if callable(signal.getsignal(signal.SIGHUP)):
                    signal.raise_signal(signal.SIGHUP)

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
