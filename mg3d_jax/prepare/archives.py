"""Volumes in zip archives, read without unpacking them to disk: `study.zip`, or `study.zip/series/volume.nii.gz`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import BinaryIO

from mg3d_jax.prepare.nifti import VolumeError, check_unpacked


@dataclass(frozen=True)
class Member:
    """A file in an archive, with as much of a path's methods as the readers use."""

    archive: Path
    inner: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.inner).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.inner).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """The content, in memory. Raises `VolumeError` for a damaged archive."""
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return io.BytesIO(archive.read(self.inner))
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise VolumeError(f"{self.inner} in the archive is unreadable: {error}") from error

    def stat(self) -> SimpleNamespace:
        """`st_size`, as of a path."""
        with zipfile.ZipFile(self.archive) as archive:
            return SimpleNamespace(st_size=archive.getinfo(self.inner).file_size)


def in_archive(path: Path) -> tuple[Path, str] | None:
    """(archive, path in it) of a path that leads into a zip file, or is one; `None` for another."""
    for place in (path, *path.parents):
        if place.suffix.lower() == ".zip" and place.is_file():
            return place, "" if place == path else path.relative_to(place).as_posix()
    return None


def volume_exists(path: Path) -> bool:
    """Whether there is such a file or folder, or such a place in an archive."""
    found = in_archive(path)
    if found is None:
        return path.exists()
    try:
        return bool(members(*found))
    except VolumeError:
        return True  # a damaged archive is there: reading it says what is wrong


def members(archive: Path, inner: str) -> list[Member]:
    """The files of an archive at or below a path in it. Raises `VolumeError` for a damaged archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise VolumeError(f"the archive is unreadable: {error}") from error
    found = []
    for info in infos:
        hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(info.filename).parts)
        if not hidden and (not inner or info.filename == inner or info.filename.startswith(f"{inner}/")):
            if info.flag_bits & 1:
                raise VolumeError(f"{info.filename} in the archive is encrypted")
            check_unpacked(float(info.file_size), max(info.compress_size, 1))
            found.append(Member(archive, info.filename))
    return found
