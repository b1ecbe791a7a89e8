"""Parts of a record read from its shard straight into the arrays where they belong.

A shard is an ArrayRecord file, and that is a Riegeli file: blocks of 64 KiB that each open with a 24-byte header, and
chunks (40-byte header, then data) that run across them. With one record per chunk, a record is the logical bytes of its
chunk, so that a gathering read fetches them and leaves the block headers out. A file that does not look exactly like what
`records.ShardWriter` writes is left to `array_record`'s own reader, which reads any ArrayRecord file.

Why not always that reader: it gives whole records only, copied and hashed more than once, while records have a checksum of
their own. On one core it decodes 15 to 26 % fewer zstd records of 128 x 128 x 96 voxels per second and 65 % fewer raw
ones, and it reads all voxels of a data set (1.3 MB per record) where a tokenizer is trained on its texts (16 KB).
"""

from __future__ import annotations

import io
import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from isal import isal_zlib

from mg3d_jax.errors import UserError

_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # header hash, data size, data hash, type | records << 8, decoded size
_SIGNATURE, _RECORDS = ord("s"), ord("r")
_PIECE = 1 << 19  # bytes read at a time; together with their gaps far fewer than the 1,024 parts of one system call
_HEAD = 64  # bytes of a chunk's data that surely hold everything before the record
_OPEN_FILES = 256  # of one reader: data sets have thousands of shards, processes often 1,024 descriptors


class DamagedRecordError(UserError):
    """The bytes are not a record: cut short, overwritten, or of another format."""


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a C-ordered array as uint8, not copied."""
    return array.reshape(-1).view(np.uint8)


class RecordBytes:
    """A record in memory, with the methods of one that is still in its file."""

    def __init__(self, data: bytes):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        return self._data[part]

    def read(self, first: int, out: np.ndarray, checksum: int) -> int:
        """As `StoredRecord.read`."""
        out[:] = np.frombuffer(self._data, np.uint8, len(out), first)
        return isal_zlib.crc32(out, checksum)


class StoredRecord:
    """One record in its file: sliced like bytes, or read into an array without an intermediate."""

    def __init__(self, file: io.FileIO, start: int, size: int):
        self._file, self._start, self._size = file, start, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self._size)
        return _bytes(self._file, _advance(self._start, first), max(last - first, 0))

    def read(self, first: int, out: np.ndarray, checksum: int) -> int:
        """Fills `out` (uint8, one axis) from byte `first` on. Returns the CRC-32 so far, with `checksum` that of what
        came before: made piece by piece while the bytes are in the processor's cache. Raises `DamagedRecordError`."""
        for start in range(0, len(out), _PIECE):
            piece = out[start : start + _PIECE]
            _read(self._file, _advance(self._start, first + start), piece.data)
            checksum = isal_zlib.crc32(piece, checksum)
        return checksum


class Shard:
    """Random access to the records of one file. `open_shard` makes it; `places` are file positions and sizes."""

    def __init__(self, path: Path, places: list[tuple[int, int]]):
        self.path, self.places = path, places

    def record(self, index: int, file: io.FileIO) -> StoredRecord:
        """Record `index`; `file` is the open file."""
        return StoredRecord(file, *self.places[index])


class OpenFiles:
    """Files kept open, the least recently used of too many closed. One that is still read is closed after that."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> io.FileIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = io.FileIO(path)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


def open_shard(path: Path, records: int) -> Shard | None:
    """A fast reader of the shard, or `None` where its structure is not that of `records` records, each in a chunk."""
    places: list[tuple[int, int]] = []
    position = 0
    with io.FileIO(path) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            while len(places) < records:
                _, size, _, kind, decoded = _CHUNK_HEADER.unpack(_bytes(file, position, _CHUNK_HEADER.size))
                start = _advance(position, _CHUNK_HEADER.size)
                position = _advance(start, size)
                if position > end:
                    return None
                if kind == _SIGNATURE and size == 0:
                    continue
                if kind != _RECORDS | 1 << 8:
                    return None
                # The chunk's data: type of compression, length and bytes of the list of sizes, the record.
                head = _bytes(file, start, min(size, _HEAD))
                length, after = _varint(head, 1)
                record_size, begin = _varint(head, after)
                if head[0] or begin != after + length or record_size != decoded or begin + decoded != size:
                    return None
                places.append((_advance(start, begin), decoded))
        except (IndexError, DamagedRecordError):
            return None
    return Shard(path, places)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position after it) of a base-128 number."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _advance(position: int, size: int) -> int:
    """File position after `size` logical bytes from `position`."""
    if not size:
        return position
    body = _BLOCK - _BLOCK_HEADER
    # Logical distance from the first byte after the header of this block.
    inside = max(position % _BLOCK - _BLOCK_HEADER, 0) + size
    blocks, rest = divmod(inside - 1, body)  # the last byte lies in this block, so that an end of block is kept
    return position - position % _BLOCK + blocks * _BLOCK + _BLOCK_HEADER + rest + 1


_skipped = bytearray(_BLOCK_HEADER)  # block headers are read to here, and not used


def _read(file: io.FileIO, position: int, out: memoryview) -> None:
    """Fills `out` with the logical bytes from file position `position` on, as a rule in one system call."""
    position += _BLOCK_HEADER * (position % _BLOCK == 0)
    vectors: list[bytearray | memoryview] = []
    room, view = _BLOCK - position % _BLOCK, out
    while len(view):
        vectors += [_skipped, view[:room]] if vectors else [view[:room]]
        view, room = view[room:], _BLOCK - _BLOCK_HEADER
    while vectors:
        try:
            got = os.preadv(file.fileno(), vectors, position)
        except OSError as error:
            raise DamagedRecordError(f"byte {position} of its file cannot be read ({error})") from error
        if not got:
            raise DamagedRecordError(
                f"its file ends at byte {position}, {sum(len(vector) for vector in vectors)} too early"
            )
        position += got
        while vectors and got >= len(vectors[0]):  # network disks may give less than was asked for
            got -= len(vectors.pop(0))
        if vectors:
            vectors[0] = memoryview(vectors[0])[got:]


def _bytes(file: io.FileIO, position: int, size: int) -> bytes:
    out = bytearray(size)
    for start in range(0, size, _PIECE):
        _read(file, _advance(position, start), memoryview(out)[start : start + _PIECE])
    return bytes(out)
