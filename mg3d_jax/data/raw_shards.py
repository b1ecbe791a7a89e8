"""Fast reads of uncompressed shards: the record's bytes straight from the page cache, one copy, no thread.

An ArrayRecord file is a Riegeli file: blocks of 64 KiB that each open with a 24-byte header, and chunks (40-byte
header, then data) that run across them. Without compression and with one record per chunk, a record is the
concatenation of the pieces between block headers, so that a memory map and a join replace the general reader, which
hashes and copies every byte several times. Whatever does not look exactly like that is left to the general reader.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # header hash, data size, data hash, type | records << 8, decoded size
_SIGNATURE, _RECORDS = ord("s"), ord("r")
_UNCOMPRESSED = 0


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position after it) of a base-128 number."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


class RawRecord:
    """One record in the page cache: sliced like bytes, or copied into an array without an intermediate."""

    def __init__(self, data: np.ndarray, start: int, size: int):
        self._data, self._start, self._size = data, start, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self._size)
        out = np.empty(max(last - first, 0), np.uint8)
        self.copy(first, out)
        return out.tobytes()

    def copy(self, first: int, out: np.ndarray) -> None:
        """Fills `out` (uint8, one axis) with the bytes from `first` on. The caller keeps within the record."""
        position = _advance(self._start, first)
        position += _BLOCK_HEADER * (position % _BLOCK == 0)
        head = min(len(out), _BLOCK - position % _BLOCK)
        out[:head] = self._data[position : position + head]
        position, body = position + head, _BLOCK - _BLOCK_HEADER
        blocks = (len(out) - head) // body
        end = head + blocks * body
        rows = self._data[position : position + blocks * _BLOCK].reshape(blocks, _BLOCK)
        out[head:end].reshape(blocks, body)[...] = rows[:, _BLOCK_HEADER:]
        tail = position + blocks * _BLOCK + _BLOCK_HEADER
        out[end:] = self._data[tail : tail + len(out) - end]


class RawShard:
    """Random access to an uncompressed shard. `open_raw` makes it."""

    def __init__(self, data: np.ndarray, records: list[tuple[int, int]]):
        self._data, self._records = data, records

    def record(self, index: int) -> RawRecord:
        """Record `index` of the shard."""
        return RawRecord(self._data, *self._records[index])


def _pieces(view: memoryview, position: int, size: int) -> list[memoryview]:
    """The parts of `size` logical bytes from file position `position`, block headers left out."""
    pieces = []
    while size:
        if position % _BLOCK == 0:
            position += _BLOCK_HEADER
        count = min(size, _BLOCK - position % _BLOCK)
        pieces.append(view[position : position + count])
        position, size = position + count, size - count
    return pieces


def _advance(position: int, size: int) -> int:
    """File position after `size` logical bytes from `position`."""
    if not size:
        return position
    body = _BLOCK - _BLOCK_HEADER
    # Logical distance from the first byte after the header of this block.
    inside = max(position % _BLOCK - _BLOCK_HEADER, 0) + size
    blocks, rest = divmod(inside - 1, body)  # the last byte lies in this block, so that an end of block is kept
    return position - position % _BLOCK + blocks * _BLOCK + _BLOCK_HEADER + rest + 1


def open_raw(path: Path, records: int) -> RawShard | None:
    """A fast reader of the shard, or `None` where its structure is not that of `records` uncompressed records."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view, found, position = memoryview(data), [], 0
    try:
        while len(found) < records:
            header = b"".join(_pieces(view, position, _CHUNK_HEADER.size))
            _, size, _, kind, decoded = _CHUNK_HEADER.unpack(header)
            start = _advance(position, _CHUNK_HEADER.size)
            position = _advance(start, size)
            if position > len(data):
                return None
            if kind == _SIGNATURE and size == 0:
                continue
            if kind != _RECORDS | 1 << 8:
                return None
            head = b"".join(_pieces(view, start, min(size, 32)))
            sizes_bytes, after = _varint(head, 1)
            record_size, end = _varint(head, after)
            if (
                head[0] != _UNCOMPRESSED
                or end != after + sizes_bytes
                or record_size != decoded
                or end + decoded != size
            ):
                return None
            found.append((_advance(start, end), decoded))
    except (IndexError, struct.error):
        return None
    return RawShard(np.frombuffer(data, np.uint8), found)
