"""A header and a metadata table that disagree about a volume's voxel sizes: which of the two the evidence is for.

Evidence is what one of them cannot be: a scan wider than a scanner, pixels that are not square, the 1 mm that writers put where
nothing is known, and numbers of voxels (Rows, Columns, NumberofSlices of the table) by which the file was resampled since. For
one of the two it decides, with a warning; where there is none, or some for both, the volume is refused with both values.
"""

from __future__ import annotations

import itertools

import numpy as np

from mg3d_jax.prepare.nifti import VolumeError, with_sizes

SAME_SIZE = 0.02  # relative: voxel sizes that differ by less are the same
_SAME_EXTENT = 0.03
_WIDE_MM, _LONG_MM = (60.0, 1000.0), (10.0, 2200.0)  # of any CT: in the slices, and from head to foot
_TRUNK_MM = (150.0, 800.0)  # from head to foot, of a usual one
_DEFAULT_MM = 1.0  # of headers that were never filled in
_UNKNOWN = "1 mm is what writers put where nothing is known"


def is_default(affine: np.ndarray) -> bool:
    """Whether an affine is what writers put where nothing is known: 1 mm, straight axes, origin 0."""
    straight = np.array_equal(np.abs(affine[:3, :3]), np.eye(3)) and affine[2, 2] > 0
    return bool(straight and not affine[:3, 3].any() and affine[0, 0] == affine[1, 1])


def settled(
    affine: np.ndarray,
    shape: tuple[int, ...],
    listed: tuple[float, float, float],
    counts: tuple[int | None, int | None, int | None],
    warnings: list[str],
) -> np.ndarray:
    """The affine of the header, or that with the voxel sizes of the table, and a warning that says why.

    Args:
        affine: [4, 4] of the header; RAS+.
        shape: voxels of the file.
        listed: mm of the table: column, row, slice.
        counts: voxels of the table, in the same order; None where it does not say.

    Raises:
        VolumeError: the evidence is for neither, or for both.
    """
    own = np.sqrt((affine[:3, :3] ** 2).sum(0))
    long_axis = int(np.argmax(np.abs(affine[2, :3] / own)))  # from head to foot
    order = _matching(own, shape, listed, counts, long_axis)
    sizes = np.array([listed[axis] for axis in order])
    voxels = [counts[axis] for axis in order]
    if np.allclose(own, sizes, rtol=SAME_SIZE):
        return affine
    found = _evidence(own, sizes, np.array(shape), voxels, long_axis)
    said = f"spacing of header {own.round(3).tolist()} and table {sizes.round(3).tolist()} mm disagree"
    sides = {side for side, _ in found}
    if len(sides) != 1:
        why = "; ".join(f"for the {side}: {text}" for side, text in found) or "nothing shows which is right"
        raise VolumeError(
            f"{said} ({why}): correct the header, or the table; an empty spacing there leaves it to the header"
        )
    side = sides.pop()
    warnings.append(f"{said}: {side} used, since {'; '.join(text for _, text in found)}")
    return affine if side == "header" else with_sizes(affine, sizes)


def _matching(
    own: np.ndarray,
    shape: tuple[int, ...],
    listed: tuple[float, ...],
    counts: tuple[int | None, ...],
    long_axis: int,
) -> tuple[int, ...]:
    """Which of the table's axes each axis of the file is: by the numbers of voxels, then its slices from head to foot."""

    def differences(order: tuple[int, ...]) -> tuple[int, bool, int, float]:
        sizes = np.array([listed[axis] for axis in order])
        other = sum(counts[axis] not in (None, n) for axis, n in zip(order, shape, strict=True))
        sizes_differ = int((~np.isclose(own, sizes, rtol=SAME_SIZE)).sum())
        return other, order[long_axis] != 2, sizes_differ, float(np.abs(np.log(own / sizes)).sum())

    return min(itertools.permutations(range(3)), key=differences)


def _evidence(
    own: np.ndarray, listed: np.ndarray, shape: np.ndarray, counts: list[int | None], long_axis: int
) -> list[tuple[str, str]]:
    """[("header" or "table", why it is right), ...]."""
    found: list[tuple[str, str]] = []
    differs = ~np.isclose(own, listed, rtol=SAME_SIZE)
    ways = {"header": own, "table": listed}
    plane = [axis for axis in range(3) if axis != long_axis]
    known = [axis for axis in range(3) if counts[axis] is not None]
    there = np.array([counts[axis] or 0 for axis in range(3)])
    resampled = any(differs[axis] and there[axis] != shape[axis] for axis in known)

    def only(possible: dict[str, bool]) -> str | None:
        return next((side for side, good in possible.items() if good), None) if sum(possible.values()) == 1 else None

    extents = {side: shape * sizes for side, sizes in ways.items()}
    if side := only({side: _possible(mm, plane, long_axis) for side, mm in extents.items()}):
        other = extents["table" if side == "header" else "header"]
        found.append((side, f"by the other the scan would be {' x '.join(f'{mm:.0f}' for mm in other)} mm"))
    if resampled:
        near = np.abs(extents["header"] - there * listed)[known]
        if (near <= np.maximum(_SAME_EXTENT * extents["header"], 1.5 * np.maximum(own, listed))[known]).all():
            table = " x ".join(str(n) for n in there[known])
            found.append(("header", f"the table's {table} voxels fill the same space: the file was resampled"))
        return found
    if side := only(
        {side: bool(np.isclose(sizes[plane[0]], sizes[plane[1]], rtol=SAME_SIZE)) for side, sizes in ways.items()}
    ):
        found.append((side, "by the other the pixels of its slices would not be square"))
    if np.allclose(own[differs], _DEFAULT_MM, rtol=0, atol=1e-6):
        # In the slices exactly 1 mm is a default; between them it is common.
        usual = {side: bool(_TRUNK_MM[0] <= mm[long_axis] <= _TRUNK_MM[1]) for side, mm in extents.items()}
        everywhere = np.allclose(own, _DEFAULT_MM, rtol=0, atol=1e-6) and differs[plane].any()
        if everywhere and len(known) == 3 and only(usual) != "header":
            found.append(("table", f"{_UNKNOWN}, and the voxels are as many as the table's"))
        elif only(usual) == "table":
            found.append(("table", f"{_UNKNOWN}, and with it the scan would be odd in length"))
    return found


def _possible(extent: np.ndarray, plane: list[int], long_axis: int) -> bool:
    wide = (extent[plane] >= _WIDE_MM[0]).all() and (extent[plane] <= _WIDE_MM[1]).all()
    return bool(wide and _LONG_MM[0] <= extent[long_axis] <= _LONG_MM[1])
