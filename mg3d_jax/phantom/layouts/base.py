"""What a layout declares, and how its files are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.files import remove_partials, write_bytes
from mg3d_jax.registry import LAYOUTS

MARKER = "phantom.json"
Files = Iterator[tuple[str, bytes]]  # path below the folder, content


@dataclass(frozen=True)
class Layout:
    """A miniature of one data set.

    Args:
        summary: what it holds, in a line.
        files: `(patients, seed) -> (path, content) of every file`, the same every time. Those of one patient do not depend on
            how many there are, as far as the layout allows.
        patients: how many there are where the caller does not say.
        generator: its version: a new number whenever the same seed gives other files.
    """

    summary: str
    files: Callable[[int, int], Files]
    patients: int = 40
    generator: int = 1


def make_miniature(out: Path, name: str, patients: int | None, seed: int) -> int:
    """Writes the miniature `name` of `LAYOUTS` into the folder `out`.

    Returns:
        How many files it wrote; 0 where `out` held the whole already.

    Raises:
        UserError: there is no such layout, or `out` holds something else.
    """
    layout: Layout = LAYOUTS[name]
    patients = layout.patients if patients is None else patients
    if patients < 1 or seed < 0:
        raise UserError(f"--patients {patients} --seed {seed}: at least one patient, and a seed of 0 or more")
    settings = {"layout": name, "patients": patients, "seed": seed, "generator": layout.generator}
    marker = out / MARKER
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Name a folder to write to.")
    found = _read(marker)
    if found is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no {MARKER}: it is no miniature. Name a new folder.")
    if found is not None and {key: found.get(key) for key in settings} != settings:
        raise UserError(f"{out} holds {found}, asked for {settings}. Name a new folder, or delete this one.")
    if found is not None and found.get("complete"):
        return 0
    _write(marker, json.dumps(settings | {"complete": False}, indent=1).encode())
    count = 0
    for path, content in layout.files(patients, seed):
        _write(out / path, content)
        count += 1
    _write(marker, json.dumps(settings | {"complete": True}, indent=1).encode())
    return count


def _read(marker: Path) -> dict | None:
    if not marker.exists():
        return None
    try:
        return dict(json.loads(marker.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{marker} is not readable ({error}). Name a new folder, or delete it.") from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    write_bytes(path, content, durable=False)


def csv_bytes(rows: list[dict[str, str]]) -> bytes:
    """A csv of these rows, which have the same keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
