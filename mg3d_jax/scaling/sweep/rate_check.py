"""Is the rule that ties a setting to the size right at both ends? A size that is mis-tuned by 2 % bends the law.

`check` of a sweep file adds runs of the smallest and of the largest model, with the setting of one key times several factors.
The best of them has to lie between others: at an end of the factors nobody knows how much better the next one would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mg3d_jax.scaling.fit.table import Row
from mg3d_jax.scaling.sweep.declaration import Sweep

TOLERATED = 0.005  # of the loss: what a rule may cost before it is said


@dataclass(frozen=True)
class Check:
    """The runs of one model that differ in the checked key only.

    Args:
        size: N of the model, NaN before one of its runs is done.
        losses: by factor; NaN where a run is missing or has no finite loss.
    """

    model: str
    key: str
    size: float
    losses: dict[float, float]

    @property
    def missing(self) -> list[float]:
        return [factor for factor, loss in self.losses.items() if not math.isfinite(loss)]

    @property
    def best(self) -> float:
        """The factor with the smallest loss; NaN where no run is done."""
        done = {factor: loss for factor, loss in self.losses.items() if math.isfinite(loss)}
        return min(done, key=done.__getitem__) if done else math.nan

    @property
    def inside(self) -> bool:
        """Is the best factor between two others that were tried?"""
        return not self.missing and self.best not in (min(self.losses), max(self.losses))

    @property
    def cost(self) -> float:
        """By how much the loss of the rule is above that of the best factor, as a share: the vertex of the parabola through
        the best factor and its neighbours, over the logarithm of the factor. NaN where the best is not inside."""
        if not self.inside:
            return math.nan
        factors = sorted(self.losses)
        place = factors.index(self.best)
        around = factors[place - 1 : place + 2]
        a, b, c = np.polyfit(np.log(around), [self.losses[factor] for factor in around], 2)
        lowest = c - b**2 / (4 * a) if a > 0 else self.losses[self.best]
        return float(self.losses[1.0] / lowest - 1)

    def problem(self) -> str:
        """What is wrong with it, in one sentence; "" where nothing is."""
        if self.missing:
            missing = ", ".join(f"{factor:g}" for factor in self.missing)
            return f"{self.model} has no loss for {self.key} times {missing}"
        if not self.inside:
            side = "smallest" if self.best == min(self.losses) else "largest"
            return (
                f"{self.model} is best with {self.key} times {self.best:g}, the {side} factor that was tried: its optimum may "
                "lie beyond; add factors to 'check', and change the rule"
            )
        if self.cost > TOLERATED:
            return f"{self.model} would have a loss {100 * self.cost:.1f} % lower with another {self.key} than that of the rule"
        return ""


def checks(sweep: Sweep, found: Sequence[Row], loss: str, size: str) -> list[Check]:
    """Those that the sweep declares, by size. `found`: a row for each of its runs; `size`: the column of N."""
    by_run = {row.label: row for row in found}
    result = []
    for model in dict.fromkeys(run.check for run in sweep.runs if run.check):
        runs = [run for run in sweep.runs if run.check == model]
        values = {run.factor: by_run[run.id].extra.get(loss) for run in runs}
        losses = {factor: math.nan if value is None else float(value) for factor, value in sorted(values.items())}
        sizes = [by_run[run.id].extra[size] for run in runs if size in by_run[run.id].extra]
        result.append(Check(model, sweep.checked_key, float(sizes[0]) if sizes else math.nan, losses))
    return sorted(result, key=lambda check: (math.isnan(check.size), check.size))


def refusal(found: Sequence[Check]) -> str | None:
    """Why there must be no law: the largest model has no optimum inside its factors. None where it has, or none is checked."""
    if not found or found[-1].inside:
        return None
    return f"the largest model is not tuned: {found[-1].problem()}"


def warnings(found: Sequence[Check]) -> list[str]:
    """What else the checks say."""
    return [check.problem() for check in found if check.problem()]
