"""A lock on a file that says who has it: one owner for a run's folder, whatever starts twice and however it ends.

The lock is `flock`'s: the kernel frees it when its last holder ends, however it ends, so there is no time after which a
lock counts as old. A process that a holder starts can inherit it. It holds between hosts too where the disk is NFS (version 4,
or 3 with lockd), GPFS or Lustre (mounted with `flock`). `filelock` takes the same lock, but keeps the descriptor that a
process must inherit to itself; `flufl.lock` needs a clock that all hosts share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Self, TextIO

from mg3d_jax.errors import UserError

TRIES, TRY_SECONDS = 20, 0.05  # a glance of `holder` holds it for a moment
DESCRIPTOR_VARIABLE = "MG3D_LOCK_DESCRIPTOR"  # tells a process that it has inherited the lock of a file, open there


def holder(path: Path) -> dict[str, Any] | None:
    """What the owner of the lock says of itself, at least "host" and "pid"; None if nobody has it."""
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        if _lock(file, fcntl.LOCK_SH):
            return None
        with contextlib.suppress(ValueError):
            return dict(json.load(file))
        return {"host": "unknown", "pid": 0}  # it has the lock, and has not yet said who it is


class HeldLock:
    """The lock of a file, for this process and those that inherit its `descriptor`; a context manager that gives it back."""

    def __init__(self, file: TextIO):
        self._file = file
        self.note()

    @classmethod
    def acquire(cls, path: Path) -> Self | None:
        """The lock, or None while somebody else has it. `UserError` where the disk has no locks."""
        file = path.open("a+", encoding="utf-8")
        for _ in range(TRIES):
            if _lock(file, fcntl.LOCK_EX):
                return cls(file)
            time.sleep(TRY_SECONDS)
        file.close()
        return None

    @classmethod
    def inherited(cls, path: Path) -> Self | None:
        """The lock where whoever started this process has it and hands it on (`DESCRIPTOR_VARIABLE`); else None."""
        try:
            given = int(os.environ.get(DESCRIPTOR_VARIABLE, ""))
            if not os.path.samestat(os.fstat(given), path.stat()):
                return None
            return cls(os.fdopen(os.dup(given), "a+", encoding="utf-8"))
        except (ValueError, OSError):  # none, or one of a process further up that was closed on the way
            return None

    @property
    def descriptor(self) -> int:
        """Whoever inherits it has the lock as long as it is open there."""
        return self._file.fileno()

    @property
    def given_back(self) -> bool:
        """Nobody has it any more through this object."""
        return self._file.closed

    def note(self, **facts: Any) -> None:
        """Writes into the file who has it: host, process, and `facts`."""
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()} | facts))
        self._file.flush()

    def close(self) -> None:
        """Gives it back."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: TextIO, kind: int) -> bool:
    """Takes the lock of an open file, unless somebody else has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error}): two processes could train the same run. Put --workdir on a disk with "
            "file locks (Lustre: mounted with the option flock)"
        ) from error
