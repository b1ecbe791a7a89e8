"""Quality record of one volume: what a person would check first, as one JSON line, with warnings in words."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from mg3d_jax.batch import AIR_HU
from mg3d_jax.prepare.geometry import Metadata, voxel_spacing

QUALITY_NAME = "qa.jsonl"  # in a prepared folder, a line per record: what was found in its file
_SHORT_MM = 150.0  # a chest is longer
_LEAST_LUNG = 0.03  # share of the voxels; bowel gas is less
_LEAST_PARENCHYMA = (
    0.12  # share of the voxels of -950 to -600 HU: lung that reaches the border of a small field of view
)
_PAIRS = 12  # of neighbouring slices that are looked at
_LEAST_CHANGE_HU = 10.0  # mean change over some centimetres; less, and nothing tells the order
_WIDTH_MM = (60.0, 1000.0)  # of the slices of any CT
_SKULL = 0.09  # bone, of the voxels of a head that are no air
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def blank_slices(sample: np.ndarray, axis: int) -> int:
    """Slices inside the volume (not at its ends) in which every sampled voxel is the same: missing ones, filled up."""
    slices = np.moveaxis(sample, axis, 0).reshape(sample.shape[axis], -1)
    constant = slices.min(1) == slices.max(1)
    real = np.flatnonzero(~constant)
    return int(constant[real[0] : real[-1] + 1].sum()) if real.size else 0


def disorder(data: np.ndarray, affine: np.ndarray, slope: float) -> list[str]:
    """Warnings where neighbouring slices are the same, or no more alike than slices far apart: copied, or out of order. Looks
    at pairs that are spread over the volume.

    data: [i, j, k] stored numbers, of which a step is `slope` HU."""
    axis = int(np.argmax(np.abs(affine[2, :3] / voxel_spacing(affine))))
    slices = np.moveaxis(data, axis, 0)
    pairs = min(_PAIRS, len(slices) // 6)
    if pairs < 4:
        return []
    starts = np.linspace(0, len(slices) - 2, pairs).astype(int)
    same = [np.array_equal(slices[k], slices[k + 1]) and slices[k].min() != slices[k].max() for k in starts]
    if sum(same) > 0.1 * pairs:
        return [f"missing slices? {sum(same)} of {pairs} pairs of neighbouring slices are the same"]
    one, other = (np.stack([_coarse(slices[k + step]) for k in starts]) for step in (0, 1))
    near, far = (
        abs(slope) * float(np.median(np.abs(a - b).mean((1, 2)))) for a, b in ((one, other), (one[1:], one[:-1]))
    )
    if far > _LEAST_CHANGE_HU and near > 0.85 * far:
        return ["slices out of order? neighbours are no more alike than slices far apart"]
    return []


def _coarse(plane: np.ndarray) -> np.ndarray:
    """Means over blocks of a slice, in which noise is small. What is not finite counts as 0."""
    plane = plane.T if plane.flags.f_contiguous else plane
    if plane.dtype.kind == "f":
        plane = np.where(np.isfinite(plane), plane, 0)
    block = max(1, min(plane.shape) // 16)
    a, b = plane.shape[0] // block, plane.shape[1] // block
    return plane[: a * block, : b * block].reshape(a, block, b, block).mean((1, 3), dtype=np.float32)


def enclosed_air(sample: np.ndarray, axis: int) -> float:
    """Share of the voxels that are air inside the body: below -500 HU, in parts that do not reach the border of the
    axial slices (`axis` is head to foot). The lungs of a chest, a little bowel gas of an abdomen."""
    labels, count = ndimage.label(sample < -500)
    border = np.zeros(count + 1, bool)
    border[0] = True
    for side in (a for a in range(3) if a != axis):
        edge = np.moveaxis(labels, side, 0)
        border[np.unique(edge[0])] = border[np.unique(edge[-1])] = True
    return float(np.bincount(labels.ravel(), minlength=count + 1)[~border].sum() / labels.size)


def body_part(sample: np.ndarray, lung: float) -> str:
    """One of "chest", "head" and "abdomen". A chest has lungs, of which a small field of view may cut the border; a skull is a
    tenth and more of a head; what has neither is called an abdomen.

    lung: the share of enclosed air.
    sample: a regular 3D sample, HU."""
    parenchyma = float(np.mean((sample > -950) & (sample < -600)))
    if lung >= _LEAST_LUNG or parenchyma >= _LEAST_PARENCHYMA:
        return "chest"
    body = np.count_nonzero(sample > -300)
    bone = np.count_nonzero(sample > 300)
    return "head" if body and bone > _SKULL * body else "abdomen"


def measure(
    shape: tuple[int, ...],
    affine: np.ndarray,
    sample: np.ndarray,
    metadata: Metadata,
    volume: np.ndarray,
    kept: np.ndarray,
    warnings: list[str],
) -> dict[str, Any]:
    """The quality record. `warnings` is extended and becomes part of it.

    shape, affine: of the file. sample: a regular 3D sample of it, HU. volume, kept: on the grid, and its affine."""
    spacing = voxel_spacing(affine)
    extent = spacing * shape
    axis_z = int(np.argmax(np.abs(affine[2, :3] / spacing)))
    lung = enclosed_air(sample, axis_z)
    chest = metadata.modality == "CT"
    if chest and extent[axis_z] < _SHORT_MM:
        warnings.append(f"truncated: only {extent[axis_z]:.0f} mm from head to foot")
    wide = extent[[axis for axis in range(3) if axis != axis_z]]
    if chest and not (_WIDTH_MM[0] <= wide.min() and wide.max() <= _WIDTH_MM[1]):
        warnings.append(
            f"odd size: the slices are {wide[0]:.0f} x {wide[1]:.0f} mm; is the voxel size in another unit?"
        )
    part = body_part(sample, lung) if chest else ""
    if chest and part != "chest":
        warnings.append(f"no chest: {part}; only {lung:.1%} of the voxels are air inside the body")
    if blank := blank_slices(sample, axis_z):
        warnings.append(f"missing slices: about {blank / sample.shape[axis_z]:.0%} of the slices inside are blank")
    if metadata.slices is not None and metadata.slices != shape[axis_z]:
        warnings.append(f"missing slices: the metadata table has {metadata.slices}, the file {shape[axis_z]}")
    if volume.min() == volume.max():
        warnings.append("constant: nothing of the volume is on the grid")
    return {
        "shape": list(shape),
        "spacing": spacing.round(4).tolist(),
        "orientation": "".join(nib.aff2axcodes(affine)),
        "extent": extent.round(1).tolist(),
        "percentiles": {
            f"p{p}": round(float(v), 1) for p, v in zip(_PERCENTILES, np.percentile(sample, _PERCENTILES), strict=True)
        },
        "air": round(float(np.mean(sample < -900)), 4),
        "lung": round(lung, 4),
        "body_part": part,
        "padding": round(float(np.mean(volume == AIR_HU)), 4),
        "grid_spacing": voxel_spacing(kept).round(4).tolist(),
        "warnings": warnings,
    }
