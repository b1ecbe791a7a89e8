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

import numpy as np

from mg3d_jax.prepare.archives import in_archive, members
from mg3d_jax.prepare.dicom import read_dicom
from mg3d_jax.prepare.dicom_files import is_dicom
from mg3d_jax.prepare.geometry import Metadata, axes_affine
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError, check_unpacked, read_nifti
from mg3d_jax.prepare.walk import check_regular, natural_key, walk

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ITK_SUFFIXES = (".mhd", ".mha", ".nrrd")
ARRAY_SUFFIXES = (".npy", ".npz")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".ima")


def read_volume(path: Path, metadata: Metadata) -> StoredVolume:
    """Reads one volume, by what `path` is. Raises `VolumeError`, without the file's name."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, metadata)
    if (found := in_archive(path)) is not None:
        return _read_archive(*found, metadata)
    check_regular(path)
    name = path.name.lower()
    if name.endswith(ARRAY_SUFFIXES):
        return read_array(path, metadata)
    if name.endswith(ITK_SUFFIXES):
        return read_itk(path)
    if name.endswith(".dcm") or is_dicom(path):
        return read_dicom([path])
    return read_nifti(path, metadata.frame)


def _read_archive(archive: Path, inner: str, metadata: Metadata) -> StoredVolume:
    """The one volume of an archive: its NIfTI file, or its DICOM series."""
    files: list[Any] = list(members(archive, inner))
    volumes = [file for file in files if file.name.lower().endswith(NIFTI_SUFFIXES)]
    if len(volumes) > 1:
        names = ", ".join(file.inner for file in volumes[:4])
        raise VolumeError(
            f"{len(volumes)} volumes in the archive ({names}, ...): name one as {archive.name}/{volumes[0].inner}"
        )
    if volumes:
        return read_nifti(volumes[0], metadata.frame)
    if not files:
        raise VolumeError(f"no such file in the archive: {inner}" if inner else "the archive is empty")
    return read_dicom([file for file in files if not file.name.lower().endswith(IMAGE_SUFFIXES)])


def _read_folder(path: Path, metadata: Metadata) -> StoredVolume:
    """Slices of a folder: of itself, or of the folders in it where it holds none. Pictures beside DICOM are previews."""

    def sorted_out(files: list[Path]) -> tuple[list[Path], list[Path]]:
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        return images, [file for file in files if file not in set(images)]

    files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
    images, others = sorted_out(files)
    if not images and not any(file.suffix.lower() in DICOM_SUFFIXES or is_dicom(file) for file in others):
        below = [folder / name for folder, names in walk(path) for name in names if not name.startswith(".")]
        if len(below) > len(files):
            images, others = sorted_out([file for file in below if file.is_file()])
    if not any(file.suffix.lower() in DICOM_SUFFIXES or is_dicom(file) for file in others) and images:
        return read_slices(images, metadata)
    volume = read_dicom(others)
    if images:
        volume.notes.append(f"left out beside the DICOM slices: {len(images)} pictures such as {images[0].name}")
    return volume


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
                members = archive.zip.infolist() if archive.zip else []
                check_unpacked(float(sum(one.file_size for one in members)), path.stat().st_size)
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
    warnings = _holes([file.name for file in files])
    warning = f"8-bit slices: HU known in steps of {(high - low) / 255:.1f} and only in {low:g}..{high:g}"
    data = np.asfortranarray(np.stack(planes, -1))
    return StoredVolume(data, affine, ((high - low) / 255, low), True, windowed=True, warnings=[warning, *warnings])


def _holes(names: list[str]) -> list[str]:
    """A warning where the numbers in the names of slices are not evenly spaced: pictures have no positions to tell by."""
    numbers = sorted({int(found[-1]) for name in names if (found := re.findall(r"\d+", Path(name).stem))})
    gaps = np.diff(numbers)
    if len(numbers) < len(names) or len(gaps) < 2 or gaps.max() == gaps.min():
        return []
    step = int(np.median(gaps))
    missing = int((gaps // step - 1).clip(0).sum())
    return [f"missing slices? the numbers in the names of the slices have {missing or 'uneven'} holes"]
