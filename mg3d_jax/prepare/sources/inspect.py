"""INSPECT, CT of pulmonary embolism: `full/CTPA/*.nii.gz` and three tables of tab-separated values; impressions only."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, index_by_name, second_file
from mg3d_jax.prepare.names import split_name, without_suffix
from mg3d_jax.prepare.tables import Row, read_table, require_columns

_KEY = "impression_id"
_IMAGE = ("image_id", "image", "filename", "file", "volume")
_PATIENT = ("person_id", "patient_id", "patient")
_TEXT = ("impressions", "impression", "report", "text")


def _table(folder: Path, stem: str) -> tuple[Path, list[Row]]:
    """(path, rows) of the one table whose name begins so."""
    found = sorted([*folder.glob(f"{stem}*.tsv"), *folder.glob(f"{stem}*.csv")])
    if len(found) != 1:
        raise UserError(f"{folder}: expected one table {stem}_*.tsv, found {[path.name for path in found]}")
    rows = read_table(found[0])
    require_columns(found[0], rows, (_KEY,))
    return found[0], rows


def _by_study(path: Path, rows: list[Row], column: str, listing: Listing) -> dict[str, str]:
    """Impression id -> the cell of its row. The published tables have some rows twice; those that differ are no statement."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row[_KEY].strip(), set()).add(row[column].strip())
    if (repeated := len(rows) - len(found)) and all(len(cells) == 1 for cells in found.values()):
        listing.notes.append(f"{path.name}: {repeated} rows repeat an {_KEY} that has one already")
    for key in [key for key, cells in found.items() if len(cells) > 1]:
        listing.add_bad(path, f"the rows of {key} differ in {column!r}: {' and '.join(sorted(found.pop(key)))[:120]}")
    return {key: next(iter(cells)) for key, cells in found.items()}


def _column(path: Path, rows: list[Row], names: tuple[str, ...]) -> str:
    columns = list(rows[0])
    if column := next((name for name in names if name in columns), None):
        return column
    raise UserError(f"{path} has none of the columns {list(names)}; it has {columns}")


def list_inspect(options: SourceOptions) -> Listing:
    """INSPECT: ROOT holds `full/` (or is it): volumes below it, and `study_mapping_*`, `impressions_*` and `splits_*` joined by
    `impression_id`. About 20 of the published scans are known to be unreadable: they are listed as bad."""
    folder = options.root / "full" if (options.root / "full").is_dir() else options.root
    (map_path, studies), (text_path, texts), (split_path, splits) = (
        _table(folder, stem) for stem in ("study_mapping", "impressions", "splits")
    )
    listing = Listing([], (), notes=["INSPECT has impressions only, and no labels of findings"])
    image = _column(map_path, studies, _IMAGE)
    text_of = _by_study(text_path, texts, _column(text_path, texts, _TEXT), listing)
    split_column = _column(split_path, splits, ("split", "Split"))
    split_of = {key: split_name(name) for key, name in _by_study(split_path, splits, split_column, listing).items()}
    wanted, there = split_name(options.split), sorted(set(split_of.values()))
    if wanted not in there:
        raise UserError(f"--split {options.split!r}: the column {split_column!r} of {split_path} has {there}")
    patients = _patients((map_path, studies), (text_path, texts), (split_path, splits), listing=listing)
    volumes, seen = index_by_name(folder), set[str]()
    for row in _distinct(studies, image):
        key, stem = row[_KEY].strip(), without_suffix(row[image].strip())
        split, person = split_of.get(key, ""), patients.get(key, stem)
        if not stem:
            listing.add_bad(map_path, f"{key} has no {image}")
            continue
        if split and split != wanted:
            listing.other_splits.setdefault(split, set()).add(person)
            seen.add(stem)
            continue
        impression = listing.clean(text_of.get(key, ""))
        volume = volumes[stem][0] if stem in volumes else folder / "CTPA" / f"{stem}.nii.gz"
        if not split:
            listing.add_bad(volume, f"{key} is in no split of {split_path.name}")
        elif stem in seen:
            listing.add_bad(map_path, f"second row of {stem}")
        elif stem not in volumes and not options.streaming:
            listing.add_bad(volume, "a report without a volume")
        elif not impression:
            listing.add_bad(volume, "empty report")
        else:
            listing.examples.append(
                Example(volume, f"{stem}.nii.gz", person, stem, "", impression, (), Metadata(), "inspect")
            )
            for other in volumes.get(stem, [])[1:]:
                listing.add_bad(other, second_file(stem, volume))
        seen.add(stem)
    for stem in sorted(volumes.keys() - seen):
        listing.add_bad(volumes[stem][0], "a volume without a report")
    return listing


def _distinct(rows: list[Row], image: str) -> list[Row]:
    """Without rows that say the same study and file again."""
    return list({(row[_KEY].strip(), row[image].strip()): row for row in rows}.values())


def _patients(*tables: tuple[Path, list[Row]], listing: Listing) -> dict[str, str]:
    """Impression id -> patient, of the first table that says so; without one every scan is a patient, which is said."""
    for path, rows in tables:
        if column := next((name for name in _PATIENT if name in rows[0]), None):
            return {key: person for key, person in _by_study(path, rows, column, listing).items() if person}
    listing.notes.append(
        f"no table has one of the columns {', '.join(_PATIENT)}: every scan counts as a patient of its own"
    )
    return {}
