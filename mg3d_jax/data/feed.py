"""Waiting for batches: a worker process that was killed or stopped, a disk that hangs and a request to stop are noticed.

The batches are fetched in a thread, so that the one that waits for them can look around meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from mg3d_jax.errors import TryAgainError

T = TypeVar("T")
LOOK_SECONDS = 0.2  # between two looks at workers and requests
STOPPED_SECONDS = 10.0  # a worker that is stopped for so long does not come back by itself
_END = object()
_asked: list[Callable[[], bool]] = []  # of the run of this process
_agreed: list[Callable[[], bool]] = []  # of all its processes
_abandoned: list[threading.Thread] = []


class StopAskedError(Exception):
    """The run was asked to stop while it waited."""


class LostWorkerError(TryAgainError):
    """A worker process that reads data is dead or does not go on; the data can be read without it."""


class NoDataError(TryAgainError):
    """No batch came in time, and no worker is to blame: a disk that hangs."""


@contextmanager
def heeding(asked: Callable[[], bool], agreed: Callable[[], bool] | None = None) -> Iterator[None]:
    """In here who waits for a batch raises `StopAskedError` when `asked()`; and between the batches of an evaluation, to which
    all processes come alike, when `agreed()`."""
    kept = list(_asked), list(_agreed)
    _asked.append(asked)
    _agreed.append(agreed or asked)
    try:
        yield
    finally:
        _asked[:], _agreed[:] = kept


@contextmanager
def unheeded() -> Iterator[None]:
    """In here requests to stop are for later: what is under way comes to its end."""
    kept = list(_asked), list(_agreed)
    _asked[:], _agreed[:] = [], []
    try:
        yield
    finally:
        _asked[:], _agreed[:] = kept


def look_up(*, together: bool = False) -> None:
    """`StopAskedError` where the run is asked to stop. `together`: all its processes look up here."""
    if any(asked() for asked in (_agreed if together else _asked)):
        raise StopAskedError


def hangs() -> bool:
    """Is there a thread that a disk has not let go? Python would wait for it at its end, for ever."""
    return any(thread.is_alive() for thread in _abandoned)


def watched(batches: Generator[T], seconds: float) -> Generator[T]:
    """The elements of `batches`, which are fetched one at a time by a thread of their own.

    Args:
        batches: closed at the end, unless it hangs.
        seconds: to wait for one at most; 0: for ever.

    Raises:
        LostWorkerError: a worker process died, or is stopped for `STOPPED_SECONDS`.
        NoDataError: nothing came for so many seconds.
        StopAskedError: see `heeding`.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def fetch() -> None:
        while wanted.get():
            try:
                found.put((next(batches, _END), None))
            except BaseException as error:
                found.put((_END, error))

    thread = threading.Thread(target=fetch, name="batches", daemon=True)
    thread.start()
    idle = True
    try:
        while True:
            wanted.put(True)
            idle = False
            element, error = _wait(found, seconds)
            idle = True
            if error is not None:
                if died := _worker_died(error):
                    raise LostWorkerError(f"a data worker {_ended(died)}") from error
                raise error
            if element is _END:
                return
            yield element
    finally:
        wanted.put(False)
        if idle:
            batches.close()
        else:
            _abandon(thread)


def _wait(found: queue.SimpleQueue[Any], seconds: float) -> Any:
    began, workers = time.monotonic(), _Workers()
    while True:
        with suppress(queue.Empty):
            return found.get(timeout=LOOK_SECONDS)
        look_up()
        workers.look()
        if 0 < seconds <= time.monotonic() - began:
            raise NoDataError(
                f"no batch came for {seconds / 60:.3g} minutes (data.stall_minutes): does the disk of data.train hang? The "
                "run goes on when it is started again"
            )


class _Workers:
    """The worker processes of this process, looked at again and again during one wait."""

    def __init__(self) -> None:
        self._known: dict[int, BaseProcess] = {}
        self._stopped: dict[int, float] = {}  # by process id, since when

    def look(self) -> None:
        """`LostWorkerError` where one is dead or stopped."""
        self._known |= {one.pid: one for one in multiprocessing.active_children() if one.pid is not None}
        now = time.monotonic()
        for number, worker in self._known.items():
            if worker.exitcode:
                raise LostWorkerError(f"the data worker {number} {_ended(worker.exitcode)}")
            if not _is_stopped(number):
                self._stopped.pop(number, None)
            elif now - self._stopped.setdefault(number, now) >= STOPPED_SECONDS:
                raise LostWorkerError(f"the data worker {number} is stopped (SIGSTOP) and does not go on")


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (signal 9: by the system, for want of memory?)"
    return f"ended by signal {-code}" if code < 0 else f"ended with code {code}"


def _is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # it has ended, or there is no /proc
        return False


def _worker_died(error: BaseException) -> int:
    """The exit code of a worker process of which grain says in words that it has ended; 0 for another error."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", text)
    return int(found[1]) if found else 0


def _abandon(thread: threading.Thread) -> None:
    """What the thread waits for goes: it ends where a worker was to blame, and is left where a disk is."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None and "grain" in worker.name:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
    _abandoned.append(thread)
