"""The hooks that every run has, from its configuration: the one place where they are put together, in the order of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d_jax.config.parts import TrainingConfig
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.clock import Clock
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.hooks import BestMetric, HeldOutLoss, Hook, Log, ProgressBar, Save, SaveAtTheEnd
from mg3d_jax.training.profiler import Profiler
from mg3d_jax.training.stopping import SkippedUpdates
from mg3d_jax.training.watchdog import Watchdog


def standard_hooks(
    training: TrainingConfig,
    workdir: Path,
    *,
    given: Sequence[Hook],
    batch_size: int,
    checkpoints: Checkpoints,
    clock: Clock,
    cost: StepCost,
    facts: Callable[[], Mapping[str, Any]],
    profile_steps: int,
    skipped: SkippedUpdates,
    validates: bool,
) -> list[Hook]:
    """What is measured comes before what saves it; what only watches comes last.

    Args:
        given: further hooks: evaluations, pictures, those of a user.
        facts: gives the part of a checkpoint's JSON that is the same at every step.
        profile_steps: how many steps to trace.
        validates: is there held-out data?
    """
    best = training.best_metric
    log = Log(training.log_every, batch_size, clock, cost, skipped)
    save = Save(training.checkpoint_every, checkpoints, clock, batch_size, facts, best)
    return [
        skipped,
        log,
        # The best checkpoint is chosen by the evaluation of the last step: then that comes first.
        *([] if best else [SaveAtTheEnd(save)]),
        *([HeldOutLoss(training.validate_every)] if validates else []),
        *given,
        *([BestMetric(best)] if best else []),
        save,
        ProgressBar(log),
        Watchdog(workdir, training.watchdog_minutes),
        Profiler(workdir, profile_steps),
    ]
