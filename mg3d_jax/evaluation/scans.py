"""A scan from outside the prepared data, brought to the grid of a run as `mg3d prepare` would have."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import (
    POLICIES,
    STRAIGHTEN_DEGREES,
    Grid,
    Metadata,
    obliqueness,
    ras_order,
    resolve_geometry,
    voxel_spacing,
)
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.reading import read_volume
from mg3d_jax.prepare.volumes import prepare_stored
from mg3d_jax.training.restore import RestoredRun

logger = logging.getLogger(__name__)
ScanSource = str | Path | tuple[np.ndarray, np.ndarray]  # a file, a folder of slices, or voxels with their affine
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Scan:
    """A scan on a run's grid, and the space that it came from. Affines lead from voxels to mm, RAS+."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+
    affine: np.ndarray  # [4, 4] of `volume`
    shape: tuple[int, int, int]  # of the scan itself
    scan_affine: np.ndarray  # [4, 4] of the scan, as the preparation reads it
    header_affine: np.ndarray  # [4, 4] of the scan, as its file has it: the same, unless the file says too little


def run_grid(run: RestoredRun, spacing: Spacing | None = None, policy: str | None = None) -> Grid:
    """The grid that the volumes of a run were brought to.

    Args:
        spacing: mm per voxel; None takes what the checkpoint or the run's first data folder says.
        policy: one of `geometry.POLICIES`; None takes that of the run's first data folder, or "center" without it.

    Raises:
        UserError: nothing says which spacing the volumes have, or there is no such policy.
    """
    settings = run.prepared("settings") or {}
    policy = policy or settings.get("policy") or "center"
    if policy not in POLICIES:
        raise UserError(f"policy {policy!r}: choose one of {', '.join(POLICIES)}")
    spacing = tuple(spacing or run.prepared("spacing") or ()) or None
    if spacing is None and policy != "fraction":
        raise UserError(
            f"neither the checkpoint nor a manifest in data.train = {tuple(run.config.data.train)} says which spacing the "
            "volumes have: give it in mm (spacing, or --spacing X Y Z)"
        )
    fraction = {"fraction": tuple(settings["fraction"])} if settings.get("fraction") else {}
    return Grid(run.config.grid, spacing or (1.0, 1.0, 1.0), policy, **fraction)


def read_scan(source: ScanSource, grid: Grid, *, whole: bool = False, modality: str = "CT") -> Scan:
    """Reads a scan and brings it to `grid`: what its numbers mean in HU is decided as in `mg3d prepare`.

    Args:
        source: a NIfTI file, a folder with the slices of one DICOM series, or `(array [i, j, k], affine [4, 4])`.
        whole: with the voxel size of `grid`, but as many voxels as hold the whole scan.
        modality: "CT" or "MR", whose intensities are mapped to numbers of the size of HU.

    Raises:
        UserError: it is missing, damaged, not one CT volume, or has voxels that are not finite.
    """
    metadata = Metadata(modality=modality)
    name = "the array given" if isinstance(source, tuple) else str(source)
    try:
        stored = _stored(*source) if isinstance(source, tuple) else read_volume(Path(source), metadata)
        affine = resolve_geometry(stored, metadata, [])
        prepared = prepare_stored(stored, whole_grid(grid, stored.data.shape, affine) if whole else grid, metadata)
    except (VolumeError, OSError) as error:
        raise UserError(
            f"{name}: cannot be used ({error}): give a CT volume as .nii, .nii.gz or DICOM series"
        ) from error
    for warning in prepared.quality["warnings"]:
        logger.warning("%s: %s", name, warning)
    return Scan(prepared.volume, prepared.affine, stored.data.shape, affine, stored.affine)


def whole_grid(grid: Grid, shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """The grid that holds a whole scan of this shape and affine, with the voxel size that `grid` has on it."""
    order, _ = ras_order(affine)
    extent = (np.array(shape) * voxel_spacing(affine))[list(order)]  # mm, RAS+
    spacing = np.array(grid.spacing)
    if grid.policy == "fraction":
        spacing = extent * grid.fraction / np.array(grid.size)
    if obliqueness(affine) > STRAIGHTEN_DEGREES:  # it will be turned onto the scanner's axes
        corners = np.array(list(np.ndindex(2, 2, 2))) * shape @ affine[:3, :3].T
        extent = np.ptp(corners, axis=0)
    x, y, z = (max(1, int(np.ceil(mm / step - 1e-6))) for mm, step in zip(extent, spacing, strict=True))
    return Grid((x, y, z), (float(spacing[0]), float(spacing[1]), float(spacing[2])))


def _stored(array: np.ndarray, affine: np.ndarray) -> StoredVolume:
    array, affine = np.asarray(array), np.asarray(affine, np.float64)
    if array.ndim != 3 or array.dtype.kind not in "iuf" or affine.shape != (4, 4):
        raise VolumeError(
            f"voxels of shape {array.shape} and type {array.dtype} with an affine of shape {affine.shape}: needed are "
            "three axes of numbers and (4, 4)"
        )
    return StoredVolume(array, affine, scaling=None, has_orientation=True)
