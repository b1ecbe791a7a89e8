"""CT-RATE's folder: `dataset/train/train_1/train_1_a/train_1_a_1.nii.gz`, and tables of reports, labels, DICOM tags."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, second_file
from mg3d_jax.prepare.names import without_suffix
from mg3d_jax.prepare.reading import NIFTI_SUFFIXES
from mg3d_jax.prepare.tables import Row, by_volume, dicom_metadata, find_table, label_table, read_table, require_columns
from mg3d_jax.prepare.walk import walk

SPLITS = {"train": ("train", "train"), "valid": ("valid", "validation")}  # split: folder, report table


def ctrate_ids(name: str) -> tuple[str, str]:
    """(patient, scan) of a CT-RATE file name: "train_1_a_2.nii.gz" -> ("train_1", "train_1_a")."""
    parts = without_suffix(name).split("_")
    if len(parts) != 4 or not all(parts):
        raise ValueError(f"{name!r} is not split_patient_scan_reconstruction")
    return "_".join(parts[:2]), "_".join(parts[:3])


def _dataset_folder(root: Path) -> Path:
    for folder in (root / "dataset", root):
        if (folder / "radiology_text_reports").is_dir():
            return folder
    raise UserError(f"{root} is not a CT-RATE folder: neither it nor its dataset/ has radiology_text_reports/")


def _ctrate_volumes(listing: Listing, dataset: Path, split: str) -> dict[str, Path]:
    """File name -> path of every volume on disk; a `_fixed` copy is preferred to the original, with a note. Within one
    of the two folders a second file of a name is bad: nothing tells which is right."""
    original, fixed = (_nifti_files(listing, dataset / name) for name in (split, f"{split}_fixed"))
    if both := len(original.keys() & fixed.keys()):
        listing.notes.append(f"{both} volumes are in {split}/ and in {split}_fixed/: the latter were taken")
    return original | fixed


def _nifti_files(listing: Listing, folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent, files in walk(folder):
        for name in files:
            path = parent / name
            if name.endswith(NIFTI_SUFFIXES) and not name.startswith(".") and found.setdefault(name, path) != path:
                listing.add_bad(path, second_file(name, found[name]))
    return found


def list_ctrate(options: SourceOptions) -> Listing:
    """CT-RATE: `dataset/{train,valid}[_fixed]/train_1/train_1_a/train_1_a_1.nii.gz` and its tables (csv or xlsx).

    The report table is required; without metadata or labels the run goes on with a note."""
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split!r}: CT-RATE has {sorted(SPLITS)}")
    folder, table = SPLITS[options.split]
    dataset = _dataset_folder(options.root)
    reports = dataset / "radiology_text_reports"
    report_path = find_table(reports, f"{table}_reports") or reports / f"{table}_reports.csv"
    notes: list[str] = []
    rows = read_table(report_path, notes)
    require_columns(report_path, rows, ("VolumeName", "Findings_EN", "Impressions_EN"))
    labels_folder, label_stem = dataset / "multi_abnormality_labels", f"{folder}_predicted_labels"
    names, labels = label_table(find_table(labels_folder, label_stem), labels_folder / f"{label_stem}.csv", notes)
    metadata_path = find_table(dataset / "metadata", f"{table}_metadata")
    metadata: dict[str, Metadata] = {}
    if metadata_path is None:
        missing = dataset / "metadata" / f"{table}_metadata.csv"
        notes.append(f"{missing} is missing: volumes with blank headers cannot be repaired")
    else:
        table_rows = read_table(metadata_path)
        require_columns(metadata_path, table_rows, ("VolumeName",))
        metadata = by_volume(metadata_path, table_rows, dicom_metadata, notes)
    listing = Listing([], names, notes=notes)
    volumes = _ctrate_volumes(listing, dataset, folder)
    seen = _ctrate_rows(listing, options, report_path, rows, volumes, labels, metadata)
    for name in sorted(volumes.keys() - seen):
        listing.add_bad(volumes[name], "a volume without a report")
    for other, (_, other_table) in SPLITS.items():
        path = find_table(reports, f"{other_table}_reports")
        if other != options.split and path is not None:
            listing.other_splits[other] = {_patient_or_name(row.get("VolumeName", "")) for row in read_table(path)}
    return listing


def _patient_or_name(name: str) -> str:
    try:
        return ctrate_ids(name.strip())[0]
    except ValueError:
        return name.strip()


def _ctrate_rows(
    listing: Listing,
    options: SourceOptions,
    report_path: Path,
    rows: list[Row],
    volumes: dict[str, Path],
    labels: dict[str, tuple[int, ...]],
    metadata: dict[str, Metadata],
) -> set[str]:
    """Adds one example, or one bad entry, per row of the report table. Returns the volume names it saw."""
    dataset = report_path.parents[1]
    unknown = (UNKNOWN_LABEL,) * len(listing.label_names)
    seen: set[str] = set()
    unlabelled = 0
    for row in rows:
        name = row["VolumeName"].strip()
        try:
            patient, scan = ctrate_ids(name)
        except ValueError as error:
            listing.add_bad(report_path, f"report row: {error}")
            continue
        if name in seen:
            listing.add_bad(report_path, f"second report row of {name}")
            continue
        seen.add(name)
        expected = dataset / SPLITS[options.split][0] / patient / scan / name
        path = volumes.get(name, expected if options.streaming else None)
        findings, impression = listing.clean(row["Findings_EN"]), listing.clean(row["Impressions_EN"])
        if path is None:
            listing.add_bad(expected, "a report without a volume")
        elif not findings and not impression:
            listing.add_bad(path, "empty report")
        else:
            unlabelled += bool(labels) and name not in labels
            about = metadata.get(name, Metadata())
            row_label = labels.get(name, unknown)
            listing.examples.append(
                Example(path, name, patient, scan, findings, impression, row_label, about, "ctrate")
            )
    if unlabelled:
        listing.notes.append(f"{unlabelled} volumes have no row in the label table: their labels are unknown")
    return seen
