"""Records and shards: what goes in comes out, damage is named, access is random."""

from __future__ import annotations

import contextlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d_jax.data.raw_shards import open_raw
from mg3d_jax.data.records import (
    DamagedRecordError,
    Record,
    RecordReader,
    ShardWriter,
    decode,
    encode,
    file_digest,
    read_manifest,
)
from mg3d_jax.errors import UserError


def make(number: int = 0, size=(6, 5, 4)) -> Record:
    rng = np.random.default_rng(number)
    return Record(
        volume=rng.integers(-1024, 3000, size).astype(np.int16),
        sentences=("Nodule of 3 mm.", 'With "quotes", ümlaut and\nnewline.'),
        labels=np.array([0, 1, -1], np.int8),
        name=f"train_{number}_a_1.nii.gz",
        patient=f"train_{number}",
        scan=f"train_{number}_a",
        report_id="ab" * 16,
        affine=np.diag([1.5, 2.5, 3.5, 1.0]),
        findings="Nodule of 3 mm.",
        impression="",
        source="ctrate",
    )


def assert_same(a: Record, b: Record) -> None:
    for name in Record.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


def test_decode_inverts_encode_and_other_readers_can_read_it():
    record = make()
    data = encode(record)
    assert_same(decode(data), record)
    np.testing.assert_array_equal(safetensors.numpy.load(data)["volume"], record.volume)
    assert b"pickle" not in data


def test_byte_planes_keep_every_value():
    values = np.arange(-32768, 32768).astype(np.int16).reshape(64, 32, 32)
    record = replace(make(), volume=values)
    got = decode(encode(record, planes=True)).volume
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, values)


def test_uint8_window_keeps_hu_to_half_a_step():
    record = make()
    data = encode(record, window=(-1000, 1000))
    got = decode(data).volume
    assert got.dtype == np.int16
    assert np.abs(got - np.clip(record.volume, -1000, 1000)).max() <= 2000 / 255 / 2 + 0.5
    assert len(encode(record)) - len(data) == pytest.approx(record.volume.size, abs=64)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 2000), position=st.integers(0, 2000), value=st.integers(0, 255))
def test_damaged_bytes_never_crash_otherwise(cut, position, value):
    data = encode(make())
    with pytest.raises(DamagedRecordError):
        decode(data[: min(cut, len(data) - 1)])
    changed = bytearray(data)
    changed[position % len(data)] = value
    with contextlib.suppress(DamagedRecordError):
        decode(bytes(changed))  # a changed voxel or letter is for the checksum of the shard to find


def write_folder(folder, counts=(3, 2, 4), zstd_level=3):
    shards, number = [], 0
    for index, count in enumerate(counts):
        path = folder / f"records-{index}.array_record"
        writer = ShardWriter(path, zstd_level=zstd_level)
        for _ in range(count):
            writer.write(encode(make(number)))
            number += 1
        writer.close()
        shards.append({"file": path.name, "records": count, "bytes": path.stat().st_size, "sha256": file_digest(path)})
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": shards}))


@pytest.mark.parametrize("options", [{}, {"planes": True}, {"window": (-1000, 1000)}])
@pytest.mark.parametrize("zstd_level", [0, 3])
def test_a_volume_is_decoded_into_a_row_of_a_batch(tmp_path, options, zstd_level):
    size = (64, 64, 60)
    writer = ShardWriter(tmp_path / "a.array_record", zstd_level=zstd_level)
    for number in range(3):
        writer.write(encode(make(number, size), **options))
    writer.close()
    shard = {"file": "a.array_record", "records": 3}
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": [shard]}))
    reader, batch = RecordReader(tmp_path), np.zeros((3, *size), np.int16)
    for number in range(3):
        record = reader.read_into(number, batch[number])
        assert record.volume.base is not None and np.shares_memory(record.volume, batch)
        assert_same(record, reader[number])
        assert_same(record, decode(reader.read_bytes(number)))
    with pytest.raises((UserError, ValueError)):
        reader.read_into(0, np.zeros((3, 3, 3), np.int16))


@pytest.mark.parametrize("zstd_level", [0, 3])
def test_reader_gives_any_record_of_any_shard(tmp_path, zstd_level):
    write_folder(tmp_path, zstd_level=zstd_level)
    reader = RecordReader(tmp_path)
    assert len(reader) == 9
    for index in (8, 0, 3, 2, 5, 4):
        assert_same(reader[index], make(index))
    assert_same(pickle.loads(pickle.dumps(reader))[7], make(7))
    for index in (-1, 9):
        with pytest.raises(IndexError):
            reader.read_bytes(index)


@pytest.mark.parametrize("size", [(6, 5, 4), (40, 41, 42), (64, 64, 60)])
def test_the_fast_reader_of_uncompressed_shards_reads_what_the_general_one_does(tmp_path, size):
    path = tmp_path / "a.array_record"
    writer = ShardWriter(path, zstd_level=0)
    blobs = [encode(make(number, size)) for number in range(7)] + [b"", b"x", bytes(70_000)]
    for blob in blobs:
        writer.write(blob)
    writer.close()
    fast = open_raw(path, len(blobs))
    assert fast is not None
    assert [fast.record(i)[:] for i in range(len(blobs))] == blobs
    for blob, record in zip(blobs, map(fast.record, range(len(blobs))), strict=True):
        for first, last in ((0, 8), (5, 70_000), (len(blob) // 2, len(blob)), (3, 3)):
            assert record[first:last] == blob[first:last]
    general = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    assert [general.read([i])[0] for i in range(len(blobs))] == blobs


def test_the_fast_reader_leaves_everything_else_alone(tmp_path):
    for name, level in (("packed", 3), ("raw", 0)):
        writer = ShardWriter(tmp_path / name, zstd_level=level)
        for _ in range(3):
            writer.write(encode(make()))
        writer.close()
    assert open_raw(tmp_path / "packed", 3) is None
    assert open_raw(tmp_path / "raw", 3) is not None
    assert open_raw(tmp_path / "raw", 4) is None
    (tmp_path / "cut").write_bytes((tmp_path / "raw").read_bytes()[:300])
    assert open_raw(tmp_path / "cut", 1) is None


def test_the_same_records_make_the_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name)
        digests.append([shard["sha256"] for shard in read_manifest(tmp_path / name)["shards"]])
    assert digests[0] == digests[1]


def test_missing_damaged_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="mg3d prepare"):
        RecordReader(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "records-1.array_record").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="records-1"):
        RecordReader(tmp_path)[3]
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 99, "shards": []}))
    with pytest.raises(UserError, match="format_version 99"):
        RecordReader(tmp_path)


def test_an_unfinished_shard_has_no_name(tmp_path):
    path = tmp_path / "records.array_record"
    writer = ShardWriter(path)
    writer.write(b"abc")
    assert not path.exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
