"""Segmentation masks: read beside their volume, checked against it, and brought to its grid by nearest neighbour.

A mask has the voxels of its volume: the same shape and the same affine. Its values are classes, 0 for background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mg3d_jax.prepare.geometry import Metadata, voxel_spacing
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.reading import read_volume

_SAME_PLACE = 0.25  # largest distance between the corners of volume and mask, in voxels
BACKGROUND = 0
_SLAB = 8  # slices whose coordinates are in memory at a time


def read_mask(path: Path, volume: StoredVolume, classes: int, metadata: Metadata) -> np.ndarray:
    """int8 [i, j, k]: the class of each voxel of `volume`.

    Args:
        classes: how many there are, background included: values are from 0 to `classes - 1`.
        metadata: of the volume; of a 4D mask its frame is read.

    Raises:
        VolumeError: there is no such file, its shape or place is not the volume's, or a value is no class.
    """
    try:
        stored = read_volume(path, Metadata(frame=metadata.frame))
    except VolumeError as error:
        raise VolumeError(f"mask {path}: {error}") from error
    if stored.data.shape != volume.data.shape:
        raise VolumeError(f"mask {path} has the shape {stored.data.shape}, its volume {volume.data.shape}")
    _check_place(path, stored, volume)
    return _checked_classes(path, stored, classes)


def _check_place(path: Path, mask: StoredVolume, volume: StoredVolume) -> None:
    """Raises `VolumeError` where the corners of the two are not in the same places. A header that says nothing (neither
    orientation nor position) is no statement."""
    if not (mask.has_orientation and volume.has_orientation):
        return
    last = np.array(volume.data.shape) - 1
    corners = np.array([[*(last * (np.array(bits) > 0)), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (mask.affine - volume.affine).T)[:, :3], axis=1).max()
    if not apart <= _SAME_PLACE * voxel_spacing(volume.affine).min():
        raise VolumeError(
            f"mask {path} lies elsewhere than its volume, by up to {apart:.2f} mm: their affines are "
            f"{mask.affine[:3].round(3).tolist()} and {volume.affine[:3].round(3).tolist()}"
        )


def _checked_classes(path: Path, stored: StoredVolume, classes: int) -> np.ndarray:
    slope, intercept = stored.scaling or (1.0, 0.0)
    values = np.unique(stored.data)
    meant = values.astype(np.float64) * slope + intercept
    if not np.isfinite(meant).all() or (meant != np.rint(meant)).any() or meant.min() < 0 or meant.max() >= classes:
        wrong = [float(v) for v in meant if not (np.isfinite(v) and v == np.rint(v) and 0 <= v < classes)]
        raise VolumeError(
            f"mask {path} has the label values {wrong[:5]}: expected whole numbers from 0 to {classes - 1}"
        )
    return meant.astype(np.int8)[np.searchsorted(values, stored.data)]


def place_mask(mask: np.ndarray, affine: np.ndarray, kept: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """The mask on a grid: int8 [X, Y, Z], the class of the voxel in which the centre of each voxel of the grid lies.
    Outside of the mask is background: there the volume is air.

    Args:
        affine: voxel of `mask` -> mm (RAS+).
        kept: voxel of the grid -> mm.
        size: of the grid.
    """
    to_source = np.linalg.inv(affine) @ kept
    out = np.full(size, BACKGROUND, np.int8)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    for start in range(0, size[2], _SLAB):
        z = np.arange(start, min(start + _SLAB, size[2]))
        inside = np.ones((*size[:2], len(z)), bool)
        index = []
        for axis in range(3):
            row = to_source[axis]
            # A centre on the border of two voxels, as where the grid is twice as coarse, goes to the lower one on every
            # platform: rounding of affines must not decide it.
            place = np.ceil((row[0] * x + row[1] * y)[..., None] + row[2] * z + (row[3] - 0.5 - 1e-4)).astype(np.int32)
            inside &= (place >= 0) & (place < mask.shape[axis])
            index.append(np.clip(place, 0, mask.shape[axis] - 1))
        out[..., start : start + len(z)] = np.where(inside, mask[tuple(index)], BACKGROUND)
    return out
