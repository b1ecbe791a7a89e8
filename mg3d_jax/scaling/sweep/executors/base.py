"""What an executor of a sweep does: starts the training of a run somewhere, and tells whether it has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mg3d_jax import locks
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.sweep.declaration import Run

LOG_FILE = "train.log"


@dataclass(frozen=True)
class Start:
    """What is to be trained.

    Attributes:
        command: of one process; several processes of the same command are one training.
        lock: of the run's folder, for a trainer that inherits it; None for an executor of `elsewhere`.
        slot: number of the place that it takes, from 0; as many as runs are trained at once.
    """

    run: Run
    folder: Path
    command: Sequence[str]
    lock: locks.HeldLock | None = None
    slot: int = 0

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE


class Job(ABC):
    """A training that was started."""

    label: str  # in messages, e.g. "SLURM job 1234"
    facts: Mapping[str, Any] = {}  # by which any process finds it again (JSON); none where it ends with this one
    outlives: ClassVar[bool] = False  # whoever stops the sweep leaves it where it is

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code of the trainer, once it has ended: 0 done, 75 run me again, anything else a failure."""

    def stop(self, *, now: bool = False) -> None:  # noqa: B027  # what outlives us is not asked
        """Asks it to save and leave, or, `now`, ends it."""


class Executor(ABC):
    """Made of `options` (`--option KEY=VALUE`). `UserError` for those that it does not know or that are missing."""

    name: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}  # name: meaning
    elsewhere: ClassVar[bool] = True  # the trainer cannot inherit the run's lock: it takes it itself when it starts
    look_seconds: float = 30.0  # between two looks at the runs that others are at
    python: str = "python"  # interpreter of the trainers

    def __init__(self, options: Mapping[str, str], *, at_once: int = 1):
        if at_once < 1:
            raise UserError(f"--at-once {at_once}: at least one run must be trained at a time")
        self.at_once = at_once
        self.check(options)

    def check(self, options: Mapping[str, str]) -> None:
        """`UserError` for an unknown option."""
        if unknown := sorted(set(options) - set(self.options)):
            known = "; ".join(f"{name} ({meaning})" for name, meaning in self.options.items()) or "none"
            raise UserError(f"--option {unknown[0]}: the executor {self.name!r} has {known}")

    def prepare(self, workdir: Path) -> None:  # noqa: B027  # most need nothing
        """Called once, before anything is started. `UserError` where it could start nothing."""

    @abstractmethod
    def start(self, start: Start) -> Job:
        """Starts it and returns at once."""

    @staticmethod
    def alive(facts: Mapping[str, Any], folder: Path) -> bool:
        """Does the scheduler still have the job with these `Job.facts`, which another process has started?"""
        return False


def open_log(start: Start, words: str) -> Any:
    """The run's log, opened, with the command in it."""
    output = start.log.open("a")
    output.write(f"\n$ {words}\n")
    output.flush()
    return output
