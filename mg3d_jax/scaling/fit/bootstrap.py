"""Percentile intervals of the law's parameters: whole runs are drawn again, not residuals.

Rows that share a group (one cell with one seed, or branches of one trunk) are drawn together. Resampling residuals
instead treats the design as fixed and gives intervals that are too narrow. The draws depend on the seed only, not on
the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.scaling.fit import solver
from mg3d_jax.scaling.fit.laws import PARAMETERS, Law
from mg3d_jax.scaling.fit.solver import Problem

LEVELS = (80, 90)
CHUNK_ELEMENTS = 200_000  # rows x draws refitted at once: bounds memory, and stays in cache
GRID_POINTS = 12


@dataclass(frozen=True)
class Bootstrap:
    """`draws` [draws, 5] in the order of `PARAMETERS`; a term at zero has scale 0."""

    draws: np.ndarray
    groups: int
    seed: int

    def interval(self, name: str, level: float) -> tuple[float, float]:
        """Central `level` % percentile interval of one parameter."""
        tail = (100 - level) / 2
        low, high = np.percentile(self.draws[:, PARAMETERS.index(name)], [tail, 100 - tail])
        return float(low), float(high)

    def zero_share(self, name: str) -> float:
        """Share of the draws in which the scale `name` (E, A or B) is zero."""
        return float(np.mean(self.draws[:, PARAMETERS.index(name)] == 0))

    def band(self, n: np.ndarray, d: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Percentile band of the predicted loss at `n`, `d` [points]."""
        predicted = np.stack([Law(*row)(n, d) for row in self.draws])
        tail = (100 - level) / 2
        low, high = np.percentile(predicted, [tail, 100 - tail], axis=0)
        return low, high


def bootstrap(
    n: np.ndarray,
    d: np.ndarray,
    loss: np.ndarray,
    law: Law,
    *,
    draws: int,
    seed: int = 0,
    groups: Sequence[object] | None = None,
) -> Bootstrap:
    """Refits `law` to `draws` resamplings of the groups of rows [rows].

    `groups` names each row's group; by default each distinct row is one (exact repeats go together). Every refit starts
    from the point estimate and from the best grid point of its own resampling, and keeps the better optimum.
    """
    n, d, loss = (np.asarray(v, np.float64) for v in (n, d, loss))
    labels: list[Any] = [f"{group}" for group in groups] if groups is not None else list(zip(n, d, loss, strict=True))
    order = sorted(range(len(n)), key=lambda i: (labels[i], n[i], d[i], loss[i]))
    n, d, loss = n[order], d[order], loss[order]
    names = sorted(set(labels))
    member = np.asarray([names.index(labels[i]) for i in order])
    problem = Problem.of(n, d, loss)
    start = _theta(law, problem)

    counts = np.random.default_rng([seed, 2]).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights = counts[:, member].astype(np.float64)
    chunk = max(1, CHUNK_ELEMENTS // len(n))
    fitted = [_refit(problem, weights[i : i + chunk], start) for i in range(0, draws, chunk)]
    theta = np.concatenate(fitted) if fitted else np.zeros((0, 5))
    laws = [problem.law(row).as_dict() for row in theta]
    values = np.asarray([[one[name] for name in PARAMETERS] for one in laws]).reshape(-1, len(PARAMETERS))
    return Bootstrap(values, len(names), seed)


def _theta(law: Law, problem: Problem) -> np.ndarray:
    """`law` in the solver's scaled units; a term at zero starts at a thousandth of the loss."""
    x0, y0, z0 = problem.centre

    def log(scale: float) -> float:
        return float(np.log(scale)) if scale > 0 else -np.inf

    floor = np.log(1e-3)
    e = max(log(law.E) - z0, floor)
    a = max(log(law.A) - z0 - law.alpha * x0, floor)
    b = max(log(law.B) - z0 - law.beta * y0, floor)
    return np.asarray([e, a, law.alpha, b, law.beta])


def _refit(problem: Problem, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    projected = solver.variable_projection(weights, problem, points=GRID_POINTS)[:, 0]
    starts = np.concatenate([np.broadcast_to(start, projected.shape), projected])
    theta, values = solver.polish(starts, np.concatenate([weights, weights]), problem)
    half = len(weights)
    best = np.where((values[:half] <= values[half:])[:, None], theta[:half], theta[half:])
    _, shares = solver.log_law(best, problem)
    at_zero = shares.max(axis=2) < 1e-5
    for k, column in enumerate(solver.LOG_SCALES):
        best[at_zero[:, k], column] = -np.inf
    return best
