"""Dataset layouts on disk -> a list of examples: where the volume is, what the report says, the labels, the patient.

No volume is opened here. Everything that does not fit together (a report without a volume, a volume without a report,
an empty report) is listed as bad with its path and reason, never dropped silently.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.reports import clean
from mg3d_jax.data.volumes import Metadata
from mg3d_jax.errors import UserError

CTRATE_SPLITS = {
    "train": ("train", "train"),
    "valid": ("valid", "validation"),
}  # split -> folder and label, report name


@dataclass(frozen=True)
class Example:
    """One volume with its report, before any voxel is read."""

    path: Path
    name: str
    patient: str
    scan: str
    findings: str
    impression: str
    labels: tuple[int, ...]
    metadata: Metadata
    source: str


@dataclass
class Listing:
    """What a source found."""

    examples: list[Example]
    label_names: tuple[str, ...]
    bad: list[dict[str, str]] = field(default_factory=list)  # {"path", "reason"}
    skipped: dict[str, int] = field(default_factory=dict)  # left out by a rule, not for a fault
    notes: list[str] = field(default_factory=list)  # said once, in the summary and the manifest


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a csv as dicts of strings. Raises `UserError` where it is missing, empty or unreadable."""
    import pandas as pd

    if not path.is_file():
        raise UserError(f"{path} does not exist: the table is needed; check --root and --split")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    if frame.empty:
        raise UserError(f"{path} has no rows")
    return frame.to_dict("records")


def _require_columns(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if missing := [column for column in columns if column not in rows[0]]:
        raise UserError(f"{path} lacks the columns {missing}; it has {list(rows[0])}")


def _numbers(text: Any) -> tuple[float, ...] | None:
    """ "0.75", "[0.34, 0.34]" -> numbers; `None` for what is blank or not numbers."""
    try:
        value = ast.literal_eval(str(text).strip())
        numbers = tuple(float(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    except (ValueError, SyntaxError, TypeError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def table_metadata(row: dict[str, Any]) -> Metadata:
    """`Metadata` of one row of CT-RATE's metadata csv."""
    slope, intercept = _numbers(row.get("RescaleSlope")), _numbers(row.get("RescaleIntercept"))
    plane, between = _numbers(row.get("XYSpacing")), _numbers(row.get("ZSpacing"))
    orientation, position = _numbers(row.get("ImageOrientationPatient")), _numbers(row.get("ImagePositionPatient"))
    slices = _numbers(row.get("NumberofSlices"))
    if plane is not None and len(plane) == 1:
        plane = plane * 2
    known_spacing = plane is not None and between is not None and min(*plane, *between) > 0
    return Metadata(
        scaling=(slope[0] if slope else 1.0, intercept[0]) if intercept else None,
        spacing=(plane[1], plane[0], between[0]) if known_spacing else None,
        orientation=orientation if orientation and len(orientation) == 6 else None,
        position=position if position and len(position) == 3 else None,
        slices=int(slices[0]) if slices else None,
    )


def ctrate_ids(name: str) -> tuple[str, str]:
    """(patient, scan) of a CT-RATE file name: "train_1_a_2.nii.gz" -> ("train_1", "train_1_a")."""
    parts = name.removesuffix(".gz").removesuffix(".nii").split("_")
    if len(parts) != 4 or not all(parts):
        raise ValueError(f"{name!r} is not split_patient_scan_reconstruction")
    return "_".join(parts[:2]), "_".join(parts[:3])


def _dataset_folder(root: Path) -> Path:
    for folder in (root / "dataset", root):
        if (folder / "radiology_text_reports").is_dir():
            return folder
    raise UserError(f"{root} is not a CT-RATE folder: neither it nor its dataset/ has radiology_text_reports/")


def _ctrate_volumes(dataset: Path, split: str) -> dict[str, Path]:
    """File name -> path of every volume on disk; a `_fixed` copy is preferred to the original."""
    found: dict[str, Path] = {}
    for folder in (dataset / split, dataset / f"{split}_fixed"):
        for parent, _, files in sorted(os.walk(folder)):
            found.update(
                {f: Path(parent) / f for f in files if f.endswith((".nii.gz", ".nii")) and not f.startswith(".")}
            )
    return found


def _label_rows(path: Path, listing_notes: list[str]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """(names, VolumeName -> labels) of a label csv; every label unknown where there is no csv."""
    if not path.is_file():
        listing_notes.append(f"{path} is missing: every label is unknown")
        return ABNORMALITIES, {}
    rows = read_table(path)
    _require_columns(path, rows, ("VolumeName",))
    names = tuple(column for column in rows[0] if column != "VolumeName")
    values = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": UNKNOWN_LABEL}
    labels = {}
    for row in rows:
        try:
            labels[row["VolumeName"]] = tuple(values[row[name].strip()] for name in names)
        except KeyError as error:
            raise UserError(f"{path}: {row['VolumeName']} has a label {error}; expected 1, 0 or nothing") from None
    return names, labels


def list_ctrate(root: Path, split: str) -> Listing:
    """CT-RATE: `dataset/{train,valid}[_fixed]/train_1/train_1_a/train_1_a_1.nii.gz` and its csv files.

    The report csv is required; without metadata or label csv the run goes on with a note."""
    if split not in CTRATE_SPLITS:
        raise UserError(f"--split {split!r}: CT-RATE has {sorted(CTRATE_SPLITS)}")
    folder, table = CTRATE_SPLITS[split]
    dataset = _dataset_folder(root)
    report_path = dataset / "radiology_text_reports" / f"{table}_reports.csv"
    rows = read_table(report_path)
    _require_columns(report_path, rows, ("VolumeName", "Findings_EN", "Impressions_EN"))
    notes: list[str] = []
    names, labels = _label_rows(dataset / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv", notes)
    metadata_path = dataset / "metadata" / f"{table}_metadata.csv"
    if metadata_path.is_file():
        metadata = {row["VolumeName"]: table_metadata(row) for row in read_table(metadata_path)}
    else:
        metadata = {}
        notes.append(f"{metadata_path} is missing: volumes with blank headers cannot be repaired")
    volumes = _ctrate_volumes(dataset, folder)
    listing = Listing([], names, notes=notes)
    unknown = (UNKNOWN_LABEL,) * len(names)
    seen: set[str] = set()
    unlabelled = 0
    for row in rows:
        name = row["VolumeName"].strip()
        findings, impression = clean(row["Findings_EN"]), clean(row["Impressions_EN"])
        path = volumes.get(name)
        try:
            patient, scan = ctrate_ids(name)
        except ValueError as error:
            listing.bad.append({"path": str(report_path), "reason": f"report row: {error}"})
            continue
        if name in seen:
            listing.bad.append({"path": str(report_path), "reason": f"second report row of {name}"})
            continue
        seen.add(name)
        if path is None:
            expected = dataset / folder / patient / scan / name
            listing.bad.append({"path": str(expected), "reason": "a report without a volume"})
        elif not findings and not impression:
            listing.bad.append({"path": str(path), "reason": "empty report"})
        else:
            unlabelled += bool(labels) and name not in labels
            listing.examples.append(
                Example(
                    path, name, patient, scan, findings, impression,
                    labels.get(name, unknown), metadata.get(name, Metadata()), "ctrate",
                )
            )  # fmt: skip
    for name in sorted(volumes.keys() - seen):
        listing.bad.append({"path": str(volumes[name]), "reason": "a volume without a report"})
    if unlabelled:
        notes.append(f"{unlabelled} volumes have no row in the label csv: their labels are unknown")
    return listing


SOURCES: dict[str, Callable[[Path, str], Listing]] = {"ctrate": list_ctrate}
