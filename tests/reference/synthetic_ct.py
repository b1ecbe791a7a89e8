"""Small CT-like volumes and CT-RATE-shaped folders, written with nibabel alone: input of the data tests."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

LABELS = ("Cardiomegaly", "Lung nodule")


def body(shape=(48, 40, 36), *, seed: int = 0, spacing=(8.0, 8.0, 9.0)) -> np.ndarray:
    """int16 HU [X, Y, Z], RAS+: air, a fatty body, two lungs, a bright sphere in the patient's RIGHT upper front, a
    spine at the back. Noise of 12 HU."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    extent = [n * s / 2 for n, s in zip(shape, spacing, strict=True)]
    hu = np.full(shape, -1000.0)
    torso = (x / (0.85 * extent[0])) ** 2 + (y / (0.8 * extent[1])) ** 2 < 1
    inner = (x / (0.75 * extent[0])) ** 2 + (y / (0.7 * extent[1])) ** 2 < 1
    hu[torso], hu[inner] = -100, 40
    for side in (-1, 1):
        lung = ((x - side * 0.38 * extent[0]) / (0.25 * extent[0])) ** 2 + (y / (0.5 * extent[1])) ** 2 < 1
        hu[lung & (np.abs(z) < 0.8 * extent[2])] = -850
    sphere = (x - 0.35 * extent[0]) ** 2 + (y - 0.3 * extent[1]) ** 2 + (z - 0.4 * extent[2]) ** 2
    hu[sphere < (0.12 * extent[0]) ** 2] = 60
    hu[(np.abs(x) < 0.07 * extent[0]) & (np.abs(y + 0.55 * extent[1]) < 0.08 * extent[1])] = 450
    return np.clip(np.rint(hu + rng.normal(0, 12, shape)), -1024, 3071).astype(np.int16)


def affine(spacing=(8.0, 8.0, 9.0), origin=(-150.0, -120.0, 30.0)) -> np.ndarray:
    matrix = np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    return matrix


def write_nifti(path: Path, data: np.ndarray, matrix: np.ndarray, axes: str = "RAS") -> Path:
    """Writes RAS+ `data` with its voxels stored in the order `axes`; the affine stays true."""
    image = nib.Nifti1Image(data, matrix)
    transform = nib.orientations.ornt_transform(nib.io_orientation(matrix), nib.orientations.axcodes2ornt(axes))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(transform), path)
    return path


def write_raw_nifti(path: Path, stored: np.ndarray, matrix: np.ndarray, slope=None, intercept=None) -> Path:
    """Writes exactly these stored numbers under exactly this scaling (nibabel's own writer would recompute it)."""
    header = nib.Nifti1Image(stored, matrix).header
    header["scl_slope"] = np.nan if slope is None else slope
    header["scl_inter"] = np.nan if intercept is None else intercept
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + stored.tobytes("F"), 1))
    return path


def _write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report_row(name: str, findings: str, impression: str = "Not given.") -> dict[str, str]:
    return {
        "VolumeName": name,
        "ClinicalInformation_EN": "Not given.",
        "Technique_EN": "Non-contrast images were taken.",
        "Findings_EN": findings,
        "Impressions_EN": impression,
    }


def volume_path(root: Path, name: str, folder: str = "train") -> Path:
    patient, scan = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
    return root / "dataset" / folder / patient / scan / name


def write_tables(root: Path, reports: list[dict], metadata: list[dict] | None = None, split: str = "train") -> None:
    """CT-RATE's csv files for these reports; every second volume has a lung nodule."""
    table = {"train": "train", "valid": "validation"}[split]
    dataset = root / "dataset"
    _write_csv(dataset / "radiology_text_reports" / f"{table}_reports.csv", reports)
    labels = [{"VolumeName": r["VolumeName"], LABELS[0]: 0, LABELS[1]: i % 2} for i, r in enumerate(reports)]
    _write_csv(dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", labels)
    if metadata:
        _write_csv(dataset / "metadata" / f"{table}_metadata.csv", metadata)


def write_ctrate(root: Path, patients: int = 4, split: str = "train") -> list[str]:
    """A small CT-RATE folder: `patients` with one scan each, the second of them with two reconstructions that share a
    report; RAS and LPS files by turns. Returns the volume names."""
    rows, names = [], []
    for number in range(1, patients + 1):
        for reconstruction in range(1, 3 if number == 2 else 2):
            name = f"{split}_{number}_a_{reconstruction}.nii.gz"
            data = body(seed=10 * number + reconstruction)
            write_nifti(volume_path(root, name, split), data, affine(), "RAS" if number % 2 else "LPS")
            rows.append(report_row(name, f"Patient {number} was examined. A nodule of {number}.5 mm.", "Stable."))
            names.append(name)
    write_tables(root, rows, split=split)
    return names
