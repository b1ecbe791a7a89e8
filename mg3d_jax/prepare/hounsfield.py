"""What do the stored numbers mean? A decision from the data, the header and the metadata table, never from one alone.

The commonest damage in public CT collections is a rescale applied twice (CT-RATE's `_fixed` volumes are HU already,
while the metadata still lists an intercept of -1024, or -8192 on 28 % of the validation volumes). So each possible
mapping `HU = slope * stored + intercept` is tried on a sample of the voxels, and it must look like CT: a peak of soft
tissue near 0..60 HU, air (where there is any) near -1000, little beyond bone, little in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mg3d_jax.prepare.nifti import VolumeError

_BIN_HU = 10
_SAME_HU = 1.5  # two mappings that differ by less on every voxel are one


@dataclass(frozen=True)
class Evidence:
    """How much a mapping makes the voxels look like CT. Shares are of the voxels that are not scanner padding."""

    soft_peak: float  # HU of the highest peak above -500
    air_peak: float | None  # HU of the highest peak below -500, None where there is hardly any air
    soft_share: float  # -200..250 HU
    negative_share: float  # below -20 HU: fat, lung, air; MR and label maps have none
    beyond_share: float  # below -1100 or above 1300 HU

    @property
    def plausible(self) -> bool:
        """Soft tissue where it belongs, air (if any) where it belongs, and little that the body does not contain."""
        soft = -140 <= self.soft_peak <= 150 and self.soft_share >= 0.03
        air = self.air_peak is None or -1080 <= self.air_peak <= -650
        return soft and air and self.negative_share >= 0.02 and self.beyond_share <= 0.06


@dataclass(frozen=True)
class Mapping:
    """`HU = slope * stored + intercept`, where it came from, and what must be said about it."""

    slope: float
    intercept: float
    decision: str
    warnings: list[str] = field(default_factory=list)


def without_padding(sample: np.ndarray) -> np.ndarray:
    """The voxels that are not the constant outside a scanner's field of view (often -2000 or -3024, or 0 of unsigned
    data), nor its blurred rim. Such a constant is the smallest value, many voxels have it, and few have one near it."""
    lowest, spread = sample.min(), float(np.percentile(sample, 99.9) - sample.min())
    padding = np.count_nonzero(sample == lowest)
    inside = sample > lowest + 0.15 * spread
    rim = sample.size - np.count_nonzero(inside) - padding
    is_padding = padding >= 0.002 * sample.size and rim < 0.1 * padding and inside.any()
    return sample[inside] if is_padding else sample


def evidence(hu: np.ndarray) -> Evidence:
    """Evidence of a sample of voxels, in HU, without padding."""
    edges = np.arange(-2500, 4000 + _BIN_HU, _BIN_HU)
    counts = np.histogram(np.clip(hu, edges[0], edges[-1]), edges)[0].astype(np.float64)
    smooth = np.convolve(counts, np.ones(5) / 5, mode="same")
    centres = (edges[:-1] + edges[1:]) / 2
    upper, lower = centres > -500, centres <= -500
    air_share = counts[lower].sum() / max(hu.size, 1)
    return Evidence(
        soft_peak=float(centres[upper][smooth[upper].argmax()]),
        air_peak=float(centres[lower][smooth[lower].argmax()]) if air_share > 0.05 else None,
        soft_share=float(np.mean((hu >= -200) & (hu <= 250))),
        negative_share=float(np.mean(hu < -20)),
        beyond_share=float(np.mean((hu < -1100) | (hu > 1300))),
    )


def _agree(a: tuple[float, float], b: tuple[float, float], sample: np.ndarray) -> bool:
    low, high = np.percentile(sample, (1, 99))
    return all(abs((a[0] - b[0]) * v + (a[1] - b[1])) <= _SAME_HU for v in (low, high))


def _text(mapping: tuple[float, float]) -> str:
    return f"slope {mapping[0]:g}, intercept {mapping[1]:g}"


def decide(sample: np.ndarray, header: tuple[float, float] | None, table: tuple[float, float] | None) -> Mapping:
    """The mapping from stored numbers to HU.

    sample: stored numbers of some 100,000 voxels spread over the volume, finite.
    header, table: (slope, intercept) of the NIfTI header and of the metadata csv, None where they say nothing.
    Order of trust among what looks like CT: header, stored numbers as they are, table, then the shifts by 1024 and 8192
    that double or missing rescaling leaves behind. Raises `VolumeError` where nothing looks like CT.
    """
    sample = sample.astype(np.float64, copy=False).ravel()
    if sample.size and sample.min() == sample.max():
        raise VolumeError(f"constant: every voxel is {sample[0]:g}")
    tissue = without_padding(sample)
    stored = (1.0, 0.0)
    header = None if header is None or header == stored else header

    def looks_like_ct(mapping: tuple[float, float]) -> bool:
        return mapping[0] > 0 and evidence(tissue * mapping[0] + mapping[1]).plausible

    warnings: list[str] = []
    if header is not None and looks_like_ct(header):
        if table is not None and not _agree(header, table, tissue) and table != stored:
            warnings.append(f"header ({_text(header)}) and metadata table ({_text(table)}) disagree: header used")
        if looks_like_ct(stored):
            warnings.append(f"with and without the header's {_text(header)} it looks like CT: header used")
        return Mapping(*header, "header slope and intercept applied", warnings)
    if looks_like_ct(stored):
        if header is not None:
            warnings.append(f"header says {_text(header)}, but the stored numbers are HU already: not applied")
        decision = "stored numbers are HU"
        if table is not None and table != stored:
            decision += f"; the table's {_text(table)} not applied a second time"
            if looks_like_ct(table) and not _agree(table, stored, tissue):
                warnings.append(f"with and without the table's {_text(table)} it looks like CT: not applied")
        return Mapping(*stored, decision, warnings)
    if table is not None and table != stored and looks_like_ct(table):
        if header is not None:
            warnings.append(f"header says {_text(header)}, which does not look like CT: the metadata table was used")
        return Mapping(*table, "slope and intercept of the metadata table applied", warnings)
    shifts = [(1.0, shift) for shift in (-1024.0, 1024.0, -8192.0, 8192.0) if looks_like_ct((1.0, shift))]
    if len(shifts) == 1:
        warnings.append(f"repaired: only a shift by {shifts[0][1]:+g} makes the numbers look like CT")
        return Mapping(*shifts[0], "repaired by shift", warnings)
    found = evidence(tissue)
    claims = ", ".join(
        f"{name} {_text(value)}" for name, value in (("header", header), ("table", table)) if value is not None
    )
    raise VolumeError(
        f"does not look like CT in Hounsfield units: stored numbers peak at {found.soft_peak:g} "
        f"(1st to 99th percentile {np.percentile(tissue, 1):g} to {np.percentile(tissue, 99):g}); "
        f"{claims or 'no slope and intercept are given'}"
    )


_MR_PERCENTILES = (0.5, 99.5)
_MR_RANGE = (-1000.0, 1000.0)


def intensity_mapping(sample: np.ndarray) -> Mapping:
    """Of MR, whose numbers have no unit: the 0.5th and 99.5th percentile of the volume become -1000 and 1000, the HU window
    that models of this package read by default. Raises `VolumeError` for a constant volume."""
    low, high = np.percentile(sample, _MR_PERCENTILES) if sample.size else (0.0, 0.0)
    if not high > low:
        raise VolumeError(f"a constant volume: every voxel is {low:g}")
    slope = (_MR_RANGE[1] - _MR_RANGE[0]) / float(high - low)
    return Mapping(slope, _MR_RANGE[0] - slope * float(low), "MR: percentiles 0.5 and 99.5 become -1000 and 1000")
