"""Volumes in any format that users have -> `StoredVolume`: NIfTI, MetaImage and NRRD, NumPy arrays, folders of 8-bit slices,
DICOM series.

What a file does not say (spacing and axes of an array, the window of grey slices) must come with its `Metadata`.
"""

from __future__ import annotations

import functools
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError, read_nifti

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ITK_SUFFIXES = (".mhd", ".mha", ".nrrd")
ARRAY_SUFFIXES = (".npy", ".npz")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
_GAP_TOLERANCE = 0.05  # of the slice spacing
_MOST_FILLED = 0.1  # share of slices that may be missing and filled in


def natural_key(name: str) -> list:
    """Sort key that puts "slice10" after "slice9"."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def read_volume(path: Path, metadata: Metadata) -> StoredVolume:
    """Reads one volume, by what `path` is. Raises `VolumeError`, without the file's name."""
    path = Path(path)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        return read_slices(images, metadata) if images else read_dicom(files)
    name = path.name.lower()
    if name.endswith(ARRAY_SUFFIXES):
        return read_array(path, metadata)
    if name.endswith(ITK_SUFFIXES):
        return read_itk(path)
    return read_nifti(path, metadata.frame)


def read_again(path: Path, metadata: Metadata) -> StoredVolume:
    """As `read_volume`; the last one that a process read is kept, for the next patch of it. Its voxels are not to be
    changed."""
    return _read_last(path, replace(metadata, centre=None))


@functools.lru_cache(maxsize=1)
def _read_last(path: Path, metadata: Metadata) -> StoredVolume:
    return read_volume(path, metadata)


def read_itk(path: Path) -> StoredVolume:
    """MetaImage (`.mhd` with its `.raw` or `.zraw`, `.mha`) or NRRD. Needs SimpleITK (`pip install SimpleITK`)."""
    try:
        import SimpleITK
    except ImportError as error:
        raise VolumeError(f"{path.suffix} needs SimpleITK: pip install SimpleITK") from error
    if not path.is_file():
        raise VolumeError("no such file")
    try:
        image = SimpleITK.ReadImage(str(path))
        data = SimpleITK.GetArrayFromImage(image).T  # x, y, z
    except RuntimeError as error:
        raise VolumeError(f"unreadable: {' '.join(str(error).split())[-200:]}") from error
    if data.ndim != 3 or data.dtype.kind not in "iuf":
        raise VolumeError(f"not one 3D volume of numbers: {data.dtype}{data.shape}")
    affine = np.eye(4)  # LPS
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return StoredVolume(data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, None, has_orientation=True)


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


def _headerless_affine(metadata: Metadata, what: str) -> np.ndarray:
    if metadata.spacing is None:
        raise VolumeError(f"{what} has no spacing: give it in the table's column `spacing`, or with --array-spacing")
    if metadata.axes is None:
        raise VolumeError(f"{what} has no orientation: give it in the table's column `axes`, or with --array-axes")
    return axes_affine(metadata.spacing, metadata.axes)


def read_array(path: Path, metadata: Metadata) -> StoredVolume:
    """`.npy`, or `.npz` with one 3D array (key "ct" or "volume" where there are several). Never unpickles."""
    affine = _headerless_affine(metadata, "an array")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded as archive:
                keys = [k for k in ("ct", "volume") if k in archive.files] or archive.files
                if len(keys) != 1:
                    raise VolumeError(f"several arrays {archive.files} and none of them is `ct` or `volume`")
                loaded = archive[keys[0]]
    except FileNotFoundError:
        raise VolumeError("no such file") from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(f"unreadable: {error}") from error
    data = loaded.reshape([n for n in loaded.shape if n != 1]) if loaded.ndim > 3 else loaded
    if data.ndim != 3 or data.dtype.kind not in "iuf":
        raise VolumeError(f"not one 3D volume of numbers: {loaded.dtype}{loaded.shape}")
    # Reversed axes of a C-ordered array are Fortran order, which is what resampling reads fastest.
    return StoredVolume(data.T, affine[:, [2, 1, 0, 3]], None, has_orientation=True)


def read_slices(files: list[Path], metadata: Metadata) -> StoredVolume:
    """A folder of 8-bit grey slices, in the natural order of their names. Index axes: column, row, slice."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise VolumeError("8-bit slices need Pillow: pip install pillow") from error
    affine = _headerless_affine(metadata, "a folder of slices")
    if metadata.window is None:
        raise VolumeError("8-bit slices have no HU: say which HU their 0 and 255 are with --slice-window LOW HIGH")
    planes = []
    for file in sorted(files, key=lambda p: natural_key(p.name)):
        try:
            with Image.open(file) as image:
                planes.append(np.asarray(image.convert("L")).T)
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise VolumeError(f"slice {file.name} is unreadable: {error}") from error
    if len(shapes := {plane.shape for plane in planes}) != 1:
        raise VolumeError(f"slices of different sizes: {sorted(shapes)}")
    low, high = metadata.window
    warning = f"8-bit slices: HU known in steps of {(high - low) / 255:.1f} and only in {low:g}..{high:g}"
    data = np.asfortranarray(np.stack(planes, -1))
    return StoredVolume(data, affine, ((high - low) / 255, low), True, windowed=True, warnings=[warning])


def read_dicom(files: list[Path]) -> StoredVolume:
    """A folder of DICOM files: its one series of slices, ordered and spaced by their positions. Slices that are missing
    inside are filled in by interpolation, with a warning; files that are no DICOM, or no image, are passed over. Raises
    `VolumeError` for a slice that cannot be read: a chest without its top is worse than none. Needs pydicom
    (`pip install pydicom`)."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.uid import CTImageStorage
    except ImportError as error:
        raise VolumeError("DICOM needs pydicom: pip install pydicom") from error
    series: dict[str, list] = {}
    for file in files:
        try:
            dataset = pydicom.dcmread(file)
        except InvalidDicomError:
            if file.suffix.lower() == ".dcm":
                raise VolumeError(f"slice {file.name} is no DICOM, or only the start of one") from None
            continue
        except Exception as error:  # pydicom raises exceptions of many kinds
            raise VolumeError(f"slice {file.name} is unreadable: {type(error).__name__}: {error}") from error
        # pydicom gives no error for a file that ends early. One that does not even say what it is ended early.
        kind = dataset.file_meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID", CTImageStorage)
        if "PixelData" not in dataset and kind == CTImageStorage:
            raise VolumeError(f"slice {file.name} is truncated: it ends before its pixels")
        if "PixelData" in dataset and "ImagePositionPatient" in dataset and "ImageOrientationPatient" in dataset:
            series.setdefault(str(dataset.get("SeriesInstanceUID", "")), []).append(dataset)
    if not series:
        raise VolumeError("neither images nor a DICOM series with positions in this folder")
    warnings = [] if len(series) == 1 else [f"{len(series)} DICOM series in one folder: the longest was taken"]
    slices = max(series.values(), key=len)
    return _stack_dicom(slices, warnings)


def _stack_dicom(slices: list, warnings: list[str]) -> StoredVolume:
    """One series -> a volume with index axes column, row, slice (along the normal)."""
    cosines = np.array(slices[0].ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(cosines[0], cosines[1])
    for dataset in slices:
        if not np.allclose(np.array(dataset.ImageOrientationPatient, np.float64).reshape(2, 3), cosines, atol=1e-3):
            raise VolumeError("the slices of the DICOM series have different orientations")
        if (dataset.Rows, dataset.Columns) != (slices[0].Rows, slices[0].Columns):
            raise VolumeError("the slices of the DICOM series have different sizes")
    slices = sorted(slices, key=lambda d: float(np.dot(normal, np.array(d.ImagePositionPatient, np.float64))))
    heights = np.array([np.dot(normal, np.array(d.ImagePositionPatient, np.float64)) for d in slices])
    if len(slices) < 2:
        raise VolumeError("a DICOM series of one slice is not a volume")
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    if gaps.min() <= 1e-3:
        raise VolumeError("two slices of the DICOM series have the same position")
    counts = np.rint(gaps / step).astype(int)
    missing = int((counts - 1).sum())
    if np.abs(gaps - counts * step).max() > _GAP_TOLERANCE * step or missing > _MOST_FILLED * len(slices):
        raise VolumeError(f"missing slices: gaps of {gaps.min():.2f} to {gaps.max():.2f} mm in the DICOM series")
    try:
        planes = [_dicom_hu(dataset) for dataset in slices]
    except Exception as error:  # pydicom's decoders raise exceptions of many kinds
        raise VolumeError(f"the pixels of the DICOM series cannot be decoded: {error}") from error
    filled = [planes[0]]
    for index, count in enumerate(counts):
        before, after = planes[index], planes[index + 1]
        filled += [np.rint(before + (after - before) * (k / count)).astype(np.float32) for k in range(1, count)]
        filled.append(after)
    if missing:
        warnings.append(f"missing slices: {missing} of {len(filled)} filled in by interpolation")
    row_step, column_step = (float(v) for v in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = cosines[0] * column_step, cosines[1] * row_step
    # Along the positions, not the normal: a tilted gantry shears the stack.
    positions = [np.array(d.ImagePositionPatient, np.float64) for d in (slices[0], slices[-1])]
    affine[:3, 2] = (positions[1] - positions[0]) / (len(filled) - 1)
    affine[:3, 3] = positions[0]
    data = np.asfortranarray(np.stack([plane.T for plane in filled], -1))
    return StoredVolume(data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, None, has_orientation=True, warnings=warnings)


def _dicom_hu(dataset: Any) -> np.ndarray:
    """float32 [rows, columns] of one slice, its own slope and intercept applied (they may differ between slices)."""
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    return dataset.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
