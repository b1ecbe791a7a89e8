"""The fitter against closed forms, invariances, and an independent brute-force search with SciPy."""

import numpy as np
import pytest
from reference.scaling_tables import CHINCHILLA, PARAMETERS, Law, chinchilla_like, grid, huber, objective, typical_law
from scipy.optimize import minimize

from mg3d_jax.scaling.fit.certified import fit_law
from mg3d_jax.scaling.fit.noiseless import random_law


def relative_error(law: Law, truth: Law) -> float:
    return max(abs(law.as_dict()[name] / truth.as_dict()[name] - 1) for name in PARAMETERS)


def test_recovers_random_noiseless_laws():
    rng = np.random.default_rng(7)
    for _ in range(40):
        drawn, n, d = random_law(rng)
        truth = Law(**drawn.as_dict())  # the reference computes the losses
        fit = fit_law(n, d, truth(n, d))
        assert relative_error(fit.law, truth) < 1e-4, truth
        assert not fit.not_identified


def brute_force(n, d, loss) -> float:
    """What repeated BFGS and Nelder-Mead from a grid of starts reach, in the published parametrisation."""
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)

    def cost(theta):
        a, b, e, alpha, beta = theta
        predicted = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)
        return 1e3 * np.sum(huber(log_loss - predicted))

    best = np.inf
    for a in (0.0, 10.0, 20.0):
        for b in (0.0, 10.0, 20.0):
            for exponents in ((0.3, 0.3), (0.7, 0.5)):
                theta = np.asarray([a, b, 0.0, *exponents])
                for method in ("BFGS", "Nelder-Mead", "Nelder-Mead"):
                    theta = minimize(cost, theta, method=method).x
                best = min(best, cost(theta) / 1e3)
    return best


@pytest.mark.parametrize(("noise", "degrees"), [(0.004, 2.0), (0.02, 30.0)])
def test_reaches_the_brute_force_optimum_on_a_chinchilla_like_table(noise, degrees):
    n, d, loss = chinchilla_like(noise, degrees, seed=3)
    fit = fit_law(n, d, loss)
    assert fit.objective == pytest.approx(objective(Law.fitted(fit), n, d, loss), rel=1e-12)
    assert fit.objective <= objective(CHINCHILLA, n, d, loss)
    assert fit.objective <= brute_force(n, d, loss) * (1 + 1e-9)
    assert fit.law["alpha"] == pytest.approx(CHINCHILLA.alpha, rel=0.15)
    assert fit.certificate.gradient_norm < 1e-6
    assert fit.certificate.starts_within_0_1_percent > fit.certificate.starts // 2
    assert not fit.not_identified


def test_no_small_move_of_a_parameter_lowers_the_objective():
    n, d, loss = grid(typical_law(), noise=0.01)
    law = Law.fitted(fit_law(n, d, loss))
    least = objective(law, n, d, loss)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-4, 1e-6):
        for _ in range(50):
            moved = {name: value * (1 + size * rng.normal()) for name, value in law.as_dict().items()}
            assert objective(Law(**moved), n, d, loss) >= least * (1 - 1e-12)


def test_other_units_give_the_same_law():
    n, d, loss = grid(typical_law(), noise=0.01)
    law, scaled = Law.fitted(fit_law(n, d, loss)), fit_law(n / 1e6, d * 512, loss).law
    expected = Law(E=law.E, A=law.A / 1e6**law.alpha, B=law.B * 512**law.beta, alpha=law.alpha, beta=law.beta)
    assert relative_error(scaled, expected) < 1e-6
    doubled = fit_law(n, d, loss * 2).law
    assert relative_error(doubled, Law(2 * law.E, 2 * law.A, 2 * law.B, law.alpha, law.beta)) < 1e-6


def test_row_order_changes_nothing():
    n, d, loss = grid(typical_law(), noise=0.01)
    order = np.random.default_rng(1).permutation(len(n))
    assert fit_law(n, d, loss).law == fit_law(n[order], d[order], loss[order]).law


def test_float32_input_is_fitted_in_float64():
    truth = typical_law()
    n, d, loss = grid(truth)
    assert relative_error(fit_law(*(v.astype(np.float32) for v in (n, d, loss))).law, truth) < 1e-4
    noisy = grid(truth, noise=0.01)
    single = tuple(v.astype(np.float32) for v in noisy)
    assert relative_error(fit_law(*single).law, fit_law(*noisy).law) < 1e-3


@pytest.mark.parametrize("scale", [1 / 25, 1e-6, 1e6])
def test_scaling_the_objective_changes_nothing_but_the_objective(scale):
    n, d, loss = grid(typical_law(), noise=0.01)
    plain, scaled = fit_law(n, d, loss), fit_law(n, d, loss, weights=np.full(len(n), scale))
    assert relative_error(scaled.law, plain.law) < 1e-9
    assert scaled.objective == pytest.approx(scale * plain.objective, rel=1e-9)


def test_exact_repeats_count_in_the_sum_but_not_as_runs():
    n, d, loss = grid(typical_law(), noise=0.01)
    plain, twice = fit_law(n, d, loss), fit_law(*(np.tile(v, 2) for v in (n, d, loss)))
    assert relative_error(twice.law, plain.law) < 1e-6
    assert twice.objective == pytest.approx(2 * plain.objective, rel=1e-9)
    assert any("25 of 50 rows repeat" in warning for warning in twice.warnings)
    few = fit_law(*(np.tile(v[:7], 4) for v in (n, d, loss)))
    assert few.law is None and "7 distinct usable runs" in few.refusal


def test_too_few_runs_or_sizes_are_refused():
    n, d, loss = grid(typical_law(), noise=0.01)
    choice = np.random.default_rng(0).permutation(25)
    seven = fit_law(n[choice[:7]], d[choice[:7]], loss[choice[:7]])
    assert seven.law is None and "at least 8" in seven.refusal and set(seven.not_identified) == set(PARAMETERS)
    assert fit_law(n[choice[:12]], d[choice[:12]], loss[choice[:12]]).law is not None
    one_size = n == n.min()
    repeated = [np.concatenate([v[one_size]] * 2) for v in (n, d)]
    refused = fit_law(*repeated, np.linspace(2, 1, 10))
    assert refused.law is None and "1 distinct N" in refused.refusal


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize(("absent", "names"), [("E", {"E"}), ("A", {"A", "alpha"}), ("B", {"B", "beta"})])
def test_an_absent_term_is_not_identified(absent, names, noise):
    truth = Law(**(typical_law().as_dict() | {absent: 0.0}))
    n, d, loss = grid(truth, noise=noise, seed=1, repeats=2)
    fit = fit_law(n, d, loss)
    assert names <= set(fit.not_identified)
    assert all(any(w.startswith(f"{name} is not identified") for w in fit.warnings) for name in names)
    present = {"A": "alpha", "B": "beta"}[min({"A", "B"} - {absent})]
    assert present not in fit.not_identified
    assert fit.law[present] == pytest.approx(getattr(truth, present), rel=0.1)


def test_constant_losses_identify_neither_exponent():
    n, d, _ = grid(typical_law())
    fit = fit_law(n, d, np.full(len(n), 2.0))
    assert {"A", "B", "alpha", "beta"} <= set(fit.not_identified)


def test_bad_values_raise():
    n, d, loss = grid(typical_law())
    for bad in (np.nan, np.inf, 0.0, -1.0):
        with pytest.raises(ValueError, match="positive and finite"):
            fit_law(n, d, np.where(np.arange(25) == 3, bad, loss))
