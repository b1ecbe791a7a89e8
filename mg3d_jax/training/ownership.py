"""Whose is the folder of a run: one trainer's at a time, and until its end the folder that it started in."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

import jax

from mg3d_jax import locks
from mg3d_jax.errors import UserError

LOCK_FILE = "run.lock"
Place = tuple[int, int]  # device and number of a folder: what a renamed one keeps, and a new one of its name has not

_held: WeakValueDictionary[Path, locks.HeldLock] = WeakValueDictionary()


class Ownership:
    """The right of this process to write into a run's folder. With several processes the first one holds the lock for all.

    Trainers of one process share it, as they come one after another in a notebook.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self._lock: locks.HeldLock | None = None

    def take(self) -> None:
        """`UserError` where another process has the folder. Taken once, it may be asked for again."""
        if jax.process_index() != 0 or (self._lock is not None and not self._lock.given_back):
            return
        path = self.workdir.resolve() / LOCK_FILE
        self._lock = _held.get(path) or locks.HeldLock.inherited(path) or locks.HeldLock.acquire(path)
        if self._lock is None:
            owner = locks.holder(path) or {"pid": "?", "host": "?"}
            raise UserError(
                f"{self.workdir} is being trained already, by process {owner['pid']} on {owner['host']}: wait for it, stop it "
                "(SIGTERM saves), or use another --workdir"
            )
        _held[path] = self._lock

    def give_back(self) -> None:
        """For whoever comes next, in whatever process."""
        if self._lock is not None:
            _held.pop(self.workdir.resolve() / LOCK_FILE, None)
            self._lock.close()
            self._lock = None


def place(folder: Path) -> Place | None:
    """What tells a folder from others of its name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_place(folder: Path, started_in: Place | None, step: int) -> None:
    """`UserError` where `folder` is not the one that the run was started in: half of it would be saved elsewhere."""
    if place(folder) != started_in:
        raise UserError(
            f"{folder} is no longer the folder that this run was started in: somebody has moved or deleted it. Step {step} is "
            "not saved. Put it back in its place and give the same command: the run goes on from its newest checkpoint"
        )
