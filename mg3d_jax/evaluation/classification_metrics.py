"""Metrics of a finding that is present (1), absent (0) or not known (-1), for all draws of a bootstrap at once.

Every function takes the labels and scores of one class, `[n]`, and `weights [D, n]`, how often a volume counts in each of D
draws (`bootstrap.PatientDraws.weights`), and returns `[D]`; without weights every volume counts once and it returns one
number. Volumes whose label is not known do not count. Where one of the two outcomes is missing the value is NaN: undefined,
never 0 or 1. A score that is NaN counts as wrong: as the lowest of all where the finding is present, else as the highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.evaluation.bootstrap import blocks, ratio, weighted_sum

ROC_POINTS = 101
BINS = 10


@dataclass(frozen=True)
class _Outcomes:
    """The volumes of a class whose label is known, sorted by score."""

    present: np.ndarray  # scores of the present, ascending
    absent: np.ndarray
    present_rows: np.ndarray  # where they stand among the n volumes
    absent_rows: np.ndarray


def _outcomes(labels: np.ndarray, scores: np.ndarray) -> _Outcomes:
    found: list[np.ndarray] = []
    for outcome, wrong in ((1, -np.inf), (0, np.inf)):
        rows = np.flatnonzero(labels == outcome)
        values = np.where(np.isnan(scores[rows]), wrong, scores[rows])
        order = np.argsort(values, kind="stable")
        found += [values[order], rows[order]]
    return _Outcomes(found[0], found[2], found[1], found[3])


def _weights(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones((1, len(labels)), np.uint8) if weights is None else weights


def _result(values: np.ndarray, weights: np.ndarray | None) -> Any:
    return float(values[0]) if weights is None else values


def _before(weights: np.ndarray) -> np.ndarray:
    """`[D, m] -> [D, m + 1]`: the sum of the weights before each place."""
    found = np.zeros((weights.shape[0], weights.shape[1] + 1))
    np.cumsum(weights, axis=1, dtype=np.float64, out=found[:, 1:])
    return found


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Area under the ROC curve: the chance that a present volume scores higher than an absent one, ties counting half."""
    given, one = _weights(labels, weights), _outcomes(labels, scores)
    lower = np.searchsorted(one.absent, one.present, side="left")
    upper = np.searchsorted(one.absent, one.present, side="right")
    found = np.full(len(given), np.nan)
    for rows in blocks(given):
        present = given[rows][:, one.present_rows].astype(np.float64)
        below = _before(given[rows][:, one.absent_rows])
        won = np.einsum("dp,dp->d", present, below[:, lower])
        if not np.array_equal(lower, upper):
            won = (won + np.einsum("dp,dp->d", present, below[:, upper])) / 2
        found[rows] = ratio(won, present.sum(axis=1) * below[:, -1])
    return _result(found, weights)


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Area under the precision-recall curve as a sum of steps, without interpolation; scikit-learn's definition."""
    given, one = _weights(labels, weights), _outcomes(labels, scores)
    same = np.searchsorted(one.present, one.present, side="left")  # ties enter together
    absent = np.searchsorted(one.absent, one.present, side="left")
    found = np.full(len(given), np.nan)
    for rows in blocks(given):
        present = given[rows][:, one.present_rows].astype(np.float64)
        of_present, of_absent = _before(present), _before(given[rows][:, one.absent_rows])
        true = of_present[:, -1:] - of_present[:, same]
        false = of_absent[:, -1:] - of_absent[:, absent]
        precision = np.divide(true, true + false, out=np.zeros_like(true), where=true > 0)
        area = ratio((present * precision).sum(axis=1), of_present[:, -1])
        found[rows] = np.where(of_absent[:, -1] > 0, area, np.nan)
    return _result(found, weights)


@dataclass(frozen=True)
class Counts:
    """How many volumes are called right and wrong, `[D]` each. Rates are NaN where an outcome is missing."""

    true_present: np.ndarray
    false_present: np.ndarray
    false_absent: np.ndarray
    true_absent: np.ndarray

    def _defined(self, values: np.ndarray) -> np.ndarray:
        return np.where((self.present > 0) & (self.absent > 0), values, np.nan)

    @property
    def present(self) -> np.ndarray:
        return self.true_present + self.false_absent

    @property
    def absent(self) -> np.ndarray:
        return self.true_absent + self.false_present

    @property
    def sensitivity(self) -> np.ndarray:
        return self._defined(ratio(self.true_present, self.present))

    @property
    def specificity(self) -> np.ndarray:
        return self._defined(ratio(self.true_absent, self.absent))

    @property
    def balanced_accuracy(self) -> np.ndarray:
        return (self.sensitivity + self.specificity) / 2

    @property
    def f1(self) -> np.ndarray:
        """Of "present"."""
        wrong = self.false_present + self.false_absent
        return self._defined(ratio(2 * self.true_present, 2 * self.true_present + wrong))

    @property
    def f1_both_outcomes(self) -> np.ndarray:
        """The F1 of "present" and that of "absent", weighted by how often each is true. CT-CLIP's public evaluation takes
        this for every class and calls it the weighted F1."""
        wrong = self.false_present + self.false_absent
        of_absent = ratio(2 * self.true_absent, 2 * self.true_absent + wrong)
        total = self.present + self.absent
        return self._defined(ratio(self.present * self.f1 + self.absent * of_absent, total))


def counts(labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray | None = None) -> Counts:
    """What a threshold decides: present where the score reaches it."""
    called = np.where(np.isnan(scores), labels == 0, scores >= threshold)
    kinds = np.stack([(labels == truth) & (called == call) for truth, call in ((1, 1), (0, 1), (1, 0), (0, 0))], axis=1)
    return Counts(*weighted_sum(kinds, _weights(labels, weights)).T)


def roc_curve(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The share of the present that is found, at `ROC_POINTS` even false positive rates from 0 to 1: `[D, points]`, or
    `[points]` without weights."""
    given, one = _weights(labels, weights), _outcomes(labels, scores)
    cuts = np.unique(np.concatenate([one.present, one.absent]))[::-1]
    grid, found = np.linspace(0, 1, ROC_POINTS), np.full((len(given), ROC_POINTS), np.nan)
    if not len(one.present) or not len(one.absent):
        return found[0] if weights is None else found
    places = [np.searchsorted(scores_, cuts, side="left") for scores_ in (one.present, one.absent)]
    for rows in blocks(given):
        shares = []
        for columns, place in zip((one.present_rows, one.absent_rows), places, strict=True):
            before = _before(given[rows][:, columns])
            reached = before[:, -1:] - before[:, place]
            shares.append(ratio(reached, np.broadcast_to(before[:, -1:], reached.shape)))
        for row, true, false in zip(range(rows.start, rows.start + len(shares[0])), *shares, strict=True):
            if not (np.isnan(true[-1]) or np.isnan(false[-1])):
                found[row] = np.interp(grid, np.r_[0, false], np.r_[0, true])
    return found[0] if weights is None else found


def brier(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Mean squared distance of the probability from the label, from 0 (perfect) to 1."""
    given, known = _weights(labels, weights), (labels >= 0).astype(np.float64)
    wrong = np.where(np.isnan(probabilities), 1.0, (probabilities - labels) ** 2) * known
    above, below, present = weighted_sum(np.stack([wrong, known, labels == 1], axis=1), given).T
    values = np.where((present > 0) & (present < below), ratio(above, below), np.nan)
    return _result(values, weights)


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, bins: int = BINS
) -> dict[str, np.ndarray]:
    """Even bins of the probability from 0 to 1, each `[D, bins]`: `count`, the mean `probability` in it, and `observed`, the
    share of volumes in it that have the finding. NaN in empty bins. A probability that is NaN is in none."""
    given = _weights(labels, weights)
    known = (labels >= 0) & ~np.isnan(probabilities)
    place = np.clip(np.nan_to_num(probabilities) * bins, 0, bins - 1).astype(int)
    inside = (place[:, None] == np.arange(bins)) & known[:, None]
    count, probability, observed = (
        weighted_sum(inside * values[:, None], given)
        for values in (np.ones(len(labels)), np.nan_to_num(probabilities), labels == 1)
    )
    return {
        "count": count,
        "probability": ratio(probability, count),
        "observed": ratio(observed, count),
    }


def calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, bins: int = BINS
) -> Any:
    """Expected calibration error: the distance of probability and observed share, weighted over even bins (Naeini et al.
    2015)."""
    given = _weights(labels, weights)
    found = reliability(labels, probabilities, given, bins)
    gaps = np.nan_to_num(np.abs(found["probability"] - found["observed"])) * found["count"]
    present = weighted_sum(labels == 1, given)
    total = found["count"].sum(axis=1)
    defined = (present > 0) & (weighted_sum(labels == 0, given) > 0)
    return _result(np.where(defined, ratio(gaps.sum(axis=1), total), np.nan), weights)


def macro(by_class: np.ndarray) -> np.ndarray:
    """The mean over classes, `[L, D] -> [D]`: in every draw of those that are defined in it; NaN where none is."""
    defined = ~np.isnan(by_class)
    return ratio(np.where(defined, by_class, 0).sum(axis=0), defined.sum(axis=0))
