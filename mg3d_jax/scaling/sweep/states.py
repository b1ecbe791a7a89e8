"""Where each run of a sweep stands, on disk, so that any later process can tell and go on.

A run's folder holds, beside what `mg3d train` writes, `sweep_state.json` (what happened last), `sweep_lease.json`
(somebody is at it: its time stamp is the heartbeat) and `record.json` (the outcome). All are written whole or not at
all. A lease whose heartbeat is old, or whose owner is dead, may be taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.scaling.sweep.declaration import Run

STATE_FILE, LEASE_FILE, SUMMARY_FILE, METRICS_FILE = (
    "sweep_state.json",
    "sweep_lease.json",
    "summary.json",
    "metrics.jsonl",
)
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 90.0
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
    return workdir / "runs" / run.id


def status(workdir: Path, run: Run) -> Status:
    """Where `run` stands. A summary counts only if it is of the declared configuration."""
    folder = run_folder(workdir, run)
    if summary_problem(folder, run) is None:
        return Status(DONE, int(read_json(folder / SUMMARY_FILE)["step"]))
    step = last_step(folder)
    lease = read_lease(folder)
    if lease is not None and lease.alive():
        return Status(RUNNING, step, f"process {lease.pid} on {lease.host}")
    if not (folder / STATE_FILE).is_file():
        return Status(NOT_STARTED)
    state = read_json(folder / STATE_FILE)
    if state["state"] == FAILED:
        return Status(FAILED, step, state["message"])
    return Status(INTERRUPTED, step, state["message"])


def summary_problem(folder: Path, run: Run) -> str | None:
    """Why `summary.json` does not show a finished run of this configuration; None if it does."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return f"no {SUMMARY_FILE}"
    try:
        summary = read_json(path)
    except UserError as error:
        return str(error)
    if summary.get("state") != "done":
        return f"{SUMMARY_FILE} says state {summary.get('state')!r}"
    if summary.get("config_hash") != run.config_hash:
        return f"{SUMMARY_FILE} is of configuration {summary.get('config_hash')}, declared is {run.config_hash}"
    return None


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
    """Who is at a run. `trainer` is the process that trains, once it is started."""

    owner: str
    run: str
    host: str
    pid: int
    trainer: int | None
    heartbeat: float  # seconds since the epoch

    def alive(self) -> bool:
        """Is the owner or its trainer still there? On another host only the heartbeat can tell."""
        here = self.host == socket.gethostname()
        if here and self.trainer is not None and process_exists(self.trainer, mentions=self.run):
            return True  # it trains, whatever became of its sweep, which may be dead or only stopped (Ctrl-Z)
        return time.time() - self.heartbeat < LEASE_SECONDS and (not here or process_exists(self.pid))

    def orphan(self) -> int | None:
        """The process that still trains though its sweep is dead, on this host."""
        here = self.host == socket.gethostname()
        if not here or process_exists(self.pid) or self.trainer is None:
            return None
        return self.trainer if process_exists(self.trainer, mentions=self.run) else None


def process_exists(pid: int, mentions: str = "") -> bool:
    """Is there a living process of that number, with `mentions` in its command line (where the system shows it)?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not zombie and mentions in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # no /proc on this system, or the process has just ended
        return not Path("/proc/self").exists()


def read_lease(folder: Path) -> Lease | None:
    path = folder / LEASE_FILE
    try:
        return Lease(**json.loads(path.read_text()), heartbeat=path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it if no sweep is running there") from error


class HeldLease:
    """The right to work on a run, for this process; a context manager that gives it back."""

    def __init__(self, folder: Path, owner: str):
        self.folder, self.owner = folder, owner

    @classmethod
    def acquire(cls, folder: Path) -> HeldLease | None:
        """The lease of `folder`, or None while somebody else is alive at it."""
        folder.mkdir(parents=True, exist_ok=True)
        held = cls(folder, uuid.uuid4().hex)
        fresh = folder / f".{LEASE_FILE}.{held.owner}"
        fresh.write_text(held._text(None))
        try:
            for _ in range(3):
                try:
                    os.link(fresh, folder / LEASE_FILE)  # atomic: fails if there is a lease
                    return held
                except FileExistsError:
                    if not _remove_stale(folder):
                        return None
            return None
        finally:
            fresh.unlink(missing_ok=True)

    def _text(self, trainer: int | None) -> str:
        here = {"host": socket.gethostname(), "pid": os.getpid(), "trainer": trainer}
        return json.dumps({"owner": self.owner, "run": self.folder.name} | here)

    def name_trainer(self, pid: int) -> None:
        """Notes which process trains: it may outlive this one, and must not get a second one beside it."""
        partial = self.folder / f".{LEASE_FILE}.{self.owner}"
        partial.write_text(self._text(pid))
        os.replace(partial, self.folder / LEASE_FILE)

    def beat(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder / LEASE_FILE)

    def __enter__(self) -> HeldLease:
        return self

    def __exit__(self, *_: object) -> None:
        lease = read_lease(self.folder)
        if lease is not None and lease.owner == self.owner:
            (self.folder / LEASE_FILE).unlink(missing_ok=True)


def _remove_stale(folder: Path) -> bool:
    """Removes a dead owner's lease; False if the lease is alive."""
    lease = read_lease(folder)
    if lease is None:
        return True
    if lease.alive():
        return False
    aside = folder / f".{LEASE_FILE}.stale.{uuid.uuid4().hex}"
    try:
        os.rename(folder / LEASE_FILE, aside)  # one of several takers wins
    except FileNotFoundError:
        return True
    taken = json.loads(aside.read_text())
    if taken["owner"] != lease.owner:  # somebody took over between our look and our rename: give it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, folder / LEASE_FILE)
    aside.unlink()
    return True
