"""Fits the law to runs, certifies the optimum, and says which parameters the runs do not determine.

Method: a grid over the two exponents with the non-negative (E, A, B) solved for each (variable projection), some dozens
of random starts besides, every start polished by damped Newton on the sum of Huber(1e-3) on log residuals, float64
throughout. The certificate reports how many starts agree, how steep the objective still is, and how much worse the next
basin is. The laws without one of the terms are fitted too: a term that the runs do not ask for is "not identified".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mg3d_jax.scaling.fit import solver
from mg3d_jax.scaling.fit.laws import PARAMETERS, Law, huber, log_residuals
from mg3d_jax.scaling.fit.solver import Problem

MINIMUM_RUNS = len(PARAMETERS) + 3
MINIMUM_SIZES = 3  # distinct N, and distinct D: offset, scale and exponent of one axis need three points
STARTS = (12, 24)
"""From the grid of variable projection, and random ones."""
REDUCED_STARTS = (6, 6)
ZERO_SHARE = 1e-5
"""A term that is nowhere more than this share of the predicted loss is at its bound, zero."""
PLAUSIBLE_EXPONENT = (0.01, 3.0)
RESIDUAL_FLOOR = 1e-7
"""Residuals below this are rounding (of float32 tables), not evidence for a term."""
TERM_PARAMETERS = (("E",), ("A", "alpha"), ("B", "beta"))


@dataclass(frozen=True)
class Certificate:
    """Evidence that the optimum is the optimum."""

    starts: int
    starts_within_0_1_percent: int
    gradient_norm: float  # of the objective / (delta * rows), per unit of log scale or exponent
    second_basin_gap: (
        float | None
    )  # relative excess of the best end point with other exponents (5 %); None: there is none
    condition_number: float  # of the Jacobian of log L with respect to the parameters, columns normalised
    bounds_hit: list[str]


@dataclass(frozen=True)
class Fit:
    """A fitted law, or why there is none (`law` is None)."""

    law: Law | None
    objective: float | None  # unscaled sum of Huber(1e-3) on log residuals over the rows
    certificate: Certificate | None
    not_identified: dict[str, str] = field(default_factory=dict)  # parameter -> reason
    warnings: list[str] = field(default_factory=list)
    refusal: str | None = None


def fit_law(n: np.ndarray, d: np.ndarray, loss: np.ndarray, *, weights: np.ndarray | None = None, seed: int = 0) -> Fit:
    """Fits `L = E + A / N^alpha + B / D^beta` to positive, finite rows [rows].

    `weights` multiplies each row's share of the sum (default 1); a common factor changes nothing but `objective`. Fewer
    distinct runs than parameters + 3, or fewer than three sizes on an axis, is a refusal and not an error.
    """
    n, d, loss = (np.asarray(v, np.float64) for v in (n, d, loss))
    if not all(np.all(np.isfinite(v)) and np.all(v > 0) for v in (n, d, loss)):
        raise ValueError("N, D and loss must be positive and finite")
    if refusal := why_refused(n, d, loss):
        return refuse(refusal)
    order = np.lexsort((loss, d, n))  # the answer does not depend on the order of the rows
    n, d, loss = n[order], d[order], loss[order]
    weights = np.ones_like(n) if weights is None else np.asarray(weights, np.float64)[order]
    relative = weights / weights.mean()
    problem = Problem.of(n, d, loss)

    theta, values = _solve(problem, relative, seed, STARTS)
    best = int(np.argmin(values))
    reduced = [_without_term(problem, relative, k) for k in range(3)]
    missing = _terms_at_zero(theta[best], problem)
    for k, (candidate, reduced_value) in enumerate(reduced):
        if reduced_value <= values[best] * (1 + 1e-9):
            missing = missing | _terms_at_zero(candidate, problem) | {k}
            theta[best], values[best] = candidate, reduced_value
    law = problem.law(_drop(theta[best], missing))
    not_identified = _judge_terms(problem, relative, theta[best], missing, reduced)
    certificate = _certify(problem, relative, theta, values, best, missing)
    if certificate.condition_number > 1e7:
        for name in set(PARAMETERS) - set(not_identified):
            not_identified[name] = "the runs do not separate it from the other parameters (singular Jacobian)"
    low, high = PLAUSIBLE_EXPONENT
    for name, scale in (("alpha", "A"), ("beta", "B")):
        exponent = getattr(law, name)
        if name not in not_identified and not low <= exponent <= high:
            reason = f"the exponent {name} = {exponent:.3g} left the range {low} .. {high}"
            not_identified |= {name: reason, scale: reason}
    total = float(np.sum(weights * huber(log_residuals(law, n, d, loss))))
    return Fit(law, total, certificate, not_identified, _warnings(n, d, loss, not_identified, certificate))


def refuse(reason: str) -> Fit:
    """A fit without a law, and why."""
    return Fit(None, None, None, dict.fromkeys(PARAMETERS, reason), [f"no law fitted: {reason}"], reason)


def why_refused(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> str | None:
    """Why these runs cannot determine five parameters at all, or None."""
    distinct = len(np.unique(np.stack([n, d, loss], axis=1), axis=0))
    if distinct < MINIMUM_RUNS:
        return (
            f"{distinct} distinct usable runs; {len(PARAMETERS)} parameters need at least {MINIMUM_RUNS} "
            "(parameters + 3): not identified"
        )
    for name, sizes in (("N", n), ("D", d)):
        if (count := len(np.unique(sizes))) < MINIMUM_SIZES:
            return f"{count} distinct {name}; offset, scale and exponent need at least {MINIMUM_SIZES}: not identified"
    return None


def _solve(
    problem: Problem, weights: np.ndarray, seed: int, starts: tuple[int, int], allowed: tuple[int, ...] = (0, 1, 2)
) -> tuple[np.ndarray, np.ndarray]:
    """All polished starts: `theta` [starts, 5] and their scaled objectives [starts]."""
    from_grid, random = starts
    grid = solver.variable_projection(weights[None], problem, keep=solver.GRID_POINTS**2, allowed=allowed)[0]
    start = np.concatenate([_spread_out(grid, from_grid), _random_starts(random, seed, allowed)])
    return solver.polish(start, np.broadcast_to(weights, (len(start), len(weights))), problem)


def _spread_out(ranked: np.ndarray, count: int) -> np.ndarray:
    """The best grid points, no two of them neighbours in both exponents."""
    step = np.log(solver.EXPONENT_RANGE[1] / solver.EXPONENT_RANGE[0]) / (solver.GRID_POINTS - 1)
    kept: list[np.ndarray] = []
    for theta in ranked:
        exponents = np.log(theta[[2, 4]])
        if all(np.abs(exponents - np.log(other[[2, 4]])).max() > 1.5 * step for other in kept):
            kept.append(theta)
        if len(kept) == count:
            break
    return np.stack(kept)


def _random_starts(count: int, seed: int, allowed: tuple[int, ...]) -> np.ndarray:
    """Log-uniform exponents and random shares of the three terms at the centre of the data (loss 1 in scaled units)."""
    rng = np.random.default_rng([seed, 1])
    low, high = np.log(solver.EXPONENT_RANGE)
    exponents = np.exp(rng.uniform(low, high, (count, 2)))
    shares = np.log(rng.dirichlet((1.0, 1.0, 1.0), count) + 1e-3)
    shares[:, [k for k in range(3) if k not in allowed]] = -np.inf
    return np.stack([shares[:, 0], shares[:, 1], exponents[:, 0], shares[:, 2], exponents[:, 1]], axis=1)


def _without_term(problem: Problem, weights: np.ndarray, removed: int) -> tuple[np.ndarray, float]:
    """The best law without one of the terms: its theta [5] and scaled objective."""
    theta, values = _solve(problem, weights, 0, REDUCED_STARTS, tuple(k for k in range(3) if k != removed))
    best = int(np.argmin(values))
    return theta[best], float(values[best])


def _terms_at_zero(theta: np.ndarray, problem: Problem) -> set[int]:
    _, shares = solver.log_law(theta[None], problem)
    return {k for k in range(3) if shares[0, k].max() < ZERO_SHARE}


def _drop(theta: np.ndarray, missing: set[int]) -> np.ndarray:
    theta = theta.copy()
    theta[[solver.LOG_SCALES[k] for k in missing]] = -np.inf
    return theta


def _judge_terms(problem: Problem, weights: np.ndarray, theta: np.ndarray, missing: set[int], reduced: list) -> dict:
    """Parameters that the runs do not ask for: the term is at zero, or leaving it out costs less than BIC's penalty.

    The likelihood is Laplace, which is what Huber with a small delta amounts to. Under Gaussian errors its ratio is
    pi / 2 times as large as under Laplace errors when the term is absent, so the penalty is raised by that factor.
    """

    def scale(candidate: np.ndarray) -> float:
        f, _ = solver.log_law(candidate[None], problem)
        return max(float(np.average(np.abs(problem.z - f[0]), weights=weights)), RESIDUAL_FLOOR)

    rows = len(problem.x)
    verdict: dict[str, str] = {}
    for k, (candidate, _) in enumerate(reduced):
        evidence = 2 * rows * np.log(scale(candidate) / scale(theta))
        penalty = len(TERM_PARAMETERS[k]) * np.log(rows) * np.pi / 2
        if k in missing:
            reason = "its term is zero at the optimum"
        elif evidence < penalty:
            reason = f"the law without its term fits as well (evidence {evidence:.2g} < {penalty:.2g})"
        else:
            continue
        verdict |= dict.fromkeys(TERM_PARAMETERS[k], reason)
    return verdict


def _certify(
    problem: Problem, weights: np.ndarray, theta: np.ndarray, values: np.ndarray, best: int, missing: set[int]
) -> Certificate:
    floor = 0.5 * RESIDUAL_FLOOR**2 / solver.HUBER_DELTA**2 * len(problem.x)  # "equal" when all is rounding
    excess = np.maximum((values - values[best]) / max(values[best], floor), 0.0)
    exponents = theta[:, [2, 4]]
    elsewhere = np.abs(np.log(exponents / exponents[best])).max(axis=1) > 0.05
    other = excess[elsewhere]
    here = _drop(theta[best], missing)[None]
    gradient, _, _ = solver.derivatives(here, weights[None], problem, np.full(1, solver.HUBER_DELTA))
    free = [c for k in range(3) if k not in missing for c in ((0,), (1, 2), (3, 4))[k]]
    return Certificate(
        starts=len(values),
        starts_within_0_1_percent=int(np.sum(excess <= 1e-3)),
        gradient_norm=float(np.abs(gradient[0][free]).max() * solver.HUBER_DELTA / np.sum(weights)),
        second_basin_gap=float(other.min()) if len(other) else None,
        condition_number=_condition(here, problem, free),
        bounds_hit=[("E", "A", "B")[k] for k in sorted(missing)],
    )


def _condition(theta: np.ndarray, problem: Problem, free: list[int]) -> float:
    _, shares = solver.log_law(theta, problem)
    p0, p1, p2 = shares[0]
    jacobian = np.stack([p0, p1, -problem.x * p1, p2, -problem.y * p2], axis=1)[:, free]
    norms = np.linalg.norm(jacobian, axis=0)
    if norms.min() == 0:
        return float("inf")
    singular = np.linalg.svd(jacobian / norms, compute_uv=False)
    return float(singular[0] / max(singular[-1], 1e-300))


def _warnings(
    n: np.ndarray, d: np.ndarray, loss: np.ndarray, not_identified: dict[str, str], certificate: Certificate
) -> list[str]:
    found = [f"{name} is not identified: {not_identified[name]}" for name in PARAMETERS if name in not_identified]
    rows = np.stack([n, d, loss], axis=1)
    if repeats := len(rows) - len(np.unique(rows, axis=0)):
        found.append(
            f"{repeats} of {len(rows)} rows repeat another row exactly; they count in the fit, not as evidence"
        )
    for name, sizes in (("N", n), ("D", d)):
        if (decades := np.log10(sizes.max() / sizes.min())) < 1:
            found.append(f"{name} spans {decades:.2f} decades; exponents from less than one decade extrapolate badly")
    if certificate.gradient_norm > 1e-3:
        found.append(f"the optimum is not sharp: gradient {certificate.gradient_norm:.1e} of the objective's scale")
    if certificate.starts_within_0_1_percent < 2 and not certificate.bounds_hit:
        found.append(f"only 1 of {certificate.starts} starts reached the optimum; another start may be better")
    if certificate.second_basin_gap is not None and certificate.second_basin_gap < 1e-3:
        found.append(f"another law fits within {certificate.second_basin_gap:.1e} of this one")
    return found
