"""Fits a law to runs, certifies the optimum, and says which parameters the runs do not determine.

Method: a grid over the exponents with the non-negative scales solved for each (variable projection), some dozens of random
starts besides, every start polished by damped Newton on the sum of Huber(1e-3) on log residuals, float64 throughout. The
certificate reports how many starts agree, how steep the objective still is, and how much worse the next basin is. The laws
without one of the terms are fitted too: a term that the runs do not ask for is "not identified", and the law without it is
reported beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mg3d_jax.scaling.fit import projection, solver
from mg3d_jax.scaling.fit.laws import FLOOR, ND, SHARPNESS, Form, Law, huber
from mg3d_jax.scaling.fit.solver import Problem

SPARE_RUNS = 3  # more than parameters
MINIMUM_SIZES = 3  # distinct values of a variable: offset, scale and exponent of one axis need three points
STARTS = (12, 24)
"""From the grid of variable projection, and random ones."""
REDUCED_STARTS = (6, 6)
ZERO_SHARE = 1e-5
"""A term that is nowhere more than this share of the predicted loss is at its bound, zero."""
PLAUSIBLE_EXPONENT = (0.01, 3.0)
RESIDUAL_FLOOR = 1e-7
"""Residuals below this are rounding (of float32 tables), not evidence for a term."""
LEAST_PASSES, MOST_PASSES = 0.02, 95.0
"""Of the repeats that `nus-effective` saturates at, within the bounds of the solver."""
LEAST_SHARPNESS, MOST_SHARPNESS = 0.1, 9.9
"""Of the turn to chance, within the bounds of the solver."""
MOST_CONDITION = 1e7
EXACT_FIT = 1e-9
"""In units of the solver's objective: starts that end below it have found a law without residuals."""
LEAST_REPEATS = 1.0
"""Repeats (S / U - 1) that some run must pass before a penalty on them is fitted."""


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

    form: Form
    law: Law | None
    objective: float | None  # unscaled sum of Huber(1e-3) of the residuals over the rows
    certificate: Certificate | None
    not_identified: dict[str, str] = field(default_factory=dict)  # parameter -> reason
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of the design, not of what was measured
    refusal: str | None = None


def fit_law(n: np.ndarray, d: np.ndarray, loss: np.ndarray, *, weights: np.ndarray | None = None, seed: int = 0) -> Fit:
    """`fit_form` of `L = E + A / N^alpha + B / D^beta`."""
    return fit_form(ND, {"N": n, "D": d}, loss, weights=weights, seed=seed)


def fit_form(
    form: Form,
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    seed: int = 0,
    raw: bool = False,
) -> Fit:
    """Fits `form` to positive, finite rows: `columns` of its variables and `loss`, each [rows].

    `weights` multiplies each row's share of the sum (default 1); a common factor changes nothing but `objective`. `raw`:
    residuals are of the loss, in units of its geometric mean, instead of its logarithm. Fewer distinct runs than
    parameters + 3, or fewer than three sizes on an axis, is a refusal and not an error.
    """
    columns = {name: np.asarray(columns[name], np.float64) for name in form.variables}
    loss = np.asarray(loss, np.float64)
    if not all(np.all(np.isfinite(v)) and np.all(v > 0) for v in (*columns.values(), loss)):
        raise ValueError(f"{', '.join(form.variables)} and loss must be positive and finite")
    if refusal := why_refused(form, columns, loss):
        return refuse(refusal, form)
    order = np.lexsort((loss, *reversed(columns.values())))  # the answer does not depend on the order of the rows
    columns, loss = {name: v[order] for name, v in columns.items()}, loss[order]
    weights = np.ones_like(loss) if weights is None else np.asarray(weights, np.float64)[order]
    relative = weights / weights.mean()
    problem = Problem.of(form, columns, loss, raw=raw)

    theta, values = _solve(problem, relative, seed, STARTS)
    best = int(np.argmin(values))
    several = len(form.terms) > 1
    reduced = [_without_term(problem, relative, k) for k in range(len(form.terms))] if several else []
    missing = _terms_at_zero(theta[best], problem)
    for k, (candidate, reduced_value) in enumerate(reduced):
        if reduced_value <= values[best] * (1 + 1e-9):
            missing = missing | _terms_at_zero(candidate, problem) | {k}
            theta[best], values[best] = candidate, reduced_value
    law = problem.law(_drop(theta[best], missing))
    not_identified = _judge_terms(problem, relative, theta[best], missing, reduced)
    certificate = _certify(problem, relative, theta, values, best, missing)
    if certificate.condition_number > MOST_CONDITION:
        for name in set(form.parameters) - set(not_identified):
            not_identified[name] = "the runs do not separate it from the other parameters (singular Jacobian)"
    not_identified |= _implausible(law, not_identified)
    residual = problem.residual(solver.log_law(_drop(theta[best], missing)[None], problem)[0][0])
    total = float(np.sum(weights * huber(residual)))
    return Fit(
        form, law, total, certificate, not_identified, *_remarks(form, columns, loss, not_identified, certificate)
    )


def refuse(reason: str, form: Form = ND) -> Fit:
    """A fit without a law, and why."""
    return Fit(
        form, None, None, None, dict.fromkeys(form.parameters, reason), [f"no law fitted: {reason}"], refusal=reason
    )


def why_refused(form: Form, columns: Mapping[str, np.ndarray], loss: np.ndarray) -> str | None:
    """Why these runs cannot determine the parameters at all, or None."""
    distinct = len(np.unique(np.stack([*columns.values(), loss], axis=1), axis=0))
    minimum = len(form.parameters) + SPARE_RUNS
    if distinct < minimum:
        return (
            f"{distinct} distinct usable runs; {len(form.parameters)} parameters need at least {minimum} "
            "(parameters + 3): not identified"
        )
    for name, sizes in columns.items():
        if name != "U" and (count := len(np.unique(sizes))) < MINIMUM_SIZES:
            return f"{count} distinct {name}; offset, scale and exponent need at least {MINIMUM_SIZES}: not identified"
    if form.chance and loss.min() >= form.chance:
        return f"no run is below chance, {form.chance:.4g}: the smallest loss is {loss.min():.4g}"
    if "U" in columns:
        if (columns["U"] > columns["S"] * (1 + 1e-6)).any():
            return "U, the unique data, is larger than S, the data seen, in some rows: are the two columns exchanged?"
        if (columns["S"] / columns["U"] - 1).max() <= LEAST_REPEATS:
            return "no run sees its data more than twice, so the cost of repeats is not identified; fit --form nd"
    return None


def reduced_fit(fit: Fit, columns: Mapping[str, np.ndarray], loss: np.ndarray, *, raw: bool = False) -> Fit | None:
    """The fit without the terms that the runs do not determine; None where all are, or none is."""
    gone = {scale for scale in fit.form.scales if scale in fit.not_identified}
    if fit.law is None or not gone or len(gone) == len(fit.form.scales):
        return None
    form = fit.form.without(gone)
    form_columns = {name: columns[name] for name in form.variables}
    return fit_form(form, form_columns, loss, raw=raw) if form.exponents or FLOOR not in form.scales else None


def _solve(
    problem: Problem, weights: np.ndarray, seed: int, starts: tuple[int, int], allowed: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All polished starts: `theta` [starts, parameters] and their scaled objectives [starts]."""
    from_grid, random = starts
    allowed = tuple(range(problem.scales)) if allowed is None else allowed
    everything = len(projection.exponent_grid(problem.form))
    grid = projection.variable_projection(weights[None], problem, keep=everything, allowed=allowed)[0]
    start = np.concatenate([_spread_out(grid, from_grid, problem), _random_starts(random, seed, allowed, problem)])
    return solver.polish(start, np.broadcast_to(weights, (len(start), len(weights))), problem)


def _spread_out(ranked: np.ndarray, count: int, problem: Problem) -> np.ndarray:
    """The best grid points, no two of them neighbours in all exponents."""
    low, high = projection.EXPONENT_RANGE
    step = np.log(high / low) / (projection.GRID_POINTS[len(problem.form.exponents)] - 1)
    kept: list[np.ndarray] = []
    for theta in ranked:
        exponents = np.log(theta[problem.scales :])
        if all(np.abs(exponents - np.log(other[problem.scales :])).max() > 1.5 * step for other in kept):
            kept.append(theta)
        if len(kept) == count:
            break
    return np.stack(kept)


def _random_starts(count: int, seed: int, allowed: tuple[int, ...], problem: Problem) -> np.ndarray:
    """Log-uniform exponents and random shares of the terms at the centre of the data (loss 1 in scaled units)."""
    rng = np.random.default_rng([seed, 1])
    low, high = np.log(projection.EXPONENT_RANGE)
    exponents = np.exp(rng.uniform(low, high, (count, len(problem.form.exponents))))
    if problem.sharpness is not None:
        low, high = np.log(projection.SHARPNESS_RANGE)
        exponents[:, problem.sharpness - problem.scales] = np.exp(rng.uniform(low, high, count))
    shares = np.log(rng.dirichlet(np.ones(problem.scales), count) + 1e-3)
    shares[:, [k for k in range(problem.scales) if k not in allowed]] = -np.inf
    return np.concatenate([shares, exponents], axis=1)


def _without_term(problem: Problem, weights: np.ndarray, removed: int) -> tuple[np.ndarray, float]:
    """The best law without one of the terms: its theta [parameters] and scaled objective."""
    allowed = tuple(k for k in range(problem.scales) if k != removed)
    theta, values = _solve(problem, weights, 0, REDUCED_STARTS, allowed)
    best = int(np.argmin(values))
    return theta[best], float(values[best])


def _terms_at_zero(theta: np.ndarray, problem: Problem) -> set[int]:
    _, shares = solver.log_law(theta[None], problem)
    return {k for k in range(problem.scales) if shares[0, k].max() < ZERO_SHARE}


def _drop(theta: np.ndarray, missing: set[int]) -> np.ndarray:
    theta = theta.copy()
    theta[list(missing)] = -np.inf
    return theta


def _judge_terms(problem: Problem, weights: np.ndarray, theta: np.ndarray, missing: set[int], reduced: list) -> dict:
    """Parameters that the runs do not ask for: the term is at zero, or leaving it out costs less than BIC's penalty.

    The likelihood is Laplace, which is what Huber with a small delta amounts to. Under Gaussian errors its ratio is
    pi / 2 times as large as under Laplace errors when the term is absent, so the penalty is raised by that factor.
    """

    def scale(candidate: np.ndarray) -> float:
        f, _ = solver.log_law(candidate[None], problem)
        return max(float(np.average(np.abs(problem.residual(f)[0]), weights=weights)), RESIDUAL_FLOOR)

    verdict: dict[str, str] = {}
    for k, (candidate, _) in enumerate(reduced):
        names = problem.form.own(problem.form.scales[k])
        evidence = 2 * problem.rows * np.log(scale(candidate) / scale(theta))
        penalty = len(names) * np.log(problem.rows) * np.pi / 2
        if k in missing:
            reason = "its term is zero at the optimum"
        elif evidence < penalty:
            reason = f"the law without its term fits as well (evidence {evidence:.2g} < {penalty:.2g})"
        else:
            continue
        verdict.update(dict.fromkeys(names, reason))
    return verdict


def _implausible(law: Law, known: Mapping[str, str]) -> dict[str, str]:
    """Terms whose exponent left the plausible range."""
    low, high = PLAUSIBLE_EXPONENT
    found: dict[str, str] = {}
    for term in law.form.terms:
        for name, _, _ in term.powers:
            if name not in known and not low <= law[name] <= high:
                reason = f"the exponent {name} = {law[name]:.3g} left the range {low} .. {high}"
                found |= {name: reason, term.scale: reason}
        if term.saturating and term.saturating not in known and not LEAST_PASSES <= law[term.saturating] <= MOST_PASSES:
            found[term.saturating] = f"{law[term.saturating]:.3g} repeats: the runs do not say where data wear out"
    if law.form.chance and not LEAST_SHARPNESS <= law[SHARPNESS] <= MOST_SHARPNESS:
        found[SHARPNESS] = f"{law[SHARPNESS]:.3g}: the runs do not say how the law turns to chance"
    return found


def _certify(
    problem: Problem, weights: np.ndarray, theta: np.ndarray, values: np.ndarray, best: int, missing: set[int]
) -> Certificate:
    excess = (values - values[best]) / max(values[best], EXACT_FIT)
    exponents = theta[:, problem.scales :]
    elsewhere = np.abs(np.log(exponents / exponents[best])).max(axis=1) > 0.05
    other = excess[elsewhere]
    here = _drop(theta[best], missing)[None]
    gradient, _, _ = solver.derivatives(here, weights[None], problem, np.full(1, solver.HUBER_DELTA))
    present = [k for k in range(problem.scales) if k not in missing]
    free = sorted({p for k in present for p in problem.touches[k]})
    free += [problem.saturating[k][1] for k in present if k in problem.saturating]
    free += [] if problem.sharpness is None else [problem.sharpness]
    return Certificate(
        starts=len(values),
        starts_within_0_1_percent=int(np.sum(excess <= 1e-3)),
        gradient_norm=float(np.abs(gradient[0][free]).max() * solver.HUBER_DELTA / np.sum(weights)),
        second_basin_gap=float(other.min()) if len(other) else None,
        condition_number=_condition(here, problem, free),
        bounds_hit=[problem.form.scales[k] for k in sorted(missing)],
    )


def _condition(theta: np.ndarray, problem: Problem, free: list[int]) -> float:
    _, shares = solver.log_law(theta, problem)
    first = solver.jacobian(theta, shares, problem)[0, free].T
    norms = np.linalg.norm(first, axis=0)
    if norms.min() == 0:
        return float("inf")
    singular = np.linalg.svd(first / norms, compute_uv=False)
    return float(singular[0] / max(singular[-1], 1e-300))


def _remarks(
    form: Form,
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    not_identified: Mapping[str, str],
    certificate: Certificate,
) -> tuple[list[str], list[str]]:
    """Warnings of this fit, and notes on its design."""
    warnings = [
        f"{name} is not identified: {not_identified[name]}" for name in form.parameters if name in not_identified
    ]
    notes = []
    rows = np.stack([*columns.values(), loss], axis=1)
    if repeats := len(rows) - len(np.unique(rows, axis=0)):
        warnings.append(
            f"{repeats} of {len(rows)} rows repeat another row exactly; they count in the fit, not as evidence"
        )
    for name, sizes in columns.items():
        if (decades := np.log10(sizes.max() / sizes.min())) < 1:
            notes.append(f"{name} spans {decades:.2f} decades; exponents from less than one decade extrapolate badly")
    if certificate.gradient_norm > 1e-3:
        warnings.append(f"the optimum is not sharp: gradient {certificate.gradient_norm:.1e} of the objective's scale")
    if certificate.starts_within_0_1_percent < 2 and not certificate.bounds_hit:
        warnings.append(f"only 1 of {certificate.starts} starts reached the optimum; another start may be better")
    if certificate.second_basin_gap is not None and certificate.second_basin_gap < 1e-3:
        warnings.append(f"another law fits within {certificate.second_basin_gap:.1e} of this one")
    return warnings, notes
