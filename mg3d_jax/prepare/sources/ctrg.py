"""CTRG-Chest: one json with the reports of every split, volumes anywhere beneath it."""

from __future__ import annotations

import json

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.listing import (
    Example,
    Listing,
    SourceOptions,
    index_by_name,
    outside_metadata,
    second_file,
)
from mg3d_jax.prepare.names import without_suffix


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
    paths = index_by_name(root)
    volumes = {stem: found[0] for stem, found in paths.items()}
    listing = Listing([], ABNORMALITIES, notes=["CTRG has no labels: every label is unknown"])
    seen: set[str] = set()
    for row in content[split]:
        if not isinstance(row, dict) or "id" not in row:
            listing.add_bad(path, f"a row without id: {str(row)[:80]}")
            continue
        name = str(row["id"])
        stem = without_suffix(name)
        findings, impression = listing.clean(row.get("report")), listing.clean(row.get("result"))
        volume = volumes.get(stem, root / name if options.streaming else None)
        if stem in seen:
            listing.add_bad(path, f"second report row of {name}")
        elif volume is None:
            listing.add_bad(root / name, "a report without a volume")
        elif not findings and not impression:
            listing.add_bad(volume, "empty report")
        else:
            unknown = (UNKNOWN_LABEL,) * len(ABNORMALITIES)
            about = outside_metadata(volume, options)
            listing.examples.append(Example(volume, name, stem, stem, findings, impression, unknown, about, "ctrg"))
        seen.add(stem)
    listing.other_splits = {
        other: {without_suffix(str(row.get("id"))) for row in rows if isinstance(row, dict)}
        for other, rows in content.items()
        if other != split and isinstance(rows, list)
    }
    others = set().union(*listing.other_splits.values()) - seen
    for stem in sorted(volumes.keys() - others):
        if stem not in seen:
            listing.add_bad(volumes[stem], "a volume without a report")
        for path in paths[stem][1:]:
            listing.add_bad(path, second_file(stem, volumes[stem]))
    return listing
