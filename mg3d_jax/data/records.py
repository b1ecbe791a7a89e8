"""One prepared example <-> bytes, and random access to a folder of them.

A record is a safetensors blob: self-describing, pickle-free, and read without a copy. Shards are ArrayRecord files with
one record per group, so that any record is one seek away; `manifest.json` beside them names shards, grid and labels.

    prepare.py -> encode -> ShardWriter -> *.array_record + manifest.json -> RecordReader -> decode -> pipeline.py
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mg3d_jax.data.raw_shards import RawRecord, open_raw
from mg3d_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_HEADER_LENGTH = struct.Struct("<Q")
_DTYPES = {"I16": np.int16, "U8": np.uint8, "I8": np.int8, "F64": np.float64}
# Added to HU before they are split into bytes, so that the noise around water does not flip the high byte.
_PLANE_SHIFT = 1152
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_TEXT_FIELDS = ("name", "patient", "scan", "report_id", "findings", "impression", "source")


class DamagedRecordError(ValueError):
    """The bytes are not a record: cut short, overwritten, or of another format."""


@dataclass(frozen=True)
class Record:
    """One volume with its report. The arrays of a decoded record are read-only views of its bytes."""

    volume: np.ndarray  # int16 HU [X, Y, Z], RAS+, air -1024
    sentences: tuple[str, ...]  # findings, then impression
    labels: np.ndarray  # int8 [L]: 1 present, 0 absent, -1 unknown
    name: str  # file name of the volume
    patient: str
    scan: str
    report_id: str  # hex digest of the normalised report text: equal for equal reports
    affine: np.ndarray  # float64 [4, 4]: voxel of `volume` -> scanner mm (RAS+)
    findings: str
    impression: str
    source: str


def encode(record: Record, window: tuple[float, float] | None = None, *, planes: bool = False) -> bytes:
    """`record` as safetensors bytes. With `window` (low, high in HU) the volume is stored as uint8 steps of
    `(high - low) / 255` HU, half the bytes; `decode` gives int16 HU back, clipped to the window. With `planes` the
    high bytes of the voxels come first, then the low bytes: zstd makes them smaller and decodes them much faster."""
    volume = np.ascontiguousarray(record.volume, dtype=np.int16)
    metadata = {"format": "mg3d-record", "version": str(FORMAT_VERSION)}
    metadata |= {name: getattr(record, name) for name in _TEXT_FIELDS}
    metadata["sentences"] = json.dumps(list(record.sentences), ensure_ascii=False)
    if window is not None:
        low, high = window
        metadata["window"] = json.dumps([low, high])
        volume = np.rint((np.clip(volume, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)
    tensors = {
        "affine": np.ascontiguousarray(record.affine, dtype=np.float64),
        "volume": volume,
        "labels": np.ascontiguousarray(record.labels, dtype=np.int8),
    }
    if planes and window is None:
        shifted = volume.astype(np.int32) + _PLANE_SHIFT
        metadata["planes"] = str(_PLANE_SHIFT)
        tensors["volume"] = np.stack([shifted >> 8, shifted & 0xFF]).astype(np.uint8)
    return _serialize(tensors, metadata)


def _serialize(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """safetensors bytes, arrays in the given order. (The library's own writer orders the text at random, and a shard
    must be the same bytes every time.)"""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # voxels start on 8 bytes
    return b"".join([_HEADER_LENGTH.pack(len(text)), text, *(array.tobytes() for array in tensors.values())])


def _parse(data: bytes | RawRecord) -> tuple[dict[str, str], dict[str, tuple[np.dtype, tuple[int, ...], int]]]:
    """(text, name -> dtype, shape and first byte of every array) of a safetensors blob. Raises `DamagedRecordError`."""
    if len(data) < _HEADER_LENGTH.size:
        raise DamagedRecordError(f"record of {len(data)} bytes is shorter than its own header")
    (header_bytes,) = _HEADER_LENGTH.unpack(data[: _HEADER_LENGTH.size])
    start = _HEADER_LENGTH.size + header_bytes
    if start > len(data):
        raise DamagedRecordError(f"record of {len(data)} bytes announces a header of {header_bytes} bytes")
    try:
        header = json.loads(data[_HEADER_LENGTH.size : start])
        metadata, arrays = header.pop("__metadata__"), {}
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or start + end > len(data):
                raise DamagedRecordError(f"array {name!r} {dtype}{shape} does not fit into {len(data)} bytes")
            arrays[name] = dtype, shape, start + begin
    except DamagedRecordError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecordError(f"its header is not readable ({type(error).__name__}: {error})") from error
    return metadata, arrays


def _array(data: bytes | RawRecord, dtype: np.dtype, shape: tuple[int, ...], start: int, out=None) -> np.ndarray:
    """One array of a blob: a view of bytes, or read into `out` (of that shape and dtype) or into a new array."""
    if out is not None and out.shape != shape:
        raise ValueError(f"a volume of {shape} does not fit into {out.shape}")
    if isinstance(data, RawRecord):
        out = np.empty(shape, dtype) if out is None else out
        data.copy(start, out.reshape(-1).view(np.uint8))
        return out
    view = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    if out is None:
        return view
    out[...] = view
    return out


def _volume(data: bytes | RawRecord, metadata: dict[str, str], place: tuple, out: np.ndarray | None) -> np.ndarray:
    """int16 HU of a blob, in `out` where that is given."""
    if "planes" not in metadata and "window" not in metadata:
        return _array(data, *place, out=out)
    stored = _array(data, *place)
    shape = stored.shape[1:] if "planes" in metadata else stored.shape
    out = np.empty(shape, np.int16) if out is None else out
    if "planes" in metadata:
        high, low = stored
        unsigned = out.view(np.uint16)
        np.left_shift(high, 8, out=unsigned, dtype=np.uint16)
        unsigned |= low
        unsigned -= np.uint16(int(metadata["planes"]) & 0xFFFF)
    else:
        lowest, highest = json.loads(metadata["window"])
        steps = np.rint(lowest + np.arange(256) * ((highest - lowest) / 255.0)).astype(np.int16)
        np.take(steps, stored, out=out)
    return out


def decode(data: bytes | RawRecord, out: np.ndarray | None = None) -> Record:
    """The record of `encode`. Raises `DamagedRecordError`.

    Without `out` the arrays are read-only views of `data` where that is possible. With `out` (int16, C-ordered, of the
    grid's shape) the volume is decoded into it, a row of a batch for example, with no copy in between."""
    metadata, arrays = _parse(data)
    try:
        if metadata.get("format") != "mg3d-record":
            raise DamagedRecordError("a safetensors blob, but not one that mg3d wrote")
        if int(metadata["version"]) > FORMAT_VERSION:
            raise DamagedRecordError(f"record format {metadata['version']} is newer than this code ({FORMAT_VERSION})")
        volume = _volume(data, metadata, arrays["volume"], out)
        text = {name: metadata[name] for name in _TEXT_FIELDS}
        labels, affine = _array(data, *arrays["labels"]), _array(data, *arrays["affine"])
        sentences = tuple(json.loads(metadata["sentences"]))
        return Record(volume=volume, labels=labels, affine=affine, sentences=sentences, **text)
    except KeyError as error:
        raise DamagedRecordError(f"record without field {error}") from error
    except (ValueError, TypeError, IndexError) as error:
        if isinstance(error, DamagedRecordError):
            raise
        raise DamagedRecordError(f"the fields of the record do not parse ({error})") from error


class ShardWriter:
    """Writes records to `path` through a temporary name: the shard is either complete or not there."""

    def __init__(self, path: Path, *, zstd_level: int = 3):
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.partial")
        compression = f"zstd:{zstd_level}" if zstd_level else "uncompressed"
        self._writer = ArrayRecordWriter(str(self._temporary), f"group_size:1,{compression}")

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
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `mg3d prepare ... --out {folder}` to its end first") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): prepare the folder again") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}, this code reads {FORMAT_VERSION}; prepare the folder again"
        )
    return manifest


def _keep_large_blocks() -> None:
    """Tells glibc to keep freed blocks of some MB for reuse. By default each of them is a fresh mapping, whose page
    faults cost more than reading the record (measured: 150 -> 1,070 records/s). Elsewhere it does nothing."""
    mmap_threshold, trim_threshold, bytes_kept = -3, -1, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, bytes_kept)
    mallopt(trim_threshold, bytes_kept)


class RecordReader:
    """Random access to the records of a prepared folder, in manifest order. Shards open on first use in each process,
    so that an instance pickles to data workers at no cost."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._starts = np.cumsum([0] + [shard["records"] for shard in self.manifest["shards"]])
        self._readers: dict[int, Callable[[int], bytes | RawRecord]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def _reader(self, shard: int) -> Callable[[int], bytes | RawRecord]:
        """Function from a position in the shard to the record, encoded."""
        if shard not in self._readers:
            _keep_large_blocks()
            entry = self.manifest["shards"][shard]
            path = self.folder / entry["file"]
            try:
                # One record per read: read-ahead would fetch neighbours that a shuffled epoch does not want.
                reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
                records = reader.num_records()
            except (ValueError, RuntimeError, OSError) as error:
                raise UserError(f"{path} cannot be opened ({error}): run `mg3d prepare --verify`") from error
            if records != entry["records"]:
                raise UserError(f"{path} holds {records} records, its manifest says {entry['records']}")
            raw = open_raw(path, records)
            self._readers[shard] = raw.record if raw else lambda position: reader.read([position])[0]
        return self._readers[shard]

    def _locate(self, index: int) -> tuple[int, int]:
        """(shard, position in the shard) of record `index`."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def read_bytes(self, index: int) -> bytes:
        """The encoded record `index` (global order)."""
        shard, position = self._locate(index)
        return bytes(self._reader(shard)(position)[:])

    def __getitem__(self, index: int) -> Record:
        return self.read_into(index, None)

    def read_into(self, index: int, out: np.ndarray | None) -> Record:
        """Record `index`, its volume decoded into `out` (see `decode`): of an uncompressed shard in one single copy."""
        shard, position = self._locate(index)
        data = self._reader(shard)(position)
        try:
            return decode(data, out)
        except DamagedRecordError as error:
            message = f"{self.folder}: record {index} is damaged ({error}): run `mg3d prepare --verify`"
            raise UserError(message) from error
