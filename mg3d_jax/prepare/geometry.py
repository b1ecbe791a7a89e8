"""Where a volume lies and which part of it is kept: affines, orientation, and the grid policies.

Millimetres and axes are RAS+ throughout (x to the patient's right, y anterior, z superior), NIfTI's convention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import nibabel as nib
import numpy as np

from mg3d_jax.batch import AIR_HU
from mg3d_jax.prepare.disagreement import SAME_SIZE, is_default, settled
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError, same_frame
from mg3d_jax.prepare.resample import AxisMap, resample

SPACING_LIMITS = (0.05, 25.0)  # mm: what a body CT can have
STRAIGHTEN_DEGREES = 10.0  # a volume that lies more askew than this is turned onto the scanner's axes
_BOX_MM = 4.0  # sampling of the volume in which a body or lung box is sought
_BOX_MARGIN_MM = 8.0

PAPER_FRACTION = (0.88, 0.875, 0.656)  # MG-3D's centre crop, as shares of the extent
POLICIES = {
    "center": "fixed spacing, centred on the volume; cropped or padded to the size",
    "body": "fixed spacing, centred on the body's bounding box",
    "lung": "fixed spacing, centred on the lungs' bounding box",
    "fraction": "a fixed share of each axis, centred and resized to the size (MG-3D's release); the spacing varies",
}


@dataclass(frozen=True)
class Grid:
    """The grid that every volume is brought to, RAS+ order: voxels, mm per voxel (not used by policy "fraction"), which
    part of the volume it is laid on, and the shares that policy "fraction" keeps."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    policy: str = "center"
    fraction: tuple[float, float, float] = PAPER_FRACTION


@dataclass(frozen=True)
class Metadata:
    """What is known about a volume from outside its file; `None` where nothing is."""

    scaling: tuple[float, float] | None = None  # rescale slope, intercept
    spacing: tuple[float, float, float] | None = None  # mm of the index axes; of a table: column, row, slice
    orientation: tuple[float, ...] | None = None  # DICOM ImageOrientationPatient, LPS
    position: tuple[float, float, float] | None = None  # DICOM ImagePositionPatient, LPS
    slices: int | None = None
    kernel: str | None = None  # convolution kernel and series description, in words
    axes: str | None = None  # files without a header: where each index axis points, such as "LPS"
    window: tuple[float, float] | None = None  # 8-bit slices: HU of 0 and of 255
    # Newer than preparations that were begun: joined to `said` where a source sets them, so that those go on.
    centre: tuple[float, float, float] | None = field(default=None, repr=False)  # of the grid, mm (RAS+): a patch
    frame: int | None = field(default=None, repr=False)  # of a 4D file, from 0
    modality: str = field(default="CT", repr=False)  # "MR": intensities are mapped to numbers of the size of HU
    # Columns, rows of a slice: evidence where header and table disagree. In no digest: begun preparations go on.
    plane: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    def said(self) -> str:
        """All that a source said of a volume, in one text."""
        more = {"centre": self.centre, "frame": self.frame, "modality": self.modality}
        plain = {"centre": None, "frame": None, "modality": "CT"}
        return repr(self) + "".join(f" {name}={value!r}" for name, value in more.items() if value != plain[name])


def voxel_spacing(affine: np.ndarray) -> np.ndarray:
    """mm along each voxel axis of an affine."""
    return np.sqrt((affine[:3, :3] ** 2).sum(0))


def axes_affine(spacing: tuple[float, float, float], axes: str) -> np.ndarray:
    """Affine (RAS+, origin 0) of an array whose index axes point to `axes`, such as "LPS" or "SPL"."""
    try:
        orientation = nib.orientations.axcodes2ornt(axes.upper())
    except (ValueError, KeyError, AttributeError) as error:
        raise VolumeError(f"axes {axes!r} are not three of R/L, A/P, S/I ({error})") from error
    if len(axes) != 3 or np.isnan(orientation).any() or sorted(orientation[:, 0]) != [0, 1, 2]:
        raise VolumeError(f"axes {axes!r} are not one each of R/L, A/P, S/I")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for source, (target, sign) in enumerate(orientation):
        affine[int(target), source] = sign * spacing[source]
    return affine


def table_affine(metadata: Metadata) -> np.ndarray | None:
    """Affine (RAS+) from DICOM tags of a table: index axes (column, row, slice), slices stacked along the normal.
    `None` without a spacing; the table's `axes`, else LPS, and origin 0 where orientation or position is missing."""
    if metadata.spacing is None:
        return None
    if metadata.axes is not None and metadata.orientation is None:
        return axes_affine(metadata.spacing, metadata.axes)
    cosines = np.array(metadata.orientation or (1, 0, 0, 0, 1, 0), np.float64).reshape(2, 3)
    axes = np.stack([cosines[0], cosines[1], np.cross(cosines[0], cosines[1])], axis=1)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(metadata.spacing)
    affine[:3, 3] = metadata.position or (0, 0, 0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _usable(affine: np.ndarray | None) -> TypeGuard[np.ndarray]:
    """With the voxel size of a body CT, and `_has_axes`."""
    if affine is None or not _has_axes(affine):
        return False
    spacing = voxel_spacing(affine)
    return bool(SPACING_LIMITS[0] <= spacing.min() and spacing.max() <= SPACING_LIMITS[1])


def _has_axes(affine: np.ndarray) -> bool:
    """Finite, with three directions that span space."""
    spacing = voxel_spacing(affine)
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / spacing)) > 0.3)


def _of_several(forms: list[np.ndarray], metadata: Metadata, warnings: list[str]) -> np.ndarray:
    """The one of a header's contradicting affines that the evidence is for: that which a body CT can have, or which the
    metadata table confirms. Raises `VolumeError` with all of them where nothing decides."""
    shown = " and ".join(
        f"{voxel_spacing(form).round(3).tolist()} mm {''.join(map(str, nib.aff2axcodes(form)))}" for form in forms
    )
    left = [form for form in forms if _usable(form)]
    if len(left) != 1 and metadata.spacing is not None:
        wanted, table = sorted(metadata.spacing), table_affine(metadata)
        left = [form for form in forms if np.allclose(sorted(voxel_spacing(form)), wanted, rtol=0.02)]
        if len(left) > 1 and metadata.orientation is not None and table is not None:
            left = [form for form in left if same_frame(form, table)]
    if len(left) != 1:
        raise VolumeError(
            f"its header contradicts itself: the coded forms and voxel sizes say {shown}; set them to the same with a NIfTI "
            "tool, or give the true spacing in the metadata table"
        )
    by = "the metadata table" if metadata.spacing is not None else "what a body CT can have"
    said = f"{voxel_spacing(left[0]).round(3).tolist()} mm {''.join(map(str, nib.aff2axcodes(left[0])))}"
    warnings.append(f"the header contradicts itself ({shown}): {said} taken, by {by}")
    return left[0]


def resolve_geometry(stored: StoredVolume, metadata: Metadata, warnings: list[str]) -> np.ndarray:
    """The affine to believe: the header's, unless it is blank or impossible; then the table's. A blank header with a true
    spacing is read as LPS (DICOM's order) where the table does not name its axes, with a warning. Raises `VolumeError` where
    nothing is usable, or where header and table disagree and nothing shows which is right."""
    table = table_affine(metadata)
    if stored.rivals:
        stored = replace(stored, affine=_of_several([stored.affine, *stored.rivals], metadata, warnings), rivals=[])
    spacing = voxel_spacing(stored.affine)
    possible = _usable(stored.affine)
    other = metadata.spacing is not None and not np.allclose(sorted(spacing), sorted(metadata.spacing), rtol=SAME_SIZE)
    blank = not stored.has_orientation or (is_default(stored.affine) and other and not _was_resampled(stored, metadata))
    if blank or not (possible or (_has_axes(stored.affine) and _usable(table))):
        return _without_header(stored, metadata, table, warnings)
    if other and metadata.spacing is not None:
        columns, rows = metadata.plane or (None, None)
        counts = (columns, rows, metadata.slices)
        return settled(stored.affine, stored.data.shape, metadata.spacing, counts, warnings)
    _compare_axes(stored, metadata, table, warnings)
    return stored.affine


def _was_resampled(stored: StoredVolume, metadata: Metadata) -> bool:
    """Whether a file has other numbers of voxels than its table says, in whatever order."""
    if metadata.plane is not None and metadata.slices is not None:
        return sorted(stored.data.shape) != sorted((*metadata.plane, metadata.slices))
    return metadata.slices is not None and metadata.slices not in stored.data.shape


def _without_header(
    stored: StoredVolume, metadata: Metadata, table: np.ndarray | None, warnings: list[str]
) -> np.ndarray:
    """The affine of a volume whose header says nothing, or what cannot be."""
    spacing, possible = voxel_spacing(stored.affine), _usable(stored.affine)
    if _usable(table):
        warnings.append("the header has no usable geometry: spacing and orientation come from the metadata table")
        return table
    if not possible:
        raise VolumeError(
            f"no usable geometry: the header has spacing {spacing.round(4).tolist()} mm, axes "
            f"{stored.affine[:3, :3].round(3).tolist()}, and no metadata table replaces it"
        )
    if np.allclose(spacing, 1):
        raise VolumeError("the header is blank (no orientation, spacing 1 mm) and no metadata table replaces it")
    x, y, z = (float(mm) for mm in spacing)
    if metadata.axes is not None:
        warnings.append(f"the header has no orientation: the table's {metadata.axes} taken")
        return axes_affine((x, y, z), metadata.axes)
    warnings.append("the header has no orientation: LPS index axes assumed, left and right are not certain")
    return axes_affine((x, y, z), "LPS")


def _compare_axes(stored: StoredVolume, metadata: Metadata, table: np.ndarray | None, warnings: list[str]) -> None:
    """Says, or refuses, where a header that is not blank has other axes than the table."""
    own = "".join(map(str, nib.aff2axcodes(stored.affine)))
    if metadata.axes is not None and metadata.axes.upper() not in (own, own[::-1]):  # reversed: of a C-ordered array
        raise VolumeError(
            f"the axes of header ({own}) and table ({metadata.axes}) disagree, and nothing shows which are right: correct the "
            "header, or leave the table's axes empty for files that have one"
        )
    if metadata.orientation is not None and _usable(table):
        cosines = (stored.affine[:3, :3] / voxel_spacing(stored.affine)).T @ (table[:3, :3] / voxel_spacing(table))
        if np.abs(cosines).max(1).min() < 0.95:
            if not _was_resampled(stored, metadata):
                raise VolumeError(
                    f"the axes of header {_directions(stored.affine)} and metadata table {_directions(table)} disagree, and "
                    "nothing shows which are right: correct the header, or leave the table's ImageOrientationPatient empty"
                )
            warnings.append("the axes of header and metadata table disagree: header used, since the file was resampled")
    if is_default(stored.affine) and metadata.spacing is None:
        warnings.append(
            f"the header says 1 mm, {own}, origin 0, as where nothing is known: sizes, left and right are not certain"
        )


def _directions(affine: np.ndarray) -> list[list[float]]:
    return (affine[:3, :3] / voxel_spacing(affine)).T.round(2).tolist()


def ras_order(affine: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """(source axis of x, y, z; its sign): the nearest RAS+ order of the voxel axes."""
    orientation = nib.io_orientation(affine)
    if np.isnan(orientation).any():
        raise VolumeError(f"the affine does not give every axis a direction: {affine[:3].round(3).tolist()}")
    x, y, z = (int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3))
    return (x, y, z), orientation[[x, y, z], 1]


def obliqueness(affine: np.ndarray) -> float:
    """Largest angle between a voxel axis and its scanner axis, degrees."""
    order, _ = ras_order(affine)
    cosines = np.abs(affine[:3, :3] / voxel_spacing(affine))
    return float(np.degrees(np.arccos(np.clip([cosines[i, source] for i, source in enumerate(order)], 0, 1))).max())


def anatomy_box(data: np.ndarray, affine: np.ndarray, to_hu: Callable, policy: str) -> np.ndarray | None:
    """Bounding box [3, 2] (first, last voxel + 1, source axes) of the "body" or the "lung"; `None` where there is none.

    Body: the largest connected part above -400 HU once thin things (table, blankets) are opened away. Lung: air inside
    the body's slices that does not reach the border of the slice, in parts of 100 ml and more."""
    from scipy import ndimage

    spacing = voxel_spacing(affine)
    strides = np.maximum(np.round(_BOX_MM / spacing), 1).astype(int)
    coarse = to_hu(data[tuple(slice(None, None, int(s)) for s in strides)])
    body = ndimage.binary_opening(coarse > -400, iterations=2)
    labels, count = ndimage.label(body)
    if not count:
        return None
    found = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    if policy == "lung":
        order, _ = ras_order(affine)
        inside = np.stack([ndimage.binary_fill_holes(s) for s in np.moveaxis(found, order[2], 0)])
        inside = np.moveaxis(inside, 0, order[2])
        air = ndimage.binary_opening(inside & (coarse < -500))
        labels, count = ndimage.label(air)
        smallest = 100_000 / float(np.prod(spacing * strides))  # 100 ml in voxels
        sizes = np.bincount(labels.ravel())
        found = np.isin(labels, [i for i in range(1, count + 1) if sizes[i] >= smallest])
        if not found.any():
            return None
    box = [np.flatnonzero(found.any(tuple(a for a in range(3) if a != axis)))[[0, -1]] for axis in range(3)]
    margin = _BOX_MARGIN_MM / spacing
    return np.array(
        [
            (max(first * s - m, 0), min((last + 1) * s + m, size))
            for (first, last), s, m, size in zip(box, strides, margin, data.shape, strict=True)
        ]
    )


def _layout(
    data: np.ndarray,
    affine: np.ndarray,
    grid: Grid,
    to_hu: Callable,
    warnings: list[str],
    at: tuple[float, float, float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(centre in source voxels, spacing in mm RAS+): where the grid lies on the volume."""
    order, _ = ras_order(affine)
    shape, spacing = np.array(data.shape), voxel_spacing(affine)
    centre, step = (shape - 1) / 2, np.array(grid.spacing, np.float64)
    if at is not None:
        centre = (np.linalg.inv(affine) @ [*at, 1.0])[:3]
        if (centre < -0.5).any() or (centre > shape - 0.5).any():
            raise VolumeError(
                f"the place {[round(x, 1) for x in at]} mm (RAS+) is outside of the volume: its voxel would be "
                f"{centre.round(1).tolist()} of {shape.tolist()}"
            )
        return centre, step
    if grid.policy == "fraction":
        kept = (shape * spacing)[list(order)] * grid.fraction
        return centre, kept / np.array(grid.size)
    if grid.policy in ("body", "lung"):
        box = anatomy_box(data, affine, to_hu, grid.policy)
        if box is None:
            warnings.append(f"no {grid.policy} found: the grid is centred on the volume")
            return centre, step
        centre = (box.sum(1) - 1) / 2
        over = ((box[:, 1] - box[:, 0]) * spacing)[list(order)] - step * grid.size
        if over.max() > 1:
            cut = ", ".join(f"{axis} by {o:.0f} mm" for axis, o in zip("xyz", over, strict=True) if o > 1)
            warnings.append(f"the {grid.policy} is larger than the grid: cut in {cut}")
    return centre, step


def place(
    data: np.ndarray,
    affine: np.ndarray,
    grid: Grid,
    to_hu: Callable,
    warnings: list[str],
    at: tuple[float, float, float] | None = None,
    straighten: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The volume on its grid: (int16 HU [X, Y, Z], affine of its voxels). Outside the volume is air. With `at` (mm, RAS+)
    the grid is centred there, whatever its policy. Without `straighten` a volume keeps its own axes however askew it is: the
    planes of cardiac MR are chosen by the heart.

    A volume that is askew by up to `STRAIGHTEN_DEGREES` keeps its own axes (the affine says so); one that is more
    askew is turned onto the scanner's axes."""
    order, signs = ras_order(affine)
    centre, spacing = _layout(data, affine, grid, to_hu, warnings, at)
    angle = obliqueness(affine)
    if angle > STRAIGHTEN_DEGREES and straighten:
        warnings.append(f"oblique by {angle:.0f} degrees: turned onto the scanner's axes")
        return _straighten(data, affine, grid.size, spacing, centre, to_hu)
    if angle > 1:
        warnings.append(f"oblique by {angle:.0f} degrees: its own axes are kept, the affine says how they lie")
    return _place_axes(data, affine, order, signs, grid.size, spacing, centre, to_hu)


def _place_axes(
    data: np.ndarray,
    affine: np.ndarray,
    order: tuple[int, int, int],
    signs: np.ndarray,
    size: Sequence[int] | np.ndarray,
    spacing: np.ndarray,
    centre: np.ndarray,
    to_hu: Callable,
) -> tuple[np.ndarray, np.ndarray]:
    """Separable resampling along the volume's own axes."""
    source_spacing = voxel_spacing(affine)
    axes: dict[int, AxisMap] = {}
    to_source = np.zeros((4, 4))  # output voxel -> source voxel
    to_source[3, 3] = 1
    for target, source in enumerate(order):
        step = spacing[target] / source_spacing[source] * signs[target]
        start = centre[source] - step * (size[target] - 1) / 2
        axes[source] = AxisMap(int(size[target]), float(start), float(step))
        to_source[source, target], to_source[source, 3] = step, start
    return resample(data, (axes[0], axes[1], axes[2]), order, to_hu, AIR_HU), affine @ to_source


def _straighten(
    data: np.ndarray,
    affine: np.ndarray,
    size: tuple[int, int, int],
    spacing: np.ndarray,
    centre: np.ndarray,
    to_hu: Callable,
) -> tuple[np.ndarray, np.ndarray]:
    """Area averaging along the volume's own axes where the grid is coarser, then one linear interpolation onto the
    scanner's axes."""
    from scipy import ndimage

    order, signs = ras_order(affine)
    own = voxel_spacing(affine)[list(order)]
    coarse = np.maximum(own, spacing)
    shape = np.array(data.shape)[list(order)]
    count = np.ceil(shape * own / coarse).astype(int)
    middle = (np.array(data.shape) - 1) / 2
    volume, to_mm = _place_axes(data, affine, order, signs, count, coarse, middle, to_hu)
    target = np.diag([*spacing, 1.0])
    target[:3, 3] = (affine @ [*centre, 1])[:3] - spacing * (np.array(size) - 1) / 2
    matrix = np.linalg.inv(to_mm) @ target
    turned = ndimage.affine_transform(
        volume.astype(np.float32), matrix[:3, :3], matrix[:3, 3], tuple(size), order=1, cval=AIR_HU
    )
    return np.rint(turned).astype(np.int16), target
