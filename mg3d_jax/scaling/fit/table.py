"""Rows of runs from a CSV file: every row is used or excluded with a reason; none is dropped silently."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError

USED, EXCLUDED, MISSING = "used", "excluded", "missing"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass
class Row:
    """One run. `sizes` are the variables of the law, NaN where unknown; `label` names the run or the row of the file."""

    label: str
    sizes: dict[str, float]
    loss: float = math.nan
    status: str = USED
    reason: str = ""
    group: str | None = None  # rows of one group share noise
    subset: str | None = None  # rows of one data subset share noise
    compute: float = math.nan  # FLOPs
    extra: dict[str, Any] = field(default_factory=dict)  # further columns of runs.csv
    tested: tuple[str, ...] | None = None  # which of them residuals may depend on; None: all

    def exclude(self, reason: str) -> None:
        self.status, self.reason = EXCLUDED, reason


def used(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.status == USED]


def columns(rows: Sequence[Row], variables: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The variables and the loss, float64 [rows] each."""
    sizes = {name: np.asarray([row.sizes[name] for row in rows], np.float64) for name in variables}
    return sizes, np.asarray([row.loss for row in rows], np.float64)


def exclude_unusable(rows: Sequence[Row], names: Mapping[str, str]) -> None:
    """Excludes every row with a variable or loss that is no positive, finite number; `names`: what they are called."""
    for row in rows:
        for key, value in (*row.sizes.items(), ("loss", row.loss)):
            if row.status != USED:
                break
            name = names.get(key, key)
            if math.isnan(value):
                row.exclude(f"{name} is NaN or empty")
            elif math.isinf(value):
                row.exclude(f"{name} is infinite")
            elif value <= 0:
                row.exclude(f"{name} is {value:g}; it must be > 0")


def read_table(
    path: Path,
    variables: Mapping[str, str],
    loss: str,
    group: Sequence[str] = (),
    *,
    subset: Sequence[str] = (),
    compute: str | None = None,
) -> list[Row]:
    """Reads the named columns of a CSV file, separated by commas, semicolons or tabs.

    Args:
        variables: variable of the law -> column.
        group: columns whose values together name rows that share noise.
        subset: columns that name, within one data amount, the data subset that rows share.
        compute: column of the FLOPs.

    Raises `UserError` if the file cannot be read, lacks a column, or has no usable row; a bad cell excludes its row and
    says why.
    """
    header, records = _read(path)
    wanted = [*variables.values(), loss]
    if twice := [name for name, count in Counter(wanted).items() if count > 1]:
        raise UserError(
            f"{path}: column {twice[0]!r} is named twice; every variable and the loss have one of their own"
        )
    wanted += [*group, *subset, *([compute] if compute else [])]
    if absent := [name for name in wanted if name not in header]:
        raise UserError(f"{path}: no column {', '.join(map(repr, absent))}. Columns: {', '.join(header)}")
    if repeated := sorted({name for name in wanted if header.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(map(repr, repeated))} occurs more than once in the header")
    rows = [_row(number, line, cells, header, variables, loss) for number, (line, cells) in enumerate(records, start=1)]
    for row, (_, cells) in zip(rows, records, strict=True):
        if len(cells) == len(header):
            record = dict(zip(header, cells, strict=True))
            row.group = " | ".join(record[name].strip() for name in group) if group else None
            amount = row.sizes.get("D", row.sizes.get("U", row.sizes.get("x", 0.0)))
            row.subset = " | ".join([f"{amount:g}", *(record[name].strip() for name in subset)]) if subset else None
            row.compute = (_number(record[compute]) or math.nan) if compute else math.nan
            row.extra = {key: value for key, value in record.items() if key not in (*variables.values(), loss)}
    exclude_unusable(rows, {**variables, "loss": loss})
    if not used(rows):
        why = "; ".join(f"{row.label}: {row.reason}" for row in rows[:5]) or "it has a header only"
        more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise UserError(f"{path}: no usable row. {why}{more}")
    return rows


def _row(
    number: int, line: int, cells: Sequence[str], header: Sequence[str], variables: Mapping[str, str], loss: str
) -> Row:
    row = Row(f"row {number} (line {line})", dict.fromkeys(variables, math.nan))
    if len(cells) != len(header):
        row.exclude(f"{len(cells)} cells, the header has {len(header)}")
        return row
    record = dict(zip(header, cells, strict=True))
    for key, name in (*variables.items(), ("loss", loss)):
        value = _number(record[name])
        if value is None:
            comma = "; write decimals with a point" if "," in record[name] else ""
            row.exclude(f"{name} is {record[name]!r}, not a number{comma}")
        elif key == "loss":
            row.loss = value
        else:
            row.sizes[key] = value
    return row


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the non-empty records with the line each ends on; the delimiter is that of the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            records = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from error
    if not records:
        raise UserError(f"{path}: the table is empty")
    return [cell.strip().removeprefix("\ufeff") for cell in records[0][1]], records[1:]


def _number(text: str) -> float | None:
    """The float in a cell; NaN for an empty one, None for anything else."""
    text = text.strip()
    if not text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return None


def make_folder(out: Path) -> None:
    """Makes the folder of the results. `UserError` where a file is in its place."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: a file stands in the way ({error.filename}); name another folder") from error
