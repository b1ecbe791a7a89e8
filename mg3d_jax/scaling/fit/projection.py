"""Starts for the solver: the best points of a grid over the exponents, with the non-negative scales solved for each.

For fixed exponents a law is linear in its scales (variable projection), with a chance level once that is taken off the losses.
"""

from __future__ import annotations

import itertools

import numpy as np

from mg3d_jax.scaling.fit.laws import SHARPNESS, Form
from mg3d_jax.scaling.fit.solver import Problem, log_terms

EXPONENT_RANGE = (0.05, 1.2)
"""Of powers of sizes; the polish may leave it."""
PENALTY_RANGE = (0.2, 2.0)
REPEATS_RANGE = (0.05, 5.0)  # in units of `solver.REPEATS_UNIT`
SHARPNESS_RANGE = (0.7, 9.0)
GRID_POINTS = {1: 60, 2: 24, 3: 12, 4: 7}
"""Grid points per exponent, by the number of exponents."""


def exponent_grid(form: Form, points: int = 0) -> np.ndarray:
    """Exponents to try [grid, exponents]; `points` per exponent, by default as `GRID_POINTS` says."""
    ranges = {name: PENALTY_RANGE for term in form.terms for name, _, sign in term.powers if sign > 0}
    ranges |= {term.saturating: REPEATS_RANGE for term in form.terms if term.saturating}
    ranges |= {SHARPNESS: SHARPNESS_RANGE}
    points = points or GRID_POINTS[len(form.exponents)]
    axes = [np.geomspace(*ranges.get(name, EXPONENT_RANGE), points) for name in form.exponents]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def variable_projection(
    weights: np.ndarray, problem: Problem, *, points: int = 0, keep: int = 1, allowed: tuple[int, ...] | None = None
) -> np.ndarray:
    """The best `keep` grid points of the exponents with their best non-negative scales: [batch, keep, parameters].

    For fixed exponents the law is linear; relative least squares (rows divided by the observed loss) has a closed form
    on each subset of active terms, so the non-negative optimum is found by trying the subsets. A term at zero starts at
    a thousandth of the loss, so that the polish may bring it back; terms not `allowed` are `-inf`. Where every problem
    has losses of its own, rows are divided by their mean over the batch.
    """
    grid = exponent_grid(problem.form, points)
    allowed = tuple(range(problem.scales)) if allowed is None else allowed
    if problem.sharpness is None:
        costs, scales = _projected(grid, weights, problem.z, problem, allowed)
    else:  # for a fixed sharpness the law is linear once chance is taken off the observed losses
        of_grid = grid[:, problem.sharpness - problem.scales]
        costs, scales = np.empty((len(weights), len(grid))), np.empty((len(weights), len(grid), problem.scales))
        for sharpness in np.unique(of_grid):
            part, (z, weight) = of_grid == sharpness, problem.without_chance(sharpness)
            costs[:, part], scales[:, part] = _projected(grid[part], weights * weight**2, z, problem, allowed)
    order = np.argsort(costs, axis=1, kind="stable")[:, :keep]
    batch = np.arange(len(weights))[:, None]
    with np.errstate(divide="ignore"):
        found = np.where(scales[batch, order] > 0, np.log(scales[batch, order]), np.log(1e-3))
    found[..., [k for k in range(problem.scales) if k not in allowed]] = -np.inf
    return np.concatenate([found, grid[order]], axis=-1)


def _projected(
    grid: np.ndarray, weights: np.ndarray, z: np.ndarray, problem: Problem, allowed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Cost [batch, grid] and the best non-negative scales [batch, grid, terms] for every point of the grid."""
    reference = z if z.ndim == 1 else z.mean(axis=0)
    logs = log_terms(np.concatenate([np.zeros((len(grid), problem.scales)), grid], axis=1), problem)
    basis = np.exp(logs - reference)  # [grid, terms, rows]
    gram = np.einsum("br,gkr,glr->bgkl", weights, basis, basis, optimize=True)
    target = np.einsum("br,gkr->bgk", weights * np.exp(z - reference), basis, optimize=True)
    best_cost = np.full(gram.shape[:2], np.inf)
    best = np.zeros(target.shape)
    for subset in _subsets(allowed):
        index = np.asarray(subset)
        sub, rhs = gram[..., index[:, None], index], target[..., index]
        ridge = (1e-13 * np.trace(sub, axis1=-2, axis2=-1)[..., None, None] + 1e-300) * np.eye(len(index))
        scales = np.linalg.solve(sub + ridge, rhs[..., None])[..., 0]
        cost = -np.einsum("bgk,bgk->bg", scales, rhs)  # plus a constant
        wins = (scales >= 0).all(axis=-1) & (cost < best_cost)
        best_cost = np.where(wins, cost, best_cost)
        full = np.zeros_like(best)
        full[..., index] = scales
        best = np.where(wins[..., None], full, best)
    if problem.sharpness is not None:  # the constant that the cost leaves out differs between sharpnesses
        best_cost = best_cost + np.sum(weights * np.exp(2 * (z - reference)), axis=1)[:, None]
    return best_cost, best


def _subsets(terms: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [chosen for size in range(len(terms), 0, -1) for chosen in itertools.combinations(terms, size)]
