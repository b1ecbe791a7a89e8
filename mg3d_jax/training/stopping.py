"""What ends a run before its last step: a signal, or too many updates that are not finite."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from mg3d_jax.errors import AGAIN, UserError
from mg3d_jax.progress import leave_terminal
from mg3d_jax.training import run_folder
from mg3d_jax.training.hooks import AfterStep, Hook, TrainingRun
from mg3d_jax.training.spikes import LossSpikes
from mg3d_jax.training.writers import keep_lines

logger = logging.getLogger(__name__)
DONE, PREEMPTED = 0, AGAIN
SKIPPED_FILE = "skipped.jsonl"


# What asks a run to save and stop: schedulers (SLURM's `--signal=USR1`), Ctrl-C, a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """One of `SIGNALS` -> finish the step, save, exit with `PREEMPTED`. A second Ctrl-C ends it at once.

    A signal that is ignored, as `nohup` has it, stays so. Outside of the main thread Python hears no signals.

    With several processes JAX's preemption service makes them agree where to stop, whichever of them got the signal: all ask it
    again and again in the same order, after each step and each batch of an evaluation, and it answers with yes at the question
    after the last one that any of them has come to. The questions are numbered from 1 in each process. To ask costs no message.
    """

    _interrupted = False

    def __init__(self) -> None:
        self._requested, self._questions, self._old = False, 0, dict[signal.Signals, Any]()
        self.alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS if self.alone else SIGNALS[1:]:  # SIGTERM of several processes is JAX's
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if number == signal.SIGHUP:
            leave_terminal()
        self.request()

    def request(self) -> None:
        """As one of the signals does."""
        if self.alone:
            self._requested = True
        else:  # they agree on a step by what JAX makes of SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self) -> bool:
        """Whether to stop in the middle of waiting: where no other process is in the next step already."""
        return self.alone and self._requested

    def asked(self) -> bool:
        """Whether to stop here. All processes must come to each call, and get the same answer."""
        if not self.alone:
            self._questions += 1
            self._requested |= multihost_utils.reached_preemption_sync_point(self._questions)
        return self._requested

    def restore_handler(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclass(eq=False)
class SkippedUpdates(Hook):
    """Counts the updates that the compiled step skipped because loss or gradient was not finite.

    As it reads the result of every step, it is also what keeps the host from dispatching too many of them ahead. Each
    skipped update is written to `skipped.jsonl` with the records of its batch. All processes see the same flags and so come
    to the same end; process 0 writes. A resumed run counts on; what was noted after its checkpoint happens again and is
    dropped.

    Attributes:
        limit: so many in a row end the run.
        total: since the first step of the run. `in_a_row`: up to the last step that was checked.
        spikes: of the losses that are finite; see there.
    """

    limit: int
    total: int = field(default=0, init=False)
    in_a_row: int = field(default=0, init=False)
    spikes: LossSpikes = field(default_factory=LossSpikes, init=False)
    _in_flight: deque[tuple[int, jax.Array, jax.Array]] = field(default_factory=deque, init=False)
    measures = waits = False

    def start(self, run: TrainingRun) -> None:
        config = run.setup.config
        records = run_folder.records_of_steps(run.train, config.data, config.seed)
        self.resume(run.workdir, run.first, records)

    def resume(self, workdir: Path, first: int, records: Callable[[int], list[str]]) -> None:
        """Counts what `workdir` tells of the steps up to `first`. `records`: names of those in the batch of a step."""
        self._path, self._records = workdir / SKIPPED_FILE, records
        self.spikes.resume(workdir, first, records)
        before = keep_lines(self._path, lambda entry: entry.get("step", math.inf) <= first)
        steps = {entry["step"] for entry in before}
        self.total = len(steps)
        self.in_a_row = next(n for n in itertools.count() if first - n not in steps)

    def __call__(self, after: AfterStep) -> None:
        """Waits until few enough steps are in flight: none where another hook needs their results."""
        self._in_flight.append((after.step, after.metrics["finite"], after.metrics["loss"]))
        self._await(0 if after.waits else max_in_flight())

    def stop(self, after: AfterStep) -> None:
        self._await(0)

    def _await(self, most: int) -> None:
        while len(self._in_flight) > most:
            step, *flags = self._in_flight.popleft()
            finite, loss = jax.device_get(flags)
            self.check(step, finite=bool(finite), loss=float(loss))

    def check(self, step: int, *, finite: bool, loss: float) -> None:
        """Takes note of one step. `UserError` when the limit is reached: nothing is saved after it."""
        if finite:
            self.in_a_row = 0
            self.spikes.see(step, loss)
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        records = self._records(step)
        if jax.process_index() == 0:
            logger.warning(
                f"step {step}: loss {loss} or its gradient is not finite, the update is skipped ({self.in_a_row} in a row, "
                f"{self.total} since the start); its {len(records)} records are in {self._path}"
            )
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "loss": repr(loss), "records": records}) + "\n")
        if self.in_a_row >= self.limit:
            run = self._path.parent
            raise UserError(
                f"{self.in_a_row} updates in a row were not finite (training.max_skipped), the last at step {step}: look at "
                f"the records in {self._path}, or lower the learning rate. The checkpoints before are intact; a new run goes "
                f"on from one with --init-from {run}@STEP --workdir OTHER --config.optimizer.learning_rate=LOWER"
            )


def max_in_flight() -> int:
    """Steps dispatched but not awaited. CPU devices deadlock in collectives when steps pile up; accelerators overlap."""
    return 0 if jax.default_backend() == "cpu" else 2
