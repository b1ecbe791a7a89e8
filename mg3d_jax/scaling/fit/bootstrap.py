"""Laws of resampled runs: whole clusters of runs are drawn again, not residuals.

Resampling residuals instead treats the noise as the same everywhere and gives intervals that are too narrow. It takes many
clusters; with few of them `random_effects.py` is used. The draws depend on the seed only, not on the order of the rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mg3d_jax.scaling.fit import projection, solver
from mg3d_jax.scaling.fit.laws import Law
from mg3d_jax.scaling.fit.solver import Problem

CHUNK_ELEMENTS = 200_000  # rows x draws refitted at once: bounds memory, and stays in cache
GRID_POINTS = {1: 12, 2: 12, 3: 6, 4: 5}  # per exponent, by the number of exponents


def draw_laws(problem: Problem, law: Law, clusters: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Parameters [draws, parameters] of laws fitted to resampled clusters of rows; `clusters` are their numbers [rows].

    Every refit starts from the point estimate and from the best grid point of its own resampling, and keeps the better
    optimum.
    """
    names, member = np.unique(clusters, return_inverse=True)
    start = problem.start(law)
    counts = np.random.default_rng([seed, 2]).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights = counts[:, member.reshape(-1)].astype(np.float64)
    chunk = max(1, CHUNK_ELEMENTS // problem.rows)
    fitted = [_refit(problem, weights[i : i + chunk], start) for i in range(0, draws, chunk)]
    return np.concatenate(fitted) if fitted else np.zeros((0, len(start)))


def _refit(problem: Problem, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    projected = projection.variable_projection(weights, problem, points=GRID_POINTS[len(problem.form.exponents)])[:, 0]
    starts = np.concatenate([np.broadcast_to(start, projected.shape), projected])
    theta, values = solver.polish(starts, np.concatenate([weights, weights]), problem)
    half = len(weights)
    best = np.where((values[:half] <= values[half:])[:, None], theta[:half], theta[half:])
    return problem.values(zeroed(best, problem))


def zeroed(theta: np.ndarray, problem: Problem) -> np.ndarray:
    """`theta` [batch, parameters] with terms that are nowhere a share of the loss set to zero."""
    _, shares = solver.log_law(theta, problem)
    theta = theta.copy()
    scales = theta[:, : problem.scales]
    scales[shares.max(axis=2) < 1e-5] = -np.inf
    return theta


def with_losses(problem: Problem, z: np.ndarray) -> Problem:
    """The same rows with other centred log losses `z` [batch, rows]."""
    chosen = replace(problem, z=z)
    vars(chosen).update({key: vars(problem)[key] for key in solver.SHARED if key in vars(problem)})
    return chosen
