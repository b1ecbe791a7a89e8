"""Layouts of public data sets with reports or labels, on their miniatures; filters of CT-RATE; MR."""

from __future__ import annotations

import zipfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from reference.synthetic_ct import affine, body, report_row, volume_path, write_nifti, write_tables
from test_prepare_folder import settings
from test_prepare_odd_files import write_series

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.rad_chestct import MAPPINGS
from mg3d_jax.data.records import RecordReader
from mg3d_jax.errors import UserError
from mg3d_jax.phantom.layouts.base import make_miniature
from mg3d_jax.prepare import Settings, prepare
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.listing import SourceOptions
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.selection import list_source
from mg3d_jax.prepare.sources.merlin import merlin_sections
from mg3d_jax.prepare.volumes import prepare_volume

GRID = Grid((24, 20, 18), (16.0, 16.0, 18.0))


def small() -> np.ndarray:
    return body((24, 20, 18), spacing=(16, 16, 18))


@pytest.mark.parametrize("name", ["rad-chestct", "merlin", "inspect", "zip"])
def test_a_miniature_of_each_is_prepared(tmp_path, name):
    make_miniature(tmp_path / "set", name, 4, 0)
    spacing = 3.2 if name == "rad-chestct" else 24.0  # its arrays are said to be of 0.8 mm
    made = Settings(name, tmp_path / "set", "train", tmp_path / "out", (16, 14, 14), (spacing,) * 3, qa_samples=0)
    manifest = prepare(made)
    reader = RecordReader(tmp_path / "out")
    assert manifest["records"] == 4 and manifest["bad"] == [] and manifest["source"] == name
    records = [reader[index] for index in range(4)]
    assert all(bool(record.sentences) == (name != "rad-chestct") for record in records)
    assert all(record.volume.std() > 50 for record in records)
    if name == "inspect":
        assert all(record.findings == "" and record.impression for record in records)
    if name == "merlin":
        assert all(record.findings and "IMPRESSION" not in record.findings for record in records)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_rad_chestct_labels_by_each_mapping_and_axes(tmp_path, mapping):
    make_miniature(tmp_path, "rad-chestct", 3, 1)
    listing = list_source("rad-chestct", SourceOptions(tmp_path, "train", label_mapping=mapping))
    labels = np.array([example.labels for example in listing.examples])
    mapped = np.array([name in MAPPINGS[mapping] for name in ABNORMALITIES])
    assert (labels[:, mapped] >= 0).all() and (labels[:, ~mapped] == -1).all()
    np.savez(tmp_path / "v.npz", ct=small()[::-1, ::-1, ::-1].transpose(2, 1, 0))
    about = replace(listing.examples[0].metadata, spacing=(18.0, 16.0, 16.0))
    np.testing.assert_array_equal(prepare_volume(tmp_path / "v.npz", GRID, about).volume, small())


def test_merlins_impression_is_found_by_its_heading_or_its_list():
    assert merlin_sections("FINDINGS: Liver is large. IMPRESSION: 1. Hepatomegaly.") == (
        "Liver is large.", "1. Hepatomegaly."
    )  # fmt: skip
    text = "FINDINGS: Liver measures 20 cm. Spleen normal.\n1. Hepatomegaly.\n2. No ascites."
    assert merlin_sections(text) == ("Liver measures 20 cm. Spleen normal.", "1. Hepatomegaly.\n2. No ascites.")
    assert merlin_sections("Liver normal. Segment 1 is clear.") == ("Liver normal. Segment 1 is clear.", "")


def test_merlin_as_it_is_published(tmp_path):
    """A spreadsheet beside `merlin_data`, in the folder that the download makes; the corrected table goes first."""
    root = tmp_path / "merlinabdominalctdataset"
    (root / "merlin_data").mkdir(parents=True)
    rows = [("AC1", "train"), ("AC2", "validation"), ("AC3", "test"), ("", "train"), ("AC4", "train"), ("AC1", "train")]
    for study in ("AC1", "AC2", "AC5"):
        (root / "merlin_data" / f"{study}.nii.gz").touch()
    table = pd.DataFrame(rows, columns=["study id", "Split"]).assign(
        Findings="Liver normal. IMPRESSION(S): No ascites."
    )
    table.assign(fewshot=0).to_excel(root / "reports_final.xlsx", index=False)
    for name in ("val", "validation"):
        found = list_source("merlin", SourceOptions(tmp_path, name))
        assert [e.name for e in found.examples] == ["AC2.nii.gz"] and found.other_splits["train"] == {"AC1", "AC4"}
    found = list_source("merlin", SourceOptions(tmp_path, "train"))
    (one,), reasons = found.examples, sorted(item["reason"] for item in found.bad)
    assert (one.findings, one.impression) == ("Liver normal.", "No ascites.")
    assert [reason.split(":")[0] for reason in reasons] == [
        "a report without a volume", "a row without a study id", "a volume without a report", "second report row of AC1",
    ]  # fmt: skip
    table.assign(Findings="Spleen large.").to_csv(root / "reports_final_updated.csv", index=False)
    found = list_source("merlin", SourceOptions(tmp_path, "train"))
    assert found.examples[0].findings == "Spleen large."
    assert "reports_final_updated.csv taken, not reports_final.xlsx" in found.notes


def test_inspect_as_it_is_published(tmp_path):
    """Tables with rows that are there twice, suffixes in the mapping, and the patient in whichever table has him."""
    (tmp_path / "full" / "CTPA").mkdir(parents=True)
    for name in ("PE1", "PE2", "PE2b", "PE4"):
        (tmp_path / "full" / "CTPA" / f"{name}.nii.gz").touch()

    def write(stem: str, *lines: str) -> None:
        (tmp_path / "full" / f"{stem}_20250611.tsv").write_text("\n".join(lines) + "\n")

    mapping = ["1\tPE1", "2\tPE2.nii.gz", "2\tPE2b.nii.gz", "1\tPE1", "3\tPE3", "4\tPE4", "5\t"]
    write("study_mapping", "impression_id\timage_id", *mapping)
    write(
        "impressions",
        "impression_id\timpressions",
        *(f"{n}\tNo embolism {n}." for n in (1, 1, 2, 3, 5)),
        "4\tA",
        "4\tB",
    )
    write(
        "splits",
        "impression_id\tsplit\tperson_id",
        "1\ttrain\t7",
        "2\ttrain\t7",
        "2\ttrain\t7",
        "3\tvalid\t8",
        "4\ttrain\t9",
    )
    found = list_source("inspect", SourceOptions(tmp_path, "train"))
    assert [(e.name, e.patient) for e in found.examples] == [(f"{n}.nii.gz", "7") for n in ("PE1", "PE2", "PE2b")]
    assert found.other_splits == {"valid": {"8"}}
    reasons = [item["reason"] for item in found.bad]
    assert reasons == ["the rows of 4 differ in 'impressions': A and B", "empty report", "5 has no image_id"]
    assert any("splits_20250611.tsv: 1 rows repeat" in note for note in found.notes)
    assert list_source("inspect", SourceOptions(tmp_path, "validation")).bad[-1]["reason"] != ""
    write("splits", "impression_id\tsplit", "1\ttrain")
    assert any(
        "every scan counts as a patient" in n for n in list_source("inspect", SourceOptions(tmp_path, "train")).notes
    )


def test_archives_are_read_in_memory_and_refused_with_the_cause(tmp_path):
    write_nifti(tmp_path / "v.nii.gz", small(), affine((16, 16, 18)))
    write_series(tmp_path / "scan")
    for name, files in {"one": [tmp_path / "v.nii.gz"], "dicom": sorted((tmp_path / "scan").iterdir())}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"a/b/{file.name}")
        np.testing.assert_array_equal(prepare_volume(tmp_path / f"{name}.zip", GRID).volume, small())
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(tmp_path / "v.nii.gz", "a.nii.gz")
        archive.write(tmp_path / "v.nii.gz", "b.nii.gz")
    np.testing.assert_array_equal(prepare_volume(tmp_path / "two.zip" / "b.nii.gz", GRID).volume, small())
    with pytest.raises(VolumeError, match=r"2 volumes in the archive .*two\.zip/a\.nii\.gz"):
        prepare_volume(tmp_path / "two.zip", GRID)
    with pytest.raises(VolumeError, match="no such file in the archive"):
        prepare_volume(tmp_path / "two.zip" / "c.nii.gz", GRID)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "two.zip").read_bytes()[:900])
    with pytest.raises(VolumeError, match="archive is unreadable"):
        prepare_volume(tmp_path / "cut.zip", GRID)


def test_filters_of_ct_rate_by_name(tmp_path):
    rows, about = [], []
    volumes = {
        "valid_1_a_1": ("A.", 1.0),
        "valid_1_a_2": ("A.", 0.5),
        "valid_2_a_1": ("B.", 1.0),
        "valid_3_a_1": ("A.", 2.0),
    }
    for name, (text, spacing) in volumes.items():
        path = volume_path(tmp_path, f"{name}.nii.gz", "valid")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        rows.append(report_row(path.name, text))
        about.append({"VolumeName": path.name, "XYSpacing": f"[{spacing}, {spacing}]", "ZSpacing": 1.0})
    write_tables(tmp_path, rows, about, split="valid")

    def listed(*filters: str) -> list[str]:
        listing = list_source("ctrate", SourceOptions(tmp_path, "valid", filters=filters))
        return [example.name.removesuffix(".nii.gz") for example in listing.examples]

    assert listed() == listed("all", "no-known-bad") == list(volumes)
    assert listed("first-per-scan") == ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1"]
    assert sorted(listed("smallest-spacing-distinct-text")) == ["valid_1_a_2", "valid_2_a_1"]
    with pytest.raises(UserError, match=r"no_chest_valid\.txt"):
        listed("no-head")
    (tmp_path / "dataset" / "no_chest_valid.txt").write_text("valid_2_a_1.nii.gz\n")
    assert listed("no-head", "first-per-scan") == ["valid_1_a_1", "valid_3_a_1"]


def test_mr_is_scaled_by_percentiles_when_asked_for_and_never_taken_for_hu(tmp_path):
    values = np.abs(small() + 1100).astype(np.int16)
    write_nifti(volume_path(tmp_path / "root", "train_1_a_1.nii.gz"), values, affine((16, 16, 18)))
    write_tables(tmp_path / "root", [report_row("train_1_a_1.nii.gz", "Normal.")])
    made = settings(tmp_path / "root", tmp_path / "out", modality="MR")
    manifest = prepare(made)
    low, high = np.percentile(RecordReader(tmp_path / "out")[0].volume, (2, 98))
    assert manifest["settings"]["modality"] == "MR" and any("MR" in note for note in manifest["notes"])
    assert low > -1030 and high < 1010
    with pytest.raises(UserError, match="modality"):
        prepare(replace(made, modality="CT"))
    with pytest.raises(UserError, match="--modality"):
        prepare(replace(made, modality="PET"))
