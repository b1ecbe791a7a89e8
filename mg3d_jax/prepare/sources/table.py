"""Any table of volumes and reports (csv, xlsx): columns are found by their names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.archives import volume_exists
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, outside_metadata
from mg3d_jax.prepare.names import without_suffix
from mg3d_jax.prepare.sections import split_sections
from mg3d_jax.prepare.tables import Row, dicom_metadata, label_columns, numbers, read_table, row_labels

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


def _find_columns(rows: list[Row]) -> dict[str, str]:
    """Role -> column name of a table of `--source csv`."""
    plain = {re.sub(r"[\s_-]", "", column).lower(): column for column in rows[0]}
    found = {}
    for role, candidates in _COLUMNS.items():
        if column := next((plain[name] for name in candidates if name in plain), None):
            found[role] = column
    return found


def list_table(options: SourceOptions) -> Listing:
    """Any table (csv, xlsx): ROOT is the file. Columns, by name: volume (path, relative to the table), report or
    findings and impression; optional patient, scan, split, spacing ("0.7 0.7 1.5", mm), axes ("LPS"). Every other
    column that holds only 1, 0, -1, true, false and nothing is a label. A split column is what `--split` selects by."""
    path = options.root
    notes: list[str] = []
    rows = read_table(path, notes)
    columns = _find_columns(rows)
    if "volume" not in columns or not {"report", "findings", "impression"} & columns.keys():
        raise UserError(
            f"{path} needs a column `volume` and `report` (or `findings`, `impression`); it has {list(rows[0])}"
        )
    others = [column for column in rows[0] if column not in columns.values()]
    names, doubtful = label_columns(rows, others)
    listing = Listing([], names, notes=[*notes, f"labels: {', '.join(names) or 'none'}", *doubtful])
    if ignored := [column for column in others if column not in names]:
        listing.notes.append(f"columns not used: {', '.join(ignored)}")
    if "split" in columns and options.split not in (splits := {row[columns["split"]].strip() for row in rows}):
        raise UserError(f"--split {options.split!r}: the column {columns['split']!r} of {path} has {sorted(splits)}")
    seen: set[Path] = set()
    for number, row in enumerate(rows, 1):
        split = row[columns["split"]].strip() if "split" in columns else options.split
        spacing = row[columns["spacing"]].strip() if "spacing" in columns else ""
        if not row[columns["volume"]].strip():
            listing.add_bad(path, "a row without a volume")
            continue
        example = _example(path, row, columns, names, options, listing)
        if split != options.split:
            listing.other_splits.setdefault(split, set()).add(example.patient)
        elif not example.findings and not example.impression:
            listing.add_bad(example.path, "empty report")
        elif not options.streaming and not volume_exists(example.path):
            listing.add_bad(example.path, "a report without a volume")
        elif spacing and _spacing(spacing) is None:
            expected = "three numbers above 0 (mm), such as '0.7 0.7 1.5'"
            listing.add_bad(example.path, f"row {number} of {path.name}: spacing {spacing!r} is not {expected}")
        elif example.path in seen:
            listing.add_bad(example.path, f"second report row of {example.name}")
        else:
            seen.add(example.path)
            listing.examples.append(example)
    return listing


def list_zip(options: SourceOptions) -> Listing:
    """One zip archive per study and a table as for `csv`, whose volumes are `study.zip`, or `study.zip/series/volume.nii.gz`
    where an archive holds several. ROOT is the table, or the folder with it. Archives are not unpacked to disk."""
    tables = sorted(options.root.glob("*.csv")) if options.root.is_dir() else [options.root]
    if len(tables) != 1:
        raise UserError(
            f"{options.root}: expected one table (csv) beside the archives, found {[t.name for t in tables]}"
        )
    listing = list_table(replace(options, root=tables[0]))
    listing.examples = [replace(example, source="zip") for example in listing.examples]
    return listing


def _spacing(text: str) -> tuple[float, float, float] | None:
    found = numbers(text)
    return found if found is not None and len(found) == 3 and min(found) > 0 else None


def _example(
    path: Path, row: Row, columns: dict[str, str], names: tuple[str, ...], options: SourceOptions, listing: Listing
) -> Example:
    def value(role: str) -> str:
        return row[columns[role]].strip() if role in columns else ""

    volume = Path(value("volume"))
    findings, impression = listing.clean(value("findings")), listing.clean(value("impression"))
    if not findings and not impression:
        findings, impression = split_sections(listing.clean(value("report")))
    about = dicom_metadata(row)
    if spacing := _spacing(value("spacing")):
        about = replace(about, spacing=spacing)
    about = outside_metadata(volume, options, replace(about, axes=value("axes") or None))
    name = str(volume)
    scan = value("scan") or without_suffix(name)
    full = volume if volume.is_absolute() else path.parent / volume
    return Example(
        full, name, value("patient") or scan, scan, findings, impression, row_labels(path, row, names), about, "csv"
    )
