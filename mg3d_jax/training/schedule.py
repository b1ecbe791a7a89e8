"""Learning-rate schedules, and how long a run and its parts are.

Lengths can be given in steps, epochs, samples or per cent of the run: one recipe fits other batch sizes and data sets.
"""

from __future__ import annotations

import math

import optax

from mg3d_jax.config.parts import ScheduleConfig, TrainingConfig
from mg3d_jax.errors import UserError


def total_steps(training: TrainingConfig, batch_size: int, records: int) -> int:
    """Steps of the run from the one of `steps`, `epochs`, `samples` that is set; at least 1."""
    if training.steps:
        return training.steps
    samples = training.samples or training.epochs * records
    return max(1, math.ceil(samples / batch_size))


def part_steps(
    schedule: ScheduleConfig, part: str, steps: int, *, batch_size: int = 0, records: int = 0
) -> tuple[int, str]:
    """Length of the `part` "warmup" or "cooldown", rounded to whole steps, and the config key that set it.

    The first of `_steps`, `_epochs`, `_samples` that is set counts, else `_percent` of the run's `steps`. `ValueError`
    where the caller left out the `batch_size` or number of `records` that the unit needs.
    """
    unit = next((u for u in ("steps", "epochs", "samples") if getattr(schedule, f"{part}_{u}")), "percent")
    key, value = f"schedule.{part}_{unit}", getattr(schedule, f"{part}_{unit}")
    if unit in ("epochs", "samples") and (batch_size < 1 or (unit == "epochs" and records < 1)):
        raise ValueError(f"{key} needs the batch size and the number of records, not {batch_size} and {records}")
    if unit == "steps":
        return value, key
    if unit == "percent":
        return round(steps * value / 100), key
    return round(value * (records if unit == "epochs" else 1) / batch_size), key


def learning_rate(
    schedule: ScheduleConfig, peak: float, steps: int, *, batch_size: int = 0, records: int = 0
) -> optax.Schedule:
    """Warm-up from 0 to `peak`, then `linear` or `cosine` decay to `final_fraction * peak`, or `constant` with a cooldown.

    The cooldown is linear and the last part of the run. `batch_size` and `records` (of an epoch) are read for lengths in
    samples and epochs. `UserError` naming the key for a warm-up or cooldown that does not fit into the run. A run of 0
    `steps`, which is opened and not trained, has 0 throughout.
    """
    if not steps:
        return optax.constant_schedule(0.0)
    known = {"batch_size": batch_size, "records": records}
    warmup, key = part_steps(schedule, "warmup", steps, **known)
    if warmup >= steps:
        raise UserError(f"{key}: a warm-up of {warmup} steps does not end before the run's {steps} steps: shorten it")
    rest, end = steps - warmup, schedule.final_fraction * peak
    if schedule.kind == "linear":
        decay = optax.linear_schedule(peak, end, rest)
    elif schedule.kind == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, schedule.final_fraction)
    else:
        cooldown = _cooldown(schedule, warmup, steps, known)
        decay = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(cooldown, 1))], [rest - cooldown]
        )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup])


def _cooldown(schedule: ScheduleConfig, warmup: int, steps: int, known: dict[str, int]) -> int:
    cooldown, key = part_steps(schedule, "cooldown", steps, **known)
    # Two lengths that fill the run exactly may both have been rounded up.
    if cooldown > steps - warmup + (not key.endswith("_steps")):
        raise UserError(
            f"{key}: a cooldown of {cooldown} steps is longer than the {steps - warmup} steps that the warm-up leaves of "
            f"the run's {steps}: shorten one of them"
        )
    return min(cooldown, steps - warmup)
