"""Trains the runs of a sweep until all are done, so that it can be stopped and started at any moment and on several hosts.

Each run is a training of its own in its own folder, which resumes by itself; an executor (`executors`) starts it. What has
become of the others is read from their folders again and again: runs that are done are skipped, runs that somebody else is at
are waited for, and taken over where that one dies; a run that fails is tried again, and does not stop the others.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mg3d_jax import locks
from mg3d_jax.errors import AGAIN, UserError
from mg3d_jax.progress import format_seconds
from mg3d_jax.scaling.sweep import collect, states
from mg3d_jax.scaling.sweep.declaration import Run, Sweep
from mg3d_jax.scaling.sweep.executors.base import LOG_FILE, Executor, Job, Start
from mg3d_jax.scaling.sweep.executors.local import Local

logger = logging.getLogger(__name__)

DONE, FAILED = 0, 1  # exit codes; and AGAIN, when asked to stop
MOST_RESTARTS = 5  # of a trainer that asks for it and does not get on
RETRIES = 1
POLL_SECONDS = 0.2

Trainer = Callable[[Run, Path], list[str]]
VERBS = {
    states.NOT_STARTED: "starts",
    states.INTERRUPTED: "goes on after step {step}",
    states.FAILED: "is tried again",
}


def train_command(run: Run, folder: Path, python: str = sys.executable) -> list[str]:
    """The command line that trains `run` in `folder`."""
    return [python, "-m", "mg3d_jax", "train", "--config", run.base, "--workdir", str(folder), *run.overrides]


class Stop:
    """SIGTERM and SIGINT ask the trainers to save and stop; a second one kills them. `jobs` says which there are."""

    def __init__(self, jobs: Callable[[], Iterable[Job]]) -> None:
        self.asked = False
        self._jobs = jobs
        main = threading.current_thread() is threading.main_thread()  # Python hears no signals elsewhere
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        self._old = {number: signal.signal(number, self._on_signal) for number in signals}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for job in self._jobs():
            if not job.outlives:
                job.stop(now=self.asked)
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclass
class Active:
    """A run that this process has started."""

    run: Run
    job: Job
    lock: locks.HeldLock | None
    slot: int
    since: float  # of `time.monotonic`
    step: int  # the last one before it


def run_all(
    sweep: Sweep,
    workdir: Path,
    trainer: Trainer | None = None,
    executor: Executor | None = None,
    *,
    retries: int = RETRIES,
) -> int:
    """Trains every run that is not done, and waits for those that others are at.

    Args:
        trainer: gives the command of a run; `train_command` unless said otherwise.
        executor: where they are trained; one after another on this machine unless said otherwise.
        retries: how often a run is tried again that fails while this process is at it.

    Returns 0 when all are done, 1 when some failed for good, 75 when asked to stop.
    """
    executor = executor or Local({})
    executor.prepare(workdir)
    python = executor.python
    with states.Runner(workdir) as me:
        loop = _Loop(
            sweep, workdir, trainer or (lambda run, folder: train_command(run, folder, python)), executor, me, retries
        )
        try:
            while loop.turn() and not loop.stopped():
                time.sleep(POLL_SECONDS)
        finally:
            loop.leave()
        return loop.end()


class _Loop:
    """The runs of a sweep as this process sees them."""

    def __init__(
        self, sweep: Sweep, workdir: Path, trainer: Trainer, executor: Executor, me: states.Runner, retries: int
    ):
        self.sweep, self.workdir, self.trainer, self.executor = sweep, workdir, trainer, executor
        self.me, self.retries = me, retries
        self.active: dict[str, Active] = {}
        self.stop = Stop(lambda: [one.job for one in self.active.values()])
        self._done: set[str] = set()
        self._names = [run.id for run in sweep.runs]
        self._hopeless = set[str]()  # at the last look
        self._failures = {run.id: self._failed(run) for run in sweep.runs}  # before us: they do not count
        self._restarts: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._next_look = 0.0

    def turn(self) -> bool:
        """Takes note of what has ended and starts what can be. False once there is nothing to wait for."""
        looks = time.monotonic() >= self._next_look
        for one in list(self.active.values()):
            if (looks or not one.job.outlives) and (code := one.job.poll()) is not None:
                self._ended(one, code)
                looks = True
        if not looks or self.stop.asked:
            return True
        waits = self._look()
        self._next_look = time.monotonic() + self.executor.look_seconds
        return waits

    def stopped(self) -> bool:
        """Were we asked to stop, and has all ended that does not go on without us?"""
        return self.stop.asked and all(one.job.outlives for one in self.active.values())

    def leave(self) -> None:
        """What does not go on without us is asked to save where we end by an error."""
        self.stop.restore()
        for one in self.active.values():
            if not one.job.outlives:
                one.job.stop()

    def end(self) -> int:
        """Says how it ended; the exit code."""
        if self.stop.asked:
            left = [one.job.label for one in self.active.values()]
            goes_on = f", {', '.join(left)} meanwhile too" if left else ""
            logger.info(f"asked to stop; the same command goes on{goes_on}")
            return AGAIN
        logger.info(f"{len(self._done)} of {len(self.sweep.runs)} runs done")
        for run in self.sweep.runs:
            if run.id not in self._done:
                status = states.waits_for(run) or states.status(self.workdir, run)
                logger.info(f"  {run.id}: {status.state}, {status.detail}")
        return DONE if len(self._done) == len(self.sweep.runs) else FAILED

    def _look(self) -> bool:
        """Reads where the runs stand, starts as many as there is room for. True while any may still be done."""
        ready, waited_for = list[Run](), len(self.active)
        room = self.executor.at_once - len(self.active)
        hopeless = set[str]()  # failed too often, or to start from such a one
        for run in self.sweep.runs:
            if run.id in self._done or run.id in self.active:
                continue
            status = states.status(self.workdir, run)
            if status.state == states.DONE:
                self._close(run, "done by another process" if run.id in self._said else "done before, skipped")
            elif status.state in (states.RUNNING, states.QUEUED):
                waited_for += 1
                room -= states.left_behind(self.workdir, states.run_folder(self.workdir, run))  # by us, it may be
                self._say(run, f"left to {status.detail}")
            elif status.state == states.FAILED and self._failed_here(run) > self.retries:
                hopeless.add(run.id)
            elif (waits := states.waits_for(run)) is not None:
                self._say(run, f"left for later, {waits.detail}")
                first = Path(run.after).name
                among = first in self._names and first not in hopeless | self._hopeless
                if among or waits.state == states.RUNNING:
                    waited_for += 1
                else:
                    hopeless.add(run.id)
            else:
                ready.append(run)
        self._hopeless = hopeless
        for run in sorted(ready, key=self._failed_here):  # what has failed goes last
            if room > 0 and not self.stop.asked:
                room -= self._start(run)
        return bool(ready or waited_for)

    def _start(self, run: Run) -> bool:
        """Starts a run, unless somebody else has just done so. Whether it was started."""
        folder = states.run_folder(self.workdir, run)
        lock = states.acquire(folder)
        if lock is None:
            return False
        status = states.standing(self.workdir, run)  # it may have been queued or done since we looked
        if status.action == "wait" or status.state == states.DONE:
            lock.close()
            return False
        slot = min(set(range(self.executor.at_once)) - {one.slot for one in self.active.values()})
        elsewhere = self.executor.elsewhere
        claim = {"executor": self.executor.name, "runner": self.me.name, "label": self.executor.name, "facts": {}}
        message = "" if elsewhere else "killed while it ran"
        states.write_state(folder, run, states.RUNNING, starts=True, message=message, job=claim if elsewhere else None)
        if elsewhere:  # claimed: its trainer takes the lock itself, wherever it starts
            lock.close()
            kept = None
        else:
            kept = lock
        self._say(run, VERBS[status.state].format(step=status.step))
        try:
            job = self.executor.start(Start(run, folder, self.trainer(run, folder), kept, slot))
        except UserError as error:  # the queue is full, the host is not there: it may work later
            states.write_state(folder, run, states.FAILED, message=str(error))
            lock.close()
            self._say(run, f"failed: {error}")
            return False
        if elsewhere:
            claim |= {"label": job.label, "facts": dict(job.facts)}
            states.write_state(folder, run, states.RUNNING, message=f"{job.label} is gone", job=claim)
        self.active[run.id] = Active(run, job, kept, slot, time.monotonic(), status.step)
        if self.stop.asked and not job.outlives:  # the signal came between the last check and the start
            job.stop()
        return True

    def _ended(self, one: Active, code: int) -> None:
        """Writes the state that a run has ended in."""
        run, folder = one.run, states.run_folder(self.workdir, one.run)
        state, message = self._outcome(one, code, folder)
        states.write_state(folder, run, state, message=message, exit_code=code)
        if one.lock is not None:
            one.lock.close()
        del self.active[run.id]
        took = format_seconds(time.monotonic() - one.since)
        if state == states.DONE:
            self._close(run, f"done in {took}")
        else:
            self._say(run, f"{state} after {took}: {message}; see {folder / LOG_FILE}")

    def _outcome(self, one: Active, code: int, folder: Path) -> tuple[str, str]:
        """State and message for the exit code of a trainer."""
        problem = states.summary_problem(folder, one.run)
        if code == 0 or problem is None:
            return (states.DONE, "") if problem is None else (states.FAILED, f"exit code 0 but {problem}")
        if one.lock is None and (owner := states.holder(folder)) is not None:
            return states.INTERRUPTED, f"process {owner.pid} on {owner.host} was faster"
        if self.stop.asked:
            return states.INTERRUPTED, "asked to stop"
        if code != AGAIN:
            return states.FAILED, f"exit code {code}: {_last_line(folder / LOG_FILE)}"
        stuck = 1 if states.last_step(folder) > one.step else self._restarts.get(one.run.id, 0) + 1
        if stuck < MOST_RESTARTS:
            self._restarts[one.run.id] = stuck
            return states.INTERRUPTED, f"exit code {AGAIN}: it is to be run again"
        self._restarts.pop(one.run.id, None)
        return states.FAILED, f"asked {MOST_RESTARTS} times to be run again (exit code {AGAIN}) without getting on"

    def _close(self, run: Run, how: str) -> None:
        """Notes that a run is done."""
        final = collect.write_record(self.workdir, run)["final"].get(self.sweep.loss)
        self._done.add(run.id)
        self._say(run, f"{how}, {self.sweep.loss} {'absent' if final is None else f'{final:.5g}'}")

    def _failed(self, run: Run) -> int:
        return states.failures(states.read_state(states.run_folder(self.workdir, run)))

    def _failed_here(self, run: Run) -> int:
        """How often it has failed since this process started, whoever was at it."""
        return self._failed(run) - self._failures[run.id]

    def _say(self, run: Run, what: str) -> None:
        """Logs it, once."""
        if self._said.get(run.id) != what:
            self._said[run.id] = what
            logger.info(f"[{self._names.index(run.id) + 1}/{len(self._names)}] {run.id}: {what}")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines and not lines[-1].startswith("$ ") else "no output"
