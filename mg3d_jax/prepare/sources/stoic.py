"""STOIC 2021: `data/mha/PATIENT.mha` (or `data/dicom/PATIENT/`) and `metadata/reference.csv`."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import PAPER_FRACTION, Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions
from mg3d_jax.prepare.tables import read_table, require_columns

COLUMNS = ("PatientID", "probCOVID", "probSevere")
LABELS = ("COVID-19", "Severe COVID-19")
_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def list_stoic(options: SourceOptions) -> Listing:
    """Labels: COVID-19, and, of those who have it, whether it is severe (intubated or dead within a month); unknown for the
    others, as the challenge scores it. One split, `all`: `--fold` holds patients out."""
    if options.split != "all":
        raise UserError(
            f"--split {options.split!r}: STOIC publishes one; use --split all, with --fold to hold patients out"
        )
    path = options.root / "metadata" / "reference.csv"
    rows = read_table(path)
    require_columns(path, rows, COLUMNS)
    listing = Listing([], LABELS)
    folder = options.root / "data"
    files = {one.stem: one for one in sorted((folder / "mha").glob("*.mha"))}
    series = {one.name: one for one in sorted((folder / "dicom").glob("*")) if one.is_dir()}
    seen: set[str] = set()
    for row in rows:
        patient = row["PatientID"].strip()
        volume = files.get(patient) or series.get(patient)
        expected = folder / "mha" / f"{patient}.mha"
        if patient in seen:
            listing.add_bad(path, f"second row of patient {patient}")
        elif volume is None and not options.streaming:
            listing.add_bad(expected, f"listed in {path.name}, but there is no such volume")
        else:
            labels = _labels(path, row)
            listing.examples.append(
                Example(
                    volume or expected, patient, patient, patient, "", "", labels, Metadata(), "stoic", has_report=False
                )
            )
        seen.add(patient)
    for patient in sorted((files.keys() | series.keys()) - seen):
        listing.add_bad(files.get(patient) or series[patient], f"a volume without a row in {path.name}")
    return listing


def _labels(path: Path, row: dict[str, str]) -> tuple[int, int]:
    for column in COLUMNS[1:]:
        if row[column].strip() not in _VALUES:
            raise UserError(f"{path}: {column} of patient {row['PatientID']} is {row[column]!r}, expected 0 or 1")
    covid, severe = (_VALUES[row[column].strip()] for column in COLUMNS[1:])
    if severe and not covid:
        raise UserError(f"{path}: patient {row['PatientID']} has probSevere 1 and probCOVID 0: one of them is wrong")
    return covid, severe if covid else UNKNOWN_LABEL


STOIC = Source(list_stoic, {"size": (128, 128, 96), "policy": "fraction", "fraction": PAPER_FRACTION})
