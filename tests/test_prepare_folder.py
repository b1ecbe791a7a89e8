"""`mg3d prepare`, end to end on files: synthetic ones, real ones, and bad ones."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from reference.synthetic_ct import body, report_row, volume_path, write_ctrate, write_tables

from mg3d_jax.commands.main import main
from mg3d_jax.data.records import RecordReader, file_digest
from mg3d_jax.errors import UserError
from mg3d_jax.prepare import Settings, prepare

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def settings(root: Path, out: Path, **changes) -> Settings:
    base = Settings("ctrate", root, "train", out, size=(24, 20, 18), spacing=(16.0, 16.0, 18.0), qa_samples=0)
    return replace(base, **changes)


def test_command_from_files_to_records(tmp_path, capsys):
    names = write_ctrate(tmp_path / "root", 5)
    out = tmp_path / "out"
    command = ["prepare", "--source", "ctrate", "--root", str(tmp_path / "root"), "--split", "train", "--out", str(out)]
    command += ["--size", "24", "20", "18", "--spacing", "16", "16", "18", "--workers", "1", "--shard-records", "4"]
    assert main(command) == 0
    assert "6 records of 5 patients, 5 distinct reports" in capsys.readouterr().out
    reader = RecordReader(out)
    manifest = reader.manifest
    assert (manifest["grid"], manifest["spacing"]) == ([24, 20, 18], [16.0, 16.0, 18.0])
    assert (manifest["source"], manifest["split"], manifest["records"]) == ("ctrate", "train", 6)
    assert manifest["bad"] == [] and manifest["unique_reports"] == 5
    assert [shard["records"] for shard in manifest["shards"]] == [4, 2]
    for shard in manifest["shards"]:
        assert file_digest(out / shard["file"]) == shard["sha256"]
    records = [reader[i] for i in range(len(reader))]
    assert sorted(r.name for r in records) == sorted(names)
    order = sorted({r.patient for r in records}, key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    assert [p for p, _ in manifest["patients"]] == order
    assert [r.patient for r in records] == [p for p, n in manifest["patients"] for _ in range(n)]
    for record in records:
        number = int(record.patient.split("_")[1])
        expected = body(seed=10 * number + int(record.name.split("_")[3][0]))
        expected = expected.reshape(24, 2, 20, 2, 18, 2).mean((1, 3, 5))
        np.testing.assert_allclose(record.volume, expected, atol=0.51)  # RAS and LPS files alike
        assert record.sentences == (f"Patient {number} was examined.", f"A nodule of {number}.5 mm.", "Stable.")
        np.testing.assert_allclose(record.affine[:3, 3], [-146, -116, 34.5])
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [(line["name"], line["affine"]) for line in index] == [(r.name, r.affine.tolist()) for r in records]
    two = [r for r in records if r.patient == "train_2"]
    assert len({r.report_id for r in two}) == 1 and len({r.scan for r in two}) == 1


def real_root(root: Path, copies: int) -> None:
    """CT-RATE's layout from the real CT and real reports; the MR and the label map stand in as intruders."""
    with open(SHARED / "reports" / "ctrate_train_reports_120.csv", newline="") as file:
        rows = list(csv.DictReader(file))[: copies + 2]
    files = ["totalseg_example_ct"] * copies + ["totalseg_example_ct_labels", "totalseg_example_mr_sm"]
    for row, name in zip(rows, files, strict=True):
        path = volume_path(root, row["VolumeName"])
        path.parent.mkdir(parents=True)
        shutil.copy(SHARED / "ct" / f"{name}.nii.gz", path)
    write_tables(root, rows)
    shutil.copy(
        SHARED / "reports" / "ctrate_train_labels_120.csv",
        root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv",
    )


def test_real_ct_and_real_reports(tmp_path):
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    real_root(tmp_path / "root", copies=4)
    out = tmp_path / "out"
    # The same file under four patients is found before any is read.
    with pytest.raises(UserError, match=r"identical files.*\n.*--allow-leak duplicate-volume"):
        prepare(settings(tmp_path / "root", out))
    assert not out.exists()
    with pytest.raises(UserError, match=r"2 of 6 \(33%\) are bad"):
        prepare(settings(tmp_path / "root", out, allow_leak=("duplicate-volume",)))
    manifest = prepare(settings(tmp_path / "root", out, max_bad_share=0.5, allow_leak=("duplicate-volume",)))
    assert manifest["records"] == 4
    assert all("does not look like CT" in item["reason"] for item in manifest["bad"])
    reader = RecordReader(out)
    assert len(manifest["label_names"]) == 18
    for index in range(4):
        record = reader[index]
        assert len(record.sentences) > 8 and record.labels.shape == (18,)
        tissue = record.volume[(record.volume > -200) & (record.volume < 300)]
        assert -120 < np.median(tissue) < 80
        np.testing.assert_allclose(np.diag(record.affine)[:3], (16, 16, 18))


def bad_root(root: Path) -> dict[str, str]:
    """Six good volumes and one of every kind of bad one: path -> what the reason must say."""
    write_ctrate(root, 6)
    rows = [report_row(f"train_{n}_a_{r}.nii.gz", "Normal.") for n in range(1, 7) for r in ((1, 2) if n == 2 else (1,))]
    expected = {}

    def volume(number: int, reason: str) -> Path:
        path = volume_path(root, f"train_{number}_a_1.nii.gz")
        path.parent.mkdir(parents=True)
        shutil.copy(volume_path(root, "train_1_a_1.nii.gz"), path)
        rows.append(report_row(path.name, "Normal."))
        expected[str(path)] = reason
        return path

    path = volume(10, "truncated")
    path.write_bytes(path.read_bytes()[:20_000])
    volume(11, "unreadable").write_bytes(b"not a nifti at all")
    path = volume(12, "NaN")
    nib.save(nib.Nifti1Image(np.full((30, 30, 30), np.nan, np.float32), np.diag([4.0, 4, 4, 1])), path)
    volume(13, "a report without a volume").unlink()
    volume(14, "a volume without a report")
    rows.pop()
    volume(15, "empty report")
    rows[-1] = report_row("train_15_a_1.nii.gz", "Not given.", " ")
    write_tables(root, rows)
    return expected


def test_bad_input_is_counted_listed_and_summed_up(tmp_path, capsys):
    expected = bad_root(tmp_path / "root")
    out = tmp_path / "out"
    arguments = [
        "prepare",
        "--source",
        "ctrate",
        "--root",
        str(tmp_path / "root"),
        "--split",
        "train",
        "--out",
        str(out),
    ]
    arguments += ["--size", "24", "20", "18", "--spacing", "16", "16", "18", "--workers", "2"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "above --max-bad-share 0.1" in message and "train_13_a_1.nii.gz" in message
    assert not (out / "manifest.json").exists()
    assert main([*arguments, "--max-bad-share", "0.6"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["records"] == 7
    found = {item["path"]: item["reason"] for item in manifest["bad"]}
    assert found.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in found[path], path
    assert "6 bad" in capsys.readouterr().out


def test_nothing_left_is_an_error(tmp_path):
    write_tables(tmp_path, [report_row("train_1_a_1.nii.gz", "Normal.")])
    with pytest.raises(UserError, match="nothing is left"):
        prepare(settings(tmp_path, tmp_path / "out", max_bad_share=1.0))


def test_a_split_without_volumes_names_the_splits_there_are(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    write_ctrate(tmp_path / "root", 2, split="valid")
    (tmp_path / "all.txt").write_text("train_1\ntrain_2\n")
    with pytest.raises(UserError) as error:
        prepare(settings(tmp_path / "root", tmp_path / "out", exclude=tmp_path / "all.txt"))
    message = str(error.value)
    assert "split 'train'; the other splits are ['valid']; 3 left out: named in all.txt" in message


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    write_ctrate(tmp_path / "root", 2)
    prepare(settings(str(tmp_path / "root"), str(tmp_path / "out")))  # paths may be strings
    with pytest.raises(UserError, match="size"):
        prepare(settings(tmp_path / "root", tmp_path / "out", size=(8, 8, 8)))


def test_workers_do_not_change_a_byte(tmp_path):
    write_ctrate(tmp_path / "root", 4)
    for workers in (1, 2):
        prepare(settings(tmp_path / "root", tmp_path / f"out{workers}", workers=workers, shard_records=2))
    names = sorted(p.relative_to(tmp_path / "out1") for p in (tmp_path / "out1").rglob("*") if p.is_file())
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


def test_the_command_never_imports_jax():
    import subprocess
    import sys

    code = "import sys, mg3d_jax.commands.prepare; print(sorted({'jax', 'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
