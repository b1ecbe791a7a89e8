"""Checkpoints with orbax: the sharded state, and beside it the data position, the config and the clock as JSON.

Saving is asynchronous and atomic; restoring places every array by the shardings of the run that restores, so another mesh
or another number of processes is fine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError
from mg3d_jax.training.state import Setup, State

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        workdir: the run; checkpoints lie in `workdir/checkpoints/STEP`.
        every: interval in steps. keep: how many of the newest to keep.
    """

    def __init__(self, workdir: Path, *, every: int = 1, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(), options=options, item_names=("state", "meta")
        )
        self.every = every

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, meta: dict[str, Any], step: int, *, force: bool = False) -> None:
        """Starts a save when `step` is due (or `force`d) and not yet saved. `meta` is JSON: position, config, clock."""
        if (force or step % self.every == 0) and step not in self._manager.all_steps():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=items, force=True)

    def reached_preemption(self, step: int) -> bool:
        """Has any process been told to stop? All processes agree on the answer for a step; ask at every step."""
        return self._manager.reached_preemption(step)

    def restore(self, setup: Setup, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """State and meta of `step` (newest by default). `UserError` where there is none or it does not fit the model."""
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self._manager.directory} holds no checkpoint: train the run first")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(setup.abstract), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(f"checkpoint {self._manager.directory}/{step} cannot be restored: {error}") from error
        return restored["state"], restored["meta"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Only the JSON part of a checkpoint."""
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self._manager.directory} holds no checkpoint: train the run first")
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_same_run(meta: dict[str, Any], config: ConfigDict) -> None:
    """`UserError` with the list of differences when a resumed run's config changed in a way that matters."""
    old = config_lib.from_json(meta["config"])
    if differences := config_lib.resume_differences(old, config):
        raise UserError(
            "this run directory was started with another configuration:\n  - "
            + "\n  - ".join(differences)
            + "\nUse the old values, or another --workdir."
        )
