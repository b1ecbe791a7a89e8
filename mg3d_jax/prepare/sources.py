"""Dataset layouts on disk -> a `Listing`: where each volume is, what its report says, labels, patient, scan.

No volume is opened here. Everything that does not fit together (a report without a volume, a volume without a report,
an empty report) is listed as bad with its path and reason, never dropped silently.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import (
    LABEL_VALUES,
    Example,
    Listing,
    Row,
    SourceOptions,
    apply_exclusion,
    by_volume,
    dicom_metadata,
    find_table,
    label_table,
    numbers,
    read_table,
    require_columns,
    row_labels,
)
from mg3d_jax.prepare.reading import ARRAY_SUFFIXES, IMAGE_SUFFIXES, NIFTI_SUFFIXES
from mg3d_jax.prepare.reports import clean, split_sections

CTRATE_SPLITS = {"train": ("train", "train"), "valid": ("valid", "validation")}  # split: folder, report table
RECONSTRUCTIONS = ("all", "first", "best")
_CHEST = re.compile(r"lung|thorax|chest|toraks|akci", re.IGNORECASE)
# Column names of `--source csv`, in order of preference, compared in lower case without "_" and "-".
_COLUMNS = {
    "volume": ("volume", "volumepath", "volumename", "path", "image", "imagepath", "file", "filename"),
    "report": ("report", "text", "reporttext"),
    "findings": ("findings", "findingsen", "finding"),
    "impression": ("impression", "impressions", "impressionsen", "conclusion"),
    "patient": ("patient", "patientid", "subject", "subjectid"),
    "scan": ("scan", "scanid", "study", "studyid", "accession"),
    "split": ("split", "fold", "subset"),
    "spacing": ("spacing", "spacingmm"),
    "axes": ("axes",),
}


def ctrate_ids(name: str) -> tuple[str, str]:
    """(patient, scan) of a CT-RATE file name: "train_1_a_2.nii.gz" -> ("train_1", "train_1_a")."""
    parts = _stem(name).split("_")
    if len(parts) != 4 or not all(parts):
        raise ValueError(f"{name!r} is not split_patient_scan_reconstruction")
    return "_".join(parts[:2]), "_".join(parts[:3])


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")


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
    for parent, _, files in sorted(os.walk(folder)):
        for name in files:
            path = Path(parent) / name
            if name.endswith(NIFTI_SUFFIXES) and not name.startswith(".") and found.setdefault(name, path) != path:
                listing.add_bad(path, _second(name, found[name]))
    return found


def _second(name: str, first: Path) -> str:
    return f"second file of {name}, the first is {first}: keep one of them"


def choose_reconstructions(listing: Listing, policy: str) -> None:
    """Keeps one volume per scan unless `policy` is "all". "first": the lowest reconstruction number. "best": a lung or
    thorax series or kernel before others, then the finest slice spacing, then the most slices."""
    if policy not in RECONSTRUCTIONS:
        raise UserError(f"--reconstructions {policy!r}: there are {RECONSTRUCTIONS}")
    if policy == "all":
        return

    def rank(example: Example) -> tuple:
        m = example.metadata
        number = [int(part) for part in re.findall(r"\d+", example.name)]
        if policy == "first":
            return (number, example.name)
        chest = bool(m.kernel and _CHEST.search(m.kernel))
        return (not chest, m.spacing[2] if m.spacing else 1e9, -(m.slices or 0), number, example.name)

    best: dict[tuple[str, str], Example] = {}
    for example in listing.examples:
        scan = (example.patient, example.scan)
        if scan not in best or rank(example) < rank(best[scan]):
            best[scan] = example
    if left_out := len(listing.examples) - len(best):
        listing.skipped[f"other reconstructions of the scan (--reconstructions {policy})"] = left_out
    listing.examples = list(best.values())


def list_ctrate(options: SourceOptions) -> Listing:
    """CT-RATE: `dataset/{train,valid}[_fixed]/train_1/train_1_a/train_1_a_1.nii.gz` and its tables (csv or xlsx).

    The report table is required; without metadata or labels the run goes on with a note."""
    if options.split not in CTRATE_SPLITS:
        raise UserError(f"--split {options.split!r}: CT-RATE has {sorted(CTRATE_SPLITS)}")
    folder, table = CTRATE_SPLITS[options.split]
    dataset = _dataset_folder(options.root)
    reports = dataset / "radiology_text_reports"
    report_path = find_table(reports, f"{table}_reports") or reports / f"{table}_reports.csv"
    rows = read_table(report_path)
    require_columns(report_path, rows, ("VolumeName", "Findings_EN", "Impressions_EN"))
    notes: list[str] = []
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
    for other, (_, other_table) in CTRATE_SPLITS.items():
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
        expected = dataset / CTRATE_SPLITS[options.split][0] / patient / scan / name
        path = volumes.get(name, expected if options.streaming else None)
        findings, impression = clean(row["Findings_EN"]), clean(row["Impressions_EN"])
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


def _outside_metadata(path: Path, options: SourceOptions, about: Metadata | None = None) -> Metadata:
    """`about`, completed by what the command line says of files without a header."""
    about = about or Metadata()
    if path.name.endswith(NIFTI_SUFFIXES):
        return about
    return replace(
        about,
        spacing=about.spacing or options.array_spacing,
        axes=about.axes or options.array_axes,
        window=options.slice_window,
    )


def _index_by_name(root: Path) -> dict[str, list[Path]]:
    """Stem -> paths of every volume under `root`: NIfTI and array files, and folders that hold slices. More than one
    path is a fault of the data set."""
    found: dict[str, list[Path]] = {}
    for parent, _, files in sorted(os.walk(root)):
        for file in sorted(files):
            if file.endswith((*NIFTI_SUFFIXES, *ARRAY_SUFFIXES)) and not file.startswith("."):
                found.setdefault(re.sub(r"\.(nii\.gz|nii|npy|npz)$", "", file), []).append(Path(parent) / file)
        if Path(parent) != root and any(file.lower().endswith((*IMAGE_SUFFIXES, ".dcm")) for file in files):
            found.setdefault(Path(parent).name, []).append(Path(parent))
    return found


def list_ctrg(options: SourceOptions) -> Listing:
    """CTRG-Chest: one json `{split: [{"id", "report", "result"}, ...]}` under ROOT, volumes anywhere beneath it as
    `<id>.nii.gz` or as folders `<id>/` of slices. A patient is an id: CTRG says no more."""
    files = [options.root] if options.root.is_file() else sorted(options.root.glob("*.json"))
    root = options.root.parent if options.root.is_file() else options.root
    tables = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is not readable JSON: {error}") from error
        if isinstance(content, dict) and any(isinstance(rows, list) for rows in content.values()):
            tables[file] = content
    if len(tables) != 1:
        raise UserError(
            f"{options.root}: expected one CTRG json with lists of reports, found {[str(t) for t in tables]}"
        )
    path, content = next(iter(tables.items()))
    split = {"valid": "val"}.get(options.split, options.split)
    if split not in content:
        raise UserError(f"--split {options.split!r}: {path} has {sorted(content)}")
    paths = _index_by_name(root)
    volumes = {stem: found[0] for stem, found in paths.items()}
    listing = Listing([], ABNORMALITIES, notes=["CTRG has no labels: every label is unknown"])
    seen: set[str] = set()
    for row in content[split]:
        if not isinstance(row, dict) or "id" not in row:
            listing.add_bad(path, f"a row without id: {str(row)[:80]}")
            continue
        name, stem = str(row["id"]), _stem(str(row["id"]))
        findings, impression = clean(row.get("report")), clean(row.get("result"))
        volume = volumes.get(stem, root / name if options.streaming else None)
        if stem in seen:
            listing.add_bad(path, f"second report row of {name}")
        elif volume is None:
            listing.add_bad(root / name, "a report without a volume")
        elif not findings and not impression:
            listing.add_bad(volume, "empty report")
        else:
            unknown = (UNKNOWN_LABEL,) * len(ABNORMALITIES)
            about = _outside_metadata(volume, options)
            listing.examples.append(Example(volume, name, stem, stem, findings, impression, unknown, about, "ctrg"))
        seen.add(stem)
    listing.other_splits = {
        other: {_stem(str(row.get("id"))) for row in rows if isinstance(row, dict)}
        for other, rows in content.items()
        if other != split and isinstance(rows, list)
    }
    others = set().union(*listing.other_splits.values()) - seen
    for stem in sorted(volumes.keys() - others):
        if stem not in seen:
            listing.add_bad(volumes[stem], "a volume without a report")
        for path in paths[stem][1:]:
            listing.add_bad(path, _second(stem, volumes[stem]))
    return listing


def _find_columns(rows: list[Row]) -> dict[str, str]:
    """Role -> column name of a table of `--source csv`."""
    plain = {re.sub(r"[\s_-]", "", column).lower(): column for column in rows[0]}
    found = {}
    for role, candidates in _COLUMNS.items():
        if column := next((plain[name] for name in candidates if name in plain), None):
            found[role] = column
    return found


def list_csv(options: SourceOptions) -> Listing:
    """Any table (csv, xlsx): ROOT is the file. Columns, by name: volume (path, relative to the table), report or
    findings and impression; optional patient, scan, split, spacing ("0.7 0.7 1.5", mm), axes ("LPS"). Every other
    column that holds only 1, 0, -1 and nothing is a label. A split column is what `--split` selects by."""
    path = options.root
    rows = read_table(path)
    columns = _find_columns(rows)
    if "volume" not in columns or not {"report", "findings", "impression"} & columns.keys():
        raise UserError(
            f"{path} needs a column `volume` and `report` (or `findings`, `impression`); it has {list(rows[0])}"
        )
    others = [column for column in rows[0] if column not in columns.values()]
    names = tuple(
        c for c in others if all(row[c].strip() in LABEL_VALUES for row in rows) and any(row[c] for row in rows)
    )
    listing = Listing([], names, notes=[f"labels: {', '.join(names) or 'none'}"])
    if ignored := [column for column in others if column not in names]:
        listing.notes.append(f"columns not used: {', '.join(ignored)}")
    if "split" in columns and options.split not in (splits := {row[columns["split"]].strip() for row in rows}):
        raise UserError(f"--split {options.split!r}: the column {columns['split']!r} of {path} has {sorted(splits)}")
    for number, row in enumerate(rows, 1):
        split = row[columns["split"]].strip() if "split" in columns else options.split
        spacing = row[columns["spacing"]].strip() if "spacing" in columns else ""
        if not row[columns["volume"]].strip():
            listing.add_bad(path, "a row without a volume")
            continue
        example = _csv_example(path, row, columns, names, options)
        if split != options.split:
            listing.other_splits.setdefault(split, set()).add(example.patient)
        elif not example.findings and not example.impression:
            listing.add_bad(example.path, "empty report")
        elif not options.streaming and not example.path.exists():
            listing.add_bad(example.path, "a report without a volume")
        elif spacing and _csv_spacing(spacing) is None:
            expected = "three numbers above 0 (mm), such as '0.7 0.7 1.5'"
            listing.add_bad(example.path, f"row {number} of {path.name}: spacing {spacing!r} is not {expected}")
        else:
            listing.examples.append(example)
    return listing


def _csv_spacing(text: str) -> tuple[float, float, float] | None:
    found = numbers(text)
    return found if found is not None and len(found) == 3 and min(found) > 0 else None


def _csv_example(
    path: Path, row: Row, columns: dict[str, str], names: tuple[str, ...], options: SourceOptions
) -> Example:
    def value(role: str) -> str:
        return row[columns[role]].strip() if role in columns else ""

    volume = Path(value("volume"))
    findings, impression = clean(value("findings")), clean(value("impression"))
    if not findings and not impression:
        findings, impression = split_sections(value("report"))
    about = dicom_metadata(row)
    if spacing := _csv_spacing(value("spacing")):
        about = replace(about, spacing=spacing)
    about = _outside_metadata(volume, options, replace(about, axes=value("axes") or None))
    name = str(volume)
    scan = value("scan") or _stem(name)
    full = volume if volume.is_absolute() else path.parent / volume
    return Example(
        full, name, value("patient") or scan, scan, findings, impression, row_labels(path, row, names), about, "csv"
    )


SOURCES: dict[str, Callable[[SourceOptions], Listing]] = {"ctrate": list_ctrate, "ctrg": list_ctrg, "csv": list_csv}


def list_source(source: str, options: SourceOptions) -> Listing:
    """The listing of one source, after exclusion and the choice of reconstructions. Raises `UserError`."""
    if source not in SOURCES:
        raise UserError(f"--source {source!r}: there are {sorted(SOURCES)}")
    if not options.root.exists():
        raise UserError(f"--root {options.root} does not exist")
    listing = SOURCES[source](options)
    apply_exclusion(listing, options.exclude)
    choose_reconstructions(listing, options.reconstructions)
    return listing
