"""LUNA16: `subset0/` to `subset9/` with `.mhd` volumes, `candidates_V2.csv`, `annotations.csv`. A record is a patch around a
candidate."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions, second_file
from mg3d_jax.prepare.tables import Row, numbers, read_table, require_columns

SUBSETS = tuple(f"subset{number}" for number in range(10))
# As Zhou et al. 2019 (Models Genesis) divide the ten folds that the challenge publishes.
SPLITS = {"train": SUBSETS[:5], "valid": SUBSETS[5:7], "test": SUBSETS[7:]} | {name: (name,) for name in SUBSETS}
CANDIDATES = ("candidates_V2.csv", "candidates.csv")
ANNOTATIONS = "annotations.csv"
_PLACE = ("coordX", "coordY", "coordZ")  # mm, LPS
_CLASSES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
Place = tuple[float, float, float]


def list_luna16(options: SourceOptions) -> Listing:
    """One example per candidate of the split's subsets, centred on it. Label `Nodule`. All nodules are kept, and
    `negatives` of the other candidates of a scan (0: all), the same ones every time. A patient is a series."""
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split!r}: LUNA16 has {', '.join(SPLITS)}")
    root = options.root
    table = next((root / name for name in CANDIDATES if (root / name).is_file()), root / CANDIDATES[0])
    candidates = _by_series(table, ("class",))
    listing = Listing([], ("Nodule",))
    volumes = _volumes(listing, root)
    here = [subset for subset in SPLITS[options.split] if (root / subset).is_dir()]
    if lacking := [subset for subset in SPLITS[options.split] if subset not in here]:
        listing.notes.append(f"{', '.join(lacking)}: not there, so not in the split")
    if all((root / subset).is_dir() for subset in SUBSETS):
        for series in sorted(candidates.keys() - volumes.keys()):
            listing.add_bad(root / f"{series}.mhd", f"listed in {table.name}, but in none of the subsets")
    left_out = 0
    for series, (subset, path) in sorted(volumes.items()):
        if subset in here:
            found = [(place, _class(table, row)) for place, row in candidates.get(series, [])]
            kept = _kept(series, found, options.negatives)
            left_out += len(found) - len(kept)
            listing.examples += [_example(path, series, place, label) for place, label in kept]
    if left_out:
        listing.skipped[f"candidates that are no nodule, beyond {options.negatives} of a scan (--negatives)"] = left_out
    _check_annotations(listing, root / ANNOTATIONS, candidates, table)
    for split in ("train", "valid", "test"):
        if not set(SPLITS[split]) & set(SPLITS[options.split]):
            listing.other_splits[split] = {series for series, (subset, _) in volumes.items() if subset in SPLITS[split]}
    return listing


def _volumes(listing: Listing, root: Path) -> dict[str, tuple[str, Path]]:
    """Series -> its subset and file."""
    found: dict[str, tuple[str, Path]] = {}
    for subset in SUBSETS:
        for path in sorted((root / subset).glob("*.mhd")):
            if path.stem in found:
                listing.add_bad(path, second_file(path.stem, found[path.stem][1]))
            else:
                found[path.stem] = subset, path
    if not found:
        raise UserError(f"{root} is not LUNA16's folder: it has no subset0/ to subset9/ with .mhd files")
    return found


def _by_series(path: Path, more: tuple[str, ...]) -> dict[str, list[tuple[Place, Row]]]:
    """The rows of a table with their places, by series. `UserError` for a place that is none."""
    rows = read_table(path)
    require_columns(path, rows, ("seriesuid", *_PLACE, *more))
    found: dict[str, list[tuple[Place, Row]]] = {}
    for number, row in enumerate(rows, 1):
        place = [numbers(row[axis]) for axis in _PLACE]
        if any(value is None or len(value) != 1 for value in place):
            raise UserError(
                f"{path}, row {number}: the place {[row[axis] for axis in _PLACE]} is not three numbers (mm)"
            )
        x, y, z = (value[0] for value in place if value)
        found.setdefault(row["seriesuid"].strip(), []).append(((x, y, z), row))
    return found


def _class(path: Path, row: Row) -> int:
    if (text := row["class"].strip()) not in _CLASSES:
        raise UserError(f"{path}: the class of a candidate of {row['seriesuid']} is {text!r}, expected 0 or 1")
    return _CLASSES[text]


def _kept(series: str, found: list[tuple[Place, int]], negatives: int) -> list[tuple[Place, int]]:
    """All nodules, and so many of the others, drawn by a hash of what they are."""
    others = [one for one in found if not one[1]]
    if negatives and len(others) > negatives:
        others = sorted(others, key=lambda one: hashlib.sha256(f"{series}{one[0]}".encode()).digest())[:negatives]
    return sorted([one for one in found if one[1]] + others)


def _example(path: Path, series: str, place: Place, label: int) -> Example:
    x, y, z = place
    about = Metadata(centre=(-x, -y, z))  # LPS -> RAS
    name = f"{series}_{x:g}_{y:g}_{z:g}"
    return Example(path, name, series, name, "", "", (label,), about, "luna16", has_report=False)


def _check_annotations(
    listing: Listing, path: Path, candidates: dict[str, list[tuple[Place, Row]]], table: Path
) -> None:
    """Notes annotated nodules that no candidate marked as a nodule lies in: they are in no record."""
    if not path.is_file():
        listing.notes.append(f"{path} is missing: whether every nodule has a candidate was not checked")
        return
    missed = 0
    series = {example.patient for example in listing.examples}
    annotations = _by_series(path, ("diameter_mm",))
    for name in series & annotations.keys():
        nodules = [place for place, row in candidates.get(name, []) if _class(table, row)]
        for place, row in annotations[name]:
            reach = (numbers(row["diameter_mm"]) or (0.0,))[0] / 2
            missed += not any(math.dist(place, other) <= reach for other in nodules)
    if missed:
        listing.notes.append(f"{missed} annotated nodules have no candidate of class 1 within their radius")


LUNA16 = Source(list_luna16, {"size": (64, 64, 64), "spacing": (1.0, 1.0, 1.0)})
