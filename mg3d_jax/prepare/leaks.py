"""Leak checks: what must not be in two splits, or twice in one.

Each finding has a name; `--allow-leak NAME` lets it pass, on purpose and on the record (the manifest lists it).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.data.records import INDEX_NAME, file_digest, read_manifest
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_lines
from mg3d_jax.prepare.listing import Example, Listing

LEAKS = {
    "identical-split": "two splits list the same patients",
    "patient-in-two-splits": "a patient is in two splits",
    "duplicate-volume": "the same voxels under two patients, or in two splits",
}
_SHOWN = 10


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


def file_leaks(examples: list[Example]) -> list[Leak]:
    """Files of different patients with the same content, found before any volume is read: of equal size, then equal bytes."""
    by_size: dict[int, dict[Path, Example]] = defaultdict(dict)
    for example in examples:
        if example.path.is_file():
            by_size[example.path.stat().st_size][example.path] = example
    twins: dict[str, list[Example]] = defaultdict(list)
    for size, found in by_size.items():
        if len({example.patient for example in found.values()}) > 1:
            for digest, alike in _alike(list(found.values()), _blocks).items():
                if len(alike) > 1:
                    for content, same in _alike(alike, lambda path: file_digest(path)).items():
                        twins[f"{size} {digest} {content}"] += same
    items = tuple(" = ".join(e.name for e in same) for same in twins.values() if len({e.patient for e in same}) > 1)
    return [Leak("duplicate-volume", "identical files", items)] if items else []


def _alike(examples: list[Example], digest: Callable[[Path], str]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[digest(example.path)].append(example)
    return found


def _blocks(path: Path) -> str:
    """Digest of the first, middle and last 64 KiB of a file."""
    size, content = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for start in (0, size // 2, max(size - 65_536, 0)):
            file.seek(start)
            content.update(file.read(65_536))
    return content.hexdigest()


def content_leaks(entries: list[dict[str, str]], against: list[Path]) -> list[Leak]:
    """Equal voxels under two patients of these entries, or here and in a prepared folder of the same grid."""
    by_content: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in entries:
        by_content[entry["content"]].append(entry)
    leaks = []
    twice = [found for found in by_content.values() if len({entry["patient"] for entry in found}) > 1]
    if twice:
        items = tuple(" = ".join(entry["name"] for entry in found) for found in twice)
        leaks.append(Leak("duplicate-volume", "within the split", items))
    for folder in against:
        others = {entry["content"]: entry["name"] for entry in read_index(folder)}
        shared = tuple(
            f"{entry['name']} = {others[entry['content']]}" for entry in entries if entry["content"] in others
        )
        if shared:
            leaks.append(Leak("duplicate-volume", f"and {folder}", shared))
    return leaks


def check(leaks: list[Leak], allowed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Raises `UserError` for leaks that are not allowed; returns the allowed ones for the manifest."""
    if forbidden := [leak for leak in leaks if leak.name not in allowed]:
        lines = "\n".join(f"  {leak}" for leak in forbidden)
        names = " ".join(sorted({leak.name for leak in forbidden}))
        raise UserError(f"the data leak between splits or patients:\n{lines}\nif that is meant: --allow-leak {names}")
    return [{"name": leak.name, "where": leak.where, "items": list(leak.items)} for leak in leaks]
