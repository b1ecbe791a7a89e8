"""What a plan promises: widths that come true, and a "not enough" where they would not."""

import math

import numpy as np
import pytest

from mg3d_jax.scaling.fit import precision
from mg3d_jax.scaling.fit.certified import fit_law


def grid(sizes, data, seeds):
    n, d = np.geomspace(1e6, 1e8, sizes), np.geomspace(1e3, 1e5, data)
    i, j, _ = (axis.ravel() for axis in np.indices((sizes, data, seeds)))
    return n[i], d[j]


def test_widths_grow_with_noise_and_shrink_with_runs():
    small = precision.expected(*grid(4, 4, 1), noise=0.003)
    noisy = precision.expected(*grid(4, 4, 1), noise=0.012)
    large = precision.expected(*grid(6, 6, 2), noise=0.003)
    assert large.alpha < small.alpha < noisy.alpha and large.prediction < small.prediction < noisy.prediction
    assert "alpha to" in large.text() and not large.verdict
    assert "Not enough" in noisy.text()


def test_the_width_is_that_of_fits_to_other_noise():
    n, d = grid(5, 5, 1)
    found = precision.expected(n, d, noise=0.003)
    rng, centre_n, centre_d = np.random.default_rng(7), np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    loss = 1 + 0.5 * (n / centre_n) ** -precision.ALPHA + 0.5 * (d / centre_d) ** -precision.BETA
    alphas = [fit_law(n, d, loss * np.exp(0.003 * rng.normal(size=len(n)))).law["alpha"] for _ in range(16)]
    assert abs(np.median(alphas) - precision.ALPHA) < found.alpha
    assert found.alpha == pytest.approx(np.subtract(*np.quantile(alphas, [0.95, 0.05])) / 2, rel=0.6)


def test_a_grid_that_allows_no_law_says_so():
    found = precision.expected(*grid(2, 2, 1))
    assert math.isnan(found.alpha) and "not enough" in found.text() and "distinct usable runs" in found.refused
