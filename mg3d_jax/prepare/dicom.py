"""A folder of DICOM files -> one volume: which files are slices, which series is taken, and where everything lies.

Nothing that belongs to the volume is lost in silence: a slice that cannot be read, or that the numbering misses, is an error or
a warning. What does not belong to it (scouts, dose pages, copies, reports) is left out with a note. Of several series one is
taken by a fixed rule, `SERIES_RULE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.prepare.dicom_files import SERIES_RULE, kernel_of, rank, read_files
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.padding import up_to_the_border
from mg3d_jax.prepare.walk import natural_key

_GAP_TOLERANCE = 0.05  # of the slice spacing
_MOST_FILLED = 0.1  # share of slices that may be missing and filled in
_BLANK = 0.9  # share of a slice
_MOST_ODD = 0.2  # share of images of another size or direction that may be left out
_OUTSIDE = np.float32(-30_000)  # HU of a scanner's padding: air under any mapping


@dataclass(frozen=True)
class Slice:
    """One image of a series with what is needed to place it."""

    name: str
    uid: str
    number: int | None  # InstanceNumber
    position: np.ndarray  # mm, LPS
    cosines: np.ndarray  # [2, 3]: directions of a row and of a column
    spacing: tuple[float, float]  # mm between rows, between columns
    shape: tuple[int, int]  # rows, columns
    kind: tuple[str, ...]  # ImageType
    pixels: Callable[[], np.ndarray]  # float32 HU [rows, columns]
    between: float | None  # SpacingBetweenSlices, mm


def read_dicom(files: Iterable[Path]) -> StoredVolume:
    """One series of `files`, in whatever order they are listed, with index axes column, row, slice. Slices that are missing
    inside are filled in by interpolation, with a warning. Raises `VolumeError` for a slice that cannot be read: a chest without
    its top is worse than none. Needs pydicom (`pip install pydicom`)."""
    series, notes, unplaced = read_files(sorted(files, key=lambda path: natural_key(path.name)))
    if not series:
        if unplaced:
            raise VolumeError(
                f"the {unplaced} images have no positions (ImagePositionPatient was removed): restore the tags, or convert the "
                "series to NIfTI with a tool that knows its slice order"
            )
        raise VolumeError("neither images nor a DICOM series with positions in this folder")
    warnings: list[str] = []
    if unplaced:
        warnings.append(f"{unplaced} images without a position were left out")
    uid = min(series, key=lambda one: rank(series[one]))
    if len(series) > 1:
        taken = series[uid]
        kernel, modality = kernel_of(taken[0][1]), taken[0][1].get("Modality", "?")
        warnings.append(
            f"{len(series)} DICOM series in one folder: {modality} of {len(taken)} slices, kernel {kernel or 'unknown'}, "
            f"taken ({uid}); rule: {SERIES_RULE}"
        )
    slices = [one for file, dataset in series[uid] for one in _slices_of(file, dataset)]
    volume = _stack(_belonging(slices, warnings), warnings)
    volume.notes = notes
    volume.modality = str(series[uid][0][1].get("Modality") or "") or None
    _check_total(series[uid][0][1], len(slices), warnings)
    return volume


def _check_total(dataset: Any, count: int, warnings: list[str]) -> None:
    """Whether the header knows of more images than there are."""
    total = dataset.get("ImagesInAcquisition")
    if total not in (None, "") and int(total) > count:
        warnings.append(f"missing slices? the header says that the acquisition has {total} images, {count} are here")


def _slices_of(file: Path, dataset: Any) -> list[Slice]:
    """The images of one file. Raises `VolumeError` for a multi-frame file that does not say where its frames lie."""
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        return _frames(file, dataset)
    number = dataset.get("InstanceNumber")
    if not np.isfinite(np.array(dataset.ImagePositionPatient, np.float64)).all():
        raise VolumeError(f"slice {file.name} has the position {list(dataset.ImagePositionPatient)}: restore the tag")
    return [
        Slice(
            file.name,
            str(dataset.get("SOPInstanceUID", file.name)),
            int(number) if number not in (None, "") else None,
            np.array(dataset.ImagePositionPatient, np.float64),
            np.array(dataset.ImageOrientationPatient, np.float64).reshape(2, 3),
            _pair(dataset.get("PixelSpacing"), file),
            (int(dataset.Rows), int(dataset.Columns)),
            tuple(str(part).upper() for part in dataset.get("ImageType", ())),
            lambda: _hounsfield(dataset, dataset.pixel_array, dataset),
            float(dataset.SpacingBetweenSlices) if dataset.get("SpacingBetweenSlices") else None,
        )
    ]


def _pair(values: Any, file: Path) -> tuple[float, float]:
    if not values or len(values) != 2 or min(map(float, values)) <= 0:
        raise VolumeError(f"slice {file.name} has no PixelSpacing: restore the tag")
    return float(values[0]), float(values[1])


def _frames(file: Path, dataset: Any) -> list[Slice]:
    """The frames of an Enhanced CT file, by its functional groups."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []

    def group(frame: Any, name: str) -> Any:
        for place in (frame, shared):
            if place is not None and place.get(name):
                return place[name][0]
        return None

    found: list[Slice] = []
    for index in range(int(dataset.NumberOfFrames)):
        frame = each[index] if index < len(each) else None
        position, direction = group(frame, "PlanePositionSequence"), group(frame, "PlaneOrientationSequence")
        measures, scale = group(frame, "PixelMeasuresSequence"), group(frame, "PixelValueTransformationSequence")
        if position is None or direction is None or measures is None:
            raise VolumeError(
                f"{file.name} is a multi-frame file that does not say where its frames lie: convert it to single-frame "
                "DICOM or to NIfTI with the scanner's or a viewer's export"
            )
        found.append(
            Slice(
                f"{file.name}, frame {index + 1}",
                f"{dataset.get('SOPInstanceUID', file.name)}.{index}",
                index + 1,
                np.array(position.ImagePositionPatient, np.float64),
                np.array(direction.ImageOrientationPatient, np.float64).reshape(2, 3),
                _pair(measures.get("PixelSpacing"), file),
                (int(dataset.Rows), int(dataset.Columns)),
                tuple(str(part).upper() for part in dataset.get("ImageType", ())),
                partial(_frame_hounsfield, dataset, index, scale),
                None,
            )
        )
    return found


def _frame_hounsfield(dataset: Any, index: int, scale: Any) -> np.ndarray:
    return _hounsfield(dataset, dataset.pixel_array[index], scale or dataset)


def _hounsfield(dataset: Any, stored: np.ndarray, scale: Any) -> np.ndarray:
    """float32 [rows, columns] of one image, its own slope and intercept applied (they may differ between slices), and air
    where its header's padding value is."""
    slope, intercept = float(scale.get("RescaleSlope", 1) or 1), float(scale.get("RescaleIntercept", 0) or 0)
    hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    padding = dataset.get("PixelPaddingValue")
    if padding in (None, ""):
        return hu
    ends = sorted((int(padding), int(dataset.get("PixelPaddingRangeLimit", padding))))
    outside = (stored >= ends[0]) & (stored <= ends[1])
    if ends[1] * slope + intercept > -950:  # tissue may have the number too
        outside = up_to_the_border(outside)
    return np.where(outside, _OUTSIDE, hu)


def _belonging(slices: list[Slice], warnings: list[str]) -> list[Slice]:
    """The slices that make one volume: without scouts, images of another size or direction, and copies."""
    found = [one for one in slices if "LOCALIZER" not in one.kind]
    if len(found) < len(slices):
        warnings.append(f"left out: {len(slices) - len(found)} scouts of the same series")
    found, before = _largest_group(found), len(found)
    if odd := before - len(found):
        if odd > max(_MOST_ODD * before, 1):
            raise VolumeError(
                f"the images of the DICOM series have different sizes or orientations: {odd} of {before} differ from "
                "the largest group; separate them into folders"
            )
        warnings.append(
            f"left out: {odd} images of another size or direction (a scout, a dose page, a secondary capture)"
        )
    unique: dict[str, Slice] = {}
    for one in found:
        unique.setdefault(one.uid, one)
    found = list(unique.values())
    if len(unique) < before - odd:
        warnings.append(f"left out: {before - odd - len(unique)} copies of slices")
    return found


def _largest_group(slices: list[Slice]) -> list[Slice]:
    if not slices:
        raise VolumeError("only scouts (localizers) in this folder: the slices of the scan are not here")
    groups: dict[tuple, list[Slice]] = {}
    for one in slices:
        key = (one.shape, tuple(one.cosines.round(2).ravel() + 0.0), tuple(np.round(one.spacing, 3)))
        groups.setdefault(key, []).append(one)
    return max(groups.values(), key=len)


def _stack(slices: list[Slice], warnings: list[str]) -> StoredVolume:
    """Slices of one size and direction -> a volume, along their normal."""
    cosines = slices[0].cosines
    normal = np.cross(cosines[0], cosines[1])
    slices = sorted(slices, key=lambda one: float(normal @ one.position))
    if len(slices) < 2:
        raise VolumeError("a DICOM series of one slice is not a volume: give the folder that holds the whole series")
    heights = np.array([normal @ one.position for one in slices])
    slices, heights = _without_twins(slices, heights, warnings)
    _check_line(slices)
    gaps = np.diff(heights)
    counts = _steps(gaps, len(slices))
    step = float(np.median(gaps))
    _check_numbers(slices, warnings)
    between = slices[0].between
    if between and abs(between - step) > _GAP_TOLERANCE * step:
        warnings.append(
            f"slices lie {step:g} mm apart, the header's SpacingBetweenSlices says {between:g}: positions used"
        )
    filled, missing = _planes(slices, counts), int((counts - 1).sum())
    _check_content(filled, slices, warnings)
    if missing:
        warnings.append(f"missing slices: {missing} of {len(filled)} filled in by interpolation")
    affine = np.eye(4)
    row_step, column_step = slices[0].spacing
    affine[:3, 0], affine[:3, 1] = cosines[0] * column_step, cosines[1] * row_step
    # Along the positions, not the normal: a tilted gantry shears the stack.
    affine[:3, 2] = (slices[-1].position - slices[0].position) / (len(filled) - 1)
    affine[:3, 3] = slices[0].position
    data = np.asfortranarray(np.stack([plane.T for plane in filled], -1))
    return StoredVolume(data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, None, has_orientation=True, warnings=warnings)


def _check_content(planes: list[np.ndarray], slices: list[Slice], warnings: list[str]) -> None:
    """Whether a slice is nearly all one number where the others are not: a copy that broke off, filled up with zeros."""
    shares = np.array([np.mean(plane == plane.min()) for plane in planes])
    blank = np.flatnonzero((shares > _BLANK) & (shares > np.median(shares) + 0.4))
    if len(blank):
        name = slices[blank[0]].name if len(planes) == len(slices) else f"number {blank[0] + 1}"
        warnings.append(f"missing slices? {len(blank)} hold hardly more than one number, such as {name}")


def _without_twins(slices: list[Slice], heights: np.ndarray, warnings: list[str]) -> tuple[list[Slice], np.ndarray]:
    """Without slices that repeat the one before, under another UID. Raises `VolumeError` for two that differ."""
    kept = [0]
    for index in range(1, len(slices)):
        if heights[index] - heights[kept[-1]] > 1e-3:
            kept.append(index)
            continue
        one, other = slices[kept[-1]], slices[index]
        if not np.array_equal(_decoded(one), _decoded(other)):
            raise VolumeError(
                f"two slices of the DICOM series have the same position and differ: {one.name} and {other.name}, e.g. two "
                "phases in one series: separate them into folders"
            )
    if len(kept) < len(slices):
        warnings.append(f"left out: {len(slices) - len(kept)} slices that repeat another")
    return [slices[index] for index in kept], heights[kept]


def _check_line(slices: list[Slice]) -> None:
    """Raises `VolumeError` where slices lie beside the line from the first to the last: an affine would shear the volume."""
    places = np.array([one.position for one in slices])
    line = places[-1] - places[0]
    along = (places - places[0]) @ line / (line @ line)
    aside = np.linalg.norm(places - places[0] - np.outer(along, line), axis=1)
    if aside.max() > max(1.0, *slices[0].spacing):
        raise VolumeError(
            f"the slices of the DICOM series do not lie on one line: {slices[int(aside.argmax())].name} is {aside.max():.1f} "
            "mm aside, as where the table was moved: give the parts as separate volumes"
        )


def _steps(gaps: np.ndarray, slices: int) -> np.ndarray:
    """By how many steps each slice lies from the one before. Raises `VolumeError` for two spacings and for many holes."""
    step = float(np.median(gaps))
    counts = np.rint(gaps / step).astype(int)
    uneven = np.abs(gaps - counts * step).max() > _GAP_TOLERANCE * step
    if not uneven and (counts - 1).sum() <= _MOST_FILLED * slices:
        return counts
    common = [(gap, n) for gap, n in Counter(gaps.round(2).tolist()).most_common(2) if n >= max(3, 0.1 * len(gaps))]
    if len(common) == 2:
        parts = " and ".join(f"{gap:g} mm ({n} times)" for gap, n in common)
        raise VolumeError(
            f"two slice spacings in one DICOM series, {parts}: give the parts as separate volumes, or resample "
            "them to one spacing"
        )
    raise VolumeError(
        f"missing slices: gaps of {gaps.min():.2f} to {gaps.max():.2f} mm in the DICOM series: copy it again"
    )


def _check_numbers(slices: list[Slice], warnings: list[str]) -> None:
    """Whether the instance numbers tell of slices at an end, or contradict the positions."""
    numbers = [one.number for one in slices if one.number is not None]
    if len(numbers) < len(slices) or len(set(numbers)) < len(numbers):
        return
    order = np.diff(np.array(numbers))
    if not ((order > 0).all() or (order < 0).all()):
        warnings.append("the order of the instance numbers contradicts the positions: positions used")
    first, last = min(numbers), max(numbers)
    strides = np.unique(np.abs(order))
    if first > 1 and len(strides) == 1 and strides[0] == 1:
        warnings.append(f"missing slices? instance numbers begin at {first}, not at 1")
    elif len(strides) > 1 and ((order > 0).all() or (order < 0).all()):
        holes = last - first + 1 - len(numbers)
        warnings.append(f"missing slices? {holes} instance numbers between {first} and {last} are not here")


def _planes(slices: list[Slice], counts: np.ndarray) -> list[np.ndarray]:
    planes = [_decoded(one) for one in slices]
    filled = [planes[0]]
    for index, count in enumerate(counts):
        before, after = planes[index], planes[index + 1]
        filled += [np.rint(before + (after - before) * (k / count)).astype(np.float32) for k in range(1, count)]
        filled.append(after)
    return filled


def _decoded(one: Slice) -> np.ndarray:
    try:
        return one.pixels()
    except MemoryError:
        raise
    except Exception as error:  # pydicom's decoders raise exceptions of many kinds
        raise VolumeError(f"the pixels of the DICOM series cannot be decoded: {one.name}: {error}") from error
