"""A run that goes on from a step of another one with all of its state: what a shorter run of a constant rate is, which cools
down earlier, or one that is to leave a divergence behind with a lower rate.

Beside weights (`init_from.path`) it takes the optimizer, the average, the step, and so the place in the data. Where rate and
schedule up to that step are the same, the run is bit for bit the one that would have been trained from the start.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.config.identity import resume_differences
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.run_folder import TOKENIZER_FOLDER
from mg3d_jax.training.state import Setup, Start

FREE = ("name", "init_from.", "training.", "schedule.", "optimizer.learning_rate:")  # what a branch may have of its own
logger = logging.getLogger(__name__)


def folder_and_step(path: str) -> tuple[Path, int | None]:
    """`RUN@STEP -> (RUN, STEP)`; the step is None where the path names none."""
    before, at, step = path.rpartition("@")
    if at and step.isdecimal() and not Path(path).exists():
        return Path(before), int(step)
    return Path(path), None


def whole_state(setup: Setup, tokenizer: ReportTokenizer) -> Start | None:
    """What a new run begins with, None without `init_from.whole`.

    Raises `UserError` where `init_from.path` is no run, where the runs differ in more than rate, schedule and length, and where
    this one would end before it begins.
    """
    config = setup.config
    if not config.init_from.whole:
        return None
    folder, step = folder_and_step(config.init_from.path)
    trunk = Checkpoints(folder)
    meta = trunk.meta(step)
    theirs = config_lib.from_json(meta["config"])
    differences = [one for one in resume_differences(theirs, config) if not one.startswith(FREE)]
    if differences:
        raise UserError(
            f"{folder} cannot be gone on from with its whole state (init_from.whole); they differ in "
            + "; ".join(differences)
            + ". Use the same settings, or init_from.whole = False for its weights alone"
        )
    if load_tokenizer(str(folder / TOKENIZER_FOLDER)).to_str() != tokenizer.tokenizer.to_str():
        raise UserError(
            f"{folder} was trained with another tokenizer: set data.tokenizer = {str(folder / TOKENIZER_FOLDER)!r}"
        )
    begins = int(meta["step"])
    if begins >= setup.steps:
        raise UserError(
            f"{folder} is at step {begins}, and this run has {setup.steps}: begin at an earlier one, {folder}@STEP"
        )
    state, meta = trunk.restore(setup, begins)
    _say(folder, theirs, setup, begins)
    kept = ("flops", "records", "content", "trained_seconds")
    return Start(state, {key: value for key, value in meta.items() if key in kept}, begins)


def _say(folder: Path, theirs: Config, setup: Setup, begins: int) -> None:
    logger.info("begins with the whole state of %s after step %d", folder, begins)
    rates = {
        (theirs.schedule, theirs.optimizer.learning_rate),
        (setup.config.schedule, setup.config.optimizer.learning_rate),
    }
    if len(rates) > 1:
        now = float(np.asarray(setup.learning_rate(begins)))
        logger.info("rate or schedule are not those of %s; the next step has a rate of %.3g", folder, now)
