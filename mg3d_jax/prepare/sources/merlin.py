"""Merlin, abdominal CT: `merlin_data/*.nii.gz` and `reports_final.xlsx` with the whole report in one column."""

from __future__ import annotations

import re

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions, index_by_name, second_file
from mg3d_jax.prepare.names import split_name, without_suffix
from mg3d_jax.prepare.reports import split_sections
from mg3d_jax.prepare.tables import find_table, read_table, require_columns

_LIST = re.compile(r"(?:^|(?<=[\n.]))\s*1\s?[.)]\s*(?=\S)")
_TABLES = ("reports_final_updated", "reports_final")  # the newer one first


def list_merlin(options: SourceOptions) -> Listing:
    """Merlin: volumes anywhere below ROOT by their study id, `reports_final.xlsx` (or csv; `reports_final_updated` goes
    first) with `study id`, `Split`, `Findings`. A patient is a study: Merlin says no more. There are no labels."""
    nested = options.root / "merlinabdominalctdataset"
    root = nested if nested.is_dir() else options.root
    tables = [path for stem in _TABLES if (path := find_table(root, stem))]
    path = tables[0] if tables else root / "reports_final.xlsx"
    rows = read_table(path)
    require_columns(path, rows, ("study id", "Split", "Findings"))
    wanted = split_name(options.split)
    splits = sorted({split_name(row["Split"]) for row in rows})
    if wanted not in splits:
        raise UserError(f"--split {options.split!r}: the column 'Split' of {path} has {splits}")
    volumes, seen = index_by_name(root), set[str]()
    listing = Listing([], (), notes=["Merlin has no labels", *(f"{path.name} taken, not {t.name}" for t in tables[1:])])
    for row in rows:
        study, split = without_suffix(row["study id"].strip()), split_name(row["Split"])
        if not study:
            listing.add_bad(path, f"a row without a study id: {row['Findings'][:60]!r}")
            continue
        if split != wanted:
            listing.other_splits.setdefault(split, set()).add(study)
            continue
        findings, impression = merlin_sections(listing.clean(row["Findings"]))
        volume = volumes[study][0] if study in volumes else root / "merlin_data" / f"{study}.nii.gz"
        if study in seen:
            listing.add_bad(path, f"second report row of {study}")
        elif study not in volumes and not options.streaming:
            listing.add_bad(volume, "a report without a volume")
        elif not findings and not impression:
            listing.add_bad(volume, "empty report")
        else:
            name = f"{study}.nii.gz"
            listing.examples.append(Example(volume, name, study, study, findings, impression, (), Metadata(), "merlin"))
            for other in volumes.get(study, [])[1:]:
                listing.add_bad(other, second_file(study, volume))
        seen.add(study)
    others = set().union(*listing.other_splits.values())
    for study in sorted(volumes.keys() - seen - others):
        listing.add_bad(volumes[study][0], "a volume without a report")
    return listing


def merlin_sections(text: str) -> tuple[str, str]:
    """(findings, impression): at the heading of the impression, else at a numbered list that begins with 1 and has a 2."""
    findings, impression = split_sections(text)
    if impression:
        return findings, impression
    for match in _LIST.finditer(text):
        if match.start() and re.search(r"(?:^|[\n.]|\s)\s*2\s?[.)]\s*\S", text[match.end() :]):
            return split_sections(text[: match.start()])[0], text[match.start() :].strip()
    return findings, ""
