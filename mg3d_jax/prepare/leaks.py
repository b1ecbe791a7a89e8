"""Leak checks: what must not be in two splits, or twice in one.

Each finding has a name; `--allow-leak NAME` lets it pass, on purpose and on the record (the manifest lists it).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.data.records import INDEX_NAME, read_manifest
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_lines
from mg3d_jax.prepare.duplicates import Volume, same_content
from mg3d_jax.prepare.listing import Example, Listing
from mg3d_jax.prepare.quality import QUALITY_NAME

logger = logging.getLogger(__name__)

LEAKS = {
    "identical-split": "two splits list the same patients",
    "patient-in-two-splits": "a patient is in two splits",
    "duplicate-volume": "the same voxels under two patients, or in two splits",
}
_SHOWN = 10
_WITHIN, _FILES = "within the split", ", identical files"  # where a volume is twice, and by what that was seen


@dataclass(frozen=True)
class Leak:
    """One finding: its name in `LEAKS`, with what, and which."""

    name: str
    where: str
    items: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.items[:_SHOWN]) + (", ..." if len(self.items) > _SHOWN else "")
        return f"{self.name} ({self.where}): {len(self.items)}: {shown}"


def listed_leaks(listing: Listing) -> list[Leak]:
    """Leaks between the split that was listed and the data set's other splits, by patient."""
    patients = {example.patient for example in listing.examples}
    leaks = []
    for other, others in sorted(listing.other_splits.items()):
        shared = tuple(sorted(patients & others))
        if shared and patients == others:
            leaks.append(Leak("identical-split", f"and split {other!r}", shared))
        elif shared:
            leaks.append(Leak("patient-in-two-splits", f"and split {other!r}", shared))
    return leaks


def read_index(folder: Path) -> list[dict[str, str]]:
    """Entries of a prepared folder: name, patient, report_id and content hash of every record. Raises `UserError` where
    one is missing: a leak would not be found."""
    path = Path(folder) / INDEX_NAME
    records = read_manifest(folder)["records"]
    try:
        entries, damaged = read_lines(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the folder again") from error
    if damaged or len(entries) != records:
        raise UserError(
            f"{path} has {len(entries)} whole lines and {damaged} damaged ones for {records} records: prepare the folder "
            "again"
        )
    return entries


def patient_leaks(examples: list[Example], against: list[Path]) -> list[Leak]:
    """Leaks between examples and folders that are prepared already, by patient."""
    leaks = []
    patients = {example.patient for example in examples}
    for folder in against:
        others = {patient for patient, _ in read_manifest(folder)["patients"]}
        shared = tuple(sorted(patients & others))
        if shared:
            name = "identical-split" if patients == others else "patient-in-two-splits"
            leaks.append(Leak(name, f"and {folder}", shared))
    return leaks


def file_leaks(examples: list[Example], against: list[Path]) -> list[Leak]:
    """Volumes with the same content under two patients, or here and in a prepared folder whose volumes are where they were:
    found before any is prepared."""
    own = [Volume(example.path, example.name, example.patient) for example in examples]
    groups = same_content([*own, *(one for folder in against for one in _made_of(folder))])
    leaks = []
    within = [[one for one in group if not one.folder] for group in groups]
    if items := tuple(_equal(group) for group in within if len({one.patient for one in group}) > 1):
        leaks.append(Leak("duplicate-volume", f"{_WITHIN}{_FILES}", items))
    for folder in map(str, against):
        shared = [[one for one in group if one.folder in ("", folder)] for group in groups]
        if items := tuple(_equal(group) for group in shared if any(one.folder for one in group)):
            leaks.append(Leak("duplicate-volume", f"and {folder}{_FILES}", items))
    return leaks


def _equal(group: list[Volume]) -> str:
    return " = ".join(one.name for one in group)


def _made_of(folder: Path) -> list[Volume]:
    """The volumes of which a prepared folder was made, as far as they are there."""
    patients = {entry["name"]: entry["patient"] for entry in read_index(folder)}
    lines, _ = read_lines(Path(folder) / QUALITY_NAME)
    found = [
        Volume(Path(line["path"]), line["name"], patients[line["name"]], str(folder))
        for line in lines
        if line["name"] in patients and Path(line["path"]).exists()
    ]
    if gone := len(patients) - len(found):
        logger.info(
            "prepare: %d volumes of %s are not where they were: compared once the new ones are read", gone, folder
        )
    return found


def check_comparable(against: list[Path], grid: dict[str, Any]) -> None:
    """Reads what `content_leaks` will, and says where voxels cannot be equal: `grid` has what decides them."""
    for folder in against:
        read_index(folder)
        settings = read_manifest(folder).get("settings", {})
        if other := sorted(key for key, value in grid.items() if settings.get(key) != value):
            logger.warning(
                "prepare: %s has other %s: the same volume has other voxels there, and is found only by its patient or file",
                folder, ", ".join(other),
            )  # fmt: skip


def content_leaks(entries: list[dict[str, str]], against: list[Path]) -> list[Leak]:
    """Equal voxels under two patients of these entries, or here and in a prepared folder of the same grid."""
    by_content: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in entries:
        by_content[entry["content"]].append(entry)
    leaks = []
    twice = [found for found in by_content.values() if len({entry["patient"] for entry in found}) > 1]
    if twice:
        items = tuple(" = ".join(entry["name"] for entry in found) for found in twice)
        leaks.append(Leak("duplicate-volume", _WITHIN, items))
    for folder in against:
        others = {entry["content"]: entry["name"] for entry in read_index(folder)}
        shared = tuple(
            f"{entry['name']} = {others[entry['content']]}" for entry in entries if entry["content"] in others
        )
        if shared:
            leaks.append(Leak("duplicate-volume", f"and {folder}", shared))
    return leaks


def merged(listed: list[Leak], found: list[Leak]) -> list[Leak]:
    """Those of both; a volume that is twice by its file, and then by its voxels, once."""
    seen = {f"{leak.where}{_FILES}" for leak in found}
    return [leak for leak in listed if leak.where not in seen] + found


def check(leaks: list[Leak], allowed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Raises `UserError` for leaks that are not allowed; returns the allowed ones for the manifest."""
    if forbidden := [leak for leak in leaks if leak.name not in allowed]:
        lines = "\n".join(f"  {leak}" for leak in forbidden)
        names = " ".join(sorted({leak.name for leak in forbidden}))
        raise UserError(f"the data leak between splits or patients:\n{lines}\nif that is meant: --allow-leak {names}")
    return [{"name": leak.name, "where": leak.where, "items": list(leak.items)} for leak in leaks]
