"""Volumes that are the same under another name: found by their files alone, before any volume is prepared.

NIfTI files are the same where their stored voxels are, packed or not and whatever else their headers say: those of the same
shape are compared by their first voxels, and those that agree there by all. Other files, and folders of slices, are compared by
their bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mg3d_jax.data.records import file_digest
from mg3d_jax.prepare.nifti import VolumeError, voxel_digest, voxel_kind
from mg3d_jax.prepare.reading import NIFTI_SUFFIXES
from mg3d_jax.progress import track

_THREADS = 16  # a disk of a network answers late, but many at a time
_BLOCK = 65_536


@dataclass(frozen=True)
class Volume:
    """A file or folder of slices, and whose it is. `folder`: the prepared folder that was made of it; "" for none."""

    path: Path
    name: str
    patient: str
    folder: str = ""


def same_content(volumes: Iterable[Volume]) -> list[list[Volume]]:
    """Groups of volumes that are the same, of more than one patient or folder each. What cannot be read is in none: it will be
    named where it is prepared."""
    groups = [list(volumes)]
    for step, tell in (("headers", _first), ("first voxels", _second), ("contents", _third)):
        candidates = [one for group in groups for one in group]
        told = _told(candidates, tell, f"duplicates: {step}")
        groups = [part for group in groups for part in _parts(group, told) if _worth(part)]
    return groups


def _worth(group: list[Volume]) -> bool:
    """Whether two of a group may leak: of two patients here, or of here and a prepared folder."""
    return any(not one.folder for one in group) and len({(one.folder, one.patient) for one in group}) > 1


def _parts(group: list[Volume], told: dict[Path, Hashable]) -> list[list[Volume]]:
    parts: dict[Hashable, list[Volume]] = defaultdict(list)
    for one in group:
        if told[one.path] is not None:
            parts[told[one.path]].append(one)
    return list(parts.values())


def _told(volumes: list[Volume], tell: Callable[[Path], Hashable], label: str) -> dict[Path, Hashable]:
    """Path -> what `tell` says of it, None where it cannot be read."""

    def safely(path: Path) -> Hashable:
        try:
            return tell(path)
        except (OSError, VolumeError):
            return None

    paths = list(dict.fromkeys(one.path for one in volumes))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(safely, paths)
        return dict(zip(paths, track(found, label, len(paths), unit="volumes") if paths else (), strict=True))


def _first(path: Path) -> Hashable:
    if _is_nifti(path):
        return voxel_kind(path)
    return sum(part.stat().st_size for part in _files(path))


def _second(path: Path) -> Hashable:
    return voxel_digest(path, whole=False) if _is_nifti(path) else _of_all(path, _blocks)


def _third(path: Path) -> Hashable:
    return voxel_digest(path) if _is_nifti(path) else _of_all(path, file_digest)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES) and path.is_file()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [Path(entry.path) for entry in os.scandir(path) if entry.is_file()]
    if not path.is_file():  # a pipe would not end; a volume in an archive is compared once it is prepared
        raise VolumeError("no file")
    return [path]


def _of_all(path: Path, digest: Callable[[Path], str]) -> str:
    """Of the files of a folder, whatever their names."""
    return " ".join(sorted(digest(part) for part in _files(path)))


def _blocks(path: Path) -> str:
    """Digest of the first, middle and last 64 KiB of a file."""
    size, content = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for start in (0, size // 2, max(size - _BLOCK, 0)):
            file.seek(start)
            content.update(file.read(_BLOCK))
    return content.hexdigest()
