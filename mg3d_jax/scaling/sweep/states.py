"""Where each run of a sweep stands, on disk, so that any later process can tell and go on.

A run's folder holds, beside what `mg3d train` writes, `sweep_state.json` (what happened last) and `record.json` (the outcome).
Whoever works on a run on this machine holds the lock of its trainer (`run.lock`, `mg3d_jax.locks`), and hands it on to
that; version 0.1.0 had `sweep_lease.json` for it. A run that was handed to a scheduler is claimed in `sweep_state.json`: by
the sweep that waits for it, which holds a lock in `runners` as long as it lives, and by what the scheduler says of the job.
No clock is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax import locks
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.registry import EXECUTORS
from mg3d_jax.scaling.sweep.declaration import RUNS_FOLDER, Run
from mg3d_jax.training.ownership import LOCK_FILE

STATE_FILE, SUMMARY_FILE, METRICS_FILE = "sweep_state.json", "summary.json", "metrics.jsonl"
OLD_LOCK_FILE = "sweep_lease.json"  # of version 0.1.0
RUNNERS_FOLDER = "runners"
TAIL_BYTES = 1 << 16  # of metrics.jsonl, in which the last step stands
DONE, RUNNING, QUEUED, FAILED, INTERRUPTED, NOT_STARTED = (
    "done",
    "running",
    "queued",
    "failed",
    "interrupted",
    "not started",
)
ACTIONS = {DONE: "skip", RUNNING: "wait", QUEUED: "wait", FAILED: "retry", INTERRUPTED: "resume", NOT_STARTED: "run"}


@dataclass(frozen=True)
class Status:
    """`state` is one of the six above; `step` the last one logged; `detail` why it failed or who is at it."""

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
    for _ in range(2):  # who is queued at the first look may have its lock and no longer be queued at the second
        found = standing(workdir, run)
        if found.state == DONE:
            return found
        if (owner := holder(folder)) is not None:
            return Status(RUNNING, found.step, f"process {owner.pid} on {owner.host}")
        if found.state in (QUEUED, NOT_STARTED):
            break
    return found


def standing(workdir: Path, run: Run) -> Status:
    """As `status`, for whoever holds the run's lock: all that its folder says but for that."""
    folder = run_folder(workdir, run)
    if summary_problem(folder, run) is None:
        return Status(DONE, int(read_json(folder / SUMMARY_FILE)["step"]))
    if not (state := read_state(folder)):
        return Status(NOT_STARTED)
    step, message = last_step(folder), state["message"]
    if state["state"] == FAILED:
        return Status(FAILED, step, message)
    if state["state"] == RUNNING and (claim := _claim(workdir, folder, state.get("job"))):
        return Status(QUEUED, step, claim)
    return Status(INTERRUPTED, step, message)


def _claim(workdir: Path, folder: Path, job: Mapping[str, Any] | None) -> str:
    """Who has handed the run to a scheduler that still has it; empty where nobody has."""
    if not job:
        return ""
    runner = locks.holder(workdir / RUNNERS_FOLDER / job["runner"])
    if runner is not None:
        return f"{job['label']}, by process {runner['pid']} on {runner['host']}"
    return job["label"] if job["facts"] and EXECUTORS[job["executor"]].alive(job["facts"], folder) else ""


def left_behind(workdir: Path, folder: Path) -> bool:
    """Was the run handed to a scheduler by a runner that is gone?"""
    job = read_state(folder).get("job")
    return job is not None and locks.holder(workdir / RUNNERS_FOLDER / job["runner"]) is None


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


def read_state(folder: Path) -> dict[str, Any]:
    """What happened last; empty for a run that nobody has begun."""
    path = folder / STATE_FILE
    return read_json(path) if path.is_file() else {}


def write_state(
    folder: Path,
    run: Run,
    state: str,
    *,
    message: str = "",
    exit_code: int | None = None,
    starts: bool = False,
    job: Mapping[str, Any] | None = None,
) -> None:
    """Records what happened last.

    Args:
        state: RUNNING, DONE, FAILED or INTERRUPTED.
        starts: this is the beginning of another attempt.
        job: executor, runner, label and facts of a run that was handed to a scheduler.
    """
    before = read_state(folder)
    write_json(
        folder / STATE_FILE,
        {
            "run": run.id,
            "state": state,
            "attempt": int(before.get("attempt", 0)) + starts,
            "failures": failures(before) + (state == FAILED),
            "exit_code": exit_code,
            "message": message,
            "last_failure": message if state == FAILED else before.get("last_failure", ""),
            "job": job,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),  # for people: nobody decides by it
        },
    )


def failures(state: Mapping[str, Any]) -> int:
    """How often the run has failed so far, by its `read_state`."""
    return int(state.get("failures", state.get("state") == FAILED))


def last_metrics(folder: Path, split: str = "") -> dict[str, Any]:
    """The last line of `metrics.jsonl`, or of one `split` of it; empty if there is none. A line cut short is passed over."""
    with contextlib.suppress(FileNotFoundError), (folder / METRICS_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found = json.loads(line)
                if int(found["step"]) >= 0 and split in ("", found.get("split")):
                    return dict(found)
    return {}


def last_step(folder: Path) -> int:
    """The last step in `metrics.jsonl`; 0 if there is none."""
    return int(last_metrics(folder).get("step", 0))


@dataclass(frozen=True)
class Owner:
    """Who is at a run: a sweep, and the process that trains once it has started."""

    host: str
    pid: int


def holder(folder: Path) -> Owner | None:
    """Who holds the lock of a run; None if nobody does."""
    for name in (LOCK_FILE, OLD_LOCK_FILE):
        if (found := locks.holder(folder / name)) is not None:
            return Owner(found["host"], found["pid"])
    return None


def acquire(folder: Path) -> locks.HeldLock | None:
    """The lock of a run, for this process and a trainer that inherits it; None while somebody else has it.

    `UserError` where the disk has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if locks.holder(folder / OLD_LOCK_FILE) is not None:
        return None
    return locks.HeldLock.acquire(folder / LOCK_FILE)


class Runner:
    """One process that works on a sweep, known to others as long as it lives. A context manager."""

    def __init__(self, workdir: Path):
        self.name = f"{secrets.token_hex(6)}.lock"
        self._path = workdir / RUNNERS_FOLDER / self.name

    def __enter__(self) -> Runner:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = locks.HeldLock.acquire(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
