"""Learning-rate schedules, and how long a run is."""

from __future__ import annotations

import math

import optax
from ml_collections import ConfigDict

from mg3d_jax.errors import UserError


def total_steps(training: ConfigDict, batch_size: int, records: int) -> int:
    """Steps of the run from the one of `steps`, `epochs`, `samples` that is set; at least 1."""
    if training.steps:
        return training.steps
    samples = training.samples or training.epochs * records
    return max(1, math.ceil(samples / batch_size))


def learning_rate(schedule: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Warm-up from 0 to `peak`, then `linear` or `cosine` decay to `final_fraction * peak`, or `constant` with a cooldown.

    The warm-up is `warmup_steps`, or `warmup_percent` of the run where that is 0; the constant form cools down linearly
    over the last `cooldown_percent` of the run.
    """
    warmup = schedule.warmup_steps or round(steps * schedule.warmup_percent / 100)
    if warmup >= steps and steps > 1:
        raise UserError(f"schedule.warmup_steps = {warmup} does not end before the run's {steps} steps: shorten it")
    rest, end = max(steps - warmup, 1), schedule.final_fraction * peak
    if schedule.kind == "linear":
        decay = optax.linear_schedule(peak, end, rest)
    elif schedule.kind == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, schedule.final_fraction)
    else:
        cooldown = round(steps * schedule.cooldown_percent / 100)
        decay = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(cooldown, 1))],
            [max(rest - cooldown, 0)],
        )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup])
