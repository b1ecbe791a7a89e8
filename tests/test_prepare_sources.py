"""Dataset layouts: what is found, what does not fit together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reference.synthetic_ct import affine, body, report_row, volume_path, write_ctrate, write_nifti, write_tables

from mg3d_jax.commands.main import main
from mg3d_jax.data.records import RecordReader
from mg3d_jax.errors import UserError
from mg3d_jax.prepare import Settings, prepare
from mg3d_jax.prepare.listing import SourceOptions
from mg3d_jax.prepare.selection import list_source
from mg3d_jax.prepare.sources.ctrate import ctrate_ids, list_ctrate
from mg3d_jax.prepare.sources.ctrg import list_ctrg
from mg3d_jax.prepare.sources.table import list_table
from mg3d_jax.prepare.tables import dicom_metadata
from mg3d_jax.registry import SOURCES


def test_ctrate_names():
    assert ctrate_ids("train_12_b_3.nii.gz") == ("train_12", "train_12_b")
    with pytest.raises(ValueError):
        ctrate_ids("scan.nii.gz")


def test_dicom_metadata_reads_ctrates_strings():
    row = {
        "RescaleSlope": "1",
        "RescaleIntercept": "-8192",
        "XYSpacing": "[0.34, 0.35]",
        "ZSpacing": "1.5",
        "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
        "ImagePositionPatient": "['-175', '-160', '12.5']",
        "NumberofSlices": "240",
    }
    metadata = dicom_metadata(row)
    assert metadata.scaling == (1.0, -8192.0)
    assert metadata.spacing == (0.35, 0.34, 1.5)  # DICOM lists row spacing first: the step along a column
    assert metadata.orientation == (1, 0, 0, 0, 1, 0) and metadata.position == (-175, -160, 12.5)
    assert metadata.slices == 240
    blank = dicom_metadata(dict.fromkeys(row, ""))
    assert (blank.scaling, blank.spacing, blank.orientation, blank.position, blank.slices) == (None,) * 5


@pytest.mark.parametrize("inside", [True, False])
def test_root_may_be_dataset_or_its_parent(tmp_path, inside):
    names = write_ctrate(tmp_path)
    listing = list_ctrate(SourceOptions(tmp_path / "dataset" if inside else tmp_path, "train"))
    assert sorted(e.name for e in listing.examples) == sorted(names)
    assert listing.bad == []
    assert listing.label_names == ("Cardiomegaly", "Lung nodule")
    by_name = {e.name: e for e in listing.examples}
    two = by_name["train_2_a_2.nii.gz"]
    assert (two.patient, two.scan, two.impression) == ("train_2", "train_2_a", "Stable.")
    assert two.labels == (0, 0) and by_name["train_2_a_1.nii.gz"].labels == (0, 1)


def test_validation_tables_have_another_name_than_their_folder(tmp_path):
    write_ctrate(tmp_path, 2, split="valid")
    assert len(list_ctrate(SourceOptions(tmp_path, "valid")).examples) == 3


def test_fixed_files_are_preferred(tmp_path):
    write_ctrate(tmp_path, 2)
    fixed = write_nifti(volume_path(tmp_path, "train_1_a_1.nii.gz", "train_fixed"), body(), affine())
    paths = {e.name: e.path for e in list_ctrate(SourceOptions(tmp_path, "train")).examples}
    assert paths["train_1_a_1.nii.gz"] == fixed
    assert "train_fixed" not in str(paths["train_2_a_1.nii.gz"])
    notes = list_ctrate(SourceOptions(tmp_path, "train")).notes
    assert "1 volumes are in train/ and in train_fixed/: the latter were taken" in notes


def test_a_second_file_of_a_volume_is_bad(tmp_path):
    write_ctrate(tmp_path, 2)
    first = volume_path(tmp_path, "train_1_a_1.nii.gz")
    second = write_nifti(tmp_path / "dataset" / "train" / "zz" / "train_1_a_1.nii.gz", body((8, 8, 8)), affine())
    listing = list_ctrate(SourceOptions(tmp_path, "train"))
    assert first in [e.path for e in listing.examples] and len(listing.examples) == 3
    (bad,) = listing.bad
    assert bad["path"] == str(second)
    assert bad["reason"].startswith(f"second file of train_1_a_1.nii.gz, the first is {first}")


def test_what_does_not_fit_together_is_listed_with_path_and_reason(tmp_path):
    write_nifti(volume_path(tmp_path, "train_1_a_1.nii.gz"), body(), affine())
    write_nifti(volume_path(tmp_path, "train_2_a_1.nii.gz"), body(), affine())
    write_nifti(volume_path(tmp_path, "train_9_a_1.nii.gz"), body(), affine())
    rows = [report_row("train_1_a_1.nii.gz", "Normal."), report_row("train_2_a_1.nii.gz", "Not given.")]
    rows += [report_row("train_3_a_1.nii.gz", "Normal."), report_row("nonsense.nii.gz", "Normal.")]
    rows += [report_row("train_1_a_1.nii.gz", "Again.")]
    write_tables(tmp_path, rows)
    listing = list_ctrate(SourceOptions(tmp_path, "train"))
    assert [e.name for e in listing.examples] == ["train_1_a_1.nii.gz"]
    reasons = {(item["path"].split("/")[-1], item["reason"]) for item in listing.bad}
    assert ("train_2_a_1.nii.gz", "empty report") in reasons
    assert ("train_3_a_1.nii.gz", "a report without a volume") in reasons
    assert ("train_9_a_1.nii.gz", "a volume without a report") in reasons
    assert len(listing.bad) == 5


def test_missing_tables(tmp_path):
    write_ctrate(tmp_path, 2)
    with pytest.raises(UserError, match="valid"):
        list_ctrate(SourceOptions(tmp_path, "test"))
    (tmp_path / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    listing = list_ctrate(SourceOptions(tmp_path, "train"))
    assert set(listing.examples[0].labels) == {-1}
    assert sum("is missing" in note for note in listing.notes) == 2  # labels, metadata
    (tmp_path / "dataset" / "radiology_text_reports" / "train_reports.csv").unlink()
    with pytest.raises(UserError, match=r"train_reports\.csv"):
        list_ctrate(SourceOptions(tmp_path, "train"))
    with pytest.raises(UserError, match="not a CT-RATE folder"):
        list_ctrate(SourceOptions(tmp_path / "nowhere", "train"))


@pytest.mark.parametrize("policy, expected", [("all", {1, 2, 3}), ("first", {1}), ("best", {3})])
def test_one_reconstruction_per_scan(tmp_path, policy, expected):
    names = [f"train_1_a_{r}.nii.gz" for r in (1, 2, 3)] + ["train_2_a_1.nii.gz"]
    about = [("B20f", "Abdomen", 1.5), ("Br64", "Lung", 3.0), ("Br64", "THORAX LUNG", 1.0), ("B20f", "", 5.0)]
    for name in names:
        write_nifti(volume_path(tmp_path, name), body((8, 8, 8)), affine())
    metadata = [
        {"VolumeName": name, "ConvolutionKernel": k, "SeriesDescription": d, "XYSpacing": "[0.7, 0.7]", "ZSpacing": z}
        for name, (k, d, z) in zip(names, about, strict=True)
    ]
    write_tables(tmp_path, [report_row(name, "Normal.") for name in names], metadata)
    listing = list_source("ctrate", SourceOptions(tmp_path, "train", reconstructions=policy))
    kept = {int(e.name.split("_")[3][0]) for e in listing.examples if e.patient == "train_1"}
    assert kept == expected
    assert any(e.patient == "train_2" for e in listing.examples)
    assert sum(listing.skipped.values()) == 3 - len(expected)


def test_excluded_names_are_counted(tmp_path):
    write_ctrate(tmp_path, 4)
    (tmp_path / "no_chest.txt").write_text("train_1_a_1\ntrain_2\n# a comment\ntrain_99_a_1.nii.gz\n")
    listing = list_source("ctrate", SourceOptions(tmp_path, "train", exclude=tmp_path / "no_chest.txt"))
    assert sorted(e.patient for e in listing.examples) == ["train_3", "train_4"]
    assert listing.skipped == {"named in no_chest.txt": 3}
    assert f"1 of 3 names in {tmp_path / 'no_chest.txt'} matched nothing" in listing.notes
    (tmp_path / "no_chest.txt").write_text("train_1_a_1\n")
    listing = list_source("ctrate", SourceOptions(tmp_path, "train", exclude=tmp_path / "no_chest.txt"))
    assert len(listing.examples) == 4 and not any("matched nothing" in note for note in listing.notes)


def test_tables_with_repeated_rows_wrong_labels_or_no_names(tmp_path):
    names = write_ctrate(tmp_path, 2)
    labels = tmp_path / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    text = labels.read_text()
    labels.write_text(text + f"{names[0]},0,0\n")
    notes = list_ctrate(SourceOptions(tmp_path, "train")).notes
    assert "train_predicted_labels.csv: 1 rows repeat a volume that has one already" in notes
    labels.write_text(text + f"{names[0]},1,0\n")
    with pytest.raises(UserError, match=r"two rows of train_1_a_1\.nii\.gz differ, \(0, 0\) and \(1, 0\)"):
        list_ctrate(SourceOptions(tmp_path, "train"))
    labels.write_text(text + "train_9_a_1.nii.gz,0,x\n")
    with pytest.raises(UserError, match=r"column 'Lung nodule' is 'x', in row \['train_9_a_1\.nii\.gz'\]"):
        list_ctrate(SourceOptions(tmp_path, "train"))
    labels.write_text(text)
    metadata = tmp_path / "dataset" / "metadata" / "train_metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("Name,ZSpacing\na,1\n")
    with pytest.raises(UserError, match=r"train_metadata\.csv lacks the columns \['VolumeName'\]"):
        list_ctrate(SourceOptions(tmp_path, "train"))
    metadata.write_text(f"VolumeName,NumberofSlices\n{names[0]},36\n{names[0]},37\n")
    with pytest.raises(UserError, match="two rows of"):
        list_ctrate(SourceOptions(tmp_path, "train"))


def test_xlsx_tables(tmp_path):
    import pandas as pd

    write_ctrate(tmp_path, 3)
    path = tmp_path / "dataset" / "radiology_text_reports" / "train_reports.csv"
    pd.read_csv(path).to_excel(path.with_suffix(".xlsx"), index=False)
    from_csv = list_ctrate(SourceOptions(tmp_path, "train"))
    path.unlink()
    from_xlsx = list_ctrate(SourceOptions(tmp_path, "train"))
    assert from_csv.examples == from_xlsx.examples


def test_ctrg_json_with_files_and_folders(tmp_path):
    rows = {
        "train": [{"id": "910.nii.gz", "report": "A nodule.", "result": "Nodule."}, {"id": "7.nii.gz", "report": "X."}],
        "val": [{"id": "11.nii.gz", "report": "Normal.", "result": ""}, {"id": "12.nii.gz", "report": ""}],
        "test": [{"id": "11.nii.gz", "report": "Normal.", "result": ""}],
    }
    (tmp_path / "ctrg.json").write_text(json.dumps(rows))
    write_nifti(tmp_path / "volumes" / "910.nii.gz", body((8, 8, 8)), affine())
    write_nifti(tmp_path / "volumes" / "12.nii.gz", body((8, 8, 8)), affine())
    write_nifti(tmp_path / "volumes" / "99.nii.gz", body((8, 8, 8)), affine())
    (tmp_path / "slices" / "11").mkdir(parents=True)
    (tmp_path / "slices" / "11" / "1.png").write_bytes(b"")
    options = SourceOptions(tmp_path, "valid", array_spacing=(1, 1, 2), array_axes="LPS", slice_window=(-1000, 400))
    listing = list_ctrg(options)
    (example,) = listing.examples
    assert example.path.name == "11" and example.metadata.window == (-1000, 400) and example.metadata.axes == "LPS"
    assert sorted(b["reason"] for b in listing.bad) == ["a volume without a report", "empty report"]
    assert listing.other_splits == {"train": {"910", "7"}, "test": {"11"}}
    train = list_ctrg(SourceOptions(tmp_path, "train", array_axes="LPS"))
    assert [e.name for e in train.examples] == ["910.nii.gz"] and train.examples[0].metadata.axes is None
    assert (train.examples[0].findings, train.examples[0].impression) == ("A nodule.", "Nodule.")
    with pytest.raises(UserError, match="split"):
        list_ctrg(SourceOptions(tmp_path, "none"))


def test_ctrg_volumes_of_one_id(tmp_path):
    rows = {"train": [{"id": "1.nii.gz", "report": "Normal."}], "val": [{"id": "2.nii.gz", "report": "Normal."}]}
    (tmp_path / "ctrg.json").write_text(json.dumps(rows))
    for name in ("a/1", "b/1", "a/2", "b/2", "a/3", "b/3"):
        write_nifti(tmp_path / f"{name}.nii.gz", body((8, 8, 8)), affine())
    (tmp_path / "c" / "1").mkdir(parents=True)
    (tmp_path / "c" / "1" / "1.png").write_bytes(b"")
    listing = list_ctrg(SourceOptions(tmp_path, "train"))
    assert [e.path for e in listing.examples] == [tmp_path / "a" / "1.nii.gz"]
    # Those of the other split are that split's.
    assert [(str(b["path"]).removeprefix(f"{tmp_path}/"), b["reason"].split(",")[0]) for b in listing.bad] == [
        ("b/1.nii.gz", "second file of 1"),
        ("c/1", "second file of 1"),
        ("a/3.nii.gz", "a volume without a report"),
        ("b/3.nii.gz", "second file of 3"),
    ]


def test_csv_spacings_that_are_none_and_splits_that_are_not_there(tmp_path):
    for name in "abcde":
        np.save(tmp_path / f"{name}.npy", body((8, 8, 8)))
    path = tmp_path / "table.csv"
    rows = ['a.npy,Normal.,train,"0,7 0,7 1,5"', "b.npy,Normal.,train,1.5", "c.npy,Normal.,train,0.7 0.7 0"]
    rows += ["d.npy,Normal.,train,0.7x0.7x1.5", "e.npy,Normal.,test,?"]
    path.write_text("\n".join(["volume,report,split,spacing", *rows]))
    listing = list_table(SourceOptions(path, "train", array_spacing=(1, 1, 1)))
    assert [(e.name, e.metadata.spacing) for e in listing.examples] == [("d.npy", (0.7, 0.7, 1.5))]
    reasons = [item["reason"] for item in listing.bad]
    assert [reason.split(" is not")[0] for reason in reasons] == [
        "row 1 of table.csv: spacing '0,7 0,7 1,5'",
        "row 2 of table.csv: spacing '1.5'",
        "row 3 of table.csv: spacing '0.7 0.7 0'",
    ]
    with pytest.raises(UserError, match=r"--split 'valid': the column 'split' of .* has \['test', 'train'\]"):
        list_table(SourceOptions(path, "valid"))


def test_csv_of_any_shape(tmp_path):
    write_nifti(tmp_path / "v" / "a.nii.gz", body((8, 8, 8)), affine())
    np.save(tmp_path / "v" / "b.npy", body((8, 8, 8)))
    lines = [
        "Image_Path,Report,Patient ID,Split,spacing,axes,Emphysema,Nodule,Age",
        'v/a.nii.gz,"FINDINGS: Large heart. IMPRESSION: Cardiomegaly.",P1,train,,,1,0,61',
        'v/b.npy,"Normal.",P2,train,0.7 0.8 1.5,RAS,,-1,70',
        'v/none.npy,"Normal.",P3,train,,,0,0,70',
        'v/a.nii.gz," ",P4,train,,,0,0,70',
        'v/a.nii.gz,"Normal.",P1,test,,,0,0,61',
        ',"Normal.",P9,train,,,0,0,61',
    ]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines))
    listing = list_table(SourceOptions(path, "train"))
    first, second = listing.examples
    assert listing.label_names == ("Emphysema", "Nodule")
    assert (first.findings, first.impression, first.patient) == ("Large heart.", "Cardiomegaly.", "P1")
    assert first.labels == (1, 0) and second.labels == (-1, -1)
    assert (second.metadata.spacing, second.metadata.axes) == ((0.7, 0.8, 1.5), "RAS")
    assert [b["reason"] for b in listing.bad] == ["a report without a volume", "empty report", "a row without a volume"]
    assert listing.other_splits == {"test": {"P1"}}
    assert any("Age" in note for note in listing.notes)
    path.write_text("volume,age\nx,3\n")
    with pytest.raises(UserError, match="`report`"):
        list_table(SourceOptions(path, "train"))


TOY_SOURCE = '''
"""A folder of arrays, each with its report beside it: `scan.npy` and `scan.txt`."""

from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing
from mg3d_jax.registry import SOURCES


def list_toy(options):
    listing = Listing([], label_names=("Nodule",))
    for path in sorted(options.root.glob(f"{options.split}_*.npy")):
        report = path.with_suffix(".txt")
        if not report.exists():
            listing.add_bad(path, "a volume without a report")
            continue
        about = Metadata(spacing=(8.0, 8.0, 9.0), axes="RAS")
        listing.examples.append(
            Example(path, path.name, path.stem, path.stem, report.read_text(), "", (1,), about, "toy")
        )
    return listing


SOURCES.register("toy", list_toy)
'''


def test_a_source_of_ones_own_is_one_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_source.py").write_text(TOY_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(3):
        np.save(tmp_path / f"train_{number}.npy", body(seed=number))
        (tmp_path / f"train_{number}.txt").write_text(f"Nodule of {number} mm.")
    np.save(tmp_path / "train_3.npy", body(seed=3))
    command = ["prepare", "--root", str(tmp_path), "--split", "train", "--out", str(tmp_path / "out"), "--workers", "2"]
    command += ["--size", "24", "20", "18", "--spacing", "16", "16", "18", "--max-bad-share", "0.5", "--source", "toy"]
    with pytest.raises(SystemExit):
        main(command)
    assert "invalid choice: 'toy'" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no source 'toy': choose one of ctrate, ctrg, csv"):
        prepare(Settings("toy", tmp_path, "train", tmp_path / "out"))
    assert main([*command, "--plugins", "no_such_module"]) == 2
    assert "the plugin 'no_such_module' cannot be imported" in capsys.readouterr().err
    try:
        assert main([*command, "--plugins", "toy_source"]) == 0
    finally:
        SOURCES.unregister("toy")
    reader = RecordReader(tmp_path / "out")
    assert [reader[i].source for i in range(len(reader))] == ["toy"] * 3
    assert reader.manifest["label_names"] == ["Nodule"] and reader.manifest["source"] == "toy"
    assert reader.manifest["bad"] == [{"path": str(tmp_path / "train_3.npy"), "reason": "a volume without a report"}]
