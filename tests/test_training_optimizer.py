"""Regex tables and schedules."""

import numpy as np
import pytest
from support import tiny_config

from mg3d_jax.errors import UserError
from mg3d_jax.training import optimizer, schedule

PARAMS = {"tower": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}, "head": {"kernel": np.zeros((2, 2))}}


def test_first_row_counts_and_frozen_is_zero():
    config = tiny_config(
        optimizer__learning_rate_multipliers=(("head/.*", 5.0), (".*", 1.0)), optimizer__freeze=("tower/bias",)
    ).optimizer
    assert optimizer.multipliers(PARAMS, config) == {"tower": {"kernel": 1.0, "bias": 0.0}, "head": {"kernel": 5.0}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer__learning_rate_multipliers": (("head/.*", 5.0),)}, "no row for tower/"),
        ({"optimizer__freeze": ("tour/.*",)}, "matches no parameter"),
        ({"optimizer__freeze": ("(",)}, "not a regular expression"),
    ],
)
def test_gaps_and_typos_in_the_tables_are_errors(changes, says):
    with pytest.raises(UserError, match=says):
        optimizer.multipliers(PARAMS, tiny_config(**changes).optimizer)


def test_weight_decay_leaves_biases_alone():
    mask = optimizer.decay_mask(PARAMS, tiny_config().optimizer)
    assert mask == {"tower": {"kernel": True, "bias": False}, "head": {"kernel": True}}


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine", {10: 1.0, 55: 0.5, 100: 0.0}),
        ("constant", {10: 1.0, 79: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
def test_schedules_against_their_closed_form(kind, at):
    config = tiny_config(schedule__kind=kind, schedule__warmup_steps=10, schedule__cooldown_percent=20.0)
    rate = schedule.learning_rate(config.schedule, 1.0, 100)
    for step, value in at.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_length_of_a_run():
    assert schedule.total_steps(tiny_config(training__steps=0, training__epochs=2.0).training, 8, 33) == 9
    assert schedule.total_steps(tiny_config(training__steps=0, training__samples=80).training, 8, 33) == 10
    with pytest.raises(UserError, match="shorten"):
        schedule.learning_rate(tiny_config(schedule__warmup_steps=100).schedule, 1.0, 50)
