"""What do the stored numbers mean? A decision from the data, the header and the metadata table, never from one alone.

The commonest damage in public CT collections is a rescale applied twice (CT-RATE's `_fixed` volumes are HU already,
while the metadata still lists an intercept of -1024, or -8192 on 28 % of the validation volumes). So every possible
mapping `HU = slope * stored + intercept` is tried on a sample of the voxels: the header's, the table's, the numbers as they
are, and shifts that missing or double rescaling leaves behind. Those that can be CT at all (`Evidence`) are weighed by
their likelihood (`ct_likeness.py`), and the best is taken. What competes with it, or fits it badly, is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mg3d_jax.prepare.ct_likeness import Counts, Likeness, likeness
from mg3d_jax.prepare.nifti import VolumeError

Scaling = tuple[float, float]  # slope, intercept

STORED: Scaling = (1.0, 0.0)
_BIN_HU = 10
_SAME_HU = 1.5  # two mappings that differ by less on every voxel are one
_SHIFTS = (-1024.0, 1024.0, -1000.0, 1000.0, -8192.0, 8192.0)

# Nats per voxel. A mapping that is 100 HU off loses 0.1 (noise of 100 HU, hardly any air) to 3 (a whole chest).
_TIE = 0.1  # claims nearer than this are both possible
_REPAIR = 0.15  # by how much a shift that nobody claims must fit better than any claim
_OFF = 0.02  # what a shift of 40 HU and more may gain before it is said
_WRONG = 0.6  # ... and one of 80 HU and more before the volume is refused
_LEAST_LOSS = 0.05  # what every other shift, and every other scale, must lose for the mapping to be certain
# Other scales, and what each may gain alone. Without air a scale of 0.8 moves fat and tissue by 20 HU: hardly to be seen.
_SCALES = {
    0.5: -_LEAST_LOSS,
    2.0: -_LEAST_LOSS,
    -1.0: -_LEAST_LOSS,
    **dict.fromkeys((0.67, 0.8, 0.9, 1.11, 1.25, 1.5), _TIE),
}
_SCALED = 0.35  # what another scale, with any shift, may gain before it is said


@dataclass(frozen=True)
class Evidence:
    """How much a mapping makes the voxels look like CT. Shares are of the voxels that are not scanner padding."""

    soft_peak: float  # HU of the highest peak above -500
    air_peak: float | None  # HU of the highest peak below -500, None where there is hardly any air
    soft_share: float  # -200..250 HU
    negative_share: float  # below -20 HU: fat, lung, air; MR and label maps have none
    beyond_share: float  # below -1100 or above 1300 HU, noise allowed for
    noise: float = 0.0  # HU, standard deviation

    @property
    def plausible(self) -> bool:
        """Soft tissue where it belongs, air (if any) where it belongs, and little that the body does not contain."""
        soft = -140 - self.noise / 2 <= self.soft_peak <= 150 + self.noise / 2 and self.soft_share >= 0.03
        air = self.air_peak is None or -1080 - self.noise <= self.air_peak <= -650
        return soft and air and self.negative_share >= 0.02 and self.beyond_share <= 0.06


@dataclass(frozen=True)
class Mapping:
    """`HU = slope * stored + intercept`, where it came from, and what must be said about it."""

    slope: float
    intercept: float
    decision: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Candidate:
    """One mapping that may be meant."""

    scaling: Scaling
    origin: str  # "header", "stored", "table", "shift"
    found: Evidence
    fit: Likeness


def without_padding(sample: np.ndarray) -> np.ndarray:
    """The voxels that are not the constant outside a scanner's field of view (often -2000 or -3024, or 0 of unsigned
    data), nor its blurred rim. Such a constant is the smallest value, many voxels have it, and few have one near it."""
    lowest, spread = sample.min(), float(np.percentile(sample, 99.9) - sample.min())
    padding = np.count_nonzero(sample == lowest)
    inside = sample > lowest + 0.15 * spread
    rim = sample.size - np.count_nonzero(inside) - padding
    is_padding = padding >= 0.002 * sample.size and rim < 0.1 * padding and inside.any()
    return sample[inside] if is_padding else sample


def evidence(counts: Counts, scaling: Scaling, noise: float = 0.0) -> Evidence:
    """Evidence of a histogram of stored numbers, without padding, under a mapping."""
    low, high = -2500, 4000
    shares = counts.in_hu(*scaling, low, high, _BIN_HU)
    centres = np.arange(low, high, _BIN_HU) + _BIN_HU / 2
    smooth = np.convolve(shares, np.ones(5) / 5, mode="same")
    upper, lower = centres > -500, centres <= -500

    def share(low: float, high: float) -> float:
        return float(shares[(centres > low) & (centres < high)].sum())

    return Evidence(
        soft_peak=float(centres[upper][smooth[upper].argmax()]),
        air_peak=float(centres[lower][smooth[lower].argmax()]) if shares[lower].sum() > 0.05 else None,
        soft_share=share(-200, 250),
        negative_share=share(low - 1, -20),
        beyond_share=share(low - 1, -1100 - 3 * noise) + share(1300, high + 1),
        noise=noise,
    )


def _agree(a: Scaling, b: Scaling, counts: Counts) -> bool:
    ends = (counts.quantile(share) for share in (0.01, 0.99))
    return all(abs((a[0] - b[0]) * v + (a[1] - b[1])) <= _SAME_HU for v in ends)


def _text(mapping: Scaling) -> str:
    return f"slope {mapping[0]:g}, intercept {mapping[1]:g}"


def decide(sample: np.ndarray, header: Scaling | None, table: Scaling | None) -> Mapping:
    """The mapping from stored numbers to HU.

    sample: stored numbers of some 100,000 voxels spread over the volume, finite.
    header, table: (slope, intercept) of the NIfTI header and of the metadata csv, None where they say nothing.
    Of what can be CT the likeliest is taken: between claims that fit equally the header's, then the numbers as they are, then
    the table's; a shift that nobody claims only where it fits clearly better. Raises `VolumeError` where nothing looks like CT,
    or where what does is certainly off.
    """
    sample = sample.ravel()
    if sample.size and sample.min() == sample.max():
        raise VolumeError(f"constant: every voxel is {sample[0]:g}")
    counts = Counts.of(without_padding(sample))
    header = None if header == STORED else header
    table = None if table == STORED else table
    claims = {"header": header, "stored": STORED, "table": table}
    found = [
        c for origin, scaling in claims.items() if scaling is not None and (c := _candidate(counts, scaling, origin))
    ]
    shifts = [c for shift in _SHIFTS if (c := _candidate(counts, (1.0, shift), "shift"))]
    if not found and not shifts:
        raise VolumeError(_not_ct(counts, header, table))
    chosen = _best(found, shifts)
    warnings = [*_said_of_claims(chosen, found, header, table, counts), *_said_of_fit(chosen, counts)]
    return Mapping(*chosen.scaling, _decision(chosen, table), warnings)


def _candidate(counts: Counts, scaling: Scaling, origin: str) -> _Candidate | None:
    """`None` for a mapping under which the numbers cannot be CT."""
    if scaling[0] <= 0:
        return None
    if not evidence(counts, scaling, noise=150.0).plausible:  # as much noise as there is: spares most of the work
        return None
    fit = likeness(counts, *scaling)
    found = evidence(counts, scaling, fit.noise)
    return _Candidate(scaling, origin, found, fit) if found.plausible else None


def _best(found: list[_Candidate], shifts: list[_Candidate]) -> _Candidate:
    """The likeliest; of claims that tie, the first."""
    claim = max(found, key=lambda c: c.fit.score, default=None)
    if claim is not None:
        claim = next(c for c in found if c.fit.score > claim.fit.score - _TIE / 5)
    shift = max(shifts, key=lambda c: c.fit.score, default=None)
    if claim is None or (shift is not None and shift.fit.score > claim.fit.score + _REPAIR):
        assert shift is not None
        return shift
    return claim


def _decision(chosen: _Candidate, table: Scaling | None) -> str:
    if chosen.origin == "stored" and table is not None:
        return f"stored numbers are HU; the table's {_text(table)} not applied a second time"
    return {
        "header": "header slope and intercept applied",
        "stored": "stored numbers are HU",
        "table": "slope and intercept of the metadata table applied",
        "shift": "repaired by shift",
    }[chosen.origin]


def _said_of_claims(
    chosen: _Candidate, found: list[_Candidate], header: Scaling | None, table: Scaling | None, counts: Counts
) -> list[str]:
    """What contradicts the mapping that was taken."""
    said = []
    rivals = {c.origin: c for c in found if not _agree(c.scaling, chosen.scaling, counts)}
    near = {origin for origin, c in rivals.items() if c.fit.score > chosen.fit.score - _TIE}
    if chosen.origin == "shift":
        said.append(
            f"repaired: of all that was tried only a shift by {chosen.scaling[1]:+g} makes the numbers look like CT"
        )
    if chosen.origin == "header":
        if table is not None and not _agree(chosen.scaling, table, counts):
            said.append(f"header ({_text(chosen.scaling)}) and metadata table ({_text(table)}) disagree: header used")
    elif header is not None and not _agree(chosen.scaling, header, counts):
        instead = f"with it they look less like CT than with {_text(chosen.scaling)}"
        what = "the stored numbers are HU already" if chosen.origin == "stored" else instead
        said.append(f"header says {_text(header)}, but {what}: not applied")
    if chosen.origin == "shift" and table is not None:
        said.append(f"the metadata table says {_text(table)}, which does not fit: not applied")
    if chosen.origin == "stored" and "table" in near and table is not None:
        said.append(f"with and without the table's {_text(table)} it looks like CT: not applied")
    if chosen.origin != "stored" and "stored" in near:
        said.append(f"with and without {_text(chosen.scaling)} it looks like CT: applied")
    return said


def _said_of_fit(chosen: _Candidate, counts: Counts) -> list[str]:
    """Whether the landmarks lie where they belong. Raises `VolumeError` where they certainly do not."""
    fit, where = chosen.fit, _text(chosen.scaling)
    if abs(fit.best_shift) >= 80 and fit.gain >= _WRONG:
        raise VolumeError(
            f"does not look like CT in Hounsfield units: with {where} air and tissue lie about {-fit.best_shift:+g} HU off; "
            "correct the slope and intercept in its header, or in the metadata table"
        )
    if abs(fit.best_shift) >= 40 and fit.gain > _OFF:
        return [f"HU may be off: with {where} air and tissue lie about {-fit.best_shift:+g} HU from where they belong"]
    if fit.rival_loss < _LEAST_LOSS:
        return [
            f"HU not certain: a shift by {fit.rival_shift:+g} would look as much like CT (little air, or much noise)"
        ]
    for scale, most in _SCALES.items():
        other = likeness(counts, chosen.scaling[0] * scale, chosen.scaling[1] * scale)
        alone = other.score + other.near_gain > fit.score + most
        if alone or other.score + other.gain > fit.score + _SCALED:
            return [f"HU not certain: scaled by {scale:g} it would look as much like CT (little air)"]
    if fit.body == "lungs" and chosen.origin in ("stored", "shift"):
        return ["HU not certain: hardly more than lung, and neither header nor table confirms them"]
    return []


def _not_ct(counts: Counts, header: Scaling | None, table: Scaling | None) -> str:
    found, low, high = evidence(counts, STORED), counts.quantile(0.01), counts.quantile(0.99)
    claims = ", ".join(f"{n} {_text(v)}" for n, v in (("header", header), ("table", table)) if v is not None)
    return (
        f"does not look like CT in Hounsfield units: stored numbers peak at {found.soft_peak:g} "
        f"(1st to 99th percentile {low:g} to {high:g}); {claims or 'no slope and intercept are given'}"
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
