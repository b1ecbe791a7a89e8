"""Minimises the sum of Huber losses of residuals, for many starts or many tables at once.

A law in logs is `f = logsumexp_k(c_k + sum_p theta_p G_pk)` with features of the rows in `G` and log scales and exponents
in `theta`: `f` has exact, cheap first and second derivatives, so a damped Newton method converges where quasi-Newton
methods with default tolerances stop early (the raw objective is tiny, and its curvature lives only in the rows within
`delta` of the law). A term that is switched off has `-inf` as its log scale. Problems are independent rows of a batch.

A law with a chance level is `g(f, k)`, `laws.turned` of the same `f`: shares of the terms are then those in `g`, which sum to
`dg / df`, and first derivatives keep their form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mg3d_jax.scaling.fit.laws import FLOOR, HUBER_DELTA, SHARPNESS, Form, Law, gain, huber, turned

EXPONENT_BOUNDS = (1e-3, 10.0)
REPEATS_UNIT = 10.0
"""How often data may be repeated is in units of ten times in `theta`, so that bounds of exponents fit."""
EXACT = 1e-16
"""An objective below this is a fit without residuals (of about 1e-11): rounding is all that is left to descend."""
LEAST_WEIGHT = 1e-6
"""Rows whose loss is nearer to chance than that, in `dg / df`, or above it, say nothing of the law's terms."""
SHARED = ("touches", "products", "saturating")  # what problems of the same rows have in common


@dataclass(frozen=True)
class Problem:
    """Observations in scaled units: sizes and losses are divided by their geometric means, then logged."""

    form: Form
    design: np.ndarray  # G [parameters, terms, rows]
    constant: np.ndarray  # c [terms, rows]
    z: np.ndarray  # log loss, centred: [rows], or [batch, rows] where every problem has losses of its own
    shift: np.ndarray  # [parameters, terms]: what was taken off each feature
    centre: float  # mean log loss
    raw: bool = False  # residuals of the loss itself, in units of its geometric mean, instead of its logarithm
    repeats: np.ndarray | None = None  # [rows], of laws of which a term is saturating

    @classmethod
    def of(cls, form: Form, columns: Mapping[str, np.ndarray], loss: np.ndarray, *, raw: bool = False) -> Problem:
        features = form.features(columns)
        z = np.log(np.asarray(loss, np.float64))
        parameters = form.parameters
        design = np.zeros((len(parameters), len(form.terms), len(z)))
        constant, shift = np.zeros((len(form.terms), len(z))), np.zeros((len(parameters), len(form.terms)))
        for k, term in enumerate(form.terms):
            design[k, k] = 1.0
            absent = np.zeros(len(z), bool)
            for exponent, feature, sign in term.powers:
                p, x = parameters.index(exponent), features[feature]
                absent |= ~np.isfinite(x)
                shift[p, k] = sign * x[np.isfinite(x)].mean() if np.isfinite(x).any() else 0.0
                design[p, k] = np.where(np.isfinite(x), sign * x - shift[p, k], 0.0)
            for factor in term.factors:
                x = features[factor]
                absent |= ~np.isfinite(x)
                middle = x[np.isfinite(x)].mean() if np.isfinite(x).any() else 0.0
                constant[k] += np.where(np.isfinite(x), x - middle, 0.0)
                shift[k, k] += middle  # of the scale: its coefficient is 1
            constant[k][absent] = -np.inf
        repeats = np.exp(features["repeats"]) if any(term.saturating for term in form.terms) else None
        return cls(form, design, constant, z - z.mean(), shift, float(z.mean()), raw, repeats)

    @property
    def rows(self) -> int:
        return self.design.shape[2]

    @property
    def scales(self) -> int:
        """Number of terms: the first columns of `theta` are their log scales."""
        return len(self.form.terms)

    @property
    def log_chance(self) -> float:
        """In the units of `z`."""
        return float(np.log(self.form.chance)) - self.centre

    @cached_property
    def sharpness(self) -> int | None:
        """The parameter that says how sharply the law turns to chance; None without a chance level."""
        return self.form.parameters.index(SHARPNESS) if self.form.chance else None

    def without_chance(self, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
        """What the terms alone must sum to for the observed losses, as `z`, and the weight of each row: both like `z`."""
        over = np.minimum(sharpness * (self.z - self.log_chance), np.log1p(-LEAST_WEIGHT))
        weight = -np.expm1(over)
        return self.log_chance + (over - np.log(weight)) / sharpness, weight

    @cached_property
    def touches(self) -> list[list[int]]:
        """For every term, the parameters that it depends on."""
        parameters, terms = self.form.parameters, self.form.terms
        return [[k, *(parameters.index(name) for name, _, _ in term.powers)] for k, term in enumerate(terms)]

    @cached_property
    def saturating(self) -> dict[int, tuple[int, int, int]]:
        """For terms that saturate: the parameters of their power and of their repeats, and the power's sign."""
        parameters, terms = self.form.parameters, self.form.terms
        return {
            k: (parameters.index(term.powers[0][0]), parameters.index(term.saturating), term.powers[0][2])
            for k, term in enumerate(terms)
            if term.saturating
        }

    def growth(self, theta: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logarithm of what repeats multiply unique data by, and its derivatives by that parameter: [batch, rows] each."""
        assert self.repeats is not None
        most = REPEATS_UNIT * theta[:, repeats, None]
        ratio = self.repeats / most
        left = np.exp(-ratio)
        total = 1 + gain(self.repeats, most)
        first = REPEATS_UNIT * (-np.expm1(-ratio) - ratio * left) / total
        second = -(REPEATS_UNIT**2) * ratio**2 * left / most / total - first**2
        return np.log(total), first, second

    @cached_property
    def products(self) -> list[np.ndarray]:
        """For every term, `G_p G_q` of the parameters that it depends on: [rows, p * q]."""
        found = []
        for k, touched in enumerate(self.touches):
            part = self.design[touched, k]
            found.append(np.einsum("pr,qr->rpq", part, part).reshape(self.rows, -1))
        return found

    def take(self, index: np.ndarray) -> Problem:
        """The problems of these rows of the batch."""
        if self.z.ndim == 1:
            return self
        chosen = replace(self, z=self.z[index])
        vars(chosen).update({key: vars(self)[key] for key in SHARED if key in vars(self)})
        return chosen

    def residual(self, f: np.ndarray) -> np.ndarray:
        return np.exp(self.z) - np.exp(f) if self.raw else self.z - f

    def law(self, theta: np.ndarray) -> Law:
        """`theta` [parameters] back in the units of the table."""
        return Law(self.form, tuple(map(float, self.values(theta[None])[0])))

    def values(self, theta: np.ndarray) -> np.ndarray:
        """`theta` [batch, parameters] as parameters in the units of the table; a term at zero has the scale 0."""
        values = theta.copy()
        for k, touched in enumerate(self.touches):
            log_scale = theta[:, k] + self.centre - self.shift[k, k]
            for p in touched[1:]:
                log_scale = log_scale - theta[:, p] * self.shift[p, k]
            values[:, k] = np.exp(log_scale)
        for _, repeats, _ in self.saturating.values():
            values[:, repeats] *= REPEATS_UNIT
        return values

    def theta(self, law: Law) -> np.ndarray:
        """The inverse of `law`; the log scale of a term at zero is `-inf`."""
        theta = np.asarray(law.values, np.float64).copy()
        for k, touched in enumerate(self.touches):
            scale = theta[k]
            log_scale = np.log(scale) if scale > 0 else -np.inf
            log_scale += -self.centre + self.shift[k, k] + sum(law.values[p] * self.shift[p, k] for p in touched[1:])
            theta[k] = log_scale
        for _, repeats, _ in self.saturating.values():
            theta[repeats] /= REPEATS_UNIT
        return theta

    def start(self, law: Law) -> np.ndarray:
        """`theta` to go on from: a term at zero gets a thousandth of the loss, so that it may come back."""
        theta = self.theta(law)
        return np.where(np.isneginf(theta), np.log(1e-3), theta)

    def residuals(self, law: Law) -> np.ndarray:
        """Of the logarithm of the loss [rows], whatever was fitted."""
        return self.z - log_law(self.theta(law)[None], self)[0][0]

    def tangent(self, law: Law) -> np.ndarray:
        """Jacobian of the log prediction [rows, parameters], the direction of the floor included where that is at zero."""
        f, shares = log_law(self.theta(law)[None], self)
        found = jacobian(self.theta(law)[None], shares, self)[0].T
        if FLOOR in law.form.scales:
            bent = 1.0 if self.sharpness is None else shares[0].sum(axis=0) ** (1 + 1 / law[SHARPNESS])
            found[:, law.form.scales.index(FLOOR)] = bent * np.exp(-f[0])
        return found


def log_terms(theta: np.ndarray, problem: Problem) -> np.ndarray:
    """Logarithms of the terms [batch, terms, rows]."""
    u = np.empty((len(theta), problem.scales, problem.rows))
    for k, touched in enumerate(problem.touches):
        u[:, k] = theta[:, k, None] + problem.constant[k]
        for p in touched[1:]:
            u[:, k] += theta[:, p, None] * problem.design[p, k]
    for k, (power, repeats, sign) in problem.saturating.items():
        u[:, k] += sign * theta[:, power, None] * problem.growth(theta, repeats)[0]
    return u


def log_law(theta: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`f` [batch, rows] and each term's share of the predicted loss [batch, terms, rows].

    With a chance level: `g`, and shares that leave out chance's own.
    """
    f, shares = _log_sum(theta, problem)
    if problem.sharpness is None:
        return f, shares
    g, weight = turned(f, problem.log_chance, theta[:, problem.sharpness, None])
    return g, shares * weight[:, None]


def _log_sum(theta: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`f` and the terms' shares in it, whatever chance is."""
    u = log_terms(theta, problem)
    top = u.max(axis=1, keepdims=True)
    shares = np.exp(u - top)
    total = shares.sum(axis=1, keepdims=True)
    return (np.log(total) + top)[:, 0], shares / total


def jacobian(theta: np.ndarray, shares: np.ndarray, problem: Problem) -> np.ndarray:
    """Derivatives of `f` [batch, parameters, rows]."""
    found = np.zeros((len(shares), len(problem.form.parameters), problem.rows))
    for k, touched in enumerate(problem.touches):
        found[:, k] = shares[:, k]
        for p in touched[1:]:
            found[:, p] += shares[:, k] * problem.design[p, k]
    for k, (power, repeats, sign) in problem.saturating.items():
        growth, first, _ = problem.growth(theta, repeats)
        found[:, power] += sign * shares[:, k] * growth
        found[:, repeats] += sign * shares[:, k] * theta[:, power, None] * first
    if problem.sharpness is not None:
        found[:, problem.sharpness] = _by_sharpness(theta, problem)[0]
    return found


def _by_sharpness(theta: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`dg / dk`, `d2g / dk2`, and what `dg / dtheta` is multiplied by in `d2g / (dk dtheta)`: [batch, rows] each."""
    assert problem.sharpness is not None
    k = theta[:, problem.sharpness, None]
    f, _ = _log_sum(theta, problem)
    g, weight = turned(f, problem.log_chance, k)
    above = f - problem.log_chance
    first = (weight * above + problem.log_chance - g) / k
    return first, -(above**2) * weight * (1 - weight) / k - 2 * first / k, -above * (1 - weight)


def _curvature(theta: np.ndarray, pulled: np.ndarray, problem: Problem, k: int) -> tuple[list[int], np.ndarray]:
    """Second derivatives of a term, summed over rows with the weights `pulled` [batch, rows]: of which parameters, and
    [batch, them, them]."""
    touched = problem.touches[k]
    if k not in problem.saturating:
        return touched, (pulled @ problem.products[k]).reshape(-1, len(touched), len(touched))
    power, repeats, sign = problem.saturating[k]
    growth, first, second = problem.growth(theta, repeats)
    slope = theta[:, power, None]
    of_log = np.stack([np.ones_like(growth), problem.design[power, k] + sign * growth, sign * slope * first], axis=1)
    found = (of_log * pulled[:, None]) @ of_log.transpose(0, 2, 1)
    mixed = np.sum(pulled * sign * first, axis=1)
    found[:, 1, 2] += mixed
    found[:, 2, 1] += mixed
    found[:, 2, 2] += np.sum(pulled * sign * slope * second, axis=1)
    return [k, power, repeats], found


def value(theta: np.ndarray, weights: np.ndarray, problem: Problem, delta: np.ndarray | float) -> np.ndarray:
    """Weighted objective in units of `HUBER_DELTA`^2, so of order one per row: [batch]."""
    f, _ = log_law(theta, problem)
    delta = np.broadcast_to(np.asarray(delta, np.float64).reshape(-1, 1), (len(theta), 1))
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.sum(weights * huber(problem.residual(f), delta), axis=1) / HUBER_DELTA**2
    return np.where(np.isfinite(found), found, np.inf)


def derivatives(
    theta: np.ndarray, weights: np.ndarray, problem: Problem, delta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient [batch, p], Hessian and curvature of the reweighted least-squares bound, both [batch, p, p].

    The bound replaces Huber's curvature by `psi(r) / r`; it is positive semi-definite everywhere and guides far from
    the optimum, where no row lies within `delta` and the Hessian says nothing.
    """
    f, shares = log_law(theta, problem)
    residual = problem.residual(f)
    delta = delta[:, None]
    slope = np.exp(f) if problem.raw else 1.0  # of the prediction with respect to `f`
    pull = weights * np.clip(residual, -delta, delta) * slope
    inside = weights * (np.abs(residual) <= delta) * slope**2
    first = jacobian(theta, shares, problem)
    gradient = -np.einsum("bkr,br->bk", first, pull)
    if problem.sharpness is None:
        hessian = _outer(first, inside if problem.raw else inside + pull)
    else:
        hessian = _with_sharpness(theta, first, shares, inside - pull if problem.raw else inside, pull, problem)
    for k in range(problem.scales):
        touched, second = _curvature(theta, pull * shares[:, k], problem, k)
        hessian[:, np.asarray(touched)[:, None], touched] -= second
    bound = _outer(first, weights * slope**2 * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)))
    return gradient / HUBER_DELTA**2, hessian / HUBER_DELTA**2, bound / HUBER_DELTA**2


def _with_sharpness(
    theta: np.ndarray, first: np.ndarray, shares: np.ndarray, outer: np.ndarray, pull: np.ndarray, problem: Problem
) -> np.ndarray:
    """Hessian of a law with a chance level, but for the second derivatives of its terms.

    With `w = dg / df` these are `d2g = w d2f - k w (1 - w) df df'`, so `dg dg' (1 + k (1 - w)) / w` beside those of the terms.
    """
    assert problem.sharpness is not None
    index = problem.sharpness
    weight = np.maximum(shares.sum(axis=1), 1e-300)
    _, second, mixed = _by_sharpness(theta, problem)
    terms = first.copy()
    terms[:, index] = 0.0
    hessian = _outer(first, outer) + _outer(terms, pull * (1 + theta[:, index, None] * (1 - weight)) / weight)
    crossed = np.einsum("bkr,br->bk", terms, pull * mixed)
    hessian[:, index] -= crossed
    hessian[:, :, index] -= crossed
    hessian[:, index, index] -= np.sum(pull * second, axis=1)
    return hessian


def _outer(first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (first * weights[:, None]) @ first.transpose(0, 2, 1)


def damped_newton(
    theta: np.ndarray, weights: np.ndarray, problem: Problem, delta: np.ndarray, *, bound_steps: int, newton_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises each row from its start; returns `(theta, value)`. Steps that do not descend are shortened.

    The first `bound_steps` iterations use the reweighted least-squares curvature, the later ones the Hessian with the
    absolute values of its eigenvalues (a descent direction at saddles too).
    """
    theta, damping = theta.copy(), np.full(len(theta), 1e-3)
    current = value(theta, weights, problem, delta)
    active = np.arange(len(theta))
    for iteration in range(bound_steps + newton_steps):
        if not len(active):
            break
        here, w, dl, part = theta[active], weights[active], delta[active], problem.take(active)
        gradient, hessian, bound = derivatives(here, w, part, dl)
        eigenvalues, vectors = np.linalg.eigh(bound if iteration < bound_steps else hessian)
        stretch = np.abs(eigenvalues)
        scale = np.maximum(stretch.max(axis=1, keepdims=True), 1e-300)
        projected = np.einsum("bkj,bk->bj", vectors, gradient)
        with np.errstate(over="ignore", invalid="ignore"):  # where the objective is flat: the step is then no descent
            step = -projected / (stretch + (damping[active][:, None] + 1e-14) * scale)
            step = np.einsum("bkj,bj->bk", vectors, step)
            step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        trial = here + step
        trial[:, problem.scales :] = np.clip(trial[:, problem.scales :], *EXPONENT_BOUNDS)
        new = value(trial, w, part, dl)
        better = new < current[active]
        gain = current[active] - new
        rows = active[better]
        theta[rows], current[rows] = trial[better], new[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 8, 1e-15), damping[active] * 5)
        done = (better & (gain <= 1e-15 * new) & (iteration >= bound_steps)) | (damping[active] > 1e8) | (new < EXACT)
        if iteration < bound_steps:
            stuck = damping[active] > 1e8
            damping[active[stuck]] = 1e-3  # the bound can descend no further: the Hessian may
            done = new < EXACT
        active = active[~done]
    return theta, current


def polish(theta: np.ndarray, weights: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """From a wide Huber loss down to `HUBER_DELTA`, then Newton to convergence: `(theta, value)` of every start."""
    f, _ = log_law(theta, problem)
    spread = np.median(np.abs(problem.residual(f)), axis=1)
    for factor in (3.0, 0.5):
        wide = np.maximum(factor * spread, HUBER_DELTA)
        theta, _ = damped_newton(theta, weights, problem, wide, bound_steps=6, newton_steps=6)
    sharp = np.full(len(theta), HUBER_DELTA)
    return damped_newton(theta, weights, problem, sharp, bound_steps=10, newton_steps=150)
