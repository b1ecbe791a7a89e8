"""Files of a data set on disk: links followed, cycles guarded, and only what is a file is opened."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mg3d_jax.prepare.nifti import VolumeError


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files, sorted) of `root` and all below it, links to folders followed; a folder that is reached a
    second time, as by a link to its parent, is passed over. In the order of the names."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        yield Path(parent), sorted(files)


def natural_key(name: str) -> list:
    """Sort key that puts "slice10" after "slice9"."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def check_regular(path: Path) -> None:
    """Raises `VolumeError` for what would not end when it is read (a pipe, a socket, a device), or is not there."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        link = f": a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise VolumeError(f"no such file{link}") from None
    except OSError as error:  # a cycle of links, a folder that may not be entered
        raise VolumeError(f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise VolumeError("not a regular file (a pipe, a socket or a device): replace it by the volume")
