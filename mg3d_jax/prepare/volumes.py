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
from mg3d_jax.prepare.hounsfield import Mapping, decide
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.quality import measure
from mg3d_jax.prepare.reading import read_volume

_SAMPLE_VOXELS = 400_000
_MOST_NAN = 0.01  # share of voxels that are not finite and may be taken for air


@dataclass(frozen=True)
class PreparedVolume:
    """A volume on the grid. `affine` maps its voxels to the scanner's mm, so that a voxel can be found again."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+
    affine: np.ndarray  # float64 [4, 4]
    quality: dict[str, Any] = field(default_factory=dict)


def sample_voxels(data: np.ndarray) -> np.ndarray:
    """A regular 3D sample of about `_SAMPLE_VOXELS` voxels, whatever the shape."""
    stride = max(1, round((data.size / _SAMPLE_VOXELS) ** (1 / 3)))
    return data[::stride, ::stride, ::stride]


def _check_finite(data: np.ndarray, warnings: list[str]) -> None:
    """Refuses a volume with more than a few voxels that are not finite."""
    if data.dtype.kind != "f":
        return
    bad = sum(int(np.count_nonzero(~np.isfinite(data[..., k]))) for k in range(data.shape[2]))
    if bad > _MOST_NAN * data.size:
        raise VolumeError(f"NaN or infinite in {bad} of {data.size} voxels ({bad / data.size:.0%})")
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


def prepare_stored(stored: StoredVolume, grid: Grid, metadata: Metadata | None = None) -> PreparedVolume:
    """Checks and resamples one volume that was read. Raises `VolumeError`, without the file's name."""
    metadata = metadata or Metadata()
    warnings = list(stored.warnings)
    affine = resolve_geometry(stored, metadata, warnings)
    _check_finite(stored.data, warnings)
    sample = sample_voxels(stored.data)
    if stored.windowed and stored.scaling:
        mapping = Mapping(*stored.scaling, "8-bit grey values of a given window")
    else:
        mapping = decide(sample[np.isfinite(sample)], stored.scaling, metadata.scaling)
    warnings += mapping.warnings
    to_hu = to_hounsfield(mapping)
    volume, kept = place(stored.data, affine, grid, to_hu, warnings)
    quality = measure(stored.data.shape, affine, to_hu(sample), metadata, volume, kept, warnings)
    return PreparedVolume(volume, kept, {"dtype": str(stored.data.dtype), "decision": mapping.decision, **quality})


def prepare_volume(path: Path, grid: Grid, metadata: Metadata | None = None) -> PreparedVolume:
    """Reads, checks and resamples one volume file (or folder of slices). Raises `VolumeError` where it is unusable; the
    caller names the file."""
    return prepare_stored(read_volume(path, metadata or Metadata()), grid, metadata)
