"""Checkpoints with orbax: the sharded state, and beside it the data position, the config and the clock as JSON.

Saving is asynchronous and atomic: orbax writes a folder under a temporary name and renames it when all processes are done.
Restoring places every array by the shardings of the run that restores, so another mesh, another number of processes or
another kind of device is fine.

A checkpoint carries a checksum of its JSON and one of every array. The latter is computed on the devices as a sum of
integers, so it neither depends on the mesh nor reads a file twice, and it vouches for all that lies between the memory of
the run that saved and of the one that restored. A checkpoint that cannot be read, or reads as something else than was
saved, is named and passed over for the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError, storage_problem
from mg3d_jax.training import distributed
from mg3d_jax.training.checksums import checksums
from mg3d_jax.training.state import Setup, State

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
HALF_WRITTEN = ".orbax-checkpoint-tmp"  # orbax's mark of a folder that is not complete
CHECKSUM, ARRAY_CHECKSUMS, METRICS = "checksum", "array_checksums", "metrics"  # keys that `save` adds to the JSON
_barriers = itertools.count()


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read, or not as it was saved."""


class Checkpoints:
    """The checkpoints of one run directory. Nothing on disk changes before the first `save`.

    Args:
        workdir: the run; checkpoints lie in `workdir/checkpoints/STEP`.
        keep: how many of the newest to keep.
        best_metric: name among the metrics given to `save`; the checkpoint that is best by it is kept too. Empty: none.
        best_mode: "min" or "max".
    """

    def __init__(self, workdir: Path, *, keep: int = 2, best_metric: str = "", best_mode: str = "min"):
        self.folder = (workdir / FOLDER).absolute()
        self._aside = (workdir / DAMAGED_FOLDER).absolute()
        self._policy = _NewestAndBest(keep, best_metric, best_mode)
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: dict[int, str] = {}  # step -> reason, of those that `newest` passed over
        self._failed = False
        _silence_repetitions()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def latest(self) -> int | None:
        """The newest complete checkpoint, be it readable or not."""
        return max(self.steps(), default=None)

    def save(
        self,
        state: State,
        meta: dict[str, Any],
        step: int,
        *,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts a save, unless the step is saved already.

        Args:
            meta: JSON: position, config, clock.
            metrics: evaluations of this very state, for `best_metric`.

        Raises `UserError` when the disk is full or refuses; this may be a failure of the save before. What was complete
        stays, what was half-written is removed.
        """
        with self._explained(f"the checkpoint of step {step}, or the one before,"):
            manager = self._writer()
            if step in manager.all_steps():
                return
            self._policy.add(step, metrics)
            meta = meta | {METRICS: self._policy.metrics(step), ARRAY_CHECKSUMS: checksums(state)}
            text = ocp.args.JsonSave(meta | {CHECKSUM: _checksum(meta)})
            manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=text), force=True)

    def reached_preemption(self, step: int) -> bool:
        """Has any process been told to stop? All processes agree on the answer for a step; ask at every step from 1 on.
        (orbax asks too, about the step that it saves.)"""
        return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

    def newest(self, setup: Setup) -> tuple[State, dict[str, Any], int] | None:
        """State, meta and step of the newest checkpoint that can be read, the same one in all processes; None without any.

        Those that cannot be read are named on stderr; the first `save` moves them out of the way. Raises `UserError` when
        none of several is readable, or when the checkpoint is of another configuration than `setup`.
        """
        if half := self._half_written():
            _say(f"{self.folder}: {', '.join(p.name for p in half)} was not written to its end and is not used")
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
            return _without_checksums(self._read_meta(step))
        except DamagedCheckpointError as error:
            raise UserError(f"checkpoint {self.folder / str(step)} cannot be read: {error}") from error

    def close(self) -> None:
        """Waits for saves under way. `UserError` when one failed, unless `save` has said so already."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        if self._failed:
            with suppress(Exception):  # reported when it failed
                manager.close()
            return
        with self._explained("the last checkpoint"):
            try:
                manager.wait_until_finished()
            finally:
                manager.close()

    def _newest(self, setup: Setup, *, same_run: bool) -> tuple[State, dict[str, Any], int] | None:
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
                    "or delete it to start from step 0. If all fail for the same reason, the code may have changed."
                )
            try:
                return *self._read(setup, step, same_run=same_run), step
            except DamagedCheckpointError as error:
                self._damaged[step] = str(error)
                _say(f"{self.folder / str(step)} is damaged and not used: {error}")

    def _read(self, setup: Setup, step: int, *, same_run: bool) -> tuple[State, dict[str, Any]]:
        """One checkpoint with all checksums verified. `DamagedCheckpointError` in all processes if in one."""
        reason, state, meta = "", None, {}
        try:
            meta = self._read_meta(step)
            if same_run:
                check_same_run(meta, setup.config)
            state = _guarded(self._read_state, setup, step)
        except DamagedCheckpointError as error:
            reason = str(error)
        readable = self._agree(not reason)
        if not all(readable):
            raise DamagedCheckpointError(reason or f"process {readable.index(0)} cannot read it")
        saved, now = meta[ARRAY_CHECKSUMS], checksums(state)
        if changed := [name for name in now if now[name] != saved.get(name)]:
            more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
            raise DamagedCheckpointError(f"the values of {changed[0]}{more} are not those that were saved")
        return state, _without_checksums(meta)

    def _read_state(self, setup: Setup, step: int) -> State:
        """Without the barriers of orbax's manager: a process that fails must not leave the others waiting there."""
        placed = ocp.checkpoint_utils.construct_restore_args(setup.abstract)
        with closing(_state_handler()) as handler:
            part = "step" not in setup.abstract  # see `restore`
            args = ocp.args.PyTreeRestore(setup.abstract, restore_args=placed, partial_restore=part)
            return handler.restore(self.folder / str(step) / "state", args=args)

    def _read_meta(self, step: int) -> dict[str, Any]:
        with closing(ocp.JsonCheckpointHandler()) as handler:
            folder = self.folder / str(step) / "meta"
            meta = _guarded(lambda: dict(handler.restore(folder, args=ocp.args.JsonRestore())))
        if meta.pop(CHECKSUM, None) != _checksum(meta):
            raise DamagedCheckpointError("the text in its meta folder is not what was saved")
        return meta

    def _agree(self, value: int) -> list[int]:
        """The values of all processes, by process. Waits for the slowest, however long it reads."""
        if jax.process_count() == 1:
            return [int(value)]
        distributed.barrier(_new_barrier())
        return [int(x) for x in np.ravel(multihost_utils.process_allgather(np.int32(value)))]

    def _writer(self) -> ocp.CheckpointManager:
        """orbax's manager, made when first needed: what damage and kills have left is out of its way then."""
        if self._manager is None:
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
                    _say(f"{error}; it cannot count as the best one")
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={"state": _state_handler(), "meta": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(preservation_policy=self._policy),
            )
        return self._manager

    def _move_aside(self, step: int) -> None:
        """A damaged checkpoint leaves the folder, or its step could not be saved again."""
        target = self._aside / str(step)
        self._aside.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder / str(step), target)
        _say(f"the damaged checkpoint of step {step} is now {target}: delete it when you have looked at it")

    def _half_written(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{HALF_WRITTEN}*")) if self.folder.is_dir() else []

    def _remove_half_written(self) -> None:
        for path in self._half_written():
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns what the disk does into a `UserError` that names the folder and the mend."""
        try:
            yield
        except Exception as error:
            self._failed = True
            if (problem := storage_problem(error)) is None:
                raise
            if self._manager is not None:
                with suppress(Exception):
                    self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._remove_half_written()
            left = self.latest()
            after = f"goes on after step {left}" if left is not None else "starts again"
            raise UserError(
                f"{what} cannot be written to {self.folder}: {problem} ({_free(self.folder)}). Make room there, lower "
                "training.keep_checkpoints, or move the whole run directory to a larger disk; then the same command "
                + after
            ) from error


class _NewestAndBest:
    """orbax's preservation policy: the newest `keep`, and the one with the best value of `metric` if that has a name."""

    def __init__(self, keep: int, metric: str, mode: str):
        self._keep, self._metric, self._sign = keep, metric, {"min": 1.0, "max": -1.0}[mode]
        self._values: dict[int, float] = {}

    def add(self, step: int, metrics: dict[str, float] | None) -> None:
        """A value that is missing or not finite makes no checkpoint the best."""
        value = (metrics or {}).get(self._metric, math.nan)
        if self._metric and math.isfinite(value):
            self._values[step] = float(value)

    def metrics(self, step: int) -> dict[str, float]:
        return {self._metric: self._values[step]} if step in self._values else {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self._keep :])
        if rated := [step for step in steps if step in self._values]:
            kept.add(min(rated, key=lambda step: (self._sign * self._values[step], -step)))  # the later of equals
        return [step in kept for step in steps]


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """orbax's own, but copies of an array share the work of writing it only where each has a MiB or more to write.

    It would cut the smallest bias into one piece per device, and compile a program for every cut.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def check_same_run(meta: dict[str, Any], config: Config) -> None:
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


def _guarded(read: Callable, *args: Any) -> Any:
    """`read(*args)`; whatever a damaged file makes orbax and tensorstore raise becomes a `DamagedCheckpointError`."""
    try:
        return read(*args)
    except Exception as error:  # any type: broken JSON, missing keys, short files, bad compression, wrong shapes
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # too little memory says nothing about the file
        lines = str(error).strip().splitlines() or [""]
        raise DamagedCheckpointError(f"{type(error).__name__}: {lines[0][:300]}") from error


@functools.cache
def _silence_repetitions() -> None:
    """One error of the disk is enough: without this hundreds of tracebacks bury the `UserError` that explains it.

    orbax logs the error in each of its threads, and tensorstore's news of the other arrays come after orbax has left.
    """
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and storage_problem(record.exc_info[1])))
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _without_checksums(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in meta.items() if name not in (CHECKSUM, ARRAY_CHECKSUMS)}


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free"


def _new_barrier() -> str:
    """A name that no barrier had before; all processes come by in the same order."""
    return f"checkpoints/{next(_barriers)}"


def _say(text: str) -> None:
    """Once per run, not per process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
