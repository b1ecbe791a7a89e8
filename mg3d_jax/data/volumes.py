"""One volume file -> checked HU -> RAS+ -> target spacing -> fixed grid, int16, with its affine and a QA record.

    nifti.read_nifti -> geometry -> hounsfield.decide -> crop -> resample -> PreparedVolume

Cropping comes before resampling and everything is done slab by slab, so that memory stays near the size of the file's
own voxels. Oblique volumes keep their own axes (the nearest RAS+ order); the affine says how they lie in the scanner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d_jax.data.hounsfield import AIR_HU, HIGHEST_HU, Mapping, decide
from mg3d_jax.data.nifti import StoredVolume, VolumeError, read_nifti
from mg3d_jax.data.resample import AxisMap, resample

_SAMPLE_VOXELS = 400_000
_SPACING_LIMITS = (0.05, 25.0)  # mm: what a body CT can have
_FEW_SLICES = 8
_MOST_NAN = 0.01  # share of voxels that are not finite and may be taken for air


@dataclass(frozen=True)
class Grid:
    """The grid that every volume is brought to: voxels and mm per axis, RAS+ order."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Metadata:
    """What a metadata table says about a volume; `None` where it says nothing."""

    scaling: tuple[float, float] | None = None  # rescale slope, intercept
    spacing: tuple[float, float, float] | None = None  # mm: column, row, slice
    orientation: tuple[float, ...] | None = None  # DICOM ImageOrientationPatient, LPS
    position: tuple[float, float, float] | None = None  # DICOM ImagePositionPatient, LPS
    slices: int | None = None


@dataclass(frozen=True)
class PreparedVolume:
    """A volume on the grid. `affine` maps its voxels to the scanner's mm, so that a voxel can be found again."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+
    affine: np.ndarray  # float64 [4, 4]
    quality: dict[str, Any] = field(default_factory=dict)


def voxel_spacing(affine: np.ndarray) -> np.ndarray:
    """mm along each voxel axis of an affine."""
    return np.sqrt((affine[:3, :3] ** 2).sum(0))


def table_affine(metadata: Metadata) -> np.ndarray | None:
    """Affine (RAS+) from DICOM tags of a table: index axes (column, row, slice), slices stacked along the normal.
    `None` without a spacing; LPS axes and origin 0 where orientation or position is missing."""
    if metadata.spacing is None:
        return None
    cosines = np.array(metadata.orientation or (1, 0, 0, 0, 1, 0), np.float64).reshape(2, 3)
    axes = np.stack([cosines[0], cosines[1], np.cross(cosines[0], cosines[1])], axis=1)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(metadata.spacing)
    affine[:3, 3] = metadata.position or (0, 0, 0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def resolve_geometry(stored: StoredVolume, metadata: Metadata, warnings: list[str]) -> np.ndarray:
    """The affine to believe: the header's, unless it is blank; then the table's. `VolumeError` without either."""
    spacing = voxel_spacing(stored.affine)
    finite = bool(np.isfinite(stored.affine).all())
    singular = not finite or spacing.min() <= 0 or abs(np.linalg.det(stored.affine[:3, :3] / spacing)) < 0.1
    blank = not stored.has_orientation
    from_table = table_affine(metadata)
    if (blank or singular) and from_table is not None:
        warnings.append("the header has no usable geometry: spacing and orientation come from the metadata table")
        return from_table
    if singular:
        raise VolumeError(f"the header's affine is unusable ({stored.affine[:3].tolist()}) and no table replaces it")
    if blank and np.allclose(spacing, 1):
        raise VolumeError("the header is blank (no orientation, spacing 1 mm) and no metadata table replaces it")
    if blank:
        warnings.append("the header has no orientation: LPS index axes assumed, left and right are not certain")
        affine = stored.affine.copy()
        affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) * spacing
        return affine
    if not (_SPACING_LIMITS[0] <= spacing.min() and spacing.max() <= _SPACING_LIMITS[1]):
        raise VolumeError(f"spacing {spacing.round(4).tolist()} mm is not that of a body CT")
    if metadata.spacing is not None and not np.allclose(sorted(spacing), sorted(metadata.spacing), rtol=0.02):
        warnings.append(f"spacing of header {spacing.round(3).tolist()} and table {list(metadata.spacing)} mm disagree")
    return stored.affine


def sample_voxels(data: np.ndarray) -> np.ndarray:
    """A regular sample of about `_SAMPLE_VOXELS` voxels, whatever the shape."""
    strides = [max(1, round((data.size / _SAMPLE_VOXELS) ** (1 / 3)))] * 3
    return data[:: strides[0], :: strides[1], :: strides[2]].ravel()


def _finite_sample(data: np.ndarray, warnings: list[str]) -> np.ndarray:
    """Sampled finite voxels; refuses a volume with more than a few that are not finite."""
    if data.dtype.kind != "f":
        return sample_voxels(data)
    bad = sum(int(np.count_nonzero(~np.isfinite(data[..., k]))) for k in range(data.shape[2]))
    if bad > _MOST_NAN * data.size:
        raise VolumeError(f"NaN or infinite in {bad} of {data.size} voxels ({bad / data.size:.0%})")
    if bad:
        warnings.append(f"{bad} voxels are NaN or infinite: taken for air")
    sample = sample_voxels(data)
    return sample[np.isfinite(sample)]


def _to_hu(mapping: Mapping):
    """Slab of stored numbers -> float32 HU in [AIR_HU, HIGHEST_HU]; what is not finite becomes air."""
    slope, intercept = np.float32(mapping.slope), np.float32(mapping.intercept)

    def convert(slab: np.ndarray) -> np.ndarray:
        hu = slab.astype(np.float32)
        if slope != 1:
            hu *= slope
        if intercept != 0:
            hu += intercept
        if slab.dtype.kind == "f":
            np.nan_to_num(hu, copy=False, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
        return np.clip(hu, AIR_HU, HIGHEST_HU, out=hu)

    return convert


def _place(data: np.ndarray, affine: np.ndarray, grid: Grid, to_hu) -> tuple[np.ndarray, np.ndarray]:
    """Centre crop or padding of the volume on the grid. Returns (int16 volume RAS+, its affine)."""
    orientation = nib.io_orientation(affine)
    if np.isnan(orientation).any():
        raise VolumeError(f"the affine does not give every axis a direction: {affine[:3].tolist()}")
    order = tuple(int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3))
    spacing = voxel_spacing(affine)
    axes: list[AxisMap | None] = [None, None, None]
    to_source = np.zeros((4, 4))  # output voxel -> source voxel
    to_source[3, 3] = 1
    for target, source in enumerate(order):
        step = grid.spacing[target] / spacing[source] * orientation[source, 1]
        start = (data.shape[source] - 1) / 2 - step * (grid.size[target] - 1) / 2
        axes[source] = AxisMap(grid.size[target], start, step)
        to_source[source, target], to_source[source, 3] = step, start
    return resample(data, tuple(axes), order, to_hu, AIR_HU), affine @ to_source


def prepare_volume(path: Path, grid: Grid, metadata: Metadata | None = None) -> PreparedVolume:
    """Reads, checks and resamples one volume. Raises `VolumeError` (unusable volume; the caller names the file)."""
    metadata = metadata or Metadata()
    stored = read_nifti(path)
    warnings = list(stored.warnings)
    affine = resolve_geometry(stored, metadata, warnings)
    sample = _finite_sample(stored.data, warnings)
    mapping = decide(sample, stored.scaling, metadata.scaling)
    warnings += mapping.warnings
    volume, out_affine = _place(stored.data, affine, grid, _to_hu(mapping))
    spacing = voxel_spacing(affine)
    hu = np.clip(sample.astype(np.float32) * mapping.slope + mapping.intercept, AIR_HU, HIGHEST_HU)
    quality = {
        "shape": list(stored.data.shape),
        "dtype": str(stored.data.dtype),
        "spacing": spacing.round(4).tolist(),
        "orientation": "".join(nib.aff2axcodes(affine)),
        "decision": mapping.decision,
        "percentiles": dict(
            zip(("p1", "p25", "p50", "p75", "p99"), np.percentile(hu, (1, 25, 50, 75, 99)).tolist(), strict=True)
        ),
        "warnings": warnings,
    }
    return PreparedVolume(volume, out_affine, quality)
