"""Reading a NIfTI file once, whole, in its stored numbers: header by nibabel, voxels by isal, and nothing guessed.

The stored numbers are left alone (no slope, no intercept): `hounsfield.py` decides what they mean.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

_CHUNK_BYTES = 1 << 20
_STREAM_ERRORS: tuple[Any, ...] = (OSError, EOFError, zlib.error, isal_zlib.error)


class VolumeError(ValueError):
    """This volume cannot be used; the message says why. The caller names the file."""


@dataclass
class StoredVolume:
    """What a file holds, before any interpretation."""

    data: np.ndarray  # [i, j, k] in the stored dtype; NIfTI's are Fortran-ordered
    affine: np.ndarray  # float64 [4, 4], voxel -> mm (RAS+), as the header has it
    scaling: tuple[float, float] | None  # slope, intercept of the header; None where it has none, or 1 and 0
    has_orientation: bool  # False where the header tells neither orientation nor position
    windowed: bool = False  # grey values of a known window: `scaling` is certain, HU beyond the window are lost
    warnings: list[str] = field(default_factory=list)


def _open(path: Path) -> BufferedIOBase:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BufferedIOBase, igzip.open(path, "rb")) if compressed else open(path, "rb")


def _read_voxels(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The voxels, Fortran-ordered. Reads to the end of the stream, so that the gzip checksum is verified."""
    flat = np.empty(int(np.prod(shape, dtype=np.int64)), dtype)
    target = flat.data.cast("B")
    done = 0
    with _open(path) as stream:
        if len(stream.read(offset)) < offset:
            raise VolumeError("truncated: the file ends inside its header")
        while done < len(target):
            count = stream.readinto(target[done : done + _CHUNK_BYTES])
            if not count:
                raise VolumeError(f"truncated: {done} of {len(target)} voxel bytes are there")
            done += count
        while stream.read(_CHUNK_BYTES):
            pass
    return flat.reshape(shape, order="F")


def _check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A damaged header may announce terabytes: refuse what the file cannot hold (gzip shrinks at most 1032-fold)."""
    announced = int(np.prod([float(n) for n in shape])) * dtype.itemsize
    if announced > 1100 * path.stat().st_size + 4096:
        raise VolumeError(f"truncated or damaged: {announced:.3g} bytes announced, the file has {path.stat().st_size}")


def read_nifti(path: Path, frame: int | None = None) -> StoredVolume:
    """Reads `.nii` or `.nii.gz`, of a 4D file its `frame`. Raises `VolumeError` for what is unreadable, truncated, or not one
    3D volume."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.read(1)  # nibabel would call a file that the system fails to read one of unknown type
        image: Any = nib.load(path)
        header = image.header
        affine = np.asarray(image.affine, np.float64)
        stored = tuple(int(n) for n in image.shape)
        dtype, offset = header.get_data_dtype(), int(image.dataobj.offset)
        # nibabel blanks these fields of a loaded header; its array proxy keeps them (1 and 0 where there are none).
        scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
        codes = [int(header[name]) for name in ("qform_code", "sform_code")] if "sform_code" in header else [0, 0]
    except FileNotFoundError:
        raise VolumeError("no such file") from None
    except (*_STREAM_ERRORS, ImageFileError, HeaderDataError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise VolumeError(f"unreadable: {error}") from error
    shape = stored
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    whole = shape
    if frame is not None and len(shape) == 4:
        if not 0 <= frame < shape[3]:
            raise VolumeError(f"it has {shape[3]} frames, frame {frame + 1} is asked for")
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 1:
        raise VolumeError(f"not one 3D volume: its shape is {stored}")
    if dtype.kind not in "iuf":
        raise VolumeError(f"voxels of type {dtype} are not CT numbers")
    _check_size(path, whole, dtype)
    try:
        data = _read_voxels(path, offset, whole, dtype)
        if whole != shape:
            data = np.asfortranarray(data[..., frame])
    except _STREAM_ERRORS as error:
        raise VolumeError(f"unreadable or truncated: {error}") from error
    return StoredVolume(
        data=data,
        affine=affine,
        scaling=None if scaling == (1.0, 0.0) else scaling,
        has_orientation=any(codes),
    )
