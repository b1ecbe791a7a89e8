"""Reading a NIfTI file once, whole, in its stored numbers: header by nibabel, voxels by isal, and nothing guessed.

Packed or not is told by the content, not by the suffix. Header and voxels may lie in two files (`.hdr` and `.img`). The stored
numbers are left alone (no slope, no intercept): `hounsfield.py` decides what they mean.
"""

from __future__ import annotations

import bz2
import hashlib
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
_MOST_PACKED = 100  # CT packs to a half or a third, drawn scans to a twentieth
_ALWAYS_READ = 1 << 28  # bytes that any file may unpack to
_MOST_BEHIND = 1 << 24  # bytes after the voxels
_SAME_SPACING, _SAME_DIRECTION = 0.02, 0.999  # relative, and the cosine of 2.6 degrees
_DISTINCT, _MOST_ALIKE = (
    8,
    1 << 24,
)  # numbers in the first voxels by which scans differ, and bytes after which they do not
_UNITS = {1: 1000.0, 3: 1e-3}  # code of the header's unit of length (metre, micrometre): mm


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
    notes: list[str] = field(default_factory=list)  # what was left out without harm, or chosen by rule
    modality: str | None = None  # "CT", "MR", ... where the header says it
    rivals: list[np.ndarray] = field(
        default_factory=list
    )  # other affines that the header has, which contradict `affine`


def _open(path: Path) -> BufferedIOBase:
    with path.open("rb") as file:
        start = file.read(3)
    if not isinstance(path, Path):  # in an archive
        unpack: Any = {b"\x1f\x8b": igzip.open, b"BZ": bz2.open}.get(start[:2], lambda opened, _: opened)
        return cast(BufferedIOBase, unpack(path.open("rb"), "rb"))
    if start[:2] == b"\x1f\x8b":
        return cast(BufferedIOBase, igzip.open(path, "rb"))
    return cast(BufferedIOBase, bz2.open(path, "rb") if start == b"BZh" else open(path, "rb"))


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
        behind = 0
        while more := len(stream.read(_CHUNK_BYTES)):
            behind += more
            if behind > max(_MOST_BEHIND, len(target)):
                raise VolumeError(f"damaged: more than {behind:.3g} bytes follow its {len(target):.3g} bytes of voxels")
    return flat.reshape(shape, order="F")


def check_unpacked(announced: float, size: int) -> None:
    """Raises `VolumeError` where a file of `size` bytes announces more than it can hold: it is damaged, or made to fill the
    memory."""
    if announced > max(_MOST_PACKED * size, _ALWAYS_READ) or announced > 1100 * size + 4096:
        raise VolumeError(f"truncated or damaged: {announced:.3g} bytes announced, the file has {size}")


def read_nifti(path: Path, frame: int | None = None) -> StoredVolume:
    """Reads NIfTI-1 or -2, or Analyze, of a 4D file its `frame`. Raises `VolumeError` for what is unreadable, truncated, or
    not one 3D volume."""
    header_path, voxel_path = _pair(path)
    try:
        header = _read_header(header_path)
        stored = tuple(int(n) for n in header.get_data_shape())
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        slope, intercept = header.get_slope_inter() if hasattr(header, "get_slope_inter") else (None, None)
    except FileNotFoundError:
        raise VolumeError("no such file") from None
    except (*_STREAM_ERRORS, ImageFileError, HeaderDataError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, VolumeError):
            raise
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
    try:
        check_unpacked(float(np.prod([float(n) for n in whole])) * dtype.itemsize, voxel_path.stat().st_size)
        data = _read_voxels(voxel_path, offset, whole, dtype)
        if whole != shape:
            data = np.asfortranarray(data[..., frame])
    except FileNotFoundError:
        raise VolumeError(f"its voxels are missing: there is no {voxel_path.name} beside it") from None
    except _STREAM_ERRORS as error:
        raise VolumeError(f"unreadable or truncated: {error}") from error
    scaling = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    volume = StoredVolume(data, np.eye(4), None if scaling == (1.0, 0.0) else scaling, has_orientation=False)
    _set_geometry(volume, header)
    return volume


def voxel_kind(path: Path) -> str:
    """Shape and type of the voxels, as the header says them. `VolumeError` for what is no NIfTI."""
    try:
        header = _read_header(_pair(path)[0])
        return f"{header.get_data_dtype()}{header.get_data_shape()}"
    except (*_STREAM_ERRORS, ImageFileError, HeaderDataError, ValueError) as error:
        raise VolumeError(f"unreadable: {error}") from error


def voxel_digest(path: Path, *, whole: bool = True) -> str:
    """Digest of the stored voxels; without `whole` of the first of them, as many as it takes to tell scans apart.

    Raises:
        VolumeError: it cannot be read, or its first 16 MiB are one number.
    """
    header_path, voxel_path = _pair(path)
    digest, length, values = hashlib.blake2b(digest_size=16), 0, set[bytes]()
    try:
        offset = int(_read_header(header_path).get_data_offset())
        with _open(voxel_path) as stream:
            stream.read(offset)
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                length += len(chunk)
                values |= {chunk[at : at + 2] for at in range(0, len(chunk), 4096)}
                if not whole and len(values) >= _DISTINCT:
                    break
                if not whole and length >= _MOST_ALIKE:
                    raise VolumeError("its first voxels are all alike")
    except (*_STREAM_ERRORS, ImageFileError, HeaderDataError, ValueError) as error:
        raise VolumeError(f"unreadable: {error}") from error
    return digest.hexdigest()


def _pair(path: Path) -> tuple[Path, Path]:
    """Files of header and voxels: the same one but for pairs, `.hdr` and `.img`, each packed or not."""
    if not isinstance(path, Path):
        return path, path
    for ours, other in ((".hdr", ".img"), (".img", ".hdr")):
        for packed in ("", ".gz"):
            if path.name.lower().endswith(ours + packed):
                stem = path.name[: -len(ours + packed)]
                names = [stem + other + more for more in (packed, "", ".gz")]
                partner = next(
                    (path.with_name(n) for n in names if path.with_name(n).exists()), path.with_name(names[0])
                )
                return (path, partner) if ours == ".hdr" else (partner, path)
    return path, path


def _read_header(path: Path) -> Any:
    """The header, by what its first bytes say. Raises `VolumeError` for what is no NIfTI."""
    with _open(path) as stream:
        start = stream.read(540)
    kinds: Any = None
    if start[344:348] == b"n+1\0":
        kinds = nib.Nifti1Header
    elif start[344:348] == b"ni1\0":
        kinds = nib.nifti1.Nifti1PairHeader
    elif start[4:8] in (b"n+2\0", b"ni2\0"):
        kinds = nib.Nifti2Header if start[4:8] == b"n+2\0" else nib.nifti2.Nifti2PairHeader
    elif len(start) >= 348 and 348 in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")):
        kinds = nib.AnalyzeHeader
    if kinds is None:
        few = "empty" if not start else f"it begins with {start[:8]!r}"
        raise VolumeError(f"unreadable: no NIfTI file ({few})")
    if len(start) < kinds.sizeof_hdr:
        raise VolumeError("truncated: the file ends inside its header")
    return kinds(start[: kinds.sizeof_hdr], check=True)


def _set_geometry(volume: StoredVolume, header: Any) -> None:
    """Affine in mm, and what contradicts it: the two coded forms against each other and against the voxel sizes."""
    volume.affine = np.asarray(header.get_best_affine(), np.float64)
    if "sform_code" not in header:
        return
    scale = _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    volume.has_orientation = any(int(header[name]) for name in ("qform_code", "sform_code"))
    rivals = []
    if int(header["sform_code"]) > 0:
        sizes = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
        if int(header["qform_code"]) > 0:
            rivals = [np.asarray(header.get_qform(), np.float64)]
            straight = header.copy()
            straight.set_qform(
                volume.affine, 1
            )  # what a writer makes of a form that it cannot express: a tilted gantry
            if same_frame(np.asarray(straight.get_qform(), np.float64), rivals[0]):
                rivals = []
        elif np.isfinite(sizes).all() and sizes.min() > 0 and not np.allclose(sizes, 1):
            rivals = [with_sizes(volume.affine, sizes)]
    # Millimetres under another unit's code are met too: the unit counts where it makes the voxels those of a body CT.
    if scale != 1 and _body_size(volume.affine * scale) and not _body_size(volume.affine):
        for matrix in (volume.affine, *rivals):
            matrix[:3] *= scale
        volume.notes.append(f"the header's lengths are in units of {scale:g} mm")
    elif scale != 1:
        volume.warnings.append(
            f"the header says its lengths are in units of {scale:g} mm, which no body CT has: taken for mm"
        )
    volume.rivals = [rival for rival in rivals if not same_frame(volume.affine, rival)]


def with_sizes(affine: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """An affine with other voxel sizes (mm), its directions and origin kept."""
    out = affine.copy()
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
    out[:3, :3] = affine[:3, :3] / np.where(lengths > 0, lengths, 1) * sizes
    return out


def _body_size(affine: np.ndarray) -> bool:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return bool(spacing.min() >= 0.05 and spacing.max() <= 25)


def same_frame(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two affines have the same voxel sizes and directions; positions may differ."""
    sizes = [np.sqrt((matrix[:3, :3] ** 2).sum(0)) for matrix in (a, b)]
    if not np.allclose(sizes[0], sizes[1], rtol=_SAME_SPACING):
        return False
    directions = [matrix[:3, :3] / size for matrix, size in zip((a, b), sizes, strict=True)]
    return bool(((directions[0] * directions[1]).sum(0) > _SAME_DIRECTION).all())
