"""Schedules against a plain NumPy version, lengths in every unit, and what does not fit into a run."""

import numpy as np
import pytest
from support import tiny_config

from mg3d_jax.errors import UserError
from mg3d_jax.training import schedule


def reference(kind, steps, warmup, cooldown, final):
    """One learning rate per step, from the definitions."""
    step = np.arange(steps + 1, dtype=float)
    if kind == "constant":
        after = np.where(step <= steps - cooldown, 1.0, final + (1 - final) * (steps - step) / max(cooldown, 1))
    else:
        done = np.clip((step - warmup) / (steps - warmup), 0, 1)
        after = final + (1 - final) * (1 - done if kind == "linear" else (1 + np.cos(np.pi * done)) / 2)
    return np.where(step < warmup, step / max(warmup, 1), after)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "cooldown", "final"), [(10, 20, 0.0), (0, 0, 0.1), (40, 60, 0.25)])
def test_schedules_against_numpy(kind, warmup, cooldown, final):
    options = {"kind": kind, "warmup_steps": warmup, "cooldown_steps": cooldown, "final_fraction": final}
    options |= {"warmup_percent": 0.0, "cooldown_percent": 0.0}
    config = tiny_config(**{f"schedule__{key}": value for key, value in options.items()})
    rate = schedule.learning_rate(config.schedule, 1.0, 100)
    found = [float(rate(step)) for step in range(101)]
    np.testing.assert_allclose(found[:-1], reference(kind, 100, warmup, cooldown, final)[:-1], atol=1e-6)
    if cooldown or kind != "constant":
        assert found[-1] == pytest.approx(final, abs=1e-6)


@pytest.mark.parametrize(
    ("set_to", "expected"),
    [
        ({"warmup_steps": 7, "warmup_epochs": 9.0}, (7, "schedule.warmup_steps")),
        ({"warmup_epochs": 1.5, "warmup_samples": 8}, (6, "schedule.warmup_epochs")),  # 1.5 * 33 / 8 = 6.19
        ({"warmup_samples": 100}, (12, "schedule.warmup_samples")),  # 12.5, to even
        ({"warmup_percent": 30.0}, (60, "schedule.warmup_percent")),
    ],
)
def test_the_first_unit_that_is_set_counts(set_to, expected):
    config = tiny_config(**{f"schedule__{key}": value for key, value in set_to.items()}).schedule
    assert schedule.part_steps(config, "warmup", 200, batch_size=8, records=33) == expected


@pytest.mark.parametrize(
    ("set_to", "says"),
    [
        ({"warmup_steps": 50}, "schedule.warmup_steps: a warm-up of 50 steps does not end before the run's 50"),
        ({"warmup_epochs": 20.0}, "schedule.warmup_epochs: a warm-up of 82 steps"),
        ({"kind": "constant", "cooldown_steps": 41, "warmup_steps": 10}, "schedule.cooldown_steps: a cooldown of 41"),
        ({"kind": "constant", "cooldown_percent": 100.0}, "schedule.cooldown_percent: a cooldown of 50"),
    ],
)
def test_parts_that_do_not_fit_are_errors_that_name_the_key(set_to, says):
    config = tiny_config(**{f"schedule__{key}": value for key, value in set_to.items()}).schedule
    with pytest.raises(UserError, match=says):
        schedule.learning_rate(config, 1.0, 50, batch_size=8, records=33)


def test_two_rounded_halves_fill_a_run_of_odd_length():
    halves = {"schedule__warmup_percent": 50.0, "schedule__cooldown_percent": 50.0, "schedule__kind": "constant"}
    rate = schedule.learning_rate(tiny_config(**halves).schedule, 1.0, 7)
    assert [round(float(rate(step)), 4) for step in (0, 4, 7)] == [0.0, 1.0, 0.0]


def test_length_of_a_run():
    assert schedule.total_steps(tiny_config(training__steps=0, training__epochs=2.0).training, 8, 33) == 9
    assert schedule.total_steps(tiny_config(training__steps=0, training__samples=80).training, 8, 33) == 10
