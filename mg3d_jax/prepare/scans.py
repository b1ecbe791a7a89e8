"""One scan from anywhere -> a grid, as `mg3d prepare` brings the volumes of a data set to theirs.

Exported folders carry this module and those that it imports (`interop.export_preparation`): nothing here needs JAX.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

logger = logging.getLogger(__name__)
Spacing = tuple[float, float, float]  # mm, RAS+
ScanSource = str | Path | tuple[np.ndarray, np.ndarray]  # a file, a folder of slices, or voxels with their affine


def trained_grid(
    size: tuple[int, int, int],
    settings: Mapping[str, Any],
    spacing: Sequence[float] | None,
    policy: str | None = None,
) -> Grid:
    """The grid that the volumes of a model's training data were brought to.

    Args:
        size: voxels.
        settings: of the preparation, as a checkpoint or a manifest has them: "policy", "fraction"; in "mixed" the keys that
            differed between the folders of the data.
        spacing: mm per voxel.
        policy: one of `geometry.POLICIES` in place of the one of `settings`; "center" where nothing says it.

    Raises:
        UserError: nothing says which spacing or which of several policies, or there is no such policy.
    """
    if policy is None and (mixed := {"policy", "fraction"} & set(settings.get("mixed", ()))):
        raise UserError(
            f"the folders of data.train were prepared with more than one {' and '.join(sorted(mixed))}: say by which one a "
            "scan is to be placed (policy, or --policy)"
        )
    policy = policy or settings.get("policy") or "center"
    if policy not in POLICIES:
        raise UserError(f"policy {policy!r}: choose one of {', '.join(POLICIES)}")
    if not spacing and policy != "fraction":
        raise UserError(
            "neither the checkpoint nor the manifest of its training data says which spacing the volumes have: give it in mm "
            "(spacing, or --spacing X Y Z)"
        )
    x, y, z = spacing or (1.0, 1.0, 1.0)
    fraction = {"fraction": tuple(settings["fraction"])} if settings.get("fraction") else {}
    return Grid(size, (float(x), float(y), float(z)), policy, **fraction)


@dataclass(frozen=True)
class Scan:
    """A scan on a run's grid, and the space that it came from. Affines lead from voxels to mm, RAS+."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+
    affine: np.ndarray  # [4, 4] of `volume`
    shape: tuple[int, int, int]  # of the scan itself
    scan_affine: np.ndarray  # [4, 4] of the scan, as the preparation reads it
    header_affine: np.ndarray  # [4, 4] of the scan, as its file has it: the same, unless the file says too little


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
