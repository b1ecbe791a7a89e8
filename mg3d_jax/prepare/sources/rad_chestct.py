"""Rad-ChestCT: `npz/*.npz` and `img{train,valid,test}_Abnormality_and_Location_Labels.csv`. Its reports are not public."""

from __future__ import annotations

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.rad_chestct import MAPPINGS
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, index_by_name, second_file
from mg3d_jax.prepare.tables import Row, label_value, read_table, require_columns

SPLITS = ("train", "valid", "test")
_ID = "NoteAcc_DEID"
_ABOUT = Metadata(spacing=(0.8, 0.8, 0.8), axes="IPL")  # of the published arrays: z, y, x


def list_rad_chestct(options: SourceOptions) -> Listing:
    """Rad-ChestCT: arrays of 0.8 mm in HU anywhere below ROOT, and a table of labels per split. A finding is present where
    one of the abnormalities that the mapping names is there at any place."""
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split!r}: Rad-ChestCT has {list(SPLITS)}")
    path = options.root / f"img{options.split}_Abnormality_and_Location_Labels.csv"
    rows = read_table(path)
    require_columns(path, rows, (_ID,))
    mapping = MAPPINGS[options.label_mapping]
    columns = {
        name: [c for c in rows[0] if c.partition("*")[0] in mapping[name]] for name in ABNORMALITIES if name in mapping
    }
    if lost := [name for name, found in columns.items() if not found]:
        raise UserError(
            f"{path} has no column ABNORMALITY*PLACE for {lost}, which the mapping {options.label_mapping!r} needs"
        )
    listing = Listing(
        [], ABNORMALITIES, notes=[f"labels by the mapping {options.label_mapping}; Rad-ChestCT has no reports"]
    )
    if unmapped := [name for name in ABNORMALITIES if name not in mapping]:
        listing.notes.append(f"not in this mapping, every label unknown: {', '.join(unmapped)}")
    volumes = index_by_name(options.root)
    seen: set[str] = set()
    for row in rows:
        name = row[_ID].strip()
        if name in seen:
            listing.add_bad(path, f"second row of {name}")
        elif name not in volumes and not options.streaming:
            listing.add_bad(options.root / "npz" / f"{name}.npz", "labels without a volume")
        else:
            volume = volumes[name][0] if name in volumes else options.root / "npz" / f"{name}.npz"
            labels = tuple(_label(path, row, columns.get(label, [])) for label in ABNORMALITIES)
            listing.examples.append(
                Example(volume, volume.name, name, name, "", "", labels, _ABOUT, "rad-chestct", has_report=False)
            )
            for other in volumes.get(name, [])[1:]:
                listing.add_bad(other, second_file(name, volume))
        seen.add(name)
    for other_split in SPLITS:
        other_path = options.root / path.name.replace(f"img{options.split}", f"img{other_split}")
        if other_split != options.split and other_path.is_file():
            listing.other_splits[other_split] = {row.get(_ID, "").strip() for row in read_table(other_path)}
    others = set().union(*listing.other_splits.values())
    for name in sorted(volumes.keys() - seen - others):
        listing.add_bad(volumes[name][0], "a volume without labels")
    return listing


def _label(path: object, row: Row, columns: list[str]) -> int:
    values = []
    for column in columns:
        value = label_value(row[column])
        if value is None:
            raise UserError(f"{path}: the label in column {column!r} of {row[_ID]} is {row[column]!r}: expected 1 or 0")
        values.append(value)
    if 1 in values:
        return 1
    return 0 if values and all(value == 0 for value in values) else UNKNOWN_LABEL
