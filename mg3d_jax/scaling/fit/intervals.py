"""Intervals of a law: which method the design allows, what clusters it takes, and when there is none.

Runs of one cell, of one data subset or of one `--group` may share noise. With many clusters of one kind, whole clusters are
drawn again (`bootstrap.py`). Otherwise the variance of every kind is estimated and tables are drawn with it
(`random_effects.py`); a kind with too few clusters for that leaves the fit without an interval. Interval ends are
bias-corrected percentiles (Efron 1981).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from mg3d_jax.scaling.fit import bootstrap, random_effects
from mg3d_jax.scaling.fit.laws import Law, predict
from mg3d_jax.scaling.fit.solver import Problem

LEVELS = (80, 90)
MANY_CLUSTERS = 60
"""From so many clusters of one kind on they are drawn again: no assumption on how noise varies with size is needed."""
CELL, SUBSET, GROUP = "cell", "subset", "group"
MOST_CORRECTION = 0.02  # shares of draws below the estimate are kept this far from 0 and 1


@dataclass(frozen=True)
class Draws:
    """`values` [draws, parameters] of laws that the runs allow; `estimate` is the fitted one."""

    estimate: Law
    values: np.ndarray
    seed: int
    method: str
    clusters: dict[str, int]  # kind -> number
    deviations: dict[str, float]  # kind, and "run" -> standard deviation of its log loss; empty where it was not needed
    freedom: dict[str, float]

    def interval(self, name: str, level: float) -> tuple[float, float]:
        """Central `level` % interval of one parameter."""
        column = self.estimate.form.parameters.index(name)
        return limits(self.values[:, column], self.estimate[name], level)

    def zero_share(self, scale: str) -> float:
        """Share of the draws in which this scale is zero."""
        return float(np.mean(self.values[:, self.estimate.form.parameters.index(scale)] == 0))

    def predictions(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Losses [draws, points] of every draw."""
        return predict(self.estimate.form, self.values, columns)

    def band(self, columns: Mapping[str, np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the predicted loss at every point of `columns` [points]."""
        drawn = self.predictions(columns)
        centre = self.estimate(*(columns[name] for name in self.estimate.form.variables))
        ends = np.asarray([limits(drawn[:, k], centre[k], level) for k in range(drawn.shape[1])])
        return ends[:, 0], ends[:, 1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "draws": len(self.values),
            "seed": self.seed,
            "method": self.method,
            "clusters": self.clusters,
            "degrees_of_freedom": self.freedom,
            "standard_deviations": self.deviations,
            "ends": "bias-corrected percentiles of the draws",
        }


def limits(drawn: np.ndarray, estimate: float, level: float) -> tuple[float, float]:
    """Bias-corrected percentile interval of one number from its draws [draws]."""
    below = np.mean(drawn < estimate) + 0.5 * np.mean(drawn == estimate)
    shift = 2 * ndtri(np.clip(below, MOST_CORRECTION, 1 - MOST_CORRECTION))
    edge = ndtri(0.5 + level / 200)
    low, high = np.quantile(drawn, ndtr([shift - edge, shift + edge]))
    return float(low), float(high)


def draw(
    problem: Problem,
    law: Law,
    kinds: Mapping[str, np.ndarray],
    *,
    draws: int,
    seed: int = 0,
    usable: np.ndarray | None = None,
) -> Draws | str:
    """Laws that the runs of `problem` allow around `law`, or why no interval can be given.

    Args:
        kinds: labels [rows] of what may share noise: `cell`, `subset`, `group`. What is no cluster is passed over.
        usable: rows [rows] whose residuals say how large the noise is; outliers do not.
    """
    clusters = random_effects.partitions(kinds)
    number = {kind: int(one.max()) + 1 for kind, one in clusters.items()}
    if len(clusters) <= 1:
        member = next(iter(clusters.values()), np.arange(problem.rows))
        if (count := int(member.max()) + 1) >= MANY_CLUSTERS:
            values = bootstrap.draw_laws(problem, law, member, draws=draws, seed=seed)
            method = f"bootstrap of {count} {next(iter(clusters), 'run')}s, drawn whole"
            return Draws(law, values, seed, method, number, {}, {})
    keep = np.ones(problem.rows, bool) if usable is None else usable
    first, residual = problem.tangent(law), problem.residuals(law)
    kept = random_effects.partitions({kind: one[keep] for kind, one in clusters.items()})
    found = random_effects.components(first[keep], residual[keep], kept)
    if (reason := random_effects.too_few(found)) is not None:
        return reason
    chosen = {kind: clusters[kind] for kind in kept}
    values = random_effects.draw_laws(problem, law, found, chosen, draws=draws, seed=seed)
    deviations = {kind: variance**0.5 for kind, variance in found.variances().items()}
    freedom: dict[str, float] = {one.kind: one.freedom for one in found.kinds} | {"run": found.run_freedom}
    return Draws(law, values, seed, "random effects, parametric bootstrap", number, deviations, freedom)
