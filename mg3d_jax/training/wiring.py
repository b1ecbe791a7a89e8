"""The hooks that every run has, from its configuration: the one place where they are put together, in the order of calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mg3d_jax.config.parts import TrainingConfig
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.hooks import BestMetric, HeldOutLoss, Hook, Log, ProgressBar, Save, SaveAtTheEnd
from mg3d_jax.training.profiler import Profiler
from mg3d_jax.training.stopping import SkippedUpdates
from mg3d_jax.training.watchdog import Watchdog


def standard_hooks(
    training: TrainingConfig,
    workdir: Path,
    checkpoints: Checkpoints,
    *,
    given: Sequence[Hook],
    profile_steps: int,
    validates: bool,
) -> list[Hook]:
    """What is measured comes before what saves it; what only watches comes last.

    Args:
        given: further hooks: evaluations, pictures, those of a user.
        profile_steps: how many steps to trace.
        validates: is there held-out data?
    """
    best, skipped = training.best_metric, SkippedUpdates(training.max_skipped)
    log = Log(skipped, every=training.log_every)
    save = Save(
        checkpoints,
        best,
        every=training.checkpoint_every,
        skipping=lambda: skipped.in_a_row > 0,
        steps=training.keep_steps,
    )
    return [
        skipped,
        log,
        # The best checkpoint is chosen by the evaluation of the last step: then that comes first.
        *([] if best else [SaveAtTheEnd(save)]),
        *([HeldOutLoss(every=training.validate_every)] if validates else []),
        *given,
        *([BestMetric(best)] if best else []),
        save,
        ProgressBar(log),
        Watchdog(workdir, training.watchdog_minutes),
        Profiler(workdir, profile_steps),
    ]
