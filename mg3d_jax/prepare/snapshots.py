"""The state that a finished folder had before it grew: a prepared folder of its own, `snapshots/1`, `snapshots/2`, ...

A run that was started on it resumes on it. It holds a manifest and an index, and the shards that changed since; the others it
shares with the folder. When no run needs it, it can be deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mg3d_jax.data.records import INDEX_NAME, MANIFEST_NAME, file_digest
from mg3d_jax.files import read_json, write_json

SNAPSHOTS = "snapshots"


def snapshot_folders(out: Path) -> list[Path]:
    """Those of a prepared folder, the oldest first."""
    found = [path for path in (out / SNAPSHOTS).glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def kept_shard(out: Path, sidecar: dict[str, Any]) -> Path | None:
    """The whole file of a shard: in the folder, or in a snapshot of it; `None` where it is damaged or lost."""
    if not sidecar["records"]:
        return out / sidecar["file"]
    for folder in (out, *reversed(snapshot_folders(out))):
        path = folder / sidecar["file"]
        if path.is_file() and path.stat().st_size == sidecar["bytes"] and file_digest(path) == sidecar["sha256"]:
            return path
    return None


def take_snapshot(out: Path, changing: list[str]) -> Path:
    """Keeps the state of a finished folder whose shards `changing` (names of files) are about to change: they move into it."""
    manifest = read_json(out / MANIFEST_NAME)
    earlier = snapshot_folders(out)
    folder = out / SNAPSHOTS / str(1 + (int(earlier[-1].name) if earlier else 0))
    folder.mkdir(parents=True)
    shutil.copy(out / INDEX_NAME, folder / INDEX_NAME)
    for shard in manifest["shards"]:
        if shard["file"] not in changing:
            shard["file"] = f"../../{shard['file']}"
    write_json(folder / MANIFEST_NAME, manifest)
    for name in changing:
        if (out / name).is_file():
            os.replace(out / name, folder / name)
    for other in earlier:  # they shared the shards that moved
        shared = read_json(other / MANIFEST_NAME)
        for shard in shared["shards"]:
            if shard["file"].startswith("../../") and shard["file"][6:] in changing:
                shard["file"] = f"../{folder.name}/{shard['file'][6:]}"
        write_json(other / MANIFEST_NAME, shared)
    return folder
