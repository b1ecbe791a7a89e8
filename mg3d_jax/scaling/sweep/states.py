"""Where each run of a sweep stands, on disk, so that any later process can tell and go on.

A run's folder holds, beside what `mg3d train` writes, `sweep_state.json` (what happened last), `sweep_lease.json` (who is
at it) and `record.json` (the outcome). Whoever works on a run holds a lock (`mg3d_jax.locks`) on its
lease file; the trainer inherits it, and keeps it if its sweep dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mg3d_jax import locks
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.scaling.sweep.declaration import RUNS_FOLDER, Run

STATE_FILE, LEASE_FILE, SUMMARY_FILE, METRICS_FILE = (
    "sweep_state.json",
    "sweep_lease.json",
    "summary.json",
    "metrics.jsonl",
)
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
    found = locks.holder(folder / LEASE_FILE)
    return None if found is None else Lease(**found)


class HeldLease(locks.HeldLock):
    """The right to work on a run, for this process and the trainer that inherits it."""

    @classmethod
    def acquire(cls, folder: Path) -> Self | None:
        """The lease of `folder`, or None while somebody else has it. `UserError` where the disk has no locks."""
        folder.mkdir(parents=True, exist_ok=True)
        return super().acquire(folder / LEASE_FILE)

    def name_trainer(self, pid: int | None) -> None:
        """Notes which process trains."""
        self.note(trainer=pid)
