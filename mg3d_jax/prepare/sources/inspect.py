"""INSPECT, CT of pulmonary embolism: `full/CTPA/*.nii.gz` and three tables of tab-separated values; impressions only."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, index_by_name, second_file
from mg3d_jax.prepare.names import without_suffix
from mg3d_jax.prepare.tables import Row, read_table, require_columns

_KEY = "impression_id"
_IMAGE = ("image_id", "image", "filename", "file", "volume")
_PATIENT = ("person_id", "patient_id", "patient")
_TEXT = ("impressions", "impression", "report", "text")


def _table(folder: Path, stem: str) -> tuple[Path, dict[str, Row]]:
    """(path, impression id -> row) of the one table whose name begins so."""
    found = sorted([*folder.glob(f"{stem}*.tsv"), *folder.glob(f"{stem}*.csv")])
    if len(found) != 1:
        raise UserError(f"{folder}: expected one table {stem}_*.tsv, found {[path.name for path in found]}")
    rows = read_table(found[0])
    require_columns(found[0], rows, (_KEY,))
    return found[0], {row[_KEY].strip(): row for row in rows}


def _column(path: Path, rows: dict[str, Row], names: tuple[str, ...]) -> str:
    columns = list(next(iter(rows.values())))
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
    image, text = _column(map_path, studies, _IMAGE), _column(text_path, texts, _TEXT)
    patient = next((name for name in _PATIENT if name in next(iter(studies.values()))), None)
    split_column = _column(split_path, splits, ("split", "Split"))
    wanted = {"val": "valid"}.get(options.split, options.split)
    there = sorted({row[split_column].strip() for row in splits.values()})
    if wanted not in there:
        raise UserError(f"--split {options.split!r}: the column {split_column!r} of {split_path} has {there}")
    volumes, seen = index_by_name(folder), set[str]()
    listing = Listing([], (), notes=["INSPECT has impressions only, and no labels of findings"])
    for key, row in studies.items():
        stem, split = without_suffix(row[image].strip()), splits.get(key, {}).get(split_column, "").strip()
        person = row[patient].strip() if patient else stem
        if split and split != wanted:
            listing.other_splits.setdefault(split, set()).add(person)
            seen.add(stem)
            continue
        impression = listing.clean(texts.get(key, {}).get(text))
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
