"""Trains the runs of a sweep on this machine, one after another, so that it can be stopped and started at any moment.

Each run is a subprocess `mg3d train` in its own folder, which resumes by itself. Runs that are done are skipped, runs
that somebody else is at are left alone, a run that fails does not stop the others. If this process is killed, its
trainer is told to save and stop (on Linux, by `setpriv` of util-linux); the next start waits for it and goes on.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from mg3d_jax.progress import format_seconds
from mg3d_jax.scaling.sweep import collect, states
from mg3d_jax.scaling.sweep.declaration import Run, Sweep
from mg3d_jax.scaling.sweep.states import HeldLease

logger = logging.getLogger(__name__)

LOG_FILE = "train.log"
RUN_ME_AGAIN = 75  # exit code of a trainer that was asked to stop and has saved everything
MOST_RESTARTS = 5
POLL_SECONDS = 0.2
ORPHAN_SECONDS = 120.0  # how long a trainer may take to save after its sweep was killed

Trainer = Callable[[Run, Path], list[str]]


def train_command(run: Run, folder: Path) -> list[str]:
    """The command line that trains `run` in `folder`."""
    return [sys.executable, "-m", "mg3d_jax", "train", "--config", run.base, "--workdir", str(folder), *run.overrides]


class Stop:
    """SIGTERM and SIGINT ask the trainer to save and stop; a second one kills it."""

    def __init__(self) -> None:
        self.asked = False
        self.trainer: subprocess.Popen[bytes] | None = None
        self._old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.send_signal(signal.SIGKILL if self.asked else signal.SIGTERM)
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def run_all(sweep: Sweep, workdir: Path, trainer: Trainer = train_command) -> int:
    """Trains every run that is not done. Returns 0 when none failed, 1 when some did, 75 when asked to stop."""
    stop = Stop()
    outcomes: dict[str, states.Status] = {}
    try:
        for number, run in enumerate(sweep.runs, start=1):
            label = f"[{number}/{len(sweep.runs)}] {run.id}"
            outcomes[run.id] = _one(sweep, run, workdir, trainer, stop, label)
            if stop.asked:
                logger.info(f"asked to stop at {label}; the same command goes on")
                return RUN_ME_AGAIN
    finally:
        stop.restore()
    failed = [run for run, outcome in outcomes.items() if outcome.state != states.DONE]
    held = [run for run in failed if outcomes[run].state == states.RUNNING]
    logger.info(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs done")
    for name in failed:
        logger.info(f"  {name}: {outcomes[name].state}, {outcomes[name].detail}")
    return 1 if len(failed) > len(held) else 0


def _one(sweep: Sweep, run: Run, workdir: Path, trainer: Trainer, stop: Stop, label: str) -> states.Status:
    """Brings one run to its end, unless it is there already or somebody else is at it."""
    folder = states.run_folder(workdir, run)
    before = _wait_for_orphan(workdir, run, stop, label)
    if before.state == states.DONE:
        collect.write_record(workdir, run)
        logger.info(f"{label}: done before, skipped")
        return before
    if (waits := states.waits_for(run)) is not None:
        logger.info(f"{label}: left for later, {waits.detail}")
        return waits
    lease = None if before.state == states.RUNNING or stop.asked else HeldLease.acquire(folder)
    if lease is None:
        logger.info(f"{label}: left alone, {before.detail or 'somebody else has just started it'}")
        return states.Status(states.RUNNING, before.step, before.detail)
    verb = {"run": "starts", "resume": f"goes on after step {before.step}", "retry": "is tried again"}[before.action]
    logger.info(f"{label}: {verb}")
    start = time.monotonic()
    with lease:
        if states.summary_problem(folder, run) is not None:  # else somebody has finished it since we looked
            _train(run, folder, trainer, lease, stop)
    after = states.status(workdir, run)
    took = format_seconds(time.monotonic() - start)
    if after.state == states.DONE:
        final = collect.write_record(workdir, run)["final"].get(sweep.loss)
        logger.info(f"{label}: done in {took}, {sweep.loss} {'absent' if final is None else f'{final:.5g}'}")
    else:
        logger.info(f"{label}: {after.state} after {took}: {after.detail}; see {folder / LOG_FILE}")
    return after


def _wait_for_orphan(workdir: Path, run: Run, stop: Stop, label: str) -> states.Status:
    """The run's status, once a trainer that a killed sweep has left behind has saved and ended."""
    folder = states.run_folder(workdir, run)
    deadline = time.monotonic() + ORPHAN_SECONDS
    told = False
    while not stop.asked and time.monotonic() < deadline:
        lease = states.holder(folder)
        orphan = None if lease is None else lease.orphan()
        if orphan is None:
            break
        if not told:
            logger.info(f"{label}: waiting for process {orphan} of a killed sweep to save")
            told = True
        time.sleep(POLL_SECONDS)
    return states.status(workdir, run)


def _train(run: Run, folder: Path, trainer: Trainer, lease: HeldLease, stop: Stop) -> None:
    """Runs the trainer, again when it asks for it, and writes the state that it ends in."""
    attempt = states.last_attempt(folder)
    for _ in range(MOST_RESTARTS):
        attempt += 1
        states.write_state(folder, run, states.RUNNING, attempt=attempt, message="killed while it ran")
        code = _subprocess(trainer(run, folder), folder / LOG_FILE, lease, stop)
        if code == 0 and (problem := states.summary_problem(folder, run)) is None:
            states.write_state(folder, run, states.DONE, attempt=attempt, exit_code=0)
            return
        if stop.asked:
            states.write_state(
                folder, run, states.INTERRUPTED, attempt=attempt, message="asked to stop", exit_code=code
            )
            return
        if code != RUN_ME_AGAIN:
            message = (
                f"exit code 0 but {problem}" if code == 0 else f"exit code {code}: {_last_line(folder / LOG_FILE)}"
            )
            states.write_state(folder, run, states.FAILED, attempt=attempt, message=message, exit_code=code)
            return
    message = f"asked {MOST_RESTARTS} times to be run again (exit code {RUN_ME_AGAIN})"
    states.write_state(folder, run, states.FAILED, attempt=attempt, message=message, exit_code=RUN_ME_AGAIN)


def _subprocess(command: list[str], log: Path, lease: HeldLease, stop: Stop) -> int:
    """Exit code of `command`, its output appended to `log`. It inherits the lease."""
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            [*_told_when_we_die(), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us only; we pass it on as a request to save
            pass_fds=(lease.descriptor,),
        )
    stop.trainer = process
    lease.name_trainer(process.pid)
    if stop.asked:  # the signal came between the last check and the start
        process.terminate()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
    stop.trainer = None
    return process.returncode


def _told_when_we_die() -> list[str]:
    """Beginning of a command line whose process gets SIGTERM when this one dies, however it dies; empty where it cannot."""
    return ["setpriv", "--pdeathsig", "TERM"] if sys.platform == "linux" and shutil.which("setpriv") else []


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines and not lines[-1].startswith("$ ") else "no output"
