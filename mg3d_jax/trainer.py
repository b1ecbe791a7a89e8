"""The trainer of `mg3d train`: the loop with everything that a config may ask for. Imports nothing that reads scans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mg3d_jax.config import Config
from mg3d_jax.evaluation.hooks import chosen_hooks
from mg3d_jax.interop.warm_start import load_initial
from mg3d_jax.training import loop
from mg3d_jax.training.hooks import Hook


class Trainer(loop.Trainer):
    """What `mg3d train` runs: with the evaluations and pictures that the config asks for, from the weights that it names.

    Args:
        config: a frozen configuration, see `mg3d_jax.config.load`.
        workdir: where checkpoints, metrics, tokenizer and summary go; an earlier run there is resumed.
        hooks: what the run does beside that, e.g. measurements of your own (`mg3d_jax.training.hooks.Hook`).
        profile_steps: traces so many steps.
    """

    def __init__(self, config: Config, workdir: Path, *, hooks: Sequence[Hook] = (), profile_steps: int = 0):
        own = chosen_hooks(config)
        super().__init__(
            config, Path(workdir), hooks=[*own, *hooks], initialize=load_initial, profile_steps=profile_steps
        )
