"""Intervals: reproducible, grouped, and they cover the truth about as often as they say."""

import numpy as np
import pytest
from reference.scaling_tables import chinchilla_like, grid, typical_law

from mg3d_jax.scaling.fit.bootstrap import bootstrap
from mg3d_jax.scaling.fit.certified import fit_law
from mg3d_jax.scaling.fit.laws import PARAMETERS


def test_draws_depend_on_the_seed_only():
    n, d, loss = grid(typical_law(), noise=0.01)
    law = fit_law(n, d, loss).law
    first, again = (bootstrap(n, d, loss, law, draws=30, seed=5) for _ in range(2))
    other = bootstrap(n, d, loss, law, draws=30, seed=6)
    order = np.random.default_rng(0).permutation(25)
    shuffled = bootstrap(n[order], d[order], loss[order], law, draws=30, seed=5)
    assert np.array_equal(first.draws, again.draws)
    assert np.array_equal(first.draws, shuffled.draws)
    assert not np.array_equal(first.draws, other.draws)


def test_each_draw_is_the_optimum_of_its_resampling():
    n, d, loss = grid(typical_law(), noise=0.01)
    drawn = bootstrap(n, d, loss, fit_law(n, d, loss).law, draws=6, seed=0)
    order = np.lexsort((loss, d, n))
    counts = np.random.default_rng([0, 2]).multinomial(25, np.full(25, 1 / 25), size=6)
    for row, weights in zip(drawn.draws, counts, strict=True):
        chosen = np.repeat(order, weights)
        full = fit_law(n[chosen], d[chosen], loss[chosen]).law
        assert row[[0, 3, 4]] == pytest.approx([full.E, full.alpha, full.beta], rel=1e-4)


def test_a_single_seed_table_and_exact_repeats_give_the_same_intervals():
    n, d, loss = grid(typical_law(), noise=0.01)
    law = fit_law(n, d, loss).law
    once = bootstrap(n, d, loss, law, draws=20)
    twice = bootstrap(*(np.repeat(v, 2) for v in (n, d, loss)), law, draws=20)
    assert (once.groups, twice.groups) == (25, 25)
    np.testing.assert_allclose(twice.draws, once.draws, rtol=1e-6)


def test_rows_of_one_group_are_drawn_together():
    n, d, loss = grid(typical_law(), noise=0.01, repeats=2)
    trunk = [f"{size:g}" for size in n]
    law = fit_law(n, d, loss).law
    assert bootstrap(n, d, loss, law, draws=5, groups=trunk).groups == 5
    assert bootstrap(n, d, loss, law, draws=5).groups == 50


def test_intervals_cover_the_truth():
    truth = typical_law()
    hits = dict.fromkeys(PARAMETERS, 0)
    simulations = 30
    for seed in range(simulations):
        n, d, loss = grid(truth, noise=0.005, seed=seed, repeats=2)
        drawn = bootstrap(n, d, loss, fit_law(n, d, loss).law, draws=100, seed=seed)
        for name in PARAMETERS:
            low, high = drawn.interval(name, 90)
            hits[name] += low <= getattr(truth, name) <= high
    coverage = {name: count / simulations for name, count in hits.items()}
    assert all(0.8 <= share <= 0.97 for share in coverage.values()), coverage


def test_intervals_of_245_runs_and_1000_draws_are_nested():
    n, d, loss = chinchilla_like(0.006, 3.0, seed=0)
    drawn = bootstrap(n, d, loss, fit_law(n, d, loss).law, draws=1000)
    low, high = drawn.interval("alpha", 80)
    wide_low, wide_high = drawn.interval("alpha", 90)
    assert wide_low < low < high < wide_high
