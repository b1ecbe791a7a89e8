"""CC-CCII: `NCP/`, `CP/` and `Normal/`, below each a folder per patient, a folder per scan, and its 8-bit slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions, outside_metadata
from mg3d_jax.prepare.reading import IMAGE_SUFFIXES
from mg3d_jax.prepare.tables import read_table, require_columns

CLASSES = ("Normal", "CP", "NCP")  # normal, common pneumonia, novel coronavirus pneumonia
SCANS_TABLE = "unzip_filenames.csv"  # zip_file, label, patient_id, scan_id, n_slice
Scan = tuple[str, str, str]  # class, patient, scan


def list_cc_ccii(options: SourceOptions) -> Listing:
    """ROOT has the folders of `CLASSES`; `unzip_filenames.csv` beside them, where it is there, says which scans there must be
    and of how many slices. One split, `all`: `--fold` holds patients out. Labels: the three classes, one present."""
    if options.split != "all":
        raise UserError(
            f"--split {options.split!r}: CC-CCII has none; use --split all, with --fold to hold patients out"
        )
    root = options.root
    if not all((root / name).is_dir() for name in CLASSES):
        raise UserError(f"{root} is not CC-CCII's folder: it needs {', '.join(f'{name}/' for name in CLASSES)}")
    listing = Listing([], CLASSES)
    listing.notes.append("8-bit slices: spacing, axes and the HU of grey 0 and 255 are the source's assumptions")
    found = {(kind, patient.name, scan.name): scan for kind, patient, scan in _scan_folders(root)}
    listed = _listed(root / SCANS_TABLE)
    if listed is None:
        listing.notes.append(f"{root / SCANS_TABLE} is missing: nothing says which scans there must be")
    for key in sorted(found.keys() | (listed or {}).keys()):
        _add(listing, root, key, found.get(key), listed, options)
    _check_one_class(listing)
    return listing


def _add(
    listing: Listing, root: Path, key: Scan, folder: Path | None, listed: dict[Scan, int] | None, options: SourceOptions
) -> None:
    kind, patient, scan = key
    slices = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()) if folder else 0
    path = folder or root / kind / patient / scan
    if folder is None:
        listing.add_bad(path, f"listed in {SCANS_TABLE}, but there is no such folder")
    elif listed is not None and key not in listed:
        listing.add_bad(path, f"a scan that {SCANS_TABLE} does not list")
    elif not slices:
        listing.add_bad(path, "a folder without slices")
    elif listed is not None and slices != listed[key]:
        listing.add_bad(path, f"it has {slices} slices, {SCANS_TABLE} says {listed[key]}")
    else:
        labels, about = tuple(int(kind == name) for name in CLASSES), outside_metadata(path, options, Metadata())
        name = f"{kind}_{patient}_{scan}"
        listing.examples.append(Example(path, name, patient, name, "", "", labels, about, "cc-ccii", has_report=False))


def _scan_folders(root: Path) -> Iterator[tuple[str, Path, Path]]:
    for kind in CLASSES:
        for patient in sorted(path for path in (root / kind).iterdir() if path.is_dir()):
            for scan in sorted(path for path in patient.iterdir() if path.is_dir()):
                yield kind, patient, scan


def _listed(path: Path) -> dict[Scan, int] | None:
    """Number of slices by scan. `UserError` for a class that is none, or a number that is none."""
    if not path.is_file():
        return None
    rows = read_table(path)
    require_columns(path, rows, ("label", "patient_id", "scan_id", "n_slice"))
    found: dict[Scan, int] = {}
    for number, row in enumerate(rows, 1):
        kind, slices = row["label"].strip(), row["n_slice"].strip()
        if kind not in CLASSES or not slices.isdecimal():
            raise UserError(
                f"{path}, row {number}: label {kind!r} and n_slice {slices!r}: expected one of {CLASSES}, a number"
            )
        found[kind, row["patient_id"].strip(), row["scan_id"].strip()] = int(slices)
    return found


def _check_one_class(listing: Listing) -> None:
    """Notes patients who are in several classes: they stay in one fold."""
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for example in listing.examples:
        kinds.setdefault(example.patient, set()).add(example.labels)
    if several := sum(len(found) > 1 for found in kinds.values()):
        listing.notes.append(f"{several} patients have scans of several classes")


# The whole scan resized, as it has no spacing; slices run from the apex down, in a lung window of 1500 around -600 HU.
CC_CCII = Source(
    list_cc_ccii,
    {
        "size": (128, 128, 96),
        "policy": "fraction",
        "fraction": (1.0, 1.0, 1.0),
        "array_spacing": (1.0, 1.0, 1.0),
        "array_axes": "LPI",
        "slice_window": (-1350.0, 150.0),
    },
)
