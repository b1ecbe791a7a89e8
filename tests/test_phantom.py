"""Phantoms: layout, determinism, geometry against SimpleITK, plain reports against an independent labeller, visibility.

Clinical reports and labels: `test_phantom_reports.py`.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from mg3d_jax.commands import phantom as phantom_command
from mg3d_jax.data.abnormalities import ABNORMALITIES, prompt_pair
from mg3d_jax.errors import UserError
from mg3d_jax.phantom import dataset
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.abnormalities import FINDINGS, adapt_anatomy
from mg3d_jax.phantom.anatomy import LOBES, draw_anatomy, lobe_of, lung_depth, sample_anatomy
from mg3d_jax.phantom.canvas import Canvas
from mg3d_jax.phantom.plain import negative_sentence, positive_sentence
from mg3d_jax.phantom.presence import EVEN

PATIENTS, VALID, SEED = 10, 3, 5
SHARED_LABELS = Path(__file__).parents[1].parent / "shared" / "data" / "reports" / "ctrate_train_labels_120.csv"


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "out"
    assert (
        phantom_command.main(
            [str(out), "--patients", str(PATIENTS), "--valid", str(VALID), "--seed", str(SEED), "--workers", "1"]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def patients() -> list[phantoms.PhantomPatient]:
    """Of the plain style, in which every abnormality is frequent."""
    return [phantoms.make_patient(SEED, index, "train", "plain") for index in range(250)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def ras(reconstruction: phantoms.Reconstruction) -> np.ndarray:
    """Voxels in RAS+ order, by nibabel."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(reconstruction.hu), reconstruction.affine)
    return np.asarray(nibabel.as_closest_canonical(image).dataobj)


# ---- files
def test_layout_is_ct_rates(data_set: Path) -> None:
    for split, long in (("train", "train"), ("valid", "validation")):
        reports = rows(data_set / f"dataset/radiology_text_reports/{long}_reports.csv")
        metadata = rows(data_set / f"dataset/metadata/{long}_metadata.csv")
        labels = rows(data_set / f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv")
        names = [row["VolumeName"] for row in reports]
        assert names == [row["VolumeName"] for row in metadata] == [row["VolumeName"] for row in labels]
        assert len(names) == len(set(names))
        expected = []
        for name in names:
            patient, scan = re.fullmatch(rf"({split}_\d+)_([ab])_[12]\.nii\.gz", name).groups()
            expected.append(data_set / "dataset" / split / patient / f"{patient}_{scan}" / name)
        assert sorted(expected) == sorted(path for path in (data_set / "dataset" / split).rglob("*") if path.is_file())
        assert {re.match(r"\w+?_\d+", name)[0] for name in names} == {
            f"{split}_{k + 1}" for k in range(PATIENTS if split == "train" else VALID)
        }
        header = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
        assert list(reports[0]) == header
        assert tuple(labels[0])[1:] == ABNORMALITIES


def test_label_order_is_that_of_the_real_csv() -> None:
    if not SHARED_LABELS.exists():
        pytest.skip("the shared CT-RATE label sample is not here")
    assert tuple(rows(SHARED_LABELS)[0])[1:] == ABNORMALITIES


def test_prompts_are_ct_clips() -> None:
    assert prompt_pair("Lung nodule") == ("Lung nodule is present.", "Lung nodule is not present.")


def test_files_agree_with_their_metadata(data_set: Path) -> None:
    seen = set()
    for row in rows(data_set / "dataset/metadata/train_metadata.csv"):
        path = dataset.volume_path(data_set, row["VolumeName"].removesuffix(".nii.gz"))
        loaded = nibabel.load(path)
        header = loaded.header
        assert header.get_data_dtype() == np.int16 and (loaded.dataobj.slope, loaded.dataobj.inter) == (1.0, 0.0)
        assert (header["sform_code"], header["qform_code"]) == (1, 1)
        image = SimpleITK.ReadImage(str(path))  # LPS, like DICOM
        np.testing.assert_allclose(image.GetOrigin(), json.loads(row["ImagePositionPatient"]), atol=2e-3)
        cosines = np.reshape(image.GetDirection(), (3, 3))
        np.testing.assert_allclose(cosines.T[:2].ravel(), json.loads(row["ImageOrientationPatient"]), atol=1e-6)
        spacing = (*json.loads(row["XYSpacing"]), float(row["ZSpacing"]))
        np.testing.assert_allclose(image.GetSpacing(), spacing, atol=1e-5)
        assert image.GetSize() == (int(row["Columns"]), int(row["Rows"]), int(row["NumberofSlices"]))
        assert (row["RescaleSlope"], row["RescaleIntercept"]) == ("1", "0")
        hu = SimpleITK.GetArrayFromImage(image)
        front = 0 if cosines[1, 1] > 0 else -1  # behind the patient may be the table
        assert hu.min() >= -1024 and hu.max() <= 3071 and np.median(hu[:, front, 0]) < -900
        seen.add("".join(nibabel.aff2axcodes(loaded.affine)))
    assert seen == {"RAS", "LPS"}


@pytest.mark.processes
def test_patient_is_the_same_whatever_the_count_and_the_workers(data_set: Path, tmp_path: Path) -> None:
    dataset.make(tmp_path / "out", 5, 1, SEED, workers=2)
    few = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert len(few) >= 6
    for path in few:
        assert (tmp_path / "out" / path).read_bytes() == (data_set / path).read_bytes()
    for table in ("radiology_text_reports/train_reports", "metadata/train_metadata"):
        part = rows(tmp_path / f"out/dataset/{table}.csv")
        assert part == rows(data_set / f"dataset/{table}.csv")[: len(part)]
    other = phantoms.make_patient(SEED + 1, 0, "train").scans[0]
    assert other.report != phantoms.make_patient(SEED, 0, "train").scans[0].report
    assert (
        phantoms.make_patient(SEED, 0, "valid").scans[0].anatomy
        != phantoms.make_patient(SEED, 0, "train").scans[0].anatomy
    )


def test_interrupted_run_goes_on_and_complete_run_is_left_alone(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(out), "--patients", "2", "--valid", "1", "--seed", str(SEED), "--workers", "1"]
    phantom_command.main(arguments)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before}
    capsys.readouterr()
    phantom_command.main(arguments)
    assert "already holds" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    # As a kill leaves it: half a file under its temporary name, no csv, no mark of completion.
    volume = next(out.rglob("train_2_a_1.nii.gz"))
    volume.rename(volume.with_name(f".{volume.name}.99999.partial")).write_bytes(b"half")
    next(out.rglob("train_reports.csv")).unlink()
    marker = out / dataset.MARKER
    marker.write_text(marker.read_text().replace("true", "false"))
    phantom_command.main(arguments)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    volume.unlink()  # lost after completion: made again
    phantom_command.main(arguments)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_refuses_what_it_must_not_touch(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        dataset.make(tmp_path, 1, 1, 0)
    with pytest.raises(UserError, match="is a file"):
        dataset.make(tmp_path / "mine.txt", 1, 1, 0)
    with pytest.raises(UserError, match="asked for"):
        dataset.make(data_set, PATIENTS, VALID, SEED + 1)
    with pytest.raises(UserError, match="1 is --style plain"):
        dataset.make(data_set, PATIENTS, VALID, SEED, style="plain")
    with pytest.raises(UserError, match="must be one of clinical, plain"):
        dataset.make(tmp_path / "new", 1, 1, 0, style="ornate")
    for patients, valid, seed, workers in ((0, 0, 0, 1), (-1, 2, 0, 1), (1, 0, -1, 1), (1, 0, 0, 0)):
        with pytest.raises(UserError, match="--"):
            dataset.make(tmp_path / "new", patients, valid, seed, workers)
    assert not (tmp_path / "new").exists()


def test_command_never_imports_jax() -> None:
    code = "import sys, mg3d_jax.commands.phantom; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- voxels
def test_orientation_is_true(patients: list[phantoms.PhantomPatient]) -> None:
    """In RAS order, whatever the file's, the heart lies to the left and the liver to the right, the spine behind."""
    orientations = set()
    for patient in patients[:8]:
        scan = patient.scans[0]
        reconstruction = replace(scan.reconstructions[0], findings={}, noise_hu=0.0)
        orientations.add(reconstruction.orientation)
        hu = ras(reconstruction)
        grid = reconstruction.grid
        x, y, z = (o + s * np.arange(n) for o, s, n in zip(grid.origin, grid.spacing, grid.shape, strict=True))
        level = np.abs(z - scan.anatomy.heart_centre[2] - 5) < 8
        tissue = (hu[:, :, level] > 0) & ((np.abs(x)[:, None] < 85) & (y > -20) & (y < 45))[..., None]
        assert np.average(x, weights=tissue.sum((1, 2))) < -5
        liver = hu[(x > 40) & (x < 90)][:, np.abs(y) < 30][:, :, z < -110]
        assert abs(np.median(liver) - 58) < 10
        bone = (hu[np.abs(x) < 18][:, :, np.abs(z) < 90] > 180).sum((0, 2))
        assert y[np.argmax(bone)] < -30
    assert orientations == {"RAS", "LPS"}


def test_two_reconstructions_show_the_same_chest(patients: list[phantoms.PhantomPatient]) -> None:
    double = [scan for patient in patients for scan in patient.scans if len(scan.reconstructions) == 2]
    single = sum(len(scan.reconstructions) == 1 for patient in patients for scan in patient.scans)
    assert 0.12 < len(double) / (len(double) + single) < 0.28
    for scan in double[:4]:
        images = []
        for reconstruction in scan.reconstructions:
            image = SimpleITK.GetImageFromArray(np.ascontiguousarray(reconstruction.hu.T.astype(np.float32)))
            affine = np.diag([-1, -1, 1, 1]) @ reconstruction.affine
            image.SetOrigin(affine[:3, 3].tolist())
            image.SetSpacing(np.abs(np.diag(affine)[:3]).tolist())
            image.SetDirection(np.diag(np.sign(np.diag(affine)[:3])).ravel().tolist())
            images.append(image)
        moved = SimpleITK.GetArrayFromImage(SimpleITK.Resample(images[1], images[0], defaultPixelValue=9999.0))
        fixed = SimpleITK.GetArrayFromImage(images[0])
        assert fixed.shape[::-1] == scan.reconstructions[0].grid.shape
        both = moved < 4000
        assert np.corrcoef(fixed[both], moved[both])[0, 1] > 0.95


def render(anatomy: phantoms.Anatomy, findings: dict[str, phantoms.Finding]) -> np.ndarray:
    """Noise-free HU averaged to 7 x 7 x 9 mm voxels, [48, 40, 32]; x from -168 mm."""
    axes = (np.arange(96) * 3.5 - 166.25, np.arange(80) * 3.5 - 138.25, np.arange(96) * 3.0 - 142.5)
    canvas = Canvas(*axes)
    draw_anatomy(canvas, anatomy)
    for name, (_, draw) in FINDINGS.items():
        if name in findings:
            draw(canvas, anatomy, findings[name])
    return canvas.hu.reshape(48, 2, 40, 2, 32, 3).mean((1, 3, 5))


@pytest.mark.parametrize("name", ABNORMALITIES)
def test_every_abnormality_is_visible_at_low_resolution_on_its_side(name: str) -> None:
    x = (np.arange(48) - 23.5) * 7.0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        healthy = sample_anatomy(rng, age=60, sex="M")
        presence = dict.fromkeys(ABNORMALITIES, False)
        anatomy = adapt_anatomy(rng, healthy, presence | {name: True})
        finding = FINDINGS[name][0](rng, anatomy)
        assert finding.name == name
        change = np.abs(render(anatomy, {name: finding}) - render(healthy, {}))
        # At least 20 of the 61,440 voxels change by far more than the noise of a whole voxel (about 10 HU).
        assert np.sort(change.ravel())[-20] > 90
        if finding.side in ("right", "left"):
            away = change[x < -30].sum() if finding.side == "right" else change[x > 30].sum()
            here = change[x > 30].sum() if finding.side == "right" else change[x < -30].sum()
            assert here > 2 * away


def test_lesions_lie_in_the_lobe_that_is_named(patients: list[phantoms.PhantomPatient]) -> None:
    checked = 0
    for patient in patients[:150]:
        for scan in patient.scans:
            for name in ("Lung nodule", "Consolidation", "Lung opacity"):
                finding = scan.findings.get(name)
                if finding is None:
                    continue
                centres = np.array([blob.centre for blob in finding.blobs])
                assert {lobe_of(centre) for centre in centres} == set(finding.lobes) <= set(LOBES)
                assert (lung_depth(scan.anatomy, centres) > 0).all()
                if finding.side != "bilateral":
                    assert (np.sign(centres[:, 0]) == (1 if finding.side == "right" else -1)).all()
                if finding.sizes_mm:
                    assert finding.sizes_mm[0] == round(2 * max(max(blob.radii) for blob in finding.blobs))
                checked += 1
    assert checked > 100


# ---- labels and reports
def test_prevalence_and_independence(patients: list[phantoms.PhantomPatient]) -> None:
    labels = np.array([patient.scans[0].labels for patient in patients])
    assert set(EVEN) == set(ABNORMALITIES) == set(FINDINGS)
    assert ((labels.mean(0) > 0.13) & (labels.mean(0) < 0.4)).all()
    correlation = np.corrcoef(labels.T) - np.eye(len(ABNORMALITIES))
    assert np.abs(correlation).max() < 0.35
    second = [patient for patient in patients if len(patient.scans) == 2]
    assert 0.08 < len(second) / len(patients) < 0.25
    assert any(patient.scans[0].labels != patient.scans[1].labels for patient in second)


# Written without sight of the templates' table: what a reader would look for.
KEYWORDS = {
    "Medical material": r"medical material|pacemaker|catheter|sternal wires",
    "Arterial wall calcification": r"arterial wall calcification|aort[^.]*calcifi|calcifi[^.]*aort",
    "Cardiomegaly": r"cardiomegaly|heart is enlarged|cardiothoracic ratio is increased",
    "Pericardial effusion": r"pericardial (effusion|space)",
    "Coronary artery wall calcification": r"coronary[^.]*calcif|calcif[^.]*coronary",
    "Hiatal hernia": r"hernia",
    "Lymphadenopathy": r"lymphadenopathy|enlarged[^.]*lymph node",
    "Emphysema": r"emphysema",
    "Atelectasis": r"atelecta",
    "Lung nodule": r"nodules?\b",
    "Lung opacity": r"opacit|ground.glass",
    "Pulmonary fibrotic sequela": r"fibro",
    "Pleural effusion": r"pleural (effusion|space)",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronchial|thick\w* of the bronchial",
    "Consolidation": r"consolidation",
    "Bronchiectasis": r"bronchiecta",
    "Interlobular septal thickening": r"interlobular",
}
NEGATION = re.compile(r"\b(no|not|neither|without|free of)\b", re.IGNORECASE)


def mentions(text: str, name: str) -> tuple[bool, bool]:
    """(stated, denied) in `text`, sentence by sentence."""
    found = [s for s in re.split(r"(?<=\.)\s+", text) if re.search(KEYWORDS[name], s, re.IGNORECASE)]
    denied = [s for s in found if NEGATION.search(s)]
    return len(found) > len(denied), bool(denied)


def test_reports_state_what_is_present_and_nothing_else(patients: list[phantoms.PhantomPatient]) -> None:
    denials = []
    for patient in patients:
        for scan in patient.scans:
            report = scan.report
            for name, label in zip(ABNORMALITIES, scan.labels, strict=True):
                stated, denied = mentions(report.findings, name)
                assert stated == bool(label), (name, label, report.findings)
                assert not (denied and label), (name, report.findings)
                if not label:
                    denials.append(denied)
                if report.impression != "Not given.":
                    assert mentions(report.impression, name) == (bool(label), False), (name, report.impression)
            assert 6 <= report.findings.count(". ") + 1 <= 32
            assert "{" not in report.findings + report.impression and "  " not in report.findings
    assert 0.5 < np.mean(denials) < 0.8
    impressions = [scan.report.impression for patient in patients for scan in patient.scans]
    assert 0.02 < np.mean([text == "Not given." for text in impressions]) < 0.2


def test_reports_give_the_side_and_size_that_are_drawn(patients: list[phantoms.PhantomPatient]) -> None:
    sides = 0
    for patient in patients:
        for scan in patient.scans:
            for finding in scan.findings.values():
                sentence = positive_sentence(finding, np.random.default_rng(finding.seed))
                named = {
                    side
                    for side in ("right", "left")
                    if re.search(rf"\b{side}\b(?! (hilar|para|coronary|anterior d|lower para))", sentence)
                }
                if finding.side in ("right", "left"):
                    assert named <= {finding.side}, sentence
                    sides += bool(named)
                millimetres = {int(size) for size in re.findall(r"(\d+)(?=,? (?:mm|and \d|\d))", sentence)}
                assert millimetres <= set(finding.sizes_mm), sentence
                if single := re.search(r"mm lung nodule is seen in the (.+)\.", sentence):
                    largest = max(finding.blobs, key=lambda blob: max(blob.radii))
                    assert single[1] == lobe_of(np.array(largest.centre))
    assert sides > 100


@pytest.mark.parametrize("name", ABNORMALITIES)
def test_phrasings_vary_and_include_the_prompts(name: str, patients: list[phantoms.PhantomPatient]) -> None:
    rng = np.random.default_rng(0)
    finding = next(scan.findings[name] for patient in patients for scan in patient.scans if name in scan.findings)
    positive = {positive_sentence(finding, rng) for _ in range(300)}
    negative = {negative_sentence(name, rng) for _ in range(300)}
    present, absent = prompt_pair(name)
    assert present in positive and absent in negative
    assert len(positive) >= 7 and len(negative) >= 6
