"""Records and shards: what goes in comes out, damage is named, access is random."""

from __future__ import annotations

import json
import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d_jax.data.record import Record, RecordText, decode, encode
from mg3d_jax.data.records import RecordReader, ShardWriter, file_digest, read_manifest
from mg3d_jax.data.shard_reader import DamagedRecordError, OpenFiles, open_shard
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


def assert_words(found: RecordText, record: Record) -> None:
    assert found == RecordText(**{name: getattr(record, name) for name in RecordText.__dataclass_fields__})


def test_decode_inverts_encode_and_other_readers_can_read_it():
    record = make()
    data = encode(record)
    assert_same(decode(data), record)
    np.testing.assert_array_equal(safetensors.numpy.load(data)["volume"], record.volume)
    assert safetensors.numpy.load(encode(record, zstd_level=3))["affine"].shape == (4, 4)
    assert b"pickle" not in data


def test_packing_keeps_every_value_of_any_size():
    values = np.arange(-32768, 32768).astype(np.int16)
    volume = np.concatenate([values] * 4 + [values[:26]]).reshape(43695, 3, 2)  # pieces, and a rest
    got = decode(encode(replace(make(), volume=volume), zstd_level=1)).volume
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, volume)


def test_uint8_window_keeps_hu_to_half_a_step():
    record = make()
    data = encode(record, window=(-1000, 1000))
    got = decode(data).volume
    assert got.dtype == np.int16
    assert np.abs(got - np.clip(record.volume, -1000, 1000)).max() <= 2000 / 255 / 2 + 0.5
    assert len(encode(record)) - len(data) == pytest.approx(record.volume.size, abs=64)


@settings(max_examples=200, deadline=None)
@given(
    cut=st.integers(0, 2000), position=st.integers(0, 2000), value=st.integers(1, 255), level=st.integers(0, 1),
    into=st.booleans(),
)  # fmt: skip
def test_no_damage_goes_unnoticed(cut, position, value, level, into):
    """Cut anywhere, or any byte changed: an error of its own kind, never another record and never another crash."""
    data = encode(make(), zstd_level=level)
    out = np.empty((6, 5, 4), np.int16) if into else None
    with pytest.raises(DamagedRecordError):
        decode(data[: min(cut, len(data) - 1)], out)
    changed = bytearray(data)
    changed[position % len(data)] ^= value
    with pytest.raises((DamagedRecordError, UserError)):  # UserError: the digit that says "an earlier version"
        decode(bytes(changed), out)


def write_folder(folder, counts=(3, 2, 4), zstd_level=3):
    shards, number = [], 0
    for index, count in enumerate(counts):
        path = folder / f"records-{index}.array_record"
        writer = ShardWriter(path)
        for _ in range(count):
            writer.write(encode(make(number), zstd_level=zstd_level))
            number += 1
        writer.close()
        shards.append({"file": path.name, "records": count, "bytes": path.stat().st_size, "sha256": file_digest(path)})
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": shards}))


@pytest.mark.parametrize("window", [None, (-1000, 1000)])
@pytest.mark.parametrize("zstd_level", [0, 3])
def test_a_volume_is_decoded_into_a_row_of_a_batch(tmp_path, window, zstd_level):
    size = (64, 64, 60)
    writer = ShardWriter(tmp_path / "a.array_record")
    for number in range(3):
        writer.write(encode(make(number, size), window, zstd_level=zstd_level))
    writer.close()
    shard = {"file": "a.array_record", "records": 3, "bytes": (tmp_path / "a.array_record").stat().st_size}
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": [shard]}))
    reader, batch = RecordReader(tmp_path), np.zeros((3, *size), np.int16)
    for number in range(3):
        record = reader.read_into(number, batch[number])
        assert record.volume.base is not None and np.shares_memory(record.volume, batch)
        assert_same(record, reader[number])
        assert_same(record, decode(reader.read_bytes(number)))
    with pytest.raises(DamagedRecordError, match="expected"):
        reader.read_into(0, np.zeros((3, 3, 3), np.int16))


@pytest.mark.parametrize("zstd_level", [0, 3])
def test_reader_gives_any_record_of_any_shard(tmp_path, zstd_level):
    write_folder(tmp_path, zstd_level=zstd_level)
    reader = RecordReader(tmp_path)
    assert len(reader) == 9
    for index in (8, 0, 3, 2, 5, 4):
        assert_same(reader[index], make(index))
        assert_words(reader.text(index), make(index))
    assert_same(pickle.loads(pickle.dumps(reader))[7], make(7))
    for index in (-1, 9):
        with pytest.raises(IndexError):
            reader.read_bytes(index)


@pytest.mark.parametrize("size", [(6, 5, 4), (40, 41, 42), (64, 64, 60), (70, 64, 64)])
def test_the_fast_reader_reads_what_the_general_one_does(tmp_path, size):
    path = tmp_path / "a.array_record"
    writer = ShardWriter(path)
    blobs = [encode(make(number, size)) for number in range(7)] + [b"", b"x", bytes(70_000)]
    for blob in blobs:
        writer.write(blob)
    writer.close()
    fast, file = open_shard(path, len(blobs)), OpenFiles()[path]
    assert fast is not None
    assert [fast.record(i, file)[:] for i in range(len(blobs))] == blobs
    for number, blob in enumerate(blobs):
        record = fast.record(number, file)
        for first, last in ((0, 8), (5, 70_000), (len(blob) // 2, len(blob)), (3, 3)):
            assert record[first:last] == blob[first:last]
        out = np.zeros(len(blob) - len(blob) // 3, np.uint8)
        assert record.read(len(blob) // 3, out, 7) == zlib.crc32(blob[len(blob) // 3 :], 7)
        assert out.tobytes() == blob[len(blob) // 3 :]
    general = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    assert [general.read([i])[0] for i in range(len(blobs))] == blobs


def test_the_fast_reader_leaves_everything_else_alone(tmp_path):
    path, pairs = tmp_path / "raw", tmp_path / "pairs"
    for file, options in ((path, "group_size:1,uncompressed"), (pairs, "group_size:2,zstd:1")):
        writer = ArrayRecordWriter(str(file), options)
        for number in range(4):
            writer.write(encode(make(number)))
        writer.close()
    assert open_shard(pairs, 4) is None and open_shard(path, 5) is None and open_shard(path, 4) is not None
    shard = {"file": "pairs", "records": 4, "bytes": pairs.stat().st_size}
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": [shard]}))
    assert_same(RecordReader(tmp_path)[2], make(2))  # through the general reader
    (tmp_path / "cut").write_bytes(path.read_bytes()[:300])
    assert open_shard(tmp_path / "cut", 1) is None


def test_the_text_is_read_without_the_volume(tmp_path):
    write_folder(tmp_path, (5,))
    path = tmp_path / "records-0.array_record"
    start, size = open_shard(path, 5).places[2]
    damaged = bytearray(path.read_bytes())
    damaged[start + size - 40 : start + size] = bytes(40)  # voxels
    path.write_bytes(damaged)
    assert_words(RecordReader(tmp_path).text(2), make(2))
    damaged[start + 10] ^= 255  # the header
    path.write_bytes(damaged)
    with pytest.raises(DamagedRecordError, match=r"record 2 .* in records-0.* is damaged"):
        RecordReader(tmp_path).text(2)


@pytest.mark.parametrize("zstd_level", [0, 3])
def test_a_flipped_byte_is_named_and_its_neighbours_are_read(tmp_path, zstd_level):
    """In the data, and in the headers of the file format, where the general reader takes over."""
    write_folder(tmp_path, (5,), zstd_level=zstd_level)
    path = tmp_path / "records-0.array_record"
    whole = path.read_bytes()
    start, size = open_shard(path, 5).places[2]
    for position in (start + size // 2, start + size - 1, start - 20):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        reader, out = RecordReader(tmp_path), np.empty((6, 5, 4), np.int16)
        with pytest.raises(DamagedRecordError, match=r"record 2 .* in records-0.* is damaged"):
            reader.read_into(2, out)
        for index in (1, 3, 4, 0):
            assert_same(reader.read_into(index, out), make(index))


def test_files_are_not_kept_open_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mg3d_jax.data.shard_reader._OPEN_FILES", 2)
    write_folder(tmp_path)
    reader = RecordReader(tmp_path)
    for index in (0, 3, 5, 1, 8, 4):
        assert_same(reader[index], make(index))
    assert len(reader._files._files) == 2


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
    with pytest.raises(UserError, match=r"records-1.* has 100 bytes, its manifest says"):
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
