"""The checkpoints of a run: the sharded state, and beside it the data position, the config and the clock as JSON.

Restoring places every array by the shardings of the run that restores, so another mesh, another number of processes or
another kind of device is fine. A checkpoint that cannot be read, or reads as something else than was saved, is named and
passed over for the one before (`integrity`). How it lies on the disk is `storage`'s matter.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError, storage_problem
from mg3d_jax.training import distributed, integrity
from mg3d_jax.training.integrity import DamagedCheckpointError, guarded
from mg3d_jax.training.state import Setup, Start, State
from mg3d_jax.training.storage import Storage

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
METRICS = "metrics"  # key that `save` adds to the JSON
logger = logging.getLogger(__name__)
_barriers = itertools.count()


class Checkpoints:
    """The checkpoints of one run directory. Nothing on disk changes before the first `save`.

    Args:
        workdir: the run; checkpoints lie in `workdir/checkpoints/STEP`.
        keep: how many of the newest to keep.
        always: steps that are kept, too, once they are saved.
        best_metric: name among the metrics given to `save`; the checkpoint that is best by it is kept too. Empty: none.
        best_mode: "min" or "max".
    """

    def __init__(
        self, workdir: Path, *, keep: int = 2, always: Sequence[int] = (), best_metric: str = "", best_mode: str = "min"
    ):
        self.folder = (workdir / FOLDER).absolute()
        self._aside = (workdir / DAMAGED_FOLDER).absolute()
        self._policy = _NewestAndBest(keep, best_metric, best_mode, frozenset(always))
        self._storage = Storage(self.folder)
        self._damaged: dict[int, str] = {}  # step -> reason, of those that `newest` passed over
        self._failed = False

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return self._storage.steps()

    def latest(self) -> int | None:
        """The newest complete checkpoint, be it readable or not."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best value of `best_metric` among those that are kept; None without such a value."""
        for step in self.steps() if self._policy.metric else ():
            self._policy.add(step, self.meta(step).get(METRICS))
        return self._policy.best(self.steps())

    def save(
        self, state: State, meta: Mapping[str, Any], step: int, *, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts a save, unless the step is saved already.

        Args:
            meta: JSON: position, config, clock.
            metrics: evaluations of this very state, for `best_metric`.

        Raises `UserError` when the disk is full or refuses; this may be a failure of the save before. What was complete
        stays, what was half-written is removed.
        """
        with self._explained(f"the checkpoint of step {step}, or the one before,"):
            if not self._storage.is_open:
                self._open()
            if self._storage.has(step):
                return
            self._policy.add(step, metrics)
            whole = dict(meta) | {METRICS: self._policy.metrics(step)}
            self._storage.save(step, state, integrity.sealed(whole, state))

    def newest(self, setup: Setup) -> Start | None:
        """State, meta and step of the newest checkpoint that can be read, the same one in all processes; None without any.

        Those that cannot be read are named in a warning; the first `save` moves them out of the way. Raises `UserError`
        when none of several is readable, or when the checkpoint is of another configuration or another model than `setup`.
        """
        if half := self._storage.half_written():
            _warn(f"{self.folder}: {', '.join(p.name for p in half)} was not written to its end and is not used")
        return self._newest(setup, same_run=True)

    def restore(self, setup: Setup, step: int | None = None, *, only: str = "") -> tuple[State, dict[str, Any]]:
        """State and meta of `step` (newest readable by default). `UserError` where there is none or it is damaged.

        `only`: read and check nothing of the state but this entry, "params" or "ema": moments take twice their memory.
        """
        if only:
            setup = dataclasses.replace(setup, abstract={only: setup.abstract[only]})
        if step is None:
            if (found := self._newest(setup, same_run=False)) is None:
                raise UserError(f"{self.folder} holds no checkpoint: train the run first")
            return found[:2]
        try:
            return self._read(setup, step, same_run=False)
        except DamagedCheckpointError as error:
            present = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be restored: {error}. There are: {present}"
            ) from error

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Only the JSON part of a checkpoint, the newest by default. `UserError` where there is none or it is damaged."""
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint: train the run first")
        try:
            return integrity.without_seal(self._read_meta(step))
        except DamagedCheckpointError as error:
            raise UserError(f"checkpoint {self.folder / str(step)} cannot be read: {error}") from error

    def close(self) -> None:
        """Waits for saves under way. `UserError` when one failed, unless `save` has said so already."""
        if self._failed:
            with suppress(Exception):  # reported when it failed
                self._storage.close()
            return
        with self._explained("the last checkpoint"):
            self._storage.close()

    def _newest(self, setup: Setup, *, same_run: bool) -> Start | None:
        """The newest readable one; fills `_damaged` and names those."""
        self._damaged = {}
        while True:
            left = [step for step in self.steps() if step not in self._damaged]
            # Process 0 says which: another one may see the listing of a network disk later.
            step = self._agree(max(left, default=-1))[0]
            if step < 0 and not self._damaged:
                return None
            if step < 0:
                tried = "\n  - ".join(f"{step}: {reason}" for step, reason in self._damaged.items())
                raise UserError(
                    f"none of the checkpoints in {self.folder} can be read:\n  - {tried}\nRestore the folder from a copy, "
                    "or delete it to start from step 0."
                )
            try:
                return Start(*self._read(setup, step, same_run=same_run), step)
            except DamagedCheckpointError as error:
                self._damaged[step] = str(error)
                _warn(f"{self.folder / str(step)} is damaged and not used: {error}")

    def _read(self, setup: Setup, step: int, *, same_run: bool) -> tuple[State, dict[str, Any]]:
        """One checkpoint with all checksums verified. `DamagedCheckpointError` in all processes if in one."""
        problem: Exception | None = None
        state: State = {}
        meta: dict[str, Any] = {}
        try:
            meta = self._read_meta(step)
            state = self._read_state(setup, step, meta, same_run=same_run)
        except (DamagedCheckpointError, UserError) as error:
            problem = error
        damaged = self._agree(isinstance(problem, DamagedCheckpointError))
        if any(damaged):
            reason = str(problem) if isinstance(problem, DamagedCheckpointError) else ""
            raise DamagedCheckpointError(reason or f"process {damaged.index(1)} cannot read it")
        if problem is not None:
            raise problem
        integrity.check_values(meta, state)
        return state, integrity.without_seal(meta)

    def _read_state(self, setup: Setup, step: int, meta: Mapping[str, Any], *, same_run: bool) -> State:
        """The arrays, as the files have them. `UserError` where they are of another configuration or another model."""
        if same_run:
            check_same_run(meta, setup.config)
        part, where = "step" not in setup.abstract, str(self.folder / str(step))  # see `restore`
        wanted = integrity.shapes(setup.abstract)
        integrity.check_same_arrays(meta, wanted, part=part, where=where)
        try:
            return guarded(self._storage.read_state, step, setup.abstract, part=part)
        except DamagedCheckpointError:
            if integrity.ARRAYS not in meta:
                integrity.check_same_shapes(meta, guarded(self._storage.shapes, step), wanted, where)
            raise

    def _read_meta(self, step: int) -> dict[str, Any]:
        return integrity.opened(guarded(self._storage.read_meta, step))

    def _agree(self, value: int) -> list[int]:
        """The values of all processes, by process. Waits for the slowest, however long it reads."""
        if jax.process_count() == 1:
            return [int(value)]
        distributed.barrier(_new_barrier())
        return [int(x) for x in np.ravel(multihost_utils.process_allgather(np.int32(value)))]

    def _open(self) -> None:
        """Makes the writer; what damage and kills have left is out of its way then."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_half_written()
            for step in self._damaged:
                self._move_aside(step)
        distributed.barrier(_new_barrier())
        for step in self.steps():
            try:
                self._policy.add(step, self._read_meta(step).get(METRICS))
            except DamagedCheckpointError as error:
                _warn(f"{error}; it cannot count as the best one")
        self._storage.open(self._policy.kept)

    def _move_aside(self, step: int) -> None:
        """A damaged checkpoint leaves the folder, or its step could not be saved again."""
        target = self._aside / str(step)
        self._aside.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder / str(step), target)
        _warn(f"the damaged checkpoint of step {step} is now {target}: delete it when you have looked at it")

    def _remove_half_written(self) -> None:
        for path in self._storage.half_written():
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns what the disk does into a `UserError` that names the folder and what to do."""
        try:
            yield
        except Exception as error:
            self._failed = True
            if (problem := storage_problem(error)) is None:
                raise
            if self._storage.is_open:
                self._storage.wait()
            if jax.process_index() == 0:
                self._remove_half_written()
            left = self.latest()
            after = f"goes on after step {left}" if left is not None else "starts again"
            raise UserError(
                f"{what} cannot be written to {self.folder}: {problem} ({_free(self.folder)}). Make room there, lower "
                "training.keep_checkpoints, or move the whole run directory to a larger disk; then the same command "
                + after
            ) from error


@dataclass
class _NewestAndBest:
    """Keeps the newest `keep`, those of `always`, and the one with the smallest or largest ("min", "max") value of `metric`
    if that has a name."""

    keep: int
    metric: str
    mode: str
    always: frozenset[int] = frozenset()
    _values: dict[int, float] = field(default_factory=dict, init=False)

    def add(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """A value that is missing or not finite makes no checkpoint the best."""
        value = (metrics or {}).get(self.metric, math.nan)
        if self.metric and math.isfinite(value):
            self._values[step] = float(value)

    def metrics(self, step: int) -> dict[str, float]:
        """Of one step, as its JSON keeps it."""
        return {self.metric: self._values[step]} if step in self._values else {}

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Those of `steps` that stay."""
        best = self.best(steps)
        return set(sorted(steps)[-self.keep :]) | (self.always & set(steps)) | (set() if best is None else {best})

    def best(self, steps: Sequence[int]) -> int | None:
        """The best of `steps`, the later of equals; None where none has a value."""
        sign = {"min": 1.0, "max": -1.0}[self.mode]
        rated = [step for step in steps if step in self._values]
        return min(rated, key=lambda step: (sign * self._values[step], -step)) if rated else None


def check_same_run(meta: Mapping[str, Any], config: Config) -> None:
    """`UserError` with the list of differences when a resumed run's config changed in a way that matters."""
    old = config_lib.from_json(meta["config"])
    if differences := config_lib.resume_differences(old, config):
        raise UserError(
            "this run directory was started with another configuration:\n  - "
            + "\n  - ".join(differences)
            + "\nUse the old values, or another --workdir."
        )


def check_writable(workdir: Path) -> None:
    """Makes `workdir` and writes a file there and away again. `UserError` where that fails; ask before building."""
    probe = workdir / f".writable-{secrets.token_hex(4)}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the run directory {workdir} cannot be written to: {error.strerror} ({_free(workdir)}). Choose another "
            "--workdir, or change its permissions or make room"
        ) from error


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free"


def _new_barrier() -> str:
    """A name that no barrier had before; all processes come by in the same order."""
    return f"checkpoints/{next(_barriers)}"


def _warn(text: str) -> None:
    """Once per run, not per process."""
    if jax.process_index() == 0:
        logger.warning(text)
