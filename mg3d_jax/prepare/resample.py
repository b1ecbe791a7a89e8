"""Separable resampling of a CT volume onto a regular grid: area averaging to shrink an axis, linear to grow it.

Every axis is one banded matrix, applied slab by slab, so that a 512x512x300 volume needs little more memory than itself
and no axis is ever aliased. Coordinates are voxel centres: voxel i covers [i - 1/2, i + 1/2] (the convention of NIfTI
affines and of SimpleITK). An output voxel whose centre lies outside the input is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_EDGE = 1e-6  # voxels: rounding of affines must not turn an edge voxel into padding
_SLAB_SLICES = 16


@dataclass(frozen=True)
class AxisMap:
    """Output voxel j of one axis has its centre at `start + j * step` in input voxels; `step` < 0 flips the axis."""

    size: int  # output voxels
    start: float
    step: float


@dataclass(frozen=True)
class AxisWeights:
    """Rows `[low, high)` of the output read input voxels `[first, last)` by `matrix`; the other rows are padding."""

    size: int
    low: int
    high: int
    first: int
    last: int
    matrix: sparse.csr_matrix  # float32 [high - low, last - first], rows sum to 1


def axis_weights(input_size: int, axis: AxisMap) -> AxisWeights:
    """The banded matrix of one axis. Area averaging over the output voxel's extent where |step| > 1 (what hangs
    over the edge of the input does not count), linear interpolation where |step| <= 1; at 1 the two are the same."""
    centres = axis.start + np.arange(axis.size) * axis.step
    inside = np.flatnonzero((centres >= -0.5 - _EDGE) & (centres <= input_size - 0.5 + _EDGE))
    if not inside.size:
        return AxisWeights(axis.size, 0, 0, 0, 0, sparse.csr_matrix((0, 0), dtype=np.float32))
    low, high = int(inside[0]), int(inside[-1]) + 1
    centres = centres[low:high]
    width = abs(axis.step)
    if width > 1:
        begin = np.maximum(centres - width / 2, -0.5)
        end = np.minimum(centres + width / 2, input_size - 0.5)
        taps = int(np.ceil(width)) + 1
        columns = np.floor(begin + 0.5).astype(np.int64)[:, None] + np.arange(taps)
        weights = np.minimum(end[:, None], columns + 0.5) - np.maximum(begin[:, None], columns - 0.5)
    else:
        centres = np.clip(centres, 0, input_size - 1)
        left = np.minimum(np.floor(centres), max(input_size - 2, 0)).astype(np.int64)
        columns = left[:, None] + np.arange(2)
        weights = 1 - np.abs(centres[:, None] - columns)
    weights = np.where((columns < input_size) & (weights > 1e-7), weights, 0)
    columns = np.minimum(columns, input_size - 1)
    weights /= weights.sum(1, keepdims=True)
    used = columns[weights > 0]
    first, last = int(used.min()), int(used.max()) + 1
    rows = np.broadcast_to(np.arange(high - low)[:, None], columns.shape)
    keep = weights > 0
    matrix = sparse.csr_matrix(
        (weights[keep].astype(np.float32), (rows[keep], columns[keep] - first)), shape=(high - low, last - first)
    )
    return AxisWeights(axis.size, low, high, first, last, matrix)


def resample(
    source: np.ndarray,
    axes: tuple[AxisMap, AxisMap, AxisMap],
    order: tuple[int, int, int],
    to_hu: Callable[[np.ndarray], np.ndarray],
    pad: float,
) -> np.ndarray:
    """int16 volume on the new grid.

    source: [i, j, k] as stored (any dtype; fastest when Fortran-ordered, as NIfTI is).
    axes: for each SOURCE axis, where its output voxels lie.
    order: source axis of output axis 0, 1, 2.
    to_hu: maps a slab of the source to clipped float32 HU; called once per voxel that the grid needs.
    """
    weights = [axis_weights(size, axis) for size, axis in zip(source.shape, axes, strict=True)]
    wi, wj, wk = weights
    output = np.full([weights[axis].size for axis in order], round(pad), dtype=np.int16)
    if all(w.high > w.low for w in weights):
        stack = source.T[wk.first : wk.last, wj.first : wj.last, wi.first : wi.last]
        stack_view = output.transpose([order.index(axis) for axis in (2, 1, 0)])  # [k, j, i] of the same voxels
        inner = stack_view[wk.low : wk.high, wj.low : wj.high, wi.low : wi.high]
        _resample_stack(stack, wk.matrix, wj.matrix, wi.matrix, to_hu, inner)
    return output


def _resample_stack(
    stack: np.ndarray,
    mk: sparse.csr_matrix,
    mj: sparse.csr_matrix,
    mi: sparse.csr_matrix,
    to_hu: Callable[[np.ndarray], np.ndarray],
    out: np.ndarray,
) -> None:
    """Fills `out` [K', J', I'] from `stack` [K, J, I]: slices in the plane first, then along k, both slab by slab.

    Only the in-plane results that later output slices still need are kept."""
    slices = mk.shape[0]
    ranges = [(row.indices.min(), row.indices.max() + 1) for row in (mk[r] for r in range(slices))]
    blocks = [range(s, min(s + _SLAB_SLICES, slices)) for s in range(0, slices, _SLAB_SLICES)]
    if slices > 1 and ranges[0][0] > ranges[-1][0]:
        blocks.reverse()  # a flipped axis: still read the input in file order
    kept_first, kept = 0, np.empty((0, mj.shape[0], mi.shape[0]), np.float32)
    for block in blocks:
        first = min(ranges[r][0] for r in block)
        last = max(ranges[r][1] for r in block)
        kept_last = kept_first + len(kept)
        begin = max(first, kept_last)
        plane = np.empty((last - first, mj.shape[0], mi.shape[0]), np.float32)
        overlap = max(kept_last - first, 0)
        if overlap:
            plane[:overlap] = kept[first - kept_first :]
        for k in range(begin, last):
            hu = to_hu(stack[k])
            plane[k - first] = (mi @ (mj @ hu).T).T
        rows = mk[block.start : block.stop, first:last]
        result = rows @ plane.reshape(len(plane), -1)
        np.rint(result, out=result)
        out[block.start : block.stop] = result.reshape(len(block), *plane.shape[1:])
        kept_first, kept = first, plane
