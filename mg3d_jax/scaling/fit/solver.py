"""Minimises the sum of Huber losses on log residuals, for many starts or many resamplings at once.

The law in logs is `f = logsumexp(e, a - alpha x, b - beta y)` with `x = log N`, `y = log D`, both centred: `f` has
exact, cheap first and second derivatives, so a damped Newton method converges where quasi-Newton methods with default
tolerances stop early (the raw objective is tiny, and its curvature lives only in the rows within `delta` of the law).
`theta` rows are `(e, a, alpha, b, beta)`; a term that is switched off has `-inf` as its log scale. Problems are
independent rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.scaling.fit.laws import HUBER_DELTA, Law, huber

EXPONENT_RANGE = (0.05, 1.2)
"""The grid of variable projection; the polish may leave it."""
GRID_POINTS = 24
LOG_SCALES = (0, 1, 3)  # columns of theta that hold e, a, b
TERM_SUBSETS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))


@dataclass(frozen=True)
class Problem:
    """Observations in scaled units: sizes and losses are divided by their geometric means, then logged."""

    x: np.ndarray  # log N, centred [rows]
    y: np.ndarray  # log D, centred [rows]
    z: np.ndarray  # log loss, centred [rows]
    centre: tuple[float, float, float]

    @classmethod
    def of(cls, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Problem:
        x, y, z = (np.log(np.asarray(v, np.float64)) for v in (n, d, loss))
        x0, y0, z0 = float(x.mean()), float(y.mean()), float(z.mean())
        return cls(x - x0, y - y0, z - z0, (x0, y0, z0))

    def law(self, theta: np.ndarray) -> Law:
        """`theta` [5] back in the units of the table."""
        e, a, alpha, b, beta = map(float, theta)
        x0, y0, z0 = self.centre
        scale_e, scale_a, scale_b = (float(np.exp(v)) for v in (e + z0, a + z0 + alpha * x0, b + z0 + beta * y0))
        return Law(scale_e, scale_a, scale_b, alpha=alpha, beta=beta)


def terms(theta: np.ndarray, problem: Problem) -> np.ndarray:
    """Log of the three terms: [batch, 3, rows]."""
    e, a, alpha, b, beta = (column[:, None] for column in theta.T)
    constant = np.broadcast_to(e, (len(theta), len(problem.x)))
    return np.stack([constant, a - alpha * problem.x, b - beta * problem.y], axis=1)


def log_law(theta: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`f` [batch, rows] and each term's share of the predicted loss [batch, 3, rows]."""
    u = terms(theta, problem)
    top = u.max(axis=1, keepdims=True)
    shares = np.exp(u - top)
    total = shares.sum(axis=1, keepdims=True)
    return (np.log(total) + top)[:, 0], shares / total


def value(theta: np.ndarray, weights: np.ndarray, problem: Problem, delta: np.ndarray | float) -> np.ndarray:
    """Weighted objective in units of `HUBER_DELTA`^2, so of order one per row: [batch]."""
    f, _ = log_law(theta, problem)
    delta = np.broadcast_to(np.asarray(delta, np.float64).reshape(-1, 1), (len(theta), 1))
    return np.sum(weights * huber(problem.z - f, delta), axis=1) / HUBER_DELTA**2


def derivatives(
    theta: np.ndarray, weights: np.ndarray, problem: Problem, delta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient [batch, 5], Hessian and curvature of the reweighted least-squares bound, both [batch, 5, 5].

    The bound replaces Huber's curvature by `psi(r) / r`; it is positive semi-definite everywhere and guides far from
    the optimum, where no row lies within `delta` and the Hessian says nothing.
    """
    x, y = problem.x, problem.y
    f, (p0, p1, p2) = (lambda out: (out[0], out[1].transpose(1, 0, 2)))(log_law(theta, problem))
    residual = problem.z - f
    delta = delta[:, None]
    psi = np.clip(residual, -delta, delta)
    inside = np.abs(residual) <= delta
    jacobian = np.stack([p0, p1, -x * p1, p2, -y * p2], axis=1)  # [batch, 5, rows]
    pull = weights * psi
    gradient = -np.einsum("bkr,br->bk", jacobian, pull)
    hessian = _outer(jacobian, weights * inside + pull)
    hessian[:, 0, 0] -= np.sum(pull * p0, axis=1)
    for start, share, size in ((1, p1, x), (3, p2, y)):
        moment = pull * share
        first = np.sum(moment * size, axis=1)
        hessian[:, start, start] -= np.sum(moment, axis=1)
        hessian[:, start, start + 1] += first
        hessian[:, start + 1, start] += first
        hessian[:, start + 1, start + 1] -= np.sum(moment * size**2, axis=1)
    bound = _outer(jacobian, weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)))
    return gradient / HUBER_DELTA**2, hessian / HUBER_DELTA**2, bound / HUBER_DELTA**2


def _outer(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (jacobian * weights[:, None]) @ jacobian.transpose(0, 2, 1)


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
        here, w, dl = theta[active], weights[active], delta[active]
        gradient, hessian, bound = derivatives(here, w, problem, dl)
        eigenvalues, vectors = np.linalg.eigh(bound if iteration < bound_steps else hessian)
        stretch = np.abs(eigenvalues)
        scale = np.maximum(stretch.max(axis=1, keepdims=True), 1e-300)
        projected = np.einsum("bkj,bk->bj", vectors, gradient)
        step = -projected / (stretch + (damping[active][:, None] + 1e-14) * scale)
        step = np.einsum("bkj,bj->bk", vectors, step)
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        trial = here + step
        trial[:, 2] = np.clip(trial[:, 2], 1e-3, 10.0)
        trial[:, 4] = np.clip(trial[:, 4], 1e-3, 10.0)
        new = value(trial, w, problem, dl)
        better = new < current[active]
        gain = current[active] - new
        rows = active[better]
        theta[rows], current[rows] = trial[better], new[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 8, 1e-15), damping[active] * 5)
        done = (better & (gain <= 1e-15 * new) & (iteration >= bound_steps)) | (damping[active] > 1e8)
        if iteration < bound_steps:
            stuck = damping[active] > 1e8
            damping[active[stuck]] = 1e-3  # the bound can descend no further: the Hessian may
            done[:] = False
        active = active[~done]
    return theta, current


def polish(theta: np.ndarray, weights: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """From a wide Huber loss down to `HUBER_DELTA`, then Newton to convergence: `(theta, value)` of every start."""
    f, _ = log_law(theta, problem)
    spread = np.median(np.abs(problem.z - f), axis=1)
    for factor in (3.0, 0.5):
        wide = np.maximum(factor * spread, HUBER_DELTA)
        theta, _ = damped_newton(theta, weights, problem, wide, bound_steps=6, newton_steps=6)
    sharp = np.full(len(theta), HUBER_DELTA)
    return damped_newton(theta, weights, problem, sharp, bound_steps=10, newton_steps=150)


def variable_projection(
    weights: np.ndarray,
    problem: Problem,
    *,
    points: int = GRID_POINTS,
    keep: int = 1,
    allowed: tuple[int, ...] = (0, 1, 2),
) -> np.ndarray:
    """The best `keep` grid points of (alpha, beta) with their best non-negative (E, A, B): [batch, keep, 5].

    For fixed exponents the law is linear; relative least squares (rows divided by the observed loss) has a closed form
    on each subset of active terms, so the non-negative optimum is found by trying the subsets. A term at zero starts at
    a thousandth of the loss, so that the polish may bring it back; terms not `allowed` are `-inf`.
    """
    grid = np.geomspace(*EXPONENT_RANGE, points)
    alpha, beta = (g.ravel() for g in np.meshgrid(grid, grid, indexing="ij"))
    constant = np.broadcast_to(np.exp(-problem.z), (len(alpha), len(problem.x)))
    basis = np.stack(
        [constant, np.exp(-alpha[:, None] * problem.x - problem.z), np.exp(-beta[:, None] * problem.y - problem.z)],
        axis=1,
    )  # [grid, 3, rows]
    gram = np.einsum("br,gkr,glr->bgkl", weights, basis, basis, optimize=True)
    target = np.einsum("br,gkr->bgk", weights, basis, optimize=True)
    best_cost = np.full(gram.shape[:2], np.inf)
    best = np.zeros(target.shape)
    for subset in TERM_SUBSETS:
        if not set(subset) <= set(allowed):
            continue
        index = np.asarray(subset)
        sub, rhs = gram[..., index[:, None], index], target[..., index]
        ridge = 1e-13 * np.trace(sub, axis1=-2, axis2=-1)[..., None, None] * np.eye(len(index))
        scales = np.linalg.solve(sub + ridge, rhs[..., None])[..., 0]
        cost = -np.einsum("bgk,bgk->bg", scales, rhs)  # plus a constant
        wins = (scales >= 0).all(axis=-1) & (cost < best_cost)
        best_cost = np.where(wins, cost, best_cost)
        full = np.zeros_like(best)
        full[..., index] = scales
        best = np.where(wins[..., None], full, best)
    order = np.argsort(best_cost, axis=1, kind="stable")[:, :keep]
    batch = np.arange(len(weights))[:, None]
    with np.errstate(divide="ignore"):
        logs = np.where(best[batch, order] > 0, np.log(best[batch, order]), np.log(1e-3))
    logs[..., [k for k in range(3) if k not in allowed]] = -np.inf
    return np.stack([logs[..., 0], logs[..., 1], alpha[order], logs[..., 2], beta[order]], axis=-1)
