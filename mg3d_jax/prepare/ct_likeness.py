"""How much does a histogram look like CT in Hounsfield units? The likelihood of all voxels under what a body is made of.

A body CT has few sharp landmarks: air at -1000 HU, fat near -100, muscle, brain and blood at 20 to 60. Lung, contrast medium
and bone are broad. Mixtures of these for a whole body, a body without air, a head and a crop of the lungs, each at several
levels of image noise, give every voxel a density; a mapping from stored numbers to HU is as good as the mean of its log. A
mapping that is 100 HU off puts the landmarks where only the broad parts are, and loses a multiple of what it could win.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

_BIN_HU = 10
_LOWEST, _HIGHEST = -1600, 3400
_REACH = 400  # HU: how far from a mapping a better one is sought
_CENTRES = np.arange(_LOWEST, _HIGHEST, _BIN_HU) + _BIN_HU / 2
_SHIFTS = np.arange(-_REACH, _REACH + _BIN_HU, _BIN_HU)
_NOISE = (0.0, 20.0, 40.0, 70.0, 100.0, 140.0)  # HU, standard deviation

# Shares of air, lung, fat, soft tissue, enhanced tissue, bone, anything.
_BODIES = {
    "whole body": (0.30, 0.15, 0.18, 0.25, 0.04, 0.07, 0.01),
    "no air": (0.005, 0.01, 0.30, 0.50, 0.09, 0.08, 0.015),
    "head": (0.35, 0.003, 0.05, 0.45, 0.02, 0.12, 0.007),
    "lungs": (0.03, 0.55, 0.08, 0.22, 0.05, 0.05, 0.02),
}


def _peak(centre: float, width: float) -> np.ndarray:
    return np.exp(-0.5 * ((_CENTRES - centre) / width) ** 2) / (width * np.sqrt(2 * np.pi))


def _flat(low: float, high: float) -> np.ndarray:
    return ((low < _CENTRES) & (high > _CENTRES)) / (high - low)


def _air(noise: float) -> np.ndarray:
    """Air as scanners store it: whole, or cut off at -1024."""
    whole = 0.8 * _peak(-998, np.hypot(14, noise)) + 0.2 * _peak(-1022, np.hypot(8, noise))
    lowest = int(np.searchsorted(_CENTRES, -1024 - _BIN_HU / 2))
    cut = whole.copy()
    cut[lowest] += cut[:lowest].sum()
    cut[:lowest] = 0
    return 0.5 * (whole + cut)


@functools.cache
def _log_densities() -> np.ndarray:
    """[bins, models]: log of the density per HU, models ordered as noise x body."""
    models = []
    for noise in _NOISE:
        parts = (
            _air(noise),
            0.7 * _peak(-870, np.hypot(60, noise)) + 0.3 * _flat(-970, -450),
            _peak(-102, np.hypot(20, noise)),
            0.8 * _peak(45, np.hypot(25, noise)) + 0.2 * _peak(15, np.hypot(25, noise)),
            0.6 * _peak(110, np.hypot(40, noise)) + 0.4 * _peak(200, np.hypot(90, noise)),
            np.where(_CENTRES > 100, np.exp(-(_CENTRES - 100) / 350) / 350, 0),
            _flat(-1060 - 3 * noise, 3100),
        )
        for shares in _BODIES.values():
            density = sum(share * part for share, part in zip(shares, parts, strict=True))
            models.append(np.log(density + 1e-8))
    return np.stack(models, axis=1)


@dataclass(frozen=True)
class Counts:
    """A histogram of stored numbers that any mapping can be applied to."""

    values: np.ndarray  # float64 [m]
    shares: np.ndarray  # float64 [m], sum 1

    @classmethod
    def of(cls, sample: np.ndarray) -> Counts:
        """Of the stored numbers of a sample of voxels, finite."""
        flat = sample.ravel()
        low, high = float(flat.min()), float(flat.max())
        if flat.dtype.kind in "iu" and high - low < 1 << 17:
            steps, step = flat.astype(np.int64) - int(low), 1.0
        else:
            low, high = (float(v) for v in np.percentile(flat, (0.05, 99.95)))
            step = max(high - low, 1e-12) / 8191
            steps = np.rint((np.clip(flat, low, high) - low) / step).astype(np.int64)
        counts = np.bincount(steps)
        there = np.flatnonzero(counts)
        return cls(low + there * step, counts[there] / flat.size)

    def quantile(self, share: float) -> float:
        """The stored number below which `share` of the voxels lie."""
        place = int(np.searchsorted(np.cumsum(self.shares), share))
        return float(self.values[min(place, len(self.values) - 1)])

    def in_hu(self, slope: float, intercept: float, low: float, high: float, step: float) -> np.ndarray:
        """Shares in bins of `step` HU from `low` to `high` of a mapping; what lies outside counts in the outermost."""
        bins = round((high - low) / step)
        place = np.clip((self.values * slope + intercept - low) / step, 0, bins - 1).astype(np.int64)
        return np.bincount(place, self.shares, bins)


@dataclass(frozen=True)
class Likeness:
    """How well a mapping fits, and what else would."""

    score: float  # mean log-likelihood per voxel, nats, of the stored numbers
    noise: float  # HU of the model that fits best
    body: str  # ... and what it is of
    best_shift: float  # HU within +-400 to add for the best fit
    gain: float  # by how much that fits better, nats per voxel
    near_gain: float  # by how much the best shift within +-30 fits better
    rival_shift: float  # the best shift of 80 HU and more
    rival_loss: float  # by how much that fits worse than this mapping


def likeness(counts: Counts, slope: float, intercept: float) -> Likeness:
    """Of the mapping `HU = slope * stored + intercept`; slope is not 0."""
    models, reach = _log_densities(), _REACH // _BIN_HU
    shares = counts.in_hu(slope, intercept, _LOWEST - _REACH, _HIGHEST + _REACH, _BIN_HU)
    shifted = np.empty((len(_SHIFTS), len(_CENTRES)))
    for row, shift in enumerate(range(-reach, reach + 1)):
        inside = shares[reach - shift : len(shares) - reach - shift].copy()
        inside[0] += shares[: reach - shift].sum()
        inside[-1] += shares[len(shares) - reach - shift :].sum()
        shifted[row] = inside
    fits = shifted @ models + np.log(abs(slope))
    profile = fits.max(axis=1)
    here, best, model = reach, int(profile.argmax()), int(fits[reach].argmax())
    near = np.abs(_SHIFTS) <= 30
    far = np.flatnonzero(np.abs(_SHIFTS) >= 80)
    rival = far[profile[far].argmax()]
    return Likeness(
        score=float(profile[here]),
        noise=_NOISE[model // len(_BODIES)],
        body=list(_BODIES)[model % len(_BODIES)],
        best_shift=float(_SHIFTS[best]),
        gain=float(profile[best] - profile[here]),
        near_gain=float(profile[near].max() - profile[here]),
        rival_shift=float(_SHIFTS[rival]),
        rival_loss=float(profile[here] - profile[rival]),
    )
