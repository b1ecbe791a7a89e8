"""Procedural chest CT patients: anatomy, findings, report, labels, reconstructions, from `(seed, split, index)`.

`make_patient` is cheap; a reconstruction's voxels are computed when its `hu` is first read. No real patient is in here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mg3d_jax.batch import AIR_HU, HIGHEST_HU
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.phantom import clinical, plain
from mg3d_jax.phantom.abnormalities import FINDINGS, adapt_anatomy
from mg3d_jax.phantom.anatomy import Anatomy, draw_anatomy, sample_anatomy
from mg3d_jax.phantom.canvas import Canvas, triple
from mg3d_jax.phantom.finding import Finding
from mg3d_jax.phantom.presence import CHRONIC, OLDEST, YOUNGEST, Presence, sample_evenly, sample_like_ct_rate
from mg3d_jax.phantom.wording import Report

SPLITS = ("train", "valid")
_TWO_SCANS, _TWO_RECONSTRUCTIONS = 0.15, 0.2


@dataclass(frozen=True)
class Style:
    """How labels are drawn and reports are written.

    `generator` is its version: a new number whenever the same seed gives different files.
    """

    generator: int
    presence: Callable[[np.random.Generator, int, Presence | None], Presence]
    report: Callable[..., Report]


# clinical: labels and language like CT-RATE's. plain: even, independent labels and short sentences; all of version 0.1.0.
STYLES = {
    "clinical": Style(2, sample_like_ct_rate, clinical.write_report),
    "plain": Style(1, sample_evenly, plain.write_report),
}
STYLE = "clinical"


@dataclass(frozen=True)
class Grid:
    """Where a reconstruction samples the chest, in RAS+ order: voxels, mm per voxel, the first voxel's centre in mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]


@dataclass(frozen=True)
class Reconstruction:
    """One file: `name` ("train_1_a_1"), `affine` [4, 4] from voxel to RAS mm, and csv `metadata`."""

    name: str
    grid: Grid
    orientation: str  # "RAS" or "LPS": the order of the stored axes
    noise_hu: float
    noise_seed: int
    anatomy: Anatomy
    findings: dict[str, Finding]
    metadata: dict[str, str]

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to RAS mm, float64 [4, 4]."""
        spacing, origin = np.array(self.grid.spacing), np.array(self.grid.origin)
        if self.orientation == "LPS":
            flip = np.array([True, True, False])
            origin = np.where(flip, origin + spacing * (np.array(self.grid.shape) - 1), origin)
            spacing = np.where(flip, -spacing, spacing)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = origin
        return affine

    @functools.cached_property
    def hu(self) -> np.ndarray:
        """int16 HU [i, j, k] as stored in the file: axes ordered as `orientation` says."""
        axes = (
            o + s * np.arange(n) for n, s, o in zip(self.grid.shape, self.grid.spacing, self.grid.origin, strict=True)
        )
        canvas = Canvas(*axes)
        draw_anatomy(canvas, self.anatomy)
        for name, (_, draw) in FINDINGS.items():
            if name in self.findings:
                draw(canvas, self.anatomy, self.findings[name])
        rng = np.random.default_rng(self.noise_seed)
        hu = canvas.hu
        hu += np.float32(self.noise_hu) * rng.standard_normal(hu.shape, np.float32)
        stored = np.clip(np.rint(hu), AIR_HU, HIGHEST_HU).astype(np.int16)
        return stored[::-1, ::-1] if self.orientation == "LPS" else stored


@dataclass(frozen=True)
class PhantomScan:
    """One visit: findings, labels in the order of `ABNORMALITIES`, one report, one or two reconstructions."""

    name: str  # "train_1_a"
    anatomy: Anatomy
    findings: dict[str, Finding]
    report: Report
    reconstructions: tuple[Reconstruction, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(int(name in self.findings) for name in ABNORMALITIES)


@dataclass(frozen=True)
class PhantomPatient:
    """One patient: `name` ("train_1") and one or two scans."""

    name: str
    scans: tuple[PhantomScan, ...]


def make_patient(seed: int, index: int, split: str, style: str = STYLE) -> PhantomPatient:
    """Patient `index` (from 0) of `split` ("train" or "valid"): the same whatever the number of patients.

    Train and valid are different streams of the same seed. `style` is a name of `STYLES`.
    """
    key = (SPLITS.index(split), index)

    def stream(*more: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*key, *more)))

    rng = stream(0)
    name = f"{split}_{index + 1}"
    sex, age = ("M", "F")[int(rng.integers(2))], int(rng.integers(YOUNGEST, OLDEST + 1))
    body = sample_anatomy(rng, age=age, sex=sex)
    scans: list[PhantomScan] = []
    presence: Presence | None = None
    for number in range(2 if rng.random() < _TWO_SCANS else 1):
        scan_rng = stream(1, number)
        presence = STYLES[style].presence(scan_rng, age, presence)
        # What is chronic keeps its geometry between the scans of a patient.
        anatomy = adapt_anatomy(stream(2), body, presence)
        findings = {}
        for position, abnormality in enumerate(ABNORMALITIES):
            if presence[abnormality]:
                own = stream(3, position) if abnormality in CHRONIC else stream(4, number, position)
                findings[abnormality] = FINDINGS[abnormality][0](own, anatomy)
        scan_name = f"{name}_{'ab'[number]}"
        report = STYLES[style].report(stream(5, number), findings, contrast=anatomy.blood_hu > 90)
        count = 2 if scan_rng.random() < _TWO_RECONSTRUCTIONS else 1
        date = (
            f"{2015 + int(scan_rng.integers(8))}{int(scan_rng.integers(1, 13)):02d}{int(scan_rng.integers(1, 29)):02d}"
        )
        reconstructions = tuple(
            _sample_reconstruction(stream(6, number, k), f"{scan_name}_{k + 1}", anatomy, findings, date)
            for k in range(count)
        )
        scans.append(PhantomScan(scan_name, anatomy, findings, report, reconstructions))
    return PhantomPatient(name, tuple(scans))


def _sample_reconstruction(
    rng: np.random.Generator, name: str, anatomy: Anatomy, findings: dict[str, Finding], date: str
) -> Reconstruction:
    in_plane, through = float(np.round(rng.uniform(2.6, 4.0), 2)), float(np.round(rng.uniform(3.0, 5.0), 1))
    spacing = (in_plane, in_plane, through)
    extent = np.array([2 * anatomy.body[0] + 24, 2 * anatomy.body[1] + 40, rng.uniform(285, 315)])
    shape = tuple(int(np.ceil(e / s)) for e, s in zip(extent, spacing, strict=True))
    # The patient never lies exactly in the middle of the field of view.
    shift = rng.normal(0, 4, 3)
    origin = tuple(float(np.round(c - s * (n - 1) / 2, 3)) for c, n, s in zip(shift, shape, spacing, strict=True))
    orientation = ("RAS", "LPS")[int(rng.integers(2))]
    sharp = bool(rng.random() < 0.4)
    grid = Grid((shape[0], shape[1], shape[2]), spacing, triple(origin))
    noise = float(rng.uniform(28, 40) if sharp else rng.uniform(10, 20))
    seed = int(rng.integers(2**31))
    blank = Reconstruction(name, grid, orientation, noise, seed, anatomy, findings, {})
    affine = blank.affine
    first = affine[:3, 3] * (-1, -1, 1)  # DICOM's patient coordinates are LPS
    direction = -np.sign(affine[0, 0])
    metadata = {
        "VolumeName": f"{name}.nii.gz",
        "Manufacturer": "MG-3D phantom",
        "SeriesDescription": f"Thorax {'lung' if sharp else 'soft tissue'} {through:g} mm",
        "ManufacturerModelName": "procedural",
        "PatientSex": anatomy.sex,
        "PatientAge": f"{anatomy.age:03d}Y",
        "ReconstructionDiameter": f"{in_plane * max(shape[:2]):g}",
        "ConvolutionKernel": "sharp" if sharp else "smooth",
        "PatientPosition": "HFS",
        "ImagePositionPatient": str([float(np.round(value, 3)) for value in first]),
        "ImageOrientationPatient": str([float(direction), 0.0, 0.0, 0.0, float(direction), 0.0]),
        "Rows": str(shape[1]),
        "Columns": str(shape[0]),
        "XYSpacing": str([in_plane, in_plane]),
        "ZSpacing": f"{through:g}",
        "RescaleIntercept": "0",
        "RescaleSlope": "1",
        "RescaleType": "HU",
        "NumberofSlices": str(shape[2]),
        "StudyDate": date,
    }
    return Reconstruction(name, grid, orientation, noise, seed, anatomy, findings, metadata)
