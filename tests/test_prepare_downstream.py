"""The readers of the downstream data sets, on miniatures in the published layouts: what they find, what they make of it, and
how they say what is wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from reference.synthetic_ct import affine

from mg3d_jax.commands.main import main
from mg3d_jax.data.records import RecordReader
from mg3d_jax.errors import UserError
from mg3d_jax.phantom.layouts.base import make_miniature
from mg3d_jax.prepare import Settings, prepare
from mg3d_jax.prepare.folds import assign
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import SourceOptions
from mg3d_jax.prepare.reading import read_volume
from mg3d_jax.prepare.selection import list_source
from mg3d_jax.registry import LAYOUTS, SOURCES

pytest.importorskip("SimpleITK")  # two of the data sets are MetaImages
SIZES = {"size": (24, 24, 16), "workers": 1, "qa_samples": 0}
# layout: patients of the miniature, split, millimetres of the grid
CASES = {
    "cc-ccii": (6, "all", (12.0, 9.0, 18.0)),
    "luna16": (10, "train", (4.0, 4.0, 6.0)),
    "stoic": (5, "all", (12.0, 9.0, 18.0)),
    "msd-lung": (5, "train", (13.0, 10.0, 18.0)),
    "msd-colon": (5, "train", (14.0, 10.0, 18.0)),
    "covid-19-20": (5, "train", (13.0, 10.0, 18.0)),
    "acdc": (5, "train", (8.0, 8.0, 10.0)),
    "ctrg": (10, "train", (13.0, 10.0, 18.0)),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A miniature of every layout, by name."""
    folder = tmp_path_factory.mktemp("miniatures")
    for name, (patients, _, _) in CASES.items():
        make_miniature(folder / name, name, patients, 0)
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module")
def made(roots, tmp_path_factory):
    """What `mg3d prepare` makes of them: name -> (manifest, records)."""
    folder, found = tmp_path_factory.mktemp("records"), {}
    for name, (_, split, spacing) in CASES.items():
        out = folder / name
        manifest = prepare(Settings.of(source=name, root=roots[name], split=split, out=out, spacing=spacing, **SIZES))
        reader = RecordReader(out)
        found[name] = manifest, [reader[index] for index in range(len(reader))]
    return found


def listed(name: str, root: Path, split: str = "", **options):
    return list_source(name, SourceOptions(root, split or CASES[name][1], **options))


def copied(roots, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(roots[name], tmp_path / name))


def rewrite(path: Path, change) -> None:
    """Changes the rows of a csv."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])
    rows = change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# ---- what is found
def test_every_miniature_is_read_whole(made):
    assert set(CASES) == {name for name in LAYOUTS if name in SOURCES and name in CASES}
    for name, (manifest, records) in made.items():
        assert manifest["bad"] == [] and len(records) == manifest["records"] > 0, name
        assert all(record.volume.shape == SIZES["size"] and np.ptp(record.volume) > 500 for record in records), name
        assert all((record.mask is not None) == bool(manifest.get("mask_names")) for record in records), name
        assert name == "ctrg" or all(record.sentences == () for record in records), name


def test_labels_of_classes(made):
    manifest, records = made["cc-ccii"]
    assert manifest["label_names"] == ["Normal", "CP", "NCP"] and manifest["warnings"] == 6  # of the grey values
    assert sorted(tuple(record.labels) for record in records) == sorted([(1, 0, 0), (0, 1, 0), (0, 0, 1)] * 2)
    assert {record.name.split("_")[0]: record.labels.argmax() for record in records} == {"Normal": 0, "CP": 1, "NCP": 2}
    for record in records:  # the lungs lie above the liver: slices are read from the apex down
        air = (record.volume < -500)[6:-6, 6:-6].mean(axis=(0, 1))
        assert air[8:14].mean() > air[:3].mean(), record.name
    manifest, records = made["stoic"]
    with_covid = {record.name: tuple(record.labels) for record in records}
    assert set(with_covid.values()) <= {(0, -1), (1, 0), (1, 1)} and (0, -1) in with_covid.values()
    manifest, records = made["acdc"]
    assert manifest["label_names"] == ["NOR", "MINF", "DCM", "HCM", "RV"] and len(records) == 10
    assert all(record.labels.sum() == 1 for record in records)


def test_patches_are_centred_on_their_candidate(made, roots):
    manifest, records = made["luna16"]
    assert manifest["label_names"] == ["Nodule"]
    centres = np.array([record.volume[10:14, 10:14, 7:9].mean() for record in records])
    nodule = np.array([record.labels[0] == 1 for record in records])
    assert nodule.any() and not nodule.all() and centres[nodule].mean() > -200 > centres[~nodule].mean() + 250
    with (roots["luna16"] / "candidates_V2.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["class"] == "1")
    record = next(
        r
        for r in records
        if r.name.startswith(row["seriesuid"]) and r.labels[0] and row["coordX"].rstrip("0") in r.name
    )
    middle = record.affine @ [11.5, 11.5, 7.5, 1]  # mm, RAS; the table says LPS
    np.testing.assert_allclose(middle[:3] * (-1, -1, 1), [float(row[f"coord{axis}"]) for axis in "XYZ"], atol=1e-3)


def test_a_meta_image_lies_where_simple_itk_says(roots):
    import SimpleITK as sitk

    path = next((roots["luna16"] / "subset3").glob("*.mhd"))
    image, stored = sitk.ReadImage(str(path)), read_volume(path, Metadata())
    assert stored.data.shape == image.GetSize()
    for index in ((0, 0, 0), (7, 3, 11)):
        place = stored.affine @ [*index, 1]
        np.testing.assert_allclose(place[:3] * (-1, -1, 1), image.TransformIndexToPhysicalPoint(index), atol=1e-6)
        assert stored.data[index] == image[index]


@pytest.mark.parametrize(
    ("name", "low", "high"), [("msd-lung", -250, 90), ("covid-19-20", -600, -200), ("msd-colon", 0, 140)]
)
def test_masks_lie_on_their_lesions(made, name, low, high):
    manifest, records = made[name]
    assert len(manifest["mask_names"]) == 2
    values = np.concatenate([record.volume[record.mask == 1] for record in records])
    assert len(values) > 50 and low < values.mean() < high


def test_frames_and_classes_of_acdc(made):
    manifest, records = made["acdc"]
    assert manifest["mask_names"] == ["background", "right ventricle", "myocardium", "left ventricle"]
    for record in records:
        assert set(np.unique(record.mask)) == {0, 1, 2, 3}
        blood, muscle = record.volume[record.mask == 3].mean(), record.volume[record.mask == 2].mean()
        assert blood > muscle + 300  # of about 2,000: MR has no Hounsfield units
    cavities = {record.name: int((record.mask == 3).sum()) for record in records}
    assert cavities["patient001_frame01"] > cavities["patient001_frame04"]  # diastole, systole


def test_the_decathlons_list_is_monais(roots):
    load = pytest.importorskip("monai.data").load_decathlon_datalist
    root = roots["msd-lung"]
    theirs = load(root / "dataset.json", is_segmentation=True, data_list_key="training", base_dir=root)
    ours = {(str(e.path.resolve()), str(e.mask.resolve())) for e in listed("msd-lung", root).examples}
    assert ours == {(str(Path(row["image"]).resolve()), str(Path(row["label"]).resolve())) for row in theirs}


def test_settings_of_a_source_are_defaults_only(roots, tmp_path):
    stated = Settings.of(source="cc-ccii", root=roots["cc-ccii"], split="all", out=tmp_path, size=(8, 8, 8))
    assert (stated.size, stated.policy, stated.array_axes, stated.slice_window) == (
        (8, 8, 8),
        "fraction",
        "LPI",
        (-1350, 150),
    )
    assert Settings.of(source="ctrate", root=tmp_path, split="train", out=tmp_path) == Settings(
        "ctrate", tmp_path, "train", tmp_path
    )
    command = [
        "prepare",
        "--source",
        "luna16",
        "--root",
        str(roots["luna16"]),
        "--split",
        "subset7",
        "--out",
        str(tmp_path / "l"),
    ]
    assert main([*command, "--workers", "1", "--qa-samples", "0", "--size", "8", "8", "8", "--negatives", "1"]) == 0
    manifest = json.loads((tmp_path / "l" / "manifest.json").read_text())
    assert manifest["spacing"] == [1.0, 1.0, 1.0] and manifest["grid"] == [8, 8, 8]
    assert "(--negatives)" in next(iter(manifest["skipped"]))


# ---- splits and folds
@pytest.mark.parametrize("name", list(CASES))
def test_an_unknown_split_names_those_that_there_are(roots, name):
    with pytest.raises(UserError, match=r"--split 'nowhere'.*(all|train|training)"):
        listed(name, roots[name], "nowhere")


def test_folds_part_the_patients_and_balance_the_labels(roots, tmp_path):
    root, file = roots["cc-ccii"], tmp_path / "new" / "folds.json"
    seen: list[str] = []
    for index in range(2):
        out = tmp_path / f"fold{index}"
        settings = {
            "size": (8, 8, 8),
            "workers": 1,
            "qa_samples": 0,
            "fold": (index, 2),
            "fold_file": file,
            "fold_seed": 4,
        }
        manifest = prepare(Settings.of(source="cc-ccii", root=root, split="all", out=out, **settings))
        reader = RecordReader(out)
        assert sorted(int(reader[i].labels.argmax()) for i in range(3)) == [0, 1, 2]
        seen += [patient for patient, _ in manifest["patients"]]
    assert len(seen) == len(set(seen)) == 6 and set(json.loads(file.read_text())["patients"]) == set(seen)
    with pytest.raises(UserError, match=r"--fold 2/2: expected i/n"):
        Settings.of(source="cc-ccii", root=root, split="all", out=tmp_path / "x", fold=(2, 2)).check()
    with pytest.raises(UserError, match=r"has 2 folds of seed 4, asked for 3 of seed 4"):
        prepare(
            Settings.of(source="cc-ccii", root=root, split="all", out=tmp_path / "y", **settings | {"fold": (0, 3)})
        )
    content = json.loads(file.read_text())
    lost = content["patients"].popitem()[0]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"no fold for 1 patients, such as {lost}"):
        prepare(Settings.of(source="cc-ccii", root=root, split="all", out=tmp_path / "z", **settings))


def test_folds_follow_from_seed_and_patients(roots):
    examples = listed("cc-ccii", roots["cc-ccii"]).examples
    first = assign(examples, 3, 0)
    assert first == assign(examples[::-1], 3, 0) != assign(examples, 3, 1)
    assert sorted(first.values()) == [0, 0, 1, 1, 2, 2]


def test_a_patient_in_two_folds_is_a_leak(roots, tmp_path):
    """The folder of a fold, and the same patients again."""
    settings = {"size": (8, 8, 8), "workers": 1, "qa_samples": 0}
    root = roots["stoic"]
    prepare(Settings.of(source="stoic", root=root, split="all", out=tmp_path / "a", fold=(0, 2), **settings))
    whole = Settings.of(
        source="stoic", root=root, split="all", out=tmp_path / "b", against=(tmp_path / "a",), **settings
    )
    with pytest.raises(UserError, match="patient-in-two-splits"):
        prepare(whole)
    prepare(Settings.of(
        source="stoic", root=root, split="all", out=tmp_path / "c", against=(tmp_path / "a",), fold=(1, 2), **settings
    ))  # fmt: skip


# ---- what is wrong, with its path
def reasons(listing) -> dict[str, str]:
    return {Path(item["path"]).name: item["reason"] for item in listing.bad}


def test_cc_ccii_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "cc-ccii", tmp_path)
    shutil.rmtree(root / "CP" / "101" / "1001")
    next((root / "NCP" / "102" / "1002").iterdir()).unlink()
    (root / "Normal" / "100" / "9").mkdir()
    (root / "Normal" / "100" / "9" / "0000.png").write_bytes(b"")
    found = reasons(listed("cc-ccii", root))
    assert found["1001"] == "listed in unzip_filenames.csv, but there is no such folder"
    assert found["1002"].endswith("slices, unzip_filenames.csv says 25") and "does not list" in found["9"]
    rewrite(root / "unzip_filenames.csv", lambda rows: [row | {"label": "Flu"} for row in rows])
    with pytest.raises(UserError, match=r"unzip_filenames\.csv, row 1: label 'Flu'"):
        listed("cc-ccii", root)
    with pytest.raises(UserError, match="not CC-CCII's folder: it needs Normal/, CP/, NCP/"):
        listed("cc-ccii", root / "NCP")


def test_luna16_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "luna16", tmp_path)
    gone = next((root / "subset2").glob("*.mhd"))
    gone.unlink()
    raw = next((root / "subset1").glob("*.raw"))
    raw.unlink()
    listing = listed("luna16", root)
    assert reasons(listing) == {gone.name: "listed in candidates_V2.csv, but in none of the subsets"}
    out = Settings.of(source="luna16", root=root, split="subset1", out=tmp_path / "out", **SIZES)
    with pytest.raises(UserError, match=rf"{raw.stem}\.mhd: unreadable"):
        prepare(out)
    rewrite(root / "candidates_V2.csv", lambda rows: [*rows[1:], rows[0] | {"class": "2"}])
    with pytest.raises(UserError, match=r"candidates_V2\.csv: the class of a candidate of .* is '2', expected 0 or 1"):
        listed("luna16", root)
    rewrite(root / "candidates_V2.csv", lambda rows: [rows[0] | {"class": "1", "coordX": "left"}])
    with pytest.raises(UserError, match=r"candidates_V2\.csv, row 1: the place \['left'"):
        listed("luna16", root)
    rewrite(root / "candidates_V2.csv", lambda rows: [row | {"class": "1", "coordX": "9000"} for row in rows])
    series = listed("luna16", root).examples[0].patient
    with pytest.raises(UserError, match=rf"{series}\.mhd: the place \[-9000\.0, .* is outside of the volume"):
        prepare(Settings.of(source="luna16", root=root, split="train", out=tmp_path / "far", **SIZES))


def test_stoic_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "stoic", tmp_path)
    (root / "data" / "mha" / "2.mha").unlink()
    shutil.copy(root / "data" / "mha" / "1.mha", root / "data" / "mha" / "77.mha")
    found = reasons(listed("stoic", root))
    assert "no such volume" in found["2.mha"] and "a volume without a row" in found["77.mha"]
    reference = root / "metadata" / "reference.csv"
    rewrite(reference, lambda rows: [row | {"probCOVID": "0", "probSevere": "1"} for row in rows])
    with pytest.raises(UserError, match=r"reference\.csv: patient 1 has probSevere 1 and probCOVID 0"):
        listed("stoic", root)
    rewrite(reference, lambda rows: [row | {"probCOVID": "0.5"} for row in rows])
    with pytest.raises(UserError, match=r"reference\.csv: probCOVID of patient 1 is '0\.5', expected 0 or 1"):
        listed("stoic", root)


def test_covid_19_20_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "covid-19-20", tmp_path)
    (root / "Train" / "volume-covid19-A-0001_seg.nii.gz").unlink()
    (root / "Train" / "volume-covid19-A-0002_ct.nii.gz").unlink()
    found = reasons(listed("covid-19-20", root))
    assert "volume-covid19-A-0001_seg.nii.gz does not exist" in found["volume-covid19-A-0001_ct.nii.gz"]
    assert found["volume-covid19-A-0002_seg.nii.gz"] == "a mask without a volume"
    assert len(listed("covid-19-20", root, "test").examples) == 1


def test_the_decathlon_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "msd-lung", tmp_path)
    (root / "labelsTr" / "lung_001.nii.gz").unlink()
    (root / "imagesTr" / "lung_002.nii.gz").unlink()
    image = nib.load(root / "imagesTr" / "lung_003.nii.gz")
    nib.save(nib.Nifti1Image(np.full(image.shape, 3, np.uint8), image.affine), root / "labelsTr" / "lung_003.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), affine()), root / "labelsTr" / "lung_004.nii.gz")
    found = reasons(listed("msd-lung", root))
    assert "lung_001.nii.gz does not exist" in found["lung_001.nii.gz"] and "no such file" in found["lung_002.nii.gz"]
    settings = Settings.of(
        source="msd-lung", root=root, split="train", out=tmp_path / "out", max_bad_share=0.9, **SIZES
    )
    bad = {Path(item["path"]).name: item["reason"] for item in prepare(settings)["bad"]}
    assert "label values [3.0]: expected whole numbers from 0 to 1" in bad["lung_003.nii.gz"]
    assert "labelsTr/lung_004.nii.gz lies elsewhere than its volume" in bad["lung_004.nii.gz"]
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(content | {"labels": {"0": "background", "2": "cancer"}}))
    with pytest.raises(UserError, match=r"dataset\.json: \"labels\" is"):
        listed("msd-lung", root)


def test_acdc_says_what_does_not_fit(roots, tmp_path):
    root = copied(roots, "acdc", tmp_path)
    first, second, third = (root / "training" / f"patient00{number}" for number in (1, 2, 3))
    (first / "Info.cfg").write_text("ED: 1\nES: 4\nGroup: XYZ\n")
    (second / "patient002_frame04_gt.nii.gz").unlink()
    (third / "patient003_frame01.nii.gz").unlink()  # the 4D file has it, too
    listing = listed("acdc", root)
    found = reasons(listing)
    assert "Group is 'XYZ', expected one of NOR" in found["patient001"]
    assert "patient002_frame04_gt.nii.gz does not exist" in found["patient002_frame04.nii.gz"]
    example = next(one for one in listing.examples if one.name == "patient003_frame01")
    assert example.path.name == "patient003_4d.nii.gz" and example.metadata.frame == 0
    original = nib.load(roots["acdc"] / "training" / "patient003" / "patient003_frame01.nii.gz")
    np.testing.assert_array_equal(read_volume(example.path, example.metadata).data, np.asarray(original.dataobj))
    (third / "Info.cfg").write_text("ED: 1\nES: 40\nGroup: DCM\n")
    (third / "patient003_frame40_gt.nii.gz").write_bytes((third / "patient003_frame04_gt.nii.gz").read_bytes())
    settings = Settings.of(source="acdc", root=root, split="train", out=tmp_path / "out", max_bad_share=0.9, **SIZES)
    assert any("it has 6 frames, frame 40 is asked for" in item["reason"] for item in prepare(settings)["bad"])


# ---- the command
def test_a_miniature_is_made_once_and_never_over_something_else(tmp_path, capsys):
    out = tmp_path / "mini"
    command = ["phantom", str(out), "--layout", "stoic", "--patients", "1"]
    assert main(command) == 0 and "2 files" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main([*command, "--seed", "1"]) == 2 and "holds" in capsys.readouterr().err
    assert main([*command, "--valid", "1"]) == 2 and "--valid: of --layout ctrate only" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    assert (
        main(["phantom", str(tmp_path / "other"), "--layout", "acdc"]) == 2
        and "no miniature" in capsys.readouterr().err
    )
