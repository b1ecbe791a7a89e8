"""One prepared example <-> bytes.

A record is a safetensors blob: self-describing, without pickle, with a checksum over all of it, and read without a copy.
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from isal import isal_zlib

from mg3d_jax.data.shard_reader import DamagedRecordError, RecordBytes, StoredRecord, flat_bytes
from mg3d_jax.errors import UserError

_RECORD_VERSION = "2"
_MASK_VERSION = "3"  # of a record with a mask: code that knows none refuses it by its version
_HEADER_LENGTH = struct.Struct("<Q")
_HEAD = 1 << 14  # bytes that hold most headers
_DTYPES = {"I16": np.int16, "U8": np.uint8, "I8": np.int8, "F64": np.float64, "U64": np.uint64}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_TEXT_FIELDS = ("name", "patient", "scan", "report_id", "findings", "impression", "source")
_ARRAYS = ("affine", "checksum", "volume", "labels")
_VERSIONS = {_RECORD_VERSION: _ARRAYS, _MASK_VERSION: (*_ARRAYS, "mask")}
_MASK_LEVEL = 3  # of zstd: masks are always packed, to about a hundredth
_PIECE = 1 << 17  # voxels that are packed together
Encoded = bytes | StoredRecord


@dataclass(frozen=True)
class Record:
    """One volume with its report."""

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
    mask: np.ndarray | None = (
        None  # int8 [X, Y, Z]: class of each voxel, 0 background, -1 unknown; None: without a mask
    )


def encode(record: Record, window: tuple[float, float] | None = None, *, zstd_level: int = 0) -> bytes:
    """`record` as safetensors bytes. With `window` (low, high in HU) the volume is stored as uint8 steps of
    `(high - low) / 255` HU, half the bytes; `decode` gives int16 HU back, clipped to the window. With a `zstd_level` the
    volume is packed (see `frames_of`): text, labels and affine stay readable without unpacking. A mask is always packed; the
    bytes of a record without one do not depend on there being such a field."""
    volume = np.ascontiguousarray(record.volume, dtype=np.int16)
    about: dict[str, Any] = {"shape": volume.shape}
    if window is not None:
        low, high = window
        about["window"] = [low, high]
        volume = np.rint((np.clip(volume, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)
    if zstd_level:
        frames = frames_of(volume, zstd_level)
        volume, about["zstd"] = np.frombuffer(b"".join(frames), np.uint8), [len(frame) for frame in frames]
    version = _RECORD_VERSION if record.mask is None else _MASK_VERSION
    metadata = {"format": "mg3d-record", "version": version, "volume": json.dumps(about)}
    metadata |= {name: getattr(record, name) for name in _TEXT_FIELDS}
    metadata["sentences"] = json.dumps(list(record.sentences), ensure_ascii=False)
    tensors: dict[str, np.ndarray] = {
        "affine": np.ascontiguousarray(record.affine, dtype=np.float64),
        "checksum": np.zeros(1, np.uint64),
        "volume": volume,
        "labels": np.ascontiguousarray(record.labels, dtype=np.int8),
    }
    if record.mask is not None:
        tensors["mask"], metadata["mask"] = _packed_mask(record.mask)
    header = _header(tensors, metadata)
    checksum = isal_zlib.crc32(header)
    for name in tensors:
        if name != "checksum":
            checksum = isal_zlib.crc32(flat_bytes(tensors[name]), checksum)
    tensors["checksum"][:] = checksum
    return b"".join([header, *(array.tobytes() for array in tensors.values())])


def frames_of(volume: np.ndarray, level: int = 3) -> list[bytes]:
    """zstd frames of pieces of the volume (int16 HU, or uint8 steps) that fit into a processor's cache.

    int16 is packed as high bytes, then low bytes, v = 256 * high + low, both signed, so that the noise around water and
    around air does not flip the high byte: it is smaller so, and unpacks three times as fast."""
    compress, flat, frames = zstandard.ZstdCompressor(level=level).compress, volume.reshape(-1), []
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if piece.dtype == np.int16:
            shifted = piece.astype(np.int32) + 128
            piece = np.stack([shifted >> 8, (shifted & 0xFF) - 128]).astype(np.int8)
        frames.append(compress(piece.tobytes()))
    return frames


def _packed_mask(mask: np.ndarray) -> tuple[np.ndarray, str]:
    """(packed bytes as uint8, JSON that says how to unpack them) of an int8 mask."""
    steps = np.ascontiguousarray(mask, dtype=np.int8).view(np.uint8)
    frames = frames_of(steps, _MASK_LEVEL)
    about = {"shape": mask.shape, "zstd": [len(frame) for frame in frames]}
    return np.frombuffer(b"".join(frames), np.uint8), json.dumps(about)


def _unpacked_mask(stored: np.ndarray, about: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """The int8 mask of `_packed_mask`, of the volume's shape."""
    flat = np.concatenate([*_pieces(stored, about["zstd"]), np.zeros(0, np.uint8)])
    if tuple(about["shape"]) != shape or len(flat) != math.prod(shape):
        raise DamagedRecordError(f"a mask of {len(flat)} voxels, {about['shape']}, for a volume of {shape}")
    return flat.view(np.int8).reshape(shape)


def _header(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Length and JSON of a safetensors blob, arrays in the given order. (The library's own writer orders the text at
    random, and a shard must be the same bytes every time.)"""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # voxels start on 8 bytes
    return _HEADER_LENGTH.pack(len(text)) + text


def _parse(
    data: StoredRecord | RecordBytes,
) -> tuple[bytes, dict[str, str], dict[str, tuple[np.dtype, tuple[int, ...]]]]:
    """(header, text, name -> dtype and shape of every array) of a record. Raises `DamagedRecordError`."""
    if len(data) < _HEADER_LENGTH.size:
        raise DamagedRecordError(f"record of {len(data)} bytes is shorter than its own header")
    head = bytes(data[:_HEAD])
    (header_bytes,) = _HEADER_LENGTH.unpack_from(head)
    end = _HEADER_LENGTH.size + header_bytes
    if end > len(data):
        raise DamagedRecordError(f"record of {len(data)} bytes announces a header of {header_bytes} bytes")
    head = head[:end] if end <= len(head) else bytes(data[:end])
    try:
        header = json.loads(head[_HEADER_LENGTH.size :])
        metadata, places, position = header.pop("__metadata__"), {}, 0
        if metadata["format"] != "mg3d-record":
            raise DamagedRecordError("a safetensors blob, but not one that mg3d wrote")
        if metadata["version"] == "1":
            raise UserError("a record of an earlier version of this code, without a checksum: prepare the folder again")
        if metadata["version"] not in _VERSIONS:
            raise DamagedRecordError(f"record format {metadata['version']!r} instead of {' or '.join(_VERSIONS)}")
        if tuple(header) != (arrays := _VERSIONS[metadata["version"]]):
            raise DamagedRecordError(f"arrays {list(header)} instead of {list(arrays)}")
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            size = math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [position, position + size] or position + size > len(data):
                raise DamagedRecordError(f"array {name!r} {dtype}{shape} is not where it should be")
            places[name], position = (dtype, shape), position + size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecordError(f"its header is not readable ({type(error).__name__}: {error})") from error
    if end + position != len(data):
        raise DamagedRecordError(f"record of {len(data)} bytes instead of {end + position}")
    return head, metadata, places


_local = threading.local()  # a decompressor belongs to one thread at a time


def _pieces(stored: np.ndarray, frames: list[int]) -> Iterator[np.ndarray]:
    """The unpacked pieces of `frames_of`, as uint8; each is consumed while it is in the processor's cache."""
    if not hasattr(_local, "decompress"):
        _local.decompress = zstandard.ZstdDecompressor().decompress
    start, packed = 0, stored.data
    for size in frames:
        yield np.frombuffer(_local.decompress(packed[start : start + size]), np.uint8)
        start += size


def _hounsfield(stored: np.ndarray, about: dict[str, Any], out: np.ndarray) -> None:
    """Stored steps, packed or not, -> int16 HU in `out`."""
    steps = None
    if "window" in about:
        lowest, highest = about["window"]
        steps = np.rint(lowest + np.arange(256) * ((highest - lowest) / 255.0)).astype(np.int16)
    flat, start = out.reshape(-1), 0
    for piece in _pieces(stored, about["zstd"]) if "zstd" in about else [stored.reshape(-1)]:
        if steps is not None:
            target = flat[start : start + len(piece)]
            np.take(steps, piece, out=target, mode="clip")  # any mode but "raise" writes directly
        else:
            high, low = piece.view(np.int8).reshape(2, -1)
            target = flat[start : start + len(high)]
            np.multiply(high, np.int16(256), out=target, dtype=np.int16)
            np.add(target, low, out=target)
        start += len(target)
    if start != len(flat):
        raise DamagedRecordError(f"it has {start} voxels instead of {len(flat)}")


def decode(data: Encoded, out: np.ndarray | None = None) -> Record:
    """The record of `encode`. Raises `DamagedRecordError` where a single bit is not as it was written.

    With `out` (int16, C-ordered, of the grid's shape) the volume is decoded into it, a row of a batch for example, with no
    copy in between; what `out` holds after an error is not defined."""
    stored = data if isinstance(data, StoredRecord) else RecordBytes(data)
    header, metadata, places = _parse(stored)
    checksum, position, tensors = isal_zlib.crc32(header), len(header), {}
    try:
        about = json.loads(metadata["volume"])
        shape, direct = tuple(about["shape"]), not {"zstd", "window"} & about.keys()
        if out is None:
            out = np.empty(shape, np.int16)
        elif out.shape != shape:
            raise DamagedRecordError(f"a volume of {shape} where one of {out.shape} is expected")
        if direct and places["volume"] != (out.dtype, shape):
            raise DamagedRecordError(f"a volume of {places['volume']} is said to be int16 {shape}")
        for name, (dtype, array_shape) in places.items():
            tensors[name] = out if direct and name == "volume" else np.empty(array_shape, dtype)
            found = stored.read(position, flat_bytes(tensors[name]), checksum)
            checksum = checksum if name == "checksum" else found
            position += tensors[name].nbytes
        if checksum != tensors["checksum"][0]:
            raise DamagedRecordError("its checksum is wrong")
        if not direct:
            _hounsfield(tensors["volume"], about, out)
        mask = _unpacked_mask(tensors["mask"], json.loads(metadata["mask"]), shape) if "mask" in tensors else None
        text = {name: metadata[name] for name in _TEXT_FIELDS}
        sentences = tuple(json.loads(metadata["sentences"]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, zstandard.ZstdError) as error:
        raise DamagedRecordError(f"its fields do not parse ({type(error).__name__}: {error})") from error
    return Record(
        volume=out, labels=tensors["labels"], affine=tensors["affine"], sentences=sentences, mask=mask, **text
    )


@dataclass(frozen=True)
class RecordText:
    """What a record says of itself in words; the fields of `Record`."""

    name: str
    patient: str
    scan: str
    report_id: str
    sentences: tuple[str, ...]


def decode_text(data: Encoded) -> RecordText:
    """The words of an encoded record, from its header alone. Raises `DamagedRecordError`."""
    _, metadata, _ = _parse(data if isinstance(data, StoredRecord) else RecordBytes(data))
    try:
        named = {name: metadata[name] for name in ("name", "patient", "scan", "report_id")}
        return RecordText(sentences=tuple(json.loads(metadata["sentences"])), **named)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedRecordError(f"its text does not parse ({type(error).__name__}: {error})") from error
