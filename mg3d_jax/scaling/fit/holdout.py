"""Back-test: the law of the cheap runs against the runs that cost more, with naive guesses beside it.

A law that cannot beat "the last loss of the same run" has not been shown to predict anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.fit.certified import fit_form
from mg3d_jax.scaling.fit.laws import FORMS, Form
from mg3d_jax.scaling.fit.table import Row

LAW = "the law"
TIE = 1e-3  # relative; a guess that differs by less is the law in other words, as one of compute is of one size
REPEATED = tuple(FORMS[name] for name in ("nus-1", "nus", "nus-effective"))
"""Forms of repeated data: the back-test of one shows the others, so that held-out runs choose between them."""


@dataclass(frozen=True)
class Score:
    """How one way to predict did on the held-out runs. Errors are of the log loss."""

    method: str
    log_rmse: float
    mean_absolute_percent: float
    bias_percent: float  # mean of observed over predicted, minus 1


@dataclass(frozen=True)
class BackTest:
    """`refusal`: why there is none; `covered`: share of the held-out losses within the law's 90 % interval."""

    limit: float
    fitted: int
    held_out: int
    scores: list[Score]
    refusal: str | None
    covered: float | None
    predictions: list[dict[str, Any]]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def split(rows: Sequence[Row], limit: float) -> tuple[list[Row], list[Row]]:
    """Used rows that cost at most `limit` FLOPs, and those that cost more."""
    chosen = table.used(rows)
    return [r for r in chosen if r.compute <= limit * (1 + 1e-9)], [r for r in chosen if r.compute > limit * (1 + 1e-9)]


def back_test(rows: Sequence[Row], form: Form, limit: float, fitted: Callable[[Sequence[Row]], Any]) -> BackTest:
    """Fits the runs of at most `limit` FLOPs with `fitted` (a function of rows that returns an `outputs.Result`)."""
    below, above = split(rows, limit)
    empty = BackTest(limit, len(below), len(above), [], None, None, [], [])
    if not above:
        return _refused(empty, f"no run costs more than {limit:.3g} FLOPs")
    if not below:
        return _refused(empty, f"no run costs at most {limit:.3g} FLOPs")
    result = fitted(below)
    if result.fit.law is None:
        return _refused(empty, f"no law of the runs of at most {limit:.3g} FLOPs: {result.fit.refusal}")
    sizes, loss = table.columns(above, form.variables)
    predictions = {LAW: result.fit.law(*(sizes[name] for name in form.variables))} | baselines(below, above, form)
    scores = [_score(name, one, loss) for name, one in predictions.items()]
    covered = None
    if result.drawn is not None:
        low, high = result.drawn.band(sizes, 90)
        noise = result.lack.noise or 0.0
        covered = float(np.mean((loss >= low * np.exp(-1.645 * noise)) & (loss <= high * np.exp(1.645 * noise))))
    lines = [
        {"run": row.label, **row.sizes, "compute": row.compute, "loss": row.loss}
        | {name: float(one[k]) for name, one in predictions.items()}
        for k, row in enumerate(above)
    ]
    best = min(scores[1:], key=lambda one: one.log_rmse, default=None)
    warnings = []
    if best is not None and best.log_rmse < scores[0].log_rmse * (1 - TIE):
        warnings.append(
            f"back-test: {best.method!r} predicts the {len(above)} runs above {limit:.3g} FLOPs better than the law "
            f"(log-RMSE {best.log_rmse:.4f} against {scores[0].log_rmse:.4f})"
        )
    return BackTest(limit, len(below), len(above), scores, None, covered, lines, warnings)


def _refused(empty: BackTest, why: str) -> BackTest:
    return BackTest(**(vars(empty) | {"refusal": why, "warnings": [f"back-test: {why}"]}))


def baselines(below: Sequence[Row], above: Sequence[Row], form: Form) -> dict[str, np.ndarray]:
    """Losses [held-out rows] that need no law of two variables; a guess that cannot be made for all of them is left out."""
    amount = form.variables[-1]
    found: dict[str, np.ndarray] = {}
    last = [_last(below, row, form.variables[0], amount) for row in above]
    if all(guess is not None for guess in last):
        found["last loss of the same run or size"] = np.asarray(last, np.float64)
    sizes, loss = table.columns(below, form.variables)
    points, _ = table.columns(above, form.variables)
    distance = sum((np.log(points[name])[:, None] - np.log(sizes[name])[None]) ** 2 for name in form.variables)
    found["nearest run"] = loss[np.argmin(distance, axis=1)]
    if form.chance:
        found |= _laws("the law without a chance level", FORMS[form.name], sizes, points, loss)
    if form.name == "nd":
        found |= _laws("power law without floor", FORMS["nd-no-floor"], sizes, points, loss)
    if form.variables == REPEATED[0].variables:
        for other in REPEATED:
            if other.name != form.name:
                found |= _laws(f"form {other.name}", other, sizes, points, loss)
        fresh, wanted = ({"N": one["N"], "D": one["S"]} for one in (sizes, points))
        found |= _laws("repeats as good as new", FORMS["nd"], fresh, wanted, loss)
    compute = {"x": np.asarray([row.compute for row in below])}
    found |= _laws("power law of the compute", FORMS["x"], compute, {"x": np.asarray([r.compute for r in above])}, loss)
    return found


def _last(below: Sequence[Row], row: Row, size: str, amount: str) -> float | None:
    """Mean loss of the runs nearest below in data, of the same group or else of the same size."""
    same = [one for one in below if row.group is not None and one.group == row.group]
    same = same or [one for one in below if np.isclose(one.sizes[size], row.sizes[size])]
    if size == amount:
        same = list(below)
    if not same:
        return None
    most = max(one.sizes[amount] for one in same)
    return float(np.mean([one.loss for one in same if one.sizes[amount] == most]))


def _laws(name: str, form: Form, sizes: dict, points: dict, loss: np.ndarray) -> dict[str, np.ndarray]:
    law = fit_form(form, sizes, loss).law
    return {} if law is None else {name: law(*(points[variable] for variable in form.variables))}


def _score(method: str, predicted: np.ndarray, loss: np.ndarray) -> Score:
    error = np.log(loss) - np.log(predicted)
    return Score(
        method,
        float(np.sqrt(np.mean(error**2))),
        float(100 * np.mean(np.abs(np.expm1(-error)))),
        float(100 * np.mean(np.expm1(error))),
    )
