"""Dice, normalised surface distance and Hausdorff distance of segmentations, as MONAI computes them, without PyTorch.

Surfaces are the voxels of a mask with a face neighbour outside of it; distances are between centres of voxels, in mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its parts come on first use: a trainer without masks does not wait for them

METRICS = ("dice", "surface", "hd95")
Distances = tuple[np.ndarray, np.ndarray]  # mm: of each surface voxel of one mask to the other's surface, and back


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks, bool. NaN where the reference is empty (`DiceMetric`'s `ignore_empty`)."""
    inside = int(np.count_nonzero(reference))
    if not inside:
        return float("nan")
    return 2.0 * np.count_nonzero(prediction & reference) / (inside + np.count_nonzero(prediction))


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> Distances:
    """Distances from surface to surface, both ways. Infinite where only one of the masks has a surface.

    Args:
        prediction, reference: bool [X, Y, Z].
        spacing: mm per voxel along each axis.
    """
    mine, other = _surface(prediction) * np.asarray(spacing), _surface(reference) * np.asarray(spacing)
    return _nearest(mine, other), _nearest(other, mine)


def _surface(mask: np.ndarray) -> np.ndarray:
    """Indices of the surface voxels, float64 [n, 3]."""
    if not mask.any():
        return np.zeros((0, mask.ndim))
    (box,) = scipy.ndimage.find_objects(mask.astype(np.uint8))
    inside = mask[box]
    surface = inside & ~scipy.ndimage.binary_erosion(inside)
    return np.argwhere(surface) + np.array([part.start for part in box], np.float64)


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    if not len(others):
        return np.full(len(points), np.inf)
    return scipy.spatial.KDTree(others).query(points)[0] if len(points) else np.zeros(0)


def normalised_surface_distance(distances: Distances, tolerance: float) -> float:
    """The share of both surfaces that lies within `tolerance` mm of the other one. NaN where neither mask has a surface, 0
    where only one has."""
    total = sum(map(len, distances))
    return sum(np.count_nonzero(one <= tolerance) for one in distances) / total if total else float("nan")


def hausdorff(distances: Distances, percentile: float = 95.0) -> float:
    """The larger of the two directed distances at this percentile, mm. NaN where neither mask has a surface, infinite where
    only one has."""
    if not any(map(len, distances)):
        return float("nan")
    if not all(map(len, distances)):
        return float("inf")
    return float(max(np.percentile(one, percentile) for one in distances))


def scores(
    prediction: np.ndarray, reference: np.ndarray, classes: int, spacing: Sequence[float], tolerance: float
) -> dict[str, np.ndarray]:
    """Each of `METRICS` for every class but the background, float64 [classes - 1].

    Args:
        prediction, reference: classes of voxels, integers [X, Y, Z]; what the reference does not know, -1, is background
            in both.
        classes: how many there are, background included.
        spacing: mm per voxel along each axis.
        tolerance: of the normalised surface distance, mm.
    """
    prediction = np.where(reference < 0, 0, prediction)
    rows = []
    for one in range(1, classes):
        found, true = prediction == one, reference == one
        distances = surface_distances(found, true, spacing)
        rows.append((dice(found, true), normalised_surface_distance(distances, tolerance), hausdorff(distances)))
    return dict(zip(METRICS, np.array(rows).reshape(-1, len(METRICS)).T, strict=True))
