"""A metric from the loss: accuracy, AUROC or recall saturate, so no power law of the size describes them.

With a known chance level and ceiling, `metric = chance + (ceiling - chance) * share`, where the share is a sigmoid,
`1 / (1 + exp(k (L - L0)))`, or exponential, `exp(-k (L - L0))` and 1 below L0. The one with the smaller error comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from mg3d_jax.scaling.fit.intervals import limits

LEAST_RUNS = 5
Curve = Callable[[np.ndarray, float, float], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """`metric = shape(loss; k, L0)` between `chance` and `ceiling`."""

    shape: str
    k: float
    L0: float
    chance: float
    ceiling: float
    rmse: float
    intervals: dict[str, tuple[float, float]]  # 90 %, runs drawn again

    def __call__(self, loss: np.ndarray | float) -> np.ndarray:
        return self.chance + (self.ceiling - self.chance) * SHAPES[self.shape](
            np.asarray(loss, np.float64), self.k, self.L0
        )


def _sigmoid(loss: np.ndarray, k: float, middle: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(k * (loss - middle), -500, 500)))


def _exponential(loss: np.ndarray, k: float, start: float) -> np.ndarray:
    return np.exp(-k * np.maximum(loss - start, 0.0))


SHAPES: dict[str, Curve] = {"sigmoid": _sigmoid, "exponential": _exponential}


def fit_metric(
    loss: np.ndarray, metric: np.ndarray, *, chance: float, ceiling: float, draws: int = 0, seed: int = 0
) -> list[Metric]:
    """Both shapes fitted to runs [rows], the better one first. `ValueError` where the ends or the runs do not allow it."""
    loss, metric = np.asarray(loss, np.float64), np.asarray(metric, np.float64)
    if not chance < ceiling:
        raise ValueError(f"chance {chance:g} must be below the ceiling {ceiling:g}")
    if len(np.unique(loss)) < LEAST_RUNS:
        raise ValueError(f"{len(np.unique(loss))} distinct losses; at least {LEAST_RUNS} are needed")
    share = (metric - chance) / (ceiling - chance)
    found = []
    for shape in SHAPES:
        k, middle = _fit(shape, loss, share)
        rng = np.random.default_rng([seed, 4])
        drawn = []
        for _ in range(draws):
            chosen = rng.integers(len(loss), size=len(loss))
            if len(np.unique(loss[chosen])) > 2:
                drawn.append(_fit(shape, loss[chosen], share[chosen], (k, middle)))
        values = np.asarray(drawn)
        intervals = {n: limits(values[:, i], (k, middle)[i], 90) for i, n in enumerate(("k", "L0"))} if drawn else {}
        one = Metric(shape, k, middle, chance, ceiling, 0.0, intervals)
        rmse = float(np.sqrt(np.mean((one(loss) - metric) ** 2)))
        found.append(Metric(shape, k, middle, chance, ceiling, rmse, intervals))
    return sorted(found, key=lambda one: one.rmse)


def _fit(
    shape: str, loss: np.ndarray, share: np.ndarray, start: tuple[float, float] | None = None
) -> tuple[float, float]:
    curve, spread = SHAPES[shape], max(float(np.ptp(loss)), 1e-9)
    starts = (
        [start] if start else [(s / spread, m) for s in (0.5, 2.0, 8.0) for m in np.quantile(loss, (0.0, 0.5, 1.0))]
    )
    if not start and shape == "exponential":
        starts += [(s / spread, loss.min() - spread * f) for s in (0.5, 2.0) for f in (0.3, 1.0)]
    best: tuple[float, np.ndarray] | None = None
    for slope, middle in starts:
        found = optimize.least_squares(
            lambda p: curve(loss, np.exp(p[0]), p[1]) - share, (np.log(slope), middle), xtol=1e-12, ftol=1e-12
        )
        if best is None or found.cost < best[0]:
            best = (float(found.cost), found.x)
    assert best is not None
    return float(np.exp(best[1][0])), float(best[1][1])
