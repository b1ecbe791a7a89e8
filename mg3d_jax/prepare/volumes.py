"""One volume file -> checked HU -> RAS+ -> target spacing -> fixed grid, int16, with its affine and a QA record.

    reading.read_volume -> geometry.resolve_geometry -> hounsfield.decide -> geometry.place -> PreparedVolume

Cropping comes before resampling and everything is done slab by slab, so that memory stays near the size of the file's
own voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.batch import AIR_HU, HIGHEST_HU
from mg3d_jax.prepare.geometry import Grid, Metadata, place, resolve_geometry
from mg3d_jax.prepare.hounsfield import Mapping, decide, intensity_mapping
from mg3d_jax.prepare.masks import place_mask, read_mask
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.padding import below_air, border_constants, cut_off, fill_padding, not_finite, without_constants
from mg3d_jax.prepare.quality import disorder, measure
from mg3d_jax.prepare.reading import read_again, read_volume

_SAMPLE_VOXELS = 400_000
_MOST_NAN = 0.01  # share of voxels that are not finite and may be taken for air
_MOST_PADDING = 0.95  # share of voxels outside of the scan


@dataclass(frozen=True)
class PreparedVolume:
    """A volume on the grid. `affine` maps its voxels to the scanner's mm, so that a voxel can be found again."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+
    affine: np.ndarray  # float64 [4, 4]
    quality: dict[str, Any] = field(default_factory=dict)
    mask: np.ndarray | None = None  # int8 [X, Y, Z], class of each voxel


def sample_voxels(data: np.ndarray) -> np.ndarray:
    """A regular 3D sample of about `_SAMPLE_VOXELS` voxels, whatever the shape."""
    stride = max(1, round((data.size / _SAMPLE_VOXELS) ** (1 / 3)))
    return data[::stride, ::stride, ::stride]


def _check_finite(data: np.ndarray, warnings: list[str]) -> None:
    """Refuses a volume with more than a few voxels that are not finite."""
    if data.dtype.kind != "f":
        return
    outside, bad = not_finite(data)
    if outside + bad <= _MOST_NAN * data.size or outside + bad > _MOST_PADDING * data.size:
        outside, bad = 0, outside + bad
    if bad > _MOST_NAN * data.size:
        raise VolumeError(f"NaN or infinite in {bad} of {data.size} voxels ({bad / data.size:.0%})")
    if outside:
        share = outside / data.size
        warnings.append(f"padding: {share:.1%} of the voxels are NaN or infinite up to the border: taken for air")
    if bad:
        warnings.append(f"{bad} voxels are NaN or infinite: taken for air")


def to_hounsfield(mapping: Mapping) -> Callable[[np.ndarray], np.ndarray]:
    """Function from a slab of stored numbers to float32 HU in [AIR_HU, HIGHEST_HU]; what is not finite becomes air."""
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


def prepare_stored(
    stored: StoredVolume,
    grid: Grid,
    metadata: Metadata | None = None,
    *,
    mask: Path | None = None,
    mask_classes: int = 0,
) -> PreparedVolume:
    """Checks and resamples one volume that was read, and its mask. Raises `VolumeError`, without the volume's name.

    Args:
        mask: file of the class of each voxel, on the same voxels.
        mask_classes: its values are from 0 to below this.
    """
    metadata = metadata or Metadata()
    if stored.modality is not None and stored.modality != metadata.modality:
        raise VolumeError(
            f"its header says that it is {stored.modality}, and it is to be read as {metadata.modality}: leave it out, or "
            "see --modality"
        )
    warnings = list(stored.warnings)
    affine = resolve_geometry(stored, metadata, warnings)
    _check_finite(stored.data, warnings)
    data, mapping = in_hounsfield(stored, metadata, warnings)
    to_hu = to_hounsfield(mapping)
    warnings += disorder(data, affine, mapping.slope)
    straighten = metadata.modality == "CT"
    volume, kept = place(data, affine, grid, to_hu, warnings, metadata.centre, straighten=straighten)
    quality = measure(data.shape, affine, to_hu(sample_voxels(data)), metadata, volume, kept, warnings)
    classes = place_mask(read_mask(mask, stored, mask_classes, metadata), affine, kept, grid.size) if mask else None
    quality = {"dtype": str(stored.data.dtype), "decision": mapping.decision, **quality}
    if stored.notes:
        quality["notes"] = stored.notes
    return PreparedVolume(volume, kept, quality, classes)


def in_hounsfield(stored: StoredVolume, metadata: Metadata, warnings: list[str]) -> tuple[np.ndarray, Mapping]:
    """(stored numbers in which padding is air, their mapping to HU; of MR, to numbers of the size of HU)."""
    sample = sample_voxels(stored.data)
    finite = sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample.ravel()
    if metadata.modality != "CT":
        mapping = intensity_mapping(finite)
        warnings += mapping.warnings
        return stored.data, mapping
    if stored.windowed and stored.scaling:
        return stored.data, Mapping(*stored.scaling, "8-bit grey values of a given window")
    constants = border_constants(sample)
    mapping = decide(without_constants(finite, constants), stored.scaling, metadata.scaling)
    warnings += mapping.warnings
    warnings += cut_off(finite, mapping.slope, mapping.intercept)
    warnings += below_air(sample, mapping.slope, mapping.intercept, constants)
    data = stored.data
    if metadata.centre is not None and constants:  # kept for the next patch of the same volume
        data = data.copy(order="K")
    return fill_padding(data, constants, mapping.slope, mapping.intercept, warnings), mapping


def prepare_volume(
    path: Path, grid: Grid, metadata: Metadata | None = None, *, mask: Path | None = None, mask_classes: int = 0
) -> PreparedVolume:
    """Reads, checks and resamples one volume file (or folder of slices) and its mask. Raises `VolumeError` where it is
    unusable; the caller names the file."""
    metadata = metadata or Metadata()
    read = read_again if metadata.centre is not None else read_volume  # of one volume, many patches
    return prepare_stored(read(path, metadata), grid, metadata, mask=mask, mask_classes=mask_classes)
