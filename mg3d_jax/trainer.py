"""The trainer of `mg3d train`: the loop with everything that a config may ask for. Imports nothing that reads scans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mg3d_jax.config import Config
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.hooks import chosen_hooks
from mg3d_jax.interop.warm_start import load_initial
from mg3d_jax.training import branch, loop
from mg3d_jax.training.hooks import Hook
from mg3d_jax.training.state import Setup, Start, initialize


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
            config, Path(workdir), hooks=[*own, *hooks], initialize=first_state, profile_steps=profile_steps
        )


def first_state(setup: Setup, tokenizer: ReportTokenizer) -> Start:
    """What a new run begins with, as its config says: another run's whole state (`init_from.whole`), or random numbers with
    the weights that `init_from` and `model.*_encoder.pretrained` name in their places."""
    whole = branch.whole_state(setup, tokenizer)
    return whole or Start(load_initial(setup, initialize(setup), tokenizer), {}, 0)
