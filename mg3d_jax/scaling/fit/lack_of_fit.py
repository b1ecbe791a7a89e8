"""Does the law describe the runs? Mean residuals of every size, data amount and further column against the noise.

A robust fit passes through most of the runs and takes a whole mis-tuned size for outliers, so nothing is judged by it.
Rows that stand out from their own size and data amount are set aside first, by name; then the law is fitted by least
squares, and for every column the residuals are explained by its values: an F test of what that explains beyond the law
against what is left beside all columns. All tests together warn in at most `FALSE_WARNINGS` of the tables that follow the law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from mg3d_jax.scaling.fit import solver
from mg3d_jax.scaling.fit.laws import Law
from mg3d_jax.scaling.fit.random_effects import _basis, _dummies
from mg3d_jax.scaling.fit.solver import Problem

FALSE_WARNINGS, FALSE_OUTLIERS = 0.02, 0.01
"""Shares of clean tables in which the tests of columns warn, and in which a row is called an outlier."""
MOST_LEVELS = 12  # values of a column that are told apart; more of them are put into bins
BINS, BIN_ROWS = 6, 6
TOGETHER = "N and D together"
LEAST_FREEDOM = 3
LEAST_SHIFT = 1e-5  # of the loss: smaller differences are rounding
MOST_OUTLIERS = 0.25  # share of the rows
SUSPECT = 4.0  # robust standard deviations
LARGE_RMS = 0.05
POOLED = 0.5  # clusters that differ by chance in more than this share of tables count as sharing no noise
SPARE = 8  # cells that must be left beside the law and all columns for size and data to be looked at together


@dataclass(frozen=True)
class Group:
    """Rows with one value of a column: mean log residual, in units of its standard error too."""

    value: str
    rows: int
    mean: float
    standard_errors: float


@dataclass(frozen=True)
class Test:
    """What a column explains of the residuals. `share` is the p-value, `limit` the one below which it is said."""

    column: str
    shift: float  # root mean square of what it explains, of the loss
    freedom: tuple[int, int]
    share: float
    limit: float
    worst: str  # the value that is furthest off

    @property
    def warns(self) -> bool:
        return self.share < self.limit and self.shift > LEAST_SHIFT


@dataclass(frozen=True)
class LackOfFit:
    """The verdict. Residuals are of the law fitted by least squares without the outliers."""

    rms: float
    noise: float | None  # standard deviation of a run beside the law and all columns; None: too few runs to say
    groups: dict[str, list[Group]]
    tests: list[Test]
    outliers: dict[str, float]  # name of the row -> log residual
    kept: np.ndarray  # [rows] not an outlier
    least_squares: Law | None
    left_out: list[dict[str, Any]]  # refits without each size
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rms": self.rms,
            "noise": self.noise,
            "mean_residuals": {column: [asdict(one) for one in groups] for column, groups in self.groups.items()},
            "tests": [asdict(one) | {"warns": one.warns} for one in self.tests],
            "outliers": self.outliers,
            "least_squares": self.least_squares.as_dict() if self.least_squares else None,
            "without_each_size": self.left_out,
            "warnings": self.warnings,
        }


def judge(
    problem: Problem,
    columns: Mapping[str, np.ndarray],
    law: Law,
    extra: Mapping[str, Sequence[Any]],
    names: Sequence[str],
    clusters: Mapping[str, np.ndarray],
) -> LackOfFit:
    """Judges `law` on its rows.

    Args:
        columns: of the law's variables, [rows] each.
        extra: further columns of the table, [rows] each: schedule, width, unique data, ...
        names: of the rows.
        clusters: cluster numbers [rows] of what may share noise; a column that varies by such clusters only is tested against
            the differences between them.
    """
    labels = {name: found for name, values in columns.items() if (found := _labels(values, always=True)) is not None}
    codes = {name: _codes(one) for name, one in labels.items()}
    for name, values in extra.items():
        one = _labels(values)
        if one is not None and not any(_same(_codes(one), other) for other in codes.values()):
            labels[name], codes[name] = one, _codes(one)
    blocks = {name: _dummies(one) for name, one in codes.items()}
    kept = _without_outliers(problem, law, list(blocks.values()), clusters)
    fitted = least_squares(problem, law, kept)
    residual = problem.residuals(fitted)
    first = problem.tangent(fitted)
    cells = len(np.unique(np.stack([*columns.values()], axis=1)[kept], axis=0))
    if cells - _basis(np.concatenate([first, *blocks.values()], axis=1)[kept]).shape[1] >= SPARE:
        blocks |= _together(columns)
    tests, noise = _tests(first[kept], residual[kept], {k: b[kept] for k, b in blocks.items()}, clusters, kept)
    groups = {name: _groups(one, residual, kept, noise) for name, one in labels.items()}
    tests = [_named(one, labels, groups) for one in tests]
    outliers = {names[i]: float(residual[i]) for i in np.flatnonzero(~kept).tolist()}
    rms = float(np.sqrt(np.mean(residual[kept] ** 2)))
    left_out = _without_each_size(problem, columns, fitted, kept)
    warnings = _warnings(tests, outliers, rms, noise)
    return LackOfFit(rms, noise, groups, tests, outliers, kept, fitted, left_out, warnings)


def least_squares(problem: Problem, start: Law, kept: np.ndarray) -> Law:
    """The law fitted to the kept rows by least squares of log residuals, from `start`."""
    free = [k for k, value in enumerate(start.values) if value > 0]
    theta = problem.start(start)

    def residuals(x: np.ndarray) -> np.ndarray:
        full = np.where(np.isin(np.arange(len(theta)), free), theta, -np.inf)
        full[free] = x
        return (problem.z - solver.log_law(full[None], problem)[0][0])[kept]

    def slopes(x: np.ndarray) -> np.ndarray:
        full = np.where(np.isin(np.arange(len(theta)), free), theta, -np.inf)
        full[free] = x
        _, shares = solver.log_law(full[None], problem)
        return -solver.jacobian(full[None], shares, problem)[0, free][:, kept].T

    bounds = [solver.EXPONENT_BOUNDS if k >= problem.scales else (-40.0, 40.0) for k in free]
    low, high = (np.asarray(ends) for ends in zip(*bounds, strict=True))
    begin = np.clip(theta[free], low, high)
    found = optimize.least_squares(residuals, begin, slopes, (low, high), xtol=1e-12, ftol=1e-14, gtol=1e-12)
    full = np.full(len(theta), -np.inf)
    full[free] = found.x
    return problem.law(full)


def _labels(values: Sequence[Any] | np.ndarray, *, always: bool = False) -> np.ndarray | None:
    """What tells rows apart [rows]: the column's values where they are few, else bins of its numbers.

    None of a column that is one value, or text that hardly repeats. Numbers that hardly repeat are another measurement of the
    run (a training loss, seconds) and are passed over too, unless the column must `always` be looked at.
    """
    labels = np.asarray([f"{v:.8g}" if isinstance(v, float | np.floating) else f"{v}" for v in values])
    distinct = len(np.unique(labels))
    if 2 <= distinct <= min(MOST_LEVELS, len(labels) / 2):
        return labels
    try:
        numbers = np.asarray([float(v) for v in values])
    except (TypeError, ValueError):
        return None
    bins = min(BINS, len(numbers) // BIN_ROWS)
    if distinct < 2 or bins < 2 or not np.all(np.isfinite(numbers)) or not (always or distinct <= 0.6 * len(numbers)):
        return None
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)))
    member = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    return np.asarray([f"{edges[k]:.4g} to {edges[k + 1]:.4g}" for k in member]) if len(edges) > 2 else None


def _codes(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _together(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What depends on size and data together, such as large models that only suffer where data are few."""
    if set(columns) != {"N", "D"}:
        return {}
    n, d = ((x - x.mean()) / max(x.std(), 1e-9) for x in (np.log(columns["N"]), np.log(columns["D"])))
    return {TOGETHER: np.stack([n * d, n**2 * d, n * d**2], axis=1)}


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return len(np.unique(np.stack([one, other]), axis=1).T) == one.max() + 1 == other.max() + 1


def _without_outliers(
    problem: Problem, law: Law, blocks: Sequence[np.ndarray], clusters: Mapping[str, np.ndarray]
) -> np.ndarray:
    """[rows] False where a row stands out from the others of its own size, data amount and further columns."""
    design = np.concatenate([problem.tangent(law), *blocks], axis=1)
    basis, residual = _basis(design), problem.residuals(law)
    rows, rank = basis.shape
    if rows - rank < LEAST_FREEDOM + 1:
        return np.ones(rows, bool)
    rough = _least_absolute(basis, residual)
    spread = max(1.4826 * np.median(np.abs(rough)) * (rows / (rows - rank)) ** 0.5, LEAST_SHIFT)
    most = min(int(MOST_OUTLIERS * rows), rows - rank - LEAST_FREEDOM)
    suspects = [i for i in np.argsort(-np.abs(rough))[:most] if abs(rough[i]) > SUSPECT * spread]
    kept = np.ones(rows, bool)
    kept[suspects] = False
    limit = FALSE_OUTLIERS / rows
    # Rows of one cluster are no independent witnesses of the noise.
    most_freedom = max(min([int(number.max()) + 1 for number in clusters.values()], default=rows) - rank, LEAST_FREEDOM)
    while not kept.all():  # the mildest of those set aside comes back as long as it fits to the others
        share = {i: _deletion_share(basis, residual, kept, i, most_freedom) for i in np.flatnonzero(~kept).tolist()}
        mildest = max(share, key=lambda i: share[i])
        if share[mildest] < limit:
            break
        kept[mildest] = True
    return kept


def _least_absolute(basis: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Residuals [rows] of a regression by least absolute deviations (reweighted least squares)."""
    left = residual - basis @ (basis.T @ residual)
    for _ in range(30):
        weights = 1 / np.maximum(np.abs(left), 1e-6 + 1e-3 * np.median(np.abs(left)))
        scaled = basis * weights[:, None]
        left = residual - basis @ np.linalg.lstsq(scaled.T @ basis, scaled.T @ residual, rcond=None)[0]
    return left


def _deletion_share(basis: np.ndarray, residual: np.ndarray, kept: np.ndarray, row: int, most_freedom: int) -> float:
    """p-value of row `row` being a prediction of the kept rows."""
    part, target = basis[kept], residual[kept]
    solution, *_ = np.linalg.lstsq(part, target, rcond=None)
    freedom = int(kept.sum()) - np.linalg.matrix_rank(part)
    if freedom < 1:
        return 1.0
    deviation = max(np.sqrt(np.sum((target - part @ solution) ** 2) / freedom), LEAST_SHIFT)
    leverage = basis[row] @ np.linalg.pinv(part.T @ part) @ basis[row]
    off = abs(residual[row] - basis[row] @ solution) / (deviation * np.sqrt(1 + leverage))
    return float(2 * stats.t.sf(off, min(freedom, most_freedom)))


def _tests(
    first: np.ndarray,
    residual: np.ndarray,
    blocks: Mapping[str, np.ndarray],
    clusters: Mapping[str, np.ndarray],
    kept: np.ndarray,
) -> tuple[list[Test], float | None]:
    """A test for every column, and the noise of a run.

    Clusters of a kind that differ by more than runs do are noise of their own: a column that is one value within each
    cluster is held against the differences between the clusters.
    """
    base = _basis(first)
    everything = np.concatenate([first, *blocks.values()], axis=1)
    shared = {kind: _dummies(_codes(number[kept])) for kind, number in clusters.items()}
    left, freedom = _left(np.concatenate([everything, *shared.values()], axis=1), residual)
    all_left, all_freedom = _left(everything, residual)
    between: dict[str, tuple[float, int]] = {}
    for kind, dummies in shared.items():
        kind_left, kind_freedom = _left(np.concatenate([everything, dummies], axis=1), residual)
        own, own_freedom = all_left - kind_left, all_freedom - kind_freedom
        if freedom >= 1 and own_freedom >= 1 and _share(own, own_freedom, left, freedom) < POOLED:
            between[kind] = (own, own_freedom)
    design = np.concatenate([everything, *(shared[kind] for kind in between)], axis=1)
    left, freedom = _left(design, residual)  # clusters that share no noise are pooled
    if freedom < LEAST_FREEDOM:
        return [], None
    found = []
    limit = FALSE_WARNINGS / max(len(blocks), 1)
    for name, block in blocks.items():
        against = [(left, freedom)] + [between[k] for k in between if _constant_within(block, shared[k])]
        noise, within = max(against, key=lambda one: one[0] / one[1])
        noise = max(noise, (LEAST_SHIFT / 10) ** 2 * within)
        # One value that is off, such as a mis-tuned size, is likelier than all of them: each is tried alone.
        tried = [block] if name == TOGETHER else [block[:, [k]] for k in range(block.shape[1])]
        shares, shifts, which = [], [], []
        for k, part in enumerate(tried):
            joined = _basis(np.concatenate([base, part], axis=1))
            if (gained := joined.shape[1] - base.shape[1]) < 1:
                continue
            explained = float(np.sum((joined.T @ residual) ** 2) - np.sum((base.T @ residual) ** 2))
            shares.append(_share(explained, gained, noise, within))
            shifts.append(float(np.sqrt(max(explained, 0.0) / len(residual))))
            which.append(k)
        if shares:
            share = min(1.0, len(shares) * min(shares))
            found.append(
                Test(
                    name,
                    max(shifts),
                    (1 if len(tried) > 1 else 3, within),
                    share,
                    limit,
                    f"{which[int(np.argmin(shares))]}",
                )
            )
    return found, float(np.sqrt(max(left, 0.0) / freedom))


def _left(columns: np.ndarray, residual: np.ndarray) -> tuple[float, int]:
    """Sum of squares that a regression on `columns` leaves, and its degrees of freedom."""
    basis = _basis(columns)
    return max(float(np.sum(residual**2) - np.sum((basis.T @ residual) ** 2)), 0.0), len(residual) - basis.shape[1]


def _constant_within(block: np.ndarray, dummies: np.ndarray) -> bool:
    """Is every column of `block` one value within each cluster?"""
    means = dummies @ ((dummies.T @ block) / np.maximum(dummies.sum(axis=0), 1)[:, None])
    return bool(np.allclose(means, block, atol=1e-9))


def _share(explained: float, gained: int, left: float, freedom: int) -> float:
    """p-value of an F test."""
    ratio = (max(explained, 0.0) / gained) / max(left / freedom, 1e-300)
    return float(stats.f.sf(ratio, gained, freedom))


def _groups(labels: np.ndarray, residual: np.ndarray, kept: np.ndarray, noise: float | None) -> list[Group]:
    found = []
    for label in sorted(set(labels), key=_number):
        chosen = residual[kept & (labels == label)]
        if len(chosen):
            error = max(noise or 0.0, LEAST_SHIFT / 10) / np.sqrt(len(chosen))
            found.append(Group(str(label), len(chosen), float(chosen.mean()), float(chosen.mean() / error)))
    return found


def _number(label: str) -> tuple[float, str]:
    try:
        return float(label.split(" to ")[0]), label
    except ValueError:
        return np.inf, label


def _named(test: Test, labels: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[Group]]) -> Test:
    """With the value that is off, instead of its number."""
    if test.column not in labels:
        return replace(test, worst="")
    label = np.unique(labels[test.column])[int(test.worst)]
    found = [one for one in groups[test.column] if one.value == label]
    return replace(test, worst=f"{label} (mean residual {found[0].mean:+.2%}, {found[0].rows} runs)" if found else "")


def _without_each_size(
    problem: Problem, columns: Mapping[str, np.ndarray], fitted: Law, kept: np.ndarray
) -> list[dict[str, Any]]:
    """Least-squares fits without each size: their parameters, and how far off the size that was left out then is."""
    size = next(iter(columns.values()))
    values = np.unique(size)
    if not 4 <= len(values) <= MOST_LEVELS:
        return []
    found = []
    for value in values:
        chosen = kept & (size != value)
        if chosen.sum() < len(fitted.values):
            continue
        law = least_squares(problem, fitted, chosen)
        off = problem.residuals(law)[kept & (size == value)]
        mean = float(off.mean()) if len(off) else None
        found.append({"left_out": float(value), "mean_residual": mean, **law.as_dict()})
    return found


def _warnings(tests: Sequence[Test], outliers: Mapping[str, float], rms: float, noise: float | None) -> list[str]:
    said = []
    for one in tests:
        if one.warns:
            where = f"; furthest off: {one.worst}" if one.worst else ""
            said.append(
                f"lack of fit: residuals depend on {one.column} (it explains {one.shift:.2%} of the loss, noise "
                f"{noise:.2%}; by chance in {one.share:.1e} of clean tables){where}"
            )
    if outliers:
        shown = ", ".join(f"{name} ({value:+.1%})" for name, value in list(outliers.items())[:8])
        more = f" and {len(outliers) - 8} more, see fit.json" if len(outliers) > 8 else ""
        said.append(f"lack of fit: {len(outliers)} outlier{'s' * (len(outliers) > 1)}: {shown}{more}")
    if rms > LARGE_RMS:
        said.append(f"lack of fit: the root mean square residual is {rms:.1%} of the loss; a law leaves about 1 %")
    return said
