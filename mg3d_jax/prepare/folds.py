"""Folds by patient, for data sets without an official held-out part: `mg3d prepare --split SPLIT --fold I/N`.

A fold is a folder of its own, so that every record is on disk once: a model is trained on some of the folders
(`data.train=[F1,F2,F3,F4]`) and evaluated on another. Patients with the same labels are dealt to the folds in turn, in an order
drawn from a seed. As who is dealt after whom depends on who is there, the fold of every patient is kept in a file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.prepare.listing import Example, Listing


def assign(examples: list[Example], count: int, seed: int) -> dict[str, int]:
    """Patient -> fold, from 0 to `count - 1`. Each fold has its share of every combination of labels."""
    seen: dict[str, tuple[int, ...]] = {}
    for example in examples:
        before = seen.get(example.patient, example.labels)
        seen[example.patient] = tuple(map(max, before, example.labels))

    def place(patient: str) -> tuple[tuple[int, ...], bytes]:
        return seen[patient], hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    return {patient: number % count for number, patient in enumerate(sorted(seen, key=place))}


def keep_fold(listing: Listing, fold: tuple[int, int], *, seed: int = 0, file: Path | None = None) -> None:
    """Keeps the examples of fold (i, n), i from 0; the patients of the others become other splits, for the leak checks.

    Args:
        file: the folds of all patients, `{"seed", "folds", "patients": {patient: fold}}`: read where it is there, written
            where not.

    Raises:
        UserError: fewer patients than folds, or the file is of other folds or lacks a patient.
    """
    index, count = fold
    patients = {example.patient for example in listing.examples}
    if len(patients) < count:
        raise UserError(f"--fold {index}/{count}: there are only {len(patients)} patients")
    folds = _read(file, fold, seed, patients) if file is not None and file.is_file() else None
    if folds is None:
        folds = assign(listing.examples, count, seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)  # often that of the folders, which are not there yet
            write_json(file, {"seed": seed, "folds": count, "patients": dict(sorted(folds.items()))})
    listing.examples = [example for example in listing.examples if folds[example.patient] == index]
    for other in range(count):
        if other != index:
            listing.other_splits[f"fold {other}"] = {name for name in patients if folds[name] == other}
    listing.notes.append(
        f"fold {index} of {count} (seed {seed}): {len({e.patient for e in listing.examples})} patients"
    )


def _read(file: Path, fold: tuple[int, int], seed: int, patients: set[str]) -> dict[str, int]:
    content = read_json(file, remedy="delete it to have it written anew")
    found = content.get("patients") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f'{file} is no file of folds: it needs {{"seed", "folds", "patients": {{patient: fold}}}}')
    if (content.get("folds"), content.get("seed")) != (fold[1], seed):
        raise UserError(
            f"{file} has {content.get('folds')} folds of seed {content.get('seed')}, asked for {fold[1]} of seed {seed}"
        )
    if lacking := sorted(patients - found.keys()):
        raise UserError(f"{file} has no fold for {len(lacking)} patients, such as {lacking[0]}: add them, or delete it")
    if wrong := sorted(name for name in patients if found[name] not in range(fold[1])):
        raise UserError(f"{file}: the fold of {wrong[0]} is {found[wrong[0]]!r}, expected 0 to {fold[1] - 1}")
    return {name: int(found[name]) for name in patients}
