"""Where each run of a sweep stands, on disk, so that any later process can tell and go on.

A run's folder holds, beside what `mg3d train` writes, `sweep_state.json` (what happened last), `sweep_lease.json` (who is
at it) and `record.json` (the outcome). Whoever works on a run holds a lock on its lease file.

The lock is `flock`'s: the kernel frees it when its last holder ends, however it ends, so there is no time after which a
lease counts as old. The trainer inherits it, and keeps it if its sweep dies. It holds between hosts too where the disk is
NFS (version 4, or 3 with lockd), GPFS or Lustre (mounted with `flock`). `filelock` takes the same lock, but keeps the
descriptor that the trainer must inherit to itself; `flufl.lock` needs a clock that all hosts share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.scaling.sweep.declaration import RUNS_FOLDER, Run

STATE_FILE, LEASE_FILE, SUMMARY_FILE, METRICS_FILE = (
    "sweep_state.json",
    "sweep_lease.json",
    "summary.json",
    "metrics.jsonl",
)
TRIES, TRY_SECONDS = 20, 0.05  # for a lease: a glance of `status` holds it for a moment
DONE, RUNNING, FAILED, INTERRUPTED, NOT_STARTED = "done", "running", "failed", "interrupted", "not started"
ACTIONS = {DONE: "skip", RUNNING: "wait", FAILED: "retry", INTERRUPTED: "resume", NOT_STARTED: "run"}


@dataclass(frozen=True)
class Status:
    """`state` is one of the five above; `step` the last one logged; `detail` why it failed or who is at it."""

    state: str
    step: int = 0
    detail: str = ""

    @property
    def action(self) -> str:
        """What `mg3d sweep run` would do with it now."""
        return ACTIONS[self.state]


def run_folder(workdir: Path, run: Run) -> Path:
    return workdir / RUNS_FOLDER / run.id


def waits_for(run: Run) -> Status | None:
    """Why a run cannot start: the one that it starts from is not done. None where nothing is in its way."""
    if not run.after:
        return None
    folder = Path(run.after)
    if _finished(folder)[1] is None:
        return None
    state = NOT_STARTED if holder(folder) is None else RUNNING
    return Status(state, 0, f"it starts from {folder.name}, which is not done")


def status(workdir: Path, run: Run) -> Status:
    """Where `run` stands. A summary counts only if it is of the declared configuration."""
    folder = run_folder(workdir, run)
    if summary_problem(folder, run) is None:
        return Status(DONE, int(read_json(folder / SUMMARY_FILE)["step"]))
    step = last_step(folder)
    if (lease := holder(folder)) is not None:
        return Status(RUNNING, step, f"process {lease.pid} on {lease.host}")
    if not (folder / STATE_FILE).is_file():
        return Status(NOT_STARTED)
    state = read_json(folder / STATE_FILE)
    if state["state"] == FAILED:
        return Status(FAILED, step, state["message"])
    return Status(INTERRUPTED, step, state["message"])


def summary_problem(folder: Path, run: Run) -> str | None:
    """Why `summary.json` does not show a finished run of this configuration; None if it does."""
    summary, problem = _finished(folder)
    if problem is None and summary.get("config_hash") != run.config_hash:
        return f"{SUMMARY_FILE} is of configuration {summary.get('config_hash')}, declared is {run.config_hash}"
    return problem


def _finished(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The content of `summary.json` and why it does not show a finished run; None if it does."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}, f"no {SUMMARY_FILE}"
    try:
        summary = read_json(path)
    except UserError as error:
        return {}, str(error)
    state = summary.get("state")
    return summary, None if state == "done" else f"{SUMMARY_FILE} says state {state!r}"


def write_state(
    folder: Path, run: Run, state: str, *, attempt: int, message: str = "", exit_code: int | None = None
) -> None:
    """Records what happened last. `state` is RUNNING, DONE, FAILED or INTERRUPTED."""
    write_json(
        folder / STATE_FILE,
        {
            "run": run.id,
            "state": state,
            "attempt": attempt,
            "exit_code": exit_code,
            "message": message,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def last_attempt(folder: Path) -> int:
    """How often the run was started so far."""
    path = folder / STATE_FILE
    return int(read_json(path)["attempt"]) if path.is_file() else 0


def last_step(folder: Path) -> int:
    """The largest step in `metrics.jsonl`; 0 if there is none. A line cut short by a kill is passed over."""
    steps = [0]
    with contextlib.suppress(FileNotFoundError), (folder / METRICS_FILE).open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                steps.append(int(json.loads(line)["step"]))
    return max(steps)


@dataclass(frozen=True)
class Lease:
    """Who is at a run: a sweep, and the process that trains once it is started."""

    host: str
    pid: int
    trainer: int | None = None

    def orphan(self) -> int | None:
        """The process that still trains though its sweep, on this host, is dead."""
        return None if self.host != socket.gethostname() or process_exists(self.pid) else self.trainer


def process_exists(pid: int) -> bool:
    """Is there a living process of that number on this host?"""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OSError:  # no /proc on this system, or the process has just ended
        return not Path("/proc/self").exists()


def holder(folder: Path) -> Lease | None:
    """Who holds the lease of a run; None if nobody does."""
    try:
        file = (folder / LEASE_FILE).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        if _lock(file, fcntl.LOCK_SH):
            return None
        with contextlib.suppress(ValueError, TypeError):
            return Lease(**json.load(file))
        return Lease("unknown", 0)  # it has the lock, and has not yet said who it is


class HeldLease:
    """The right to work on a run, for this process and the trainer that inherits it; a context manager that gives it back."""

    def __init__(self, file: TextIO):
        self._file = file
        self.name_trainer(None)

    @classmethod
    def acquire(cls, folder: Path) -> HeldLease | None:
        """The lease of `folder`, or None while somebody else has it. `UserError` where the disk has no locks."""
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LEASE_FILE).open("a+", encoding="utf-8")
        for _ in range(TRIES):
            if _lock(file, fcntl.LOCK_EX):
                return cls(file)
            time.sleep(TRY_SECONDS)
        file.close()
        return None

    @property
    def descriptor(self) -> int:
        """What the trainer inherits: it has the lease as long as this is open there."""
        return self._file.fileno()

    def name_trainer(self, pid: int | None) -> None:
        """Notes which process trains."""
        self._file.truncate(0)
        self._file.write(json.dumps(asdict(Lease(socket.gethostname(), os.getpid(), pid))))
        self._file.flush()

    def __enter__(self) -> HeldLease:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lock(file: TextIO, kind: int) -> bool:
    """Takes the lock of an open file, unless somebody else has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error}): two sweeps could train the same run. Put --workdir on a disk with file "
            "locks (Lustre: mounted with the option flock)"
        ) from error
