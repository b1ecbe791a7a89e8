"""A CT volume in memory on the grid of the model, by torch and numpy alone: centred, along the scanner's axes.

`image_processing_mg3d.py` does all that the preparation of the training data did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

AIR_HU, HIGHEST_HU = -1024, 3071
STRAIGHTEN_DEGREES = 10.0  # as the preparation of the training data


def prepare_volume(
    hu: np.ndarray, affine: np.ndarray, size: Sequence[int], spacing: Sequence[float]
) -> tuple[Tensor, np.ndarray]:
    """A CT volume in HU [i, j, k] with its NIfTI affine (voxel -> RAS+ mm) -> int16 [X, Y, Z] on the model's grid.

    Reorders and flips the axes to RAS+, then resamples each axis about the volume's centre: area average where the axis
    shrinks, linear where it grows; outside is air. The array must hold HU: apply a DICOM slope and intercept before,
    once. Returns the volume and its affine.
    """
    affine = np.asarray(affine, np.float64)
    scale = np.sqrt((affine[:3, :3] ** 2).sum(0))
    cosines = affine[:3, :3] / scale
    order = [int(np.abs(cosines[axis]).argmax()) for axis in range(3)]  # source axis of each RAS+ axis
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"the affine does not give each axis a direction of its own: {affine[:3].tolist()}")
    askew = np.degrees(np.arccos(np.clip(np.abs(cosines).max(1).min(), 0, 1)))
    if askew > STRAIGHTEN_DEGREES:
        raise ValueError(
            f"the scan is askew by {askew:.0f} degrees and must be turned: use this folder's AutoImageProcessor"
        )
    if not np.isfinite(hu).all():
        raise ValueError("the volume has voxels that are not finite")
    volume = torch.as_tensor(np.asarray(hu, np.float32)).clamp(AIR_HU, HIGHEST_HU)
    inside = torch.ones((), dtype=torch.float32)
    to_source = np.zeros((4, 4))
    to_source[3, 3] = 1
    for target, source in enumerate(order):
        step = spacing[target] / scale[source] * np.sign(cosines[target, source])
        start = (volume.shape[source] - 1) / 2 - step * (size[target] - 1) / 2
        to_source[source, target], to_source[source, 3] = step, start
        weights = torch.as_tensor(_axis_weights(volume.shape[source], size[target], start, step))
        volume = torch.movedim(torch.tensordot(weights, volume, dims=([1], [source])), 0, source)
        shape = [1, 1, 1]
        shape[source] = size[target]
        inside = inside * weights.any(1).float().reshape(shape)
    volume = torch.where(inside > 0, volume, torch.tensor(float(AIR_HU)))
    return volume.round().to(torch.int16).permute(order).contiguous(), affine @ to_source


def _axis_weights(old: int, new: int, start: float, step: float) -> np.ndarray:
    """float32 [new, old]: how much of each input voxel goes into the output voxel centred at `start + i * step`."""
    centres, edges = start + np.arange(new) * step, np.arange(old)
    if abs(step) > 1:
        low, high = centres - abs(step) / 2, centres + abs(step) / 2
        weights = np.minimum(high[:, None], edges + 0.5) - np.maximum(low[:, None], edges - 0.5)
    else:
        weights = 1 - np.abs(np.clip(centres, 0, old - 1)[:, None] - edges)
    weights = np.where(
        (weights > 1e-7) & (centres[:, None] >= -0.5 - 1e-6) & (centres[:, None] <= old - 0.5 + 1e-6), weights, 0
    )
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)
