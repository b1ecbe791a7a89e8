"""What to train for a compute budget: the size and data amount of least predicted loss, and how sure that is.

The law is minimised over a ladder of sizes that can be built, each with its own FLOPs per datum: where attention or frozen
towers cost, C = 6 N D does not hold, so nothing is solved in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mg3d_jax.scaling.fit.intervals import limits
from mg3d_jax.scaling.fit.laws import Law, predict

MOST_EXTRAPOLATION = 100.0
"""Budget over the largest fitted one beyond which advice is refused."""
WIDE = 10.0  # ratio of the ends of the 80 % interval of N from which it is said
CONTINUOUS = 200  # sizes of a ladder where none is given


@dataclass(frozen=True)
class Rung:
    """A size that can be built. `flops` per datum of D, forward and backward."""

    name: str
    n: float
    flops: float


@dataclass(frozen=True)
class Choice:
    """One rung at the budget. `d` is what the budget pays: of a law that knows no repeats, at most the unique data. `spent` is
    the share of the budget used, `epochs` how often the unique data are seen; None where the law or the limit is not given."""

    name: str
    n: float
    d: float
    spent: float
    loss: float
    interval: tuple[float, float] | None  # 80 %, of the loss
    regret: float  # loss above that of the best rung
    best_share: float | None  # share of the draws in which it is the best rung
    epochs: float | None = None


@dataclass(frozen=True)
class Advice:
    """The best rung and its neighbours; `refusal`: why nothing is advised."""

    compute: float
    extrapolation: float | None  # budget over the largest one that was fitted
    best: Choice | None
    interval_n: tuple[float, float] | None  # 80 %, of the best N over the draws
    interval_d: tuple[float, float] | None
    choices: list[Choice]
    warnings: list[str]
    refusal: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def continuous_ladder(smallest: float, largest: float, flops_per_nd: float = 6.0) -> list[Rung]:
    """Sizes from a tenth of the smallest to a thousand times the largest, for C = `flops_per_nd` N D."""
    sizes = np.geomspace(smallest / 10, largest * 1000, CONTINUOUS)
    return [Rung(f"{size:.3g}", float(size), float(flops_per_nd * size)) for size in sizes]


def advise(
    law: Law,
    draws: np.ndarray,
    ladder: Sequence[Rung],
    compute: float,
    *,
    largest_fitted: float | None,
    unique_data: float | None = None,
    most_extrapolation: float = MOST_EXTRAPOLATION,
    not_identified: Sequence[str] = (),
) -> Advice:
    """The best rung of `ladder` for `compute` FLOPs under a law of N and D, or of N, U and S.

    Args:
        draws: [draws, parameters] of laws that the runs allow: they say how sure it is.
        largest_fitted: the most FLOPs of a fitted run, if known.
        unique_data: the most unique data there are. A rung that could pay for more sees them again, if the law is of U and S;
            else it gets these, and keeps compute unspent.
    """
    ratio = None if largest_fitted is None else compute / largest_fitted
    empty = Advice(compute, ratio, None, None, None, [], [])
    if ratio is not None and ratio > most_extrapolation:
        why = f"{compute:.3g} FLOPs are {ratio:.3g} times the largest fitted run; more than {most_extrapolation:g} is a guess"
        return _refused(empty, why)
    if not_identified:
        return _refused(empty, f"the law has parameters that the runs do not determine: {', '.join(not_identified)}")
    n, flops = np.asarray([one.n for one in ladder]), np.asarray([one.flops for one in ladder])
    affordable, unique = compute / flops, np.inf if unique_data is None else unique_data
    repeats = "S" in law.form.variables
    d = affordable if repeats else np.minimum(affordable, unique)
    columns = {"N": n, "U": np.minimum(d, unique), "S": d} if repeats else {"N": n, "D": d}
    loss = law(*(columns[name] for name in law.form.variables))
    best = int(np.argmin(loss))
    drawn = predict(law.form, draws, columns) if len(draws) else None
    winners = None if drawn is None else np.argmin(drawn, axis=1)
    choices = []
    for k, rung in enumerate(ladder):
        interval = None if drawn is None else limits(drawn[:, k], float(loss[k]), 80)
        share = None if winners is None else float(np.mean(winners == k))
        spent = float(d[k] / affordable[k])
        epochs = float(d[k] / columns["U"][k]) if repeats and unique_data is not None else None
        regret = float(loss[k] - loss[best])
        choices.append(Choice(rung.name, rung.n, float(d[k]), spent, float(loss[k]), interval, regret, share, epochs))
    interval_n = interval_d = None
    if winners is not None:
        interval_n, interval_d = _ends(n[winners]), _ends(d[winners])
    warnings = _warnings(ladder, best, interval_n, choices, unique_data)
    return Advice(compute, ratio, choices[best], interval_n, interval_d, _shown(choices, best), warnings)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The 10 and 90 % points of the draws."""
    low, high = np.quantile(values, (0.1, 0.9), method="nearest")
    return float(low), float(high)


def _refused(empty: Advice, why: str) -> Advice:
    return Advice(**(vars(empty) | {"refusal": why}))


def _shown(choices: Sequence[Choice], best: int) -> list[Choice]:
    """All rungs of a short ladder; of a long one the best and its neighbours at half and twice the size."""
    if len(choices) <= 12:
        return list(choices)
    sizes = np.asarray([one.n for one in choices])
    wanted = [int(np.argmin(np.abs(np.log(sizes / (factor * sizes[best]))))) for factor in (0.25, 0.5, 1, 2, 4)]
    return [choices[k] for k in sorted(set(wanted))]


def _warnings(
    ladder: Sequence[Rung],
    best: int,
    interval: tuple[float, float] | None,
    choices: Sequence[Choice],
    unique_data: float | None,
) -> list[str]:
    found = []
    sizes = [one.n for one in ladder]
    if ladder[best].n in (min(sizes), max(sizes)):
        end = "smallest" if ladder[best].n == min(sizes) else "largest"
        found.append(f"the best rung is the {end} of the ladder: the optimum may lie beyond it")
    if interval is None:
        found.append("no interval: the fit has no draws")
    elif interval[1] > WIDE * interval[0]:
        found.append(f"the best N is known only to lie in {interval[0]:.3g} .. {interval[1]:.3g} (80 %)")
    if unique_data is not None and choices[best].spent < 1 - 1e-9:
        found.append(
            f"there are {unique_data:.4g} unique data: {1 - choices[best].spent:.0%} of the budget stays unspent, as the law "
            "does not know what repeats are worth"
        )
    return found
