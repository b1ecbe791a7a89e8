"""Folders that grow with the download: what is new, excluded, changed or damaged is done, and nothing else."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from reference.synthetic_ct import affine, body, report_row, volume_path, write_nifti, write_tables
from test_prepare_folder import settings

from mg3d_jax.commands.main import main
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.records import RecordReader
from mg3d_jax.errors import UserError
from mg3d_jax.prepare import leaks, prepare, snapshots
from mg3d_jax.prepare import shards as shards_lib
from mg3d_jax.prepare.folder import dry_run
from mg3d_jax.training import run_folder

SHAPE, SPACING = (16, 14, 14), (24.0, 24.0, 24.0)
SMALL = {"size": SHAPE, "spacing": SPACING, "shard_records": 2, "zstd_level": 0}


FIRST = [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (5, 1)]  # patient, reconstruction


def name(patient: int, reconstruction: int = 1) -> str:
    return f"train_{patient}_a_{reconstruction}.nii.gz"


def write(root: Path, volumes: list[tuple[int, int]]) -> None:
    """A CT-RATE folder of these (patient, reconstruction)."""
    rows = []
    for patient, reconstruction in volumes:
        path = volume_path(root, name(patient, reconstruction))
        if not path.exists():
            write_nifti(path, body(SHAPE, seed=10 * patient + reconstruction, spacing=SPACING), affine(SPACING))
        rows.append(report_row(path.name, f"Patient {patient} has a nodule.", "Stable."))
    write_tables(root, rows)


def names(folder: Path) -> list[str]:
    reader = RecordReader(folder)
    return [reader[index].name for index in range(len(reader))]


def records(folder: Path) -> dict[str, bytes]:
    reader = RecordReader(folder)
    return {reader[index].name: reader.read_bytes(index) for index in range(len(reader))}


@pytest.fixture
def grown(tmp_path):
    """A finished folder of five patients, of whom the third has two volumes."""
    root, out = tmp_path / "root", tmp_path / "out"
    write(root, FIRST)
    prepare(settings(root, out, **SMALL))
    return root, out


def counting(monkeypatch) -> list[str]:
    """Names of the volumes that are read from now on."""
    read, reading = [], shards_lib.prepare_volume
    monkeypatch.setattr(
        shards_lib, "prepare_volume", lambda path, *rest, **more: read.append(path.name) or reading(path, *rest, **more)
    )
    return read


def test_volumes_that_arrive_later_are_added_behind_and_beside_their_patients(grown, tmp_path, monkeypatch, caplog):
    root, out = grown
    before, order = records(out), names(out)
    assert f"{out} was prepared already" not in dry_run(settings(root, out, **SMALL))
    write(root, [*FIRST, (4, 2), (6, 1), (7, 1), (8, 1)])
    said = dry_run(settings(root, out, **SMALL))
    assert "4 new: " in said and "would read 4 volumes" in said and names(out) == order
    read = counting(monkeypatch)
    with caplog.at_level("INFO"):
        manifest = prepare(settings(root, out, **SMALL))
    assert sorted(read) == [name(4, 2), name(6), name(7), name(8)] and "4 new" in caplog.text
    after = names(out)
    assert [n for n in after if n in order] == order  # the order of what was there
    assert set(after[-3:]) == {name(6), name(7), name(8)}
    assert after.index(name(4, 2)) == after.index(name(4)) + 1
    assert [p for p, _ in manifest["patients"]][:5] == list(dict.fromkeys(n.rsplit("_", 2)[0] for n in order))
    assert {n: records(out)[n] for n in order} == before
    assert main(["prepare", "--verify", "--out", str(out)]) == 0
    assert not read[4:] and prepare(settings(root, out, **SMALL))["records"] == 10 and len(read) == 4
    # And again: a folder that has grown grows on.
    write(root, [*FIRST, (4, 2), (6, 1), (7, 1), (8, 1), (9, 1)])
    assert prepare(settings(root, out, **SMALL))["records"] == 11 and read[4:] == [name(9)]
    assert names(out)[:10] == after
    # The states before are prepared folders of their own.
    assert names(out / "snapshots" / "1") == order and names(out / "snapshots" / "2") == after
    assert records(out / "snapshots" / "1") == before
    assert main(["prepare", "--verify", "--out", str(out / "snapshots" / "1")]) == 0


def test_excluded_volumes_leave_and_come_back(grown, tmp_path):
    root, out = grown
    order, before = names(out), records(out)
    (tmp_path / "exclude.txt").write_text("train_3\ntrain_5_a_1.nii.gz\n")
    some = {**SMALL, "exclude": tmp_path / "exclude.txt"}
    assert "3 left out now: train_3_a_1" in dry_run(settings(root, out, **some))
    prepare(settings(root, out, **some))
    left = [n for n in order if not n.startswith(("train_3", "train_5"))]
    assert names(out) == left and {n: before[n] for n in left} == records(out)
    prepare(settings(root, out, **SMALL))
    assert records(out) == before and names(out)[: len(left)] == left


@pytest.mark.parametrize("what", ["volume", "report", "shard", "lost shard", "old time"])
def test_what_changed_or_was_damaged_is_done_again_and_nothing_else(grown, tmp_path, monkeypatch, what):
    root, out = grown
    path, before, order = volume_path(root, name(2)), records(out), names(out)
    shard = next(out.glob("*.array_record"))
    if what in ("volume", "old time"):
        path.unlink()
        write_nifti(path, body(SHAPE, seed=99, spacing=SPACING), affine(SPACING))
        if what == "old time":  # as `cp -p` leaves it; the size tells, or the checksum
            os.utime(path, (1e9, 1e9))
    elif what == "report":
        table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
        table.write_text(table.read_text().replace("Patient 2 has a nodule", "Patient 2 has a cyst"))
    elif what == "shard":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    read = counting(monkeypatch)
    prepare(settings(root, out, **SMALL))
    assert names(out) == order
    after = records(out)
    if "shard" in what:
        assert after == before and len(read) == 2
        assert not (out / "snapshots").exists()
    else:
        assert read == [name(2)] and [n for n in order if after[n] != before[n]] == [name(2)]
        assert records(out / "snapshots" / "1") == before
    assert main(["prepare", "--verify", "--out", str(out)]) == 0


def test_shards_are_read_again_only_where_they_were_touched(grown, monkeypatch):
    """Terabytes: a call that finds all done reads what was copied or written to since, once, and all on request."""
    root, out = grown
    read, digest = [], snapshots.file_digest
    monkeypatch.setattr(snapshots, "file_digest", lambda path: read.append(path.name) or digest(path))
    shards = sorted(path.name for path in out.glob("*.array_record"))
    prepare(settings(root, out, **SMALL))
    del read[:]  # a shard that was written within one tick of the clock before its sidecar is read once
    prepare(settings(root, out, **SMALL))
    assert read == []
    content = (out / shards[1]).read_bytes()
    (out / shards[1]).write_bytes(content)  # copied back
    os.utime(out / shards[1], (1e9, 1e9))  # with its old time
    assert "would read 0 volumes" in dry_run(settings(root, out, **SMALL))
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file())
    prepare(settings(root, out, **SMALL))
    prepare(settings(root, out, **SMALL))
    assert read == [shards[1]] * 2  # of the dry run, which writes nothing, and of the first call
    work = [(path, time) for path, time in before if path.parent.name == "work"]
    assert all(path.stat().st_mtime_ns == time for path, time in work)
    prepare(settings(root, out, **SMALL, compare="checksum"))
    assert read[2:] == shards
    (out / shards[1]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(out / shards[1], (1e9, 1e9))
    assert "1 damaged or lost shards" in dry_run(settings(root, out, **SMALL))


def test_a_header_that_was_taken_without_evidence_is_decided_again(grown, monkeypatch):
    root, out = grown
    sidecar = out / "work" / f"{RecordReader(out).manifest['shards'][0]['file'].removesuffix('.array_record')}.json"
    written = json.loads(sidecar.read_text())
    old = "spacing of header [1.0, 1.0, 1.0] and table [8.0, 8.0, 9.0] mm disagree: header used"
    written["quality"][0]["warnings"] = [old]
    begun = sidecar.stat().st_mtime
    sidecar.write_text(json.dumps(written))
    os.utime(sidecar, (begun, begun))
    read = counting(monkeypatch)
    prepare(settings(root, out, **SMALL))
    assert read == [written["entries"][0]["name"]]
    prepare(settings(root, out, **SMALL))
    assert len(read) == 1


def test_checksums_find_what_size_and_time_do_not(tmp_path, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    write(root, [(1, 1), (2, 1)])
    options = {**SMALL, "compare": "checksum"}
    prepare(settings(root, out, **options))
    path = volume_path(root, name(2))
    data = bytearray(path.read_bytes())
    data[4] ^= 1  # the time in the head of the packed file: another content of the same volume
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    read = counting(monkeypatch)
    prepare(settings(root, out, **SMALL))
    assert read == []
    prepare(settings(root, out, **options))
    assert read == [name(2)]


def test_a_kill_while_a_folder_grows_loses_nothing(grown, tmp_path, monkeypatch):
    root, out = grown
    write(root, [(1, 1), (1, 2), (2, 1), (3, 1), (3, 2), (4, 1), (5, 1), (5, 2), (6, 1), (7, 1)])
    shutil.copytree(out, tmp_path / "whole")
    prepare(settings(root, tmp_path / "whole", **SMALL))
    reading, left = shards_lib.prepare_volume, [2]

    def killed(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return reading(*args, **more)

    monkeypatch.setattr(shards_lib, "prepare_volume", killed)
    for allowed in (0, 1, 2):
        left[0] = allowed
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(root, out, **SMALL))
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(shards_lib, "prepare_volume", reading)
    prepare(settings(root, out, **SMALL))
    assert names(out) == names(tmp_path / "whole") and records(out) == records(tmp_path / "whole")


def test_a_run_of_the_old_state_is_told_what_changed_and_where_it_goes_on(grown):
    root, out = grown
    old = PreparedData((str(out),))
    meta = {"records": old.lengths, "content": old.contents()}
    run_folder.check_same_records(meta, old)
    write(root, [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (6, 1)])
    (root / "dataset" / "train" / "train_5" / "train_5_a" / name(5)).unlink()
    prepare(settings(root, out, **SMALL))
    with pytest.raises(UserError, match=rf"1 new: {name(6)}; 1 left: {name(5)}.*data\.train={out}/snapshots/1"):
        run_folder.check_same_records(meta, PreparedData((str(out),)))
    run_folder.check_same_records(meta, PreparedData((str(out / "snapshots" / "1"),)))
    with pytest.raises(UserError, match="Use the same data"):
        run_folder.check_same_records({"records": [3]}, PreparedData((str(out),)))


def test_the_dry_run_of_the_command_writes_nothing(tmp_path, capsys):
    write(tmp_path / "root", [(1, 1), (2, 1)])
    command = ["prepare", "--source", "ctrate", "--root", str(tmp_path / "root"), "--split", "train"]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "would read 2 volumes, write 1 of 1 shards" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_limits_of_the_machine_end_at_once_in_one_line(tmp_path, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    write(root, [(1, 1), (2, 1), (3, 1), (4, 1)])
    reading = shards_lib.prepare_volume
    for number, words in ((errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "disk is full")):

        def failing(*args, number=number, **more):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(shards_lib, "prepare_volume", failing)
        with pytest.raises(UserError, match=words) as caught:
            prepare(settings(root, out, **SMALL))
        assert "\n" not in str(caught.value) and "goes on from here" in str(caught.value)
    monkeypatch.setattr(shards_lib, "prepare_volume", reading)
    monkeypatch.setattr(shards_lib.ShardWriter, "close", lambda self: failing())
    with pytest.raises(UserError, match="cannot be written"):
        prepare(settings(root, out, **SMALL))
    monkeypatch.undo()
    assert prepare(settings(root, out, **SMALL))["records"] == 4


def test_a_fetch_that_brings_nothing_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mg3d_jax.prepare.fetch._WAIT_SECONDS", 0.0)
    root = tmp_path / "root"
    write(root, [(n, 1) for n in range(1, 7)])
    shutil.rmtree(root / "dataset" / "train")
    tried = tmp_path / "tried"
    with pytest.raises(UserError, match="--fetch brings nothing: fetch failed"):
        prepare(settings(root, tmp_path / "out", **SMALL, fetch=f"echo {{name}} >> {tried}; false {{dir}}"))
    assert len(set(tried.read_text().split())) == 3
    with pytest.raises(UserError, match="cannot be run"):
        prepare(settings(root, tmp_path / "out", **SMALL, fetch="no-such-program {dir}"))


def test_layout_of_a_folder_is_json_that_says_where_every_volume_is(grown):
    root, out = grown
    write(root, [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1)])
    prepare(settings(root, out, **SMALL))
    layout = json.loads((out / "work" / "layout.json").read_text())
    assert [key.split("\t")[1] for keys in layout["shards"].values() for key in keys] == names(out)


@pytest.mark.parametrize("form", ["another level", "not packed", "another header", "folder of slices"])
def test_the_same_volume_of_another_patient_is_found_before_any_is_prepared(tmp_path, monkeypatch, form):
    root = tmp_path / "root"
    write(root, [(1, 1), (2, 1), (3, 1)])
    image = nib.load(volume_path(root, name(1)))
    voxels = np.asarray(image.dataobj)
    copy = root / "copy.nii"
    if form == "another level":
        copy = root / "copy.nii.gz"
        copy.write_bytes(gzip.compress(image.to_bytes(), 1))
    elif form == "not packed":
        copy.write_bytes(image.to_bytes())
    elif form == "another header":
        copy = write_nifti(root / "copy.nii.gz", voxels, np.diag([2.0, 2, 2, 1]))
    else:
        for folder, stem in (("first", "a"), ("copy", "b")):
            (root / folder).mkdir()
            for n in range(3):
                (root / folder / f"{stem}{n}.dcm").write_bytes(bytes([n]) * 200)
        copy = root / "copy"
    first = root / "first" if copy.is_dir() else volume_path(root, name(1))
    table = root / "table.csv"
    rows = [("a", first), ("b", volume_path(root, name(2))), ("c", copy), ("d", volume_path(root, name(3)))]
    table.write_text("patient,volume,report\n" + "".join(f"{who},{path},Normal.\n" for who, path in rows))
    read = counting(monkeypatch)
    options = {**SMALL, "source": "csv", "split": "all"}
    with pytest.raises(UserError, match=rf"identical files\): 1: {first} = {copy}"):
        prepare(replace(settings(table, tmp_path / "out"), **options))
    assert not read and not (tmp_path / "out").exists()


def test_folders_to_compare_with_are_looked_at_before_any_volume(grown, tmp_path, monkeypatch, caplog):
    root, out = grown
    table = root / "table.csv"
    table.write_text(f"patient,volume,report\nz,{volume_path(root, name(2))},Normal.\n")
    options = {**SMALL, "source": "csv", "split": "all", "against": (out,)}
    again = replace(settings(table, tmp_path / "again"), **options)
    read = counting(monkeypatch)
    assert f"would stop: duplicate-volume (and {out}, identical files)" in dry_run(again)
    with caplog.at_level("INFO"):
        leaks.file_leaks([], [out])
        leaks.check_comparable([out], {"spacing": [1, 1, 1], "size": list(SHAPE)})
    assert "has other spacing" in caplog.text and "not where they were" not in caplog.text
    (out / "index.jsonl").write_text("")
    with pytest.raises(UserError, match="prepare the folder again"):
        prepare(again)
    assert read == []
