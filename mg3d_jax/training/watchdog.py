"""Says where every thread hangs when a training step does not end.

Every process of a run has its own watchdog: a hang in a collective is seen by all of them, and the one that hangs elsewhere
(reading data, compiling, waiting for a disk) is the culprit. Nothing is killed: that is the launcher's or the user's decision.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import jax

from mg3d_jax.progress import format_seconds
from mg3d_jax.training.hooks import AfterStep, Hook, TrainingRun

logger = logging.getLogger(__name__)
FOLDER = "stacks"
FIRST_STEP = 4.0  # the first step compiles and waits for all processes: it may take so many times longer


@dataclass(eq=False)
class Watchdog(Hook):
    """`with Watchdog(workdir, minutes) as watchdog: ...; watchdog.beat(step)` after every step.

    When no beat came for `minutes`, the stacks of all threads go to stderr and to `workdir/stacks/process-N.txt`, once per
    hang; when the step ends after all, that is said too. What lies between two beats (evaluation, a checkpoint) counts.

    Attributes:
        workdir: the run.
        minutes: 0 watches nothing.
    """

    workdir: Path
    minutes: float
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _step: int | None = field(default=None, init=False)  # the last one that ended
    _beat: float = field(default_factory=time.monotonic, init=False)
    _reported: bool = field(default=False, init=False)
    _stopped: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    measures = waits = False

    def start(self, run: TrainingRun) -> None:
        self.__enter__()

    def __call__(self, after: AfterStep) -> None:
        self.beat(after.step)

    def close(self) -> None:
        self.__exit__(None, None, None)

    def __enter__(self) -> Watchdog:
        if self.minutes > 0:
            self._beat = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def beat(self, step: int) -> None:
        """`step` has ended."""
        with self._changed:
            now = time.monotonic()
            waited = now - self._beat
            # A process that was frozen as a whole may come here before its watchdog wakes.
            late = self._reported or 0 < self._allowed() <= waited
            self._step, self._beat, self._reported = step, now, False
        if late:
            logger.warning(f"watchdog: step {step} has ended after all, after {format_seconds(waited)}")

    def _allowed(self) -> float:
        """Seconds that the step in progress may take; 0 for any time."""
        return 60 * self.minutes * (FIRST_STEP if self._step is None else 1.0)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            with self._changed:
                self._stopped = True
                self._changed.notify()
            self._thread.join(timeout=5)  # it may hang with the disk: the process can leave without it
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                limit, waited = self._allowed(), time.monotonic() - self._beat
                if waited >= limit and not self._reported:
                    self._reported = True
                    text = self._report(waited)
                    faulthandler.cancel_dump_traceback_later()  # nobody would put it off while the disk hangs
                    self._changed.release()  # a disk that hangs must not stop the trainer in `beat`
                    try:
                        self._write(text)
                    finally:
                        self._changed.acquire()
                    continue
                # Code that never gives up Python's lock stops this thread too. Then the alarm that it sets here, anew each
                # time it wakes, goes off: it needs no lock, but can write bare stacks to stderr only.
                self._set_alarm(2 * limit)
                self._changed.wait(limit / 4 if self._reported else min(limit / 4, max(limit - waited, 0.01)))

    def _set_alarm(self, seconds: float) -> None:
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)

    def _report(self, waited: float) -> str:
        """Says where the threads are on stderr, and returns it: a disk that hangs or is full is a likely culprit."""
        after = "the first step of this process" if self._step is None else f"the step after step {self._step}"
        head = (
            f"watchdog: process {jax.process_index()} of {jax.process_count()}: {after} has not ended for "
            f"{format_seconds(waited)}. Where its threads are:"
        )
        text = f"{head}\n{stacks()}"
        logger.warning(text)
        return text

    def _write(self, text: str) -> None:
        path = self.workdir / FOLDER / f"process-{jax.process_index()}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            logger.warning(f"watchdog: {path} cannot be written: {error}")


def stacks() -> str:
    """The stack of every Python thread of this process but the caller's, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)
