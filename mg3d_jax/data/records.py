"""Shards of records on disk: written whole or not at all, and read at random.

Shards are ArrayRecord files with one record per group, so that any record is one seek away; `manifest.json` beside them
names shards, grid and labels.

    prepare -> record.encode -> ShardWriter -> *.array_record + manifest.json -> RecordReader -> record.decode -> pipeline
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mg3d_jax.data.record import Encoded, Record, RecordText, decode, decode_text
from mg3d_jax.data.shard_reader import DamagedRecordError, OpenFiles, Shard, open_shard
from mg3d_jax.errors import UserError
from mg3d_jax.files import partial_path, read_json

FORMAT_VERSION = 1  # of a prepared folder
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.jsonl"  # a line per record, in order: name, patient, report id, affine, digest of the voxels


class ShardWriter:
    """Writes records to `path` through a temporary name: the shard is either complete or not there."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, partial_path(path)
        # Not compressed again: what is worth it is packed in the record, by the process that made it.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def close(self) -> None:
        """Flushes to disk and gives the shard its name."""
        self._writer.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self._path)

    def abandon(self) -> None:
        """Drops what was written."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of a prepared folder. Raises `UserError` where there is none, or of a newer format."""
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"{path} does not exist: run `mg3d prepare ... --out {folder}` to its end first")
    manifest = read_json(path, remedy="prepare the folder again")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}, this code reads {FORMAT_VERSION}; prepare the folder again"
        )
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all({"file", "records"} <= shard.keys() for shard in shards):
        raise UserError(f"{path} lacks its shards, or their files and counts; prepare the folder again")
    return manifest


def _keep_large_blocks() -> None:
    """Tells glibc to keep freed blocks of some MB for reuse, instead of mapping fresh pages for every volume and batch.
    On one core the pipeline makes 25 % (zstd) to 30 % (raw) more volumes of 128 x 128 x 96 per second by it. Without glibc
    it does nothing."""
    mmap_threshold, trim_threshold, bytes_kept = -3, -1, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, bytes_kept)
    mallopt(trim_threshold, bytes_kept)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _index_entry(line: str) -> tuple[str, str]:
    """(name, digest of the voxels and of the report) of a line of the index."""
    entry = json.loads(line)
    return entry["name"], f"{entry.get('content')} {entry.get('report_id')}"


def _few(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


class RecordReader:
    """Random access to the records of a prepared folder, in manifest order. Shards open on first use in each process,
    so that an instance pickles to data workers at no cost. Threads may share it."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._starts = np.cumsum([0] + [shard["records"] for shard in self.manifest["shards"]])
        self._open()

    def _open(self) -> None:
        self._shards: dict[int, Shard | ArrayRecordReader] = {}
        self._files = OpenFiles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def content(self) -> str:
        """A digest of the records, from the checksums of the shards."""
        return hashlib.sha256(
            "".join(str(shard.get("sha256")) for shard in self.manifest["shards"]).encode()
        ).hexdigest()[:16]

    def snapshot_with(self, records: int, content: str | None) -> Path | None:
        """The folder of an earlier state of this one (`prepare/snapshots.py`) that has so many records, and this content."""
        for folder in sorted((self.folder / "snapshots").glob("*"), key=lambda path: path.name.zfill(9), reverse=True):
            if (folder / MANIFEST_NAME).is_file():
                reader = RecordReader(folder)
                if len(reader) == records and content in (None, reader.content()):
                    return folder
        return None

    def changes_since(self, snapshot: Path | None) -> str:
        """` (2 new: a, b; 1 left: c)`: by the names in the indices of this folder and of its snapshot; "" without one."""
        if snapshot is None:
            return ""
        now, before = (
            [_index_entry(line) for line in _lines(folder / INDEX_NAME)] for folder in (self.folder, snapshot)
        )
        names = [{name for name, _ in entries} for entries in (now, before)]
        parts = [
            (what, sorted(found))
            for what, found in (
                ("new", names[0] - names[1]),
                ("left", names[1] - names[0]),
                ("changed", {name for name, _ in set(now) - set(before)} & names[1]),
            )
            if found
        ]
        return f" ({'; '.join(_few(what, found) for what, found in parts)})" if parts else ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shards", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _shard(self, number: int) -> Shard | ArrayRecordReader:
        if number not in self._shards:
            _keep_large_blocks()
            self._shards[number] = self._open_shard(self.manifest["shards"][number])
        return self._shards[number]

    def _open_shard(self, entry: dict[str, Any]) -> Shard | ArrayRecordReader:
        path = self.folder / entry["file"]
        try:
            if (size := path.stat().st_size) != entry["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes, its manifest says {entry['bytes']}: copy or prepare it again"
                )
            if shard := open_shard(path, entry["records"]):
                return shard
            # One record per read: read-ahead would fetch neighbours that a shuffled epoch does not want.
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            records = reader.num_records()
        except (ValueError, RuntimeError, OSError) as error:
            many = "too many open files" in str(error).lower()
            remedy = "raise the limit of open files (ulimit -n 4096)" if many else "run `mg3d prepare --verify`"
            raise UserError(f"{path} cannot be opened ({error}): {remedy}") from error
        if records != entry["records"]:
            raise UserError(f"{path} holds {records} records, its manifest says {entry['records']}")
        return reader

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, position in the shard) of record `index`."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _encoded(self, index: int) -> Encoded:
        number, position = self.locate(index)
        shard = self._shard(number)
        if isinstance(shard, Shard):
            return shard.record(position, self._files[shard.path])
        try:
            return shard.read([position])[0]
        except (RuntimeError, ValueError) as error:
            raise DamagedRecordError(str(error)) from error

    def read_bytes(self, index: int) -> bytes:
        """The encoded record `index` (global order)."""
        return bytes(self._encoded(index)[:])

    def __getitem__(self, index: int) -> Record:
        return self.read_into(index, None)

    def read_into(self, index: int, out: np.ndarray | None) -> Record:
        """Record `index`, its volume decoded into `out` (see `decode`): of an uncompressed shard in one single copy.
        Raises `DamagedRecordError`, naming folder, record and shard, where the record is not what was written."""
        with self._named(index):
            return decode(self._encoded(index), out)

    def text(self, index: int) -> RecordText:
        """The words of record `index`. Its volume is not read, so that the checksum cannot be checked;
        `DamagedRecordError` where the text cannot be read."""
        with self._named(index):
            return decode_text(self._encoded(index))

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except DamagedRecordError as error:
            file = self.manifest["shards"][self.locate(index)[0]]["file"]
            message = f"{self.folder}: record {index} ({self.name(index)}) in {file} is damaged: {error}"
            raise DamagedRecordError(f"{message}; copy or prepare that shard again") from error

    def name(self, index: int) -> str:
        """Name of the volume of record `index`, also where the record itself cannot be read. Slow: for messages."""
        path = self.folder / INDEX_NAME
        if path.is_file():
            with open(path, encoding="utf-8") as file:
                if line := next(itertools.islice(file, index, None), None):
                    return json.loads(line)["name"]
        try:
            return decode(self._encoded(index)).name
        except DamagedRecordError:
            return "name unknown"
