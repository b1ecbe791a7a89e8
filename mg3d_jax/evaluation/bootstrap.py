"""Intervals by resampling patients: the volumes of a patient are drawn together, because they are not independent.

A draw is a row of integer weights, how often each volume counts, so that a metric is computed for all draws at once and
nothing is copied or sorted again. Two models that are weighted by the same draws are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mg3d_jax.errors import UserError

DRAWS = 1000
LEVEL = 0.95
BLOCK = 1 << 20  # elements of a block of weights that is worked on at a time: 8 MiB as float64


class PatientDraws:
    """`draws` samples of the distinct patients with replacement, each of as many as there are. Of a single patient all are
    empty: intervals are then NaN.

    The same patients, number of draws and seed give the same samples, whatever the order of the volumes.

    Args:
        patients: `[n]`, one entry per volume.
    """

    def __init__(self, patients: np.ndarray, draws: int = DRAWS, seed: int = 0):
        self.patients = np.unique(np.asarray(patients))
        if not len(self.patients):
            raise UserError("there is nothing to resample: no patient is left")
        self.draws, count = draws, len(self.patients)
        rng = np.random.default_rng(seed)
        self._counts = np.ones((1 + draws, count), np.uint8)
        if count == 1:  # it says nothing of other patients: intervals are undefined, and not of length 0
            self._counts[1:] = 0
            return
        for row in range(1, 1 + draws):
            # As bytes: that a patient is drawn 256 times does not happen.
            self._counts[row] = np.bincount(rng.integers(0, count, count), minlength=count)

    def weights(self, patients: np.ndarray) -> np.ndarray:
        """How often each volume counts: uint8 `[1 + draws, n]`. The first row is the data as they are: all ones.

        Args:
            patients: `[n]`, of those that the samples were drawn from, in any order and number. `KeyError` for others.
        """
        patients = np.asarray(patients)
        place = np.searchsorted(self.patients, patients)
        found = self.patients[np.minimum(place, len(self.patients) - 1)] == patients
        if not found.all():
            raise KeyError(f"patient {patients[~found][0]!r} is not among those of the draws")
        return self._counts[:, place]


def interval(values: np.ndarray) -> list[float]:
    """The central 95 % of `values[1:]`, those of the draws; NaN at both ends where no draw has a value."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return [float("nan")] * 2
    return [float(x) for x in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def blocks(weights: np.ndarray) -> Iterator[slice]:
    """Slices of the rows of `weights [D, n]` that together hold at most `BLOCK` elements, at least one row each."""
    step = max(1, BLOCK // max(1, weights.shape[1]))
    for start in range(0, len(weights), step):
        yield slice(start, start + step)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of `values [n]` or `[n, m]` in every draw of `weights [D, n]`: `[D]` or `[D, m]`. NaN where nothing counts."""
    return ratio(weighted_sum(values, weights), weighted_sum(np.ones(weights.shape[1]), weights))


def weighted_sum(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum of `values [n]` or `[n, m]` in every draw of `weights [D, n]`: `[D]` or `[D, m]`."""
    values = np.asarray(values, np.float64)
    found = np.empty((len(weights), *values.shape[1:]))
    for rows in blocks(weights):
        found[rows] = weights[rows].astype(np.float64) @ values
    return found


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median of `values [n]` in every draw of `weights [D, n]`, as of a list with each value as often as it counts.
    NaN where nothing counts."""
    order = np.argsort(values, kind="stable")
    ordered = np.append(np.asarray(values, np.float64)[order], np.nan)
    found = np.empty(len(weights))
    for rows in blocks(weights):
        below = np.cumsum(weights[rows][:, order], axis=1, dtype=np.int64)
        total = below[:, -1] if len(order) else np.zeros(len(below), np.int64)
        lower, upper = ((below <= np.maximum(at, 0)[:, None]).sum(axis=1) for at in ((total - 1) // 2, total // 2))
        found[rows] = np.where(total > 0, (ordered[lower] + ordered[upper]) / 2, np.nan)
    return found


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, NaN where `below` is 0; `below` may lack the last axes of `above`."""
    below = below.reshape(below.shape + (1,) * (above.ndim - below.ndim))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
