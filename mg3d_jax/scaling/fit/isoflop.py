"""IsoFLOP profiles: at each compute budget a parabola of the loss over log N, and the power law of their minima.

A cross-check of the law, not a replacement: parabolas are biased where the two exponents differ or the window of sizes is
wide. A minimum at the edge of its sizes, or a curve that bends the other way, is flagged and left out (Hoffmann et al. 2022,
approach 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAME_BUDGET = 0.02  # relative; runs whose FLOPs differ by less are of one budget
LEAST_SIZES = 4
LEAST_MINIMA = 3


@dataclass(frozen=True)
class Profile:
    """One budget. `flag`: why its minimum is not used, or ""."""

    compute: float
    runs: int
    coefficients: tuple[float, float, float] | None  # of log(N / 1), highest power first, for the loss
    n: float | None
    loss: float | None
    flag: str


@dataclass(frozen=True)
class IsoFlop:
    """`N_opt = scale * C^exponent` of the minima that are kept; None with a `refusal`."""

    profiles: list[Profile]
    exponent: float | None
    scale: float | None
    interval: tuple[float, float] | None  # 90 %, of the exponent; leaves out each budget in turn (jackknife)
    refusal: str | None
    warnings: list[str]

    def optimum(self, compute: float) -> float | None:
        return None if self.exponent is None or self.scale is None else self.scale * compute**self.exponent

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def budgets(compute: np.ndarray) -> np.ndarray:
    """Number of the budget of every run [rows]; budgets differ by more than 2 %."""
    order = np.argsort(compute)
    steps = np.diff(np.log(compute[order])) > np.log1p(SAME_BUDGET)
    found = np.empty(len(compute), int)
    found[order] = np.concatenate([[0], np.cumsum(steps)])
    return found


def isoflop(n: np.ndarray, compute: np.ndarray, loss: np.ndarray) -> IsoFlop:
    """Profiles of runs [rows]; `compute` in FLOPs, any unit."""
    number = budgets(np.asarray(compute, np.float64))
    profiles = [
        _profile(*(np.asarray(v, np.float64)[number == k] for v in (n, compute, loss))) for k in range(number.max() + 1)
    ]
    kept = [one for one in profiles if not one.flag]
    warnings = [f"IsoFLOP at {one.compute:.3g} FLOPs: {one.flag}" for one in profiles if one.flag]
    if len(kept) < LEAST_MINIMA:
        return IsoFlop(
            profiles, None, None, None, f"{len(kept)} budgets have a minimum; {LEAST_MINIMA} are needed", warnings
        )
    exponent, scale = _power(kept)
    if len(kept) > LEAST_MINIMA:
        without = np.asarray([_power(kept[:k] + kept[k + 1 :])[0] for k in range(len(kept))])
        from scipy.stats import t

        error = np.sqrt((len(kept) - 1) / len(kept) * np.sum((without - without.mean()) ** 2))
        half = float(t.ppf(0.95, len(kept) - 2) * error)
        return IsoFlop(profiles, exponent, scale, (exponent - half, exponent + half), None, warnings)
    return IsoFlop(profiles, exponent, scale, None, None, warnings)


def _profile(n: np.ndarray, compute: np.ndarray, loss: np.ndarray) -> Profile:
    budget, sizes = float(np.exp(np.log(compute).mean())), np.unique(n)
    if len(sizes) < LEAST_SIZES:
        return Profile(budget, len(n), None, None, None, f"{len(sizes)} sizes; a parabola needs {LEAST_SIZES}")
    middle = np.log(n).mean()
    a, b, c = np.polyfit(np.log(n) - middle, loss, 2)
    shown = (float(a), float(b - 2 * a * middle), float(c - b * middle + a * middle**2))
    if a <= 0:
        return Profile(budget, len(n), shown, None, None, "it bends downwards: no minimum")
    at = -b / (2 * a)
    best, least = float(np.exp(at + middle)), float(c - b**2 / (4 * a))
    if (
        not sizes[0] < best < sizes[-1]
        or loss[n == sizes[0]].mean() <= loss.min()
        or loss[n == sizes[-1]].mean() <= loss.min()
    ):
        return Profile(budget, len(n), shown, best, least, "its minimum lies at the edge of its sizes")
    return Profile(budget, len(n), shown, best, least, "")


def _power(kept: Sequence[Profile]) -> tuple[float, float]:
    x, y = np.log([one.compute for one in kept]), np.log([one.n for one in kept])  # type: ignore[arg-type]
    slope, intercept = np.polyfit(x - x.mean(), y, 1)
    return float(slope), float(np.exp(intercept - slope * x.mean()))
