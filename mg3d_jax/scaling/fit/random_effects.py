"""Noise that runs share: how much runs of one cell or of one data subset move together, and draws of tables with it.

The model of the log residuals is `noise of the run + effect of its cluster`, for one or several kinds of clusters at once.
Each kind's mean square, what it explains beyond the law and beyond the other kinds, is compared with its expectation
(analysis of variance, Henderson's method 3). A draw first draws the variances, each mean square by the chi-square of its
degrees of freedom (a generalised pivot, Weerahandi 1993), so that few clusters give wide intervals as Student's t does;
then effects and noise; then the law is fitted to the table that they make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mg3d_jax.scaling.fit import projection, solver
from mg3d_jax.scaling.fit.laws import Law
from mg3d_jax.scaling.fit.solver import Problem

LEAST_FREEDOM = 3
"""Degrees of freedom of a kind of clusters below which its variance is a guess, and intervals are refused."""
GRID_POINTS = {1: 8, 2: 8, 3: 5, 4: 3}  # per exponent, by the number of exponents
CHUNK_ELEMENTS = 100_000  # rows x draws refitted at once


@dataclass(frozen=True)
class Component:
    """One kind of clusters. `mean_square` has `freedom` degrees of freedom; `weights`: its expectation is the sum of
    `weights[kind] * variance of that kind` over kinds, and of the variance of a run."""

    kind: str
    clusters: int
    freedom: float
    mean_square: float
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Components:
    """The kinds of clusters, finest first, and what is left to the single run."""

    kinds: tuple[Component, ...]
    run_mean_square: float
    run_freedom: int

    def variances(self) -> dict[str, float]:
        """Estimated variance of each kind's effect, at least 0, and of the `run`."""
        found = self._solve(
            {one.kind: np.asarray(one.mean_square) for one in self.kinds}, np.asarray(self.run_mean_square)
        )
        return {kind: float(value) for kind, value in found.items()}

    def drawn(self, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Variances that the mean squares allow, [draws] for each kind and the `run`."""

        def redrawn(mean_square: float, freedom: float) -> np.ndarray:
            return mean_square * freedom / np.maximum(rng.chisquare(max(freedom, 1.0), draws), 1e-12)

        run = redrawn(self.run_mean_square, self.run_freedom)
        return self._solve({one.kind: redrawn(one.mean_square, one.freedom) for one in self.kinds}, run)

    def _solve(self, mean_squares: Mapping[str, np.ndarray], run: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {"run": run}
        for one in self.kinds:
            rest = mean_squares[one.kind] - run
            for kind, weight in one.weights.items():
                if kind != one.kind:
                    rest = rest - weight * found[kind]
            found[one.kind] = np.maximum(rest / one.weights[one.kind], 0.0)
        return found


def partitions(kinds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cluster numbers [rows] of the kinds that say something: there are two clusters or more, some cluster has two rows, no
    two kinds are the same."""
    found: dict[str, np.ndarray] = {}
    for kind, labels in kinds.items():
        _, number = np.unique(np.asarray(labels), return_inverse=True)
        number = number.reshape(-1)
        if 1 < number.max(initial=0) + 1 < len(number) and not any(_same(number, other) for other in found.values()):
            found[kind] = number
    return found


def components(first: np.ndarray, residual: np.ndarray, kinds: Mapping[str, np.ndarray]) -> Components:
    """Variance components of residuals [rows] of a law with the Jacobian `first` [rows, parameters].

    `kinds` are cluster numbers [rows] of each kind, as `partitions` gives them.
    """
    dummies = {kind: _dummies(number) for kind, number in kinds.items()}
    order = sorted(kinds, key=lambda kind: -int(kinds[kind].max()))  # a refinement has more clusters
    everything = _basis(np.concatenate([first, *dummies.values()], axis=1))
    left = residual - everything @ (everything.T @ residual)
    run_freedom = len(residual) - everything.shape[1]
    found = []
    for kind in order:
        finer = {other for other in kinds if other != kind and _refines(kinds[other], kinds[kind])}
        below = _basis(np.concatenate([first, *(dummies[o] for o in kinds if o != kind and o not in finer)], axis=1))
        with_it = _basis(np.concatenate([below, dummies[kind]], axis=1))
        own = with_it.shape[1] - below.shape[1]
        explained = float(np.sum((with_it.T @ residual) ** 2) - np.sum((below.T @ residual) ** 2))
        weights = {}
        for other in (*finer, kind):
            traced = np.sum((with_it.T @ dummies[other]) ** 2) - np.sum((below.T @ dummies[other]) ** 2)
            weights[other] = float(traced / max(own, 1))
        clusters = int(kinds[kind].max()) + 1
        freedom_of = _effective(with_it, below, dummies[kind])
        found.append(Component(kind, clusters, freedom_of, max(explained, 0.0) / max(own, 1), weights))
    return Components(tuple(found), float(np.sum(left**2)) / max(run_freedom, 1), run_freedom)


def too_few(found: Components) -> str | None:
    """Why the variances are guesses, or None."""
    for one in found.kinds:
        if one.freedom < LEAST_FREEDOM:
            return (
                f"{one.clusters} clusters by {one.kind} leave {one.freedom:.1f} degrees of freedom beside the law; "
                f"an interval needs {LEAST_FREEDOM}: more clusters, such as several subsets of every data amount"
            )
    if found.run_freedom < LEAST_FREEDOM:
        return f"{found.run_freedom} degrees of freedom are left beside the law and the clusters; {LEAST_FREEDOM} are needed"
    return None


def draw_laws(
    problem: Problem, law: Law, found: Components, kinds: Mapping[str, np.ndarray], *, draws: int, seed: int
) -> np.ndarray:
    """Parameters [draws, parameters] of laws fitted to tables drawn around `law` with the noise of `found`."""
    rng = np.random.default_rng([seed, 3])
    variances = found.drawn(draws, rng)
    theta = problem.start(law)
    f, _ = solver.log_law(problem.theta(law)[None], problem)
    z = f + np.sqrt(variances["run"])[:, None] * rng.normal(size=(draws, problem.rows))
    for kind, number in kinds.items():
        effects = np.sqrt(variances[kind])[:, None] * rng.normal(size=(draws, int(number.max()) + 1))
        z = z + effects[:, number]
    chunk = max(1, CHUNK_ELEMENTS // problem.rows)
    fitted = [_refit(problem, z[i : i + chunk], theta) for i in range(0, draws, chunk)]
    return np.concatenate(fitted) if fitted else np.zeros((0, len(theta)))


def _refit(problem: Problem, z: np.ndarray, start: np.ndarray) -> np.ndarray:
    from mg3d_jax.scaling.fit.bootstrap import with_losses, zeroed

    several = with_losses(problem, z)
    weights, points = np.ones((1, problem.rows)), GRID_POINTS[len(problem.form.exponents)]
    projected = projection.variable_projection(np.broadcast_to(weights, z.shape), several, points=points)[:, 0]
    double = with_losses(problem, np.concatenate([z, z]))
    starts = np.concatenate([np.broadcast_to(start, projected.shape), projected])
    theta, values = solver.polish(starts, np.broadcast_to(weights, double.z.shape), double)
    half = len(z)
    best = np.where((values[:half] <= values[half:])[:, None], theta[:half], theta[half:])
    return problem.values(zeroed(best, problem))


def _effective(with_it: np.ndarray, below: np.ndarray, dummies: np.ndarray) -> float:
    """Degrees of freedom of what the clusters explain beside the rest, by Satterthwaite's rule.

    Directions in which the law can nearly follow the clusters' effects say little of how large these are, and hardly count.
    """
    over, under = with_it.T @ dummies, below.T @ dummies
    seen = np.clip(np.linalg.eigvalsh(over.T @ over - under.T @ under), 0.0, None)
    return float(seen.sum() ** 2 / np.sum(seen**2)) if seen.max(initial=0.0) > 1e-9 else 0.0


def _dummies(number: np.ndarray) -> np.ndarray:
    return np.eye(int(number.max()) + 1)[number]


def _basis(columns: np.ndarray) -> np.ndarray:
    """Orthonormal basis [rows, rank] of the columns' span."""
    norms = np.linalg.norm(columns, axis=0)
    scaled = columns[:, norms > 0] / norms[norms > 0]
    vectors, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    return vectors[:, singular > 1e-9 * singular[0]]


def _refines(fine: np.ndarray, coarse: np.ndarray) -> bool:
    """Does every cluster of `fine` lie in one of `coarse`?"""
    pairs = np.unique(np.stack([fine, coarse]), axis=1)
    return pairs.shape[1] == len(np.unique(fine))


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return _refines(one, other) and _refines(other, one)
