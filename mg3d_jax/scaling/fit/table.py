"""Rows of runs from a CSV file: every row is used or excluded with a reason; none is dropped silently."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError

USED, EXCLUDED, MISSING = "used", "excluded", "missing"


@dataclass
class Row:
    """One run. `n`, `d` and `loss` are NaN where they are unknown; `label` names the run or the row of the file."""

    label: str
    n: float
    d: float
    loss: float
    status: str = USED
    reason: str = ""
    group: str | None = None  # rows of one group are drawn together by the bootstrap
    extra: dict[str, Any] = field(default_factory=dict)  # further columns of runs.csv

    def exclude(self, reason: str) -> None:
        self.status, self.reason = EXCLUDED, reason


def used(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.status == USED]


def columns(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and loss, float64 [rows]."""
    n, d, loss = (np.asarray([getattr(row, name) for row in rows], np.float64) for name in ("n", "d", "loss"))
    return n, d, loss


def exclude_unusable(rows: Sequence[Row], names: tuple[str, str, str] = ("N", "D", "loss")) -> None:
    """Excludes every row whose N, D or loss is not a positive, finite number; `names` are the columns' names."""
    for row in rows:
        if row.status != USED:
            continue
        for name, value in zip(names, (row.n, row.d, row.loss), strict=True):
            if math.isnan(value):
                row.exclude(f"{name} is NaN or empty")
            elif math.isinf(value):
                row.exclude(f"{name} is infinite")
            elif value <= 0:
                row.exclude(f"{name} is {value:g}; it must be > 0")
            if row.status != USED:
                break


def read_table(path: Path, n: str, d: str, loss: str, group: Sequence[str] = ()) -> list[Row]:
    """Reads the named columns of a CSV file (tab separated if it ends in `.tsv`).

    `group` names columns whose values together say which rows the bootstrap draws as one. Raises `UserError` if the
    file cannot be read, lacks a column, or has no usable row; a bad cell excludes its row and says why.
    """
    header, records = _read(path)
    wanted = [n, d, loss, *group]
    if absent := [name for name in wanted if name not in header]:
        raise UserError(f"{path}: no column {', '.join(map(repr, absent))}. Columns: {', '.join(header)}")
    if repeated := sorted({name for name in wanted if header.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(map(repr, repeated))} occurs more than once in the header")
    rows = []
    for number, (line, cells) in enumerate(records, start=1):
        row = Row(f"row {number} (line {line})", math.nan, math.nan, math.nan)
        rows.append(row)
        if len(cells) != len(header):
            row.exclude(f"{len(cells)} cells, the header has {len(header)}")
            continue
        record = dict(zip(header, cells, strict=True))
        for attribute, name in (("n", n), ("d", d), ("loss", loss)):
            value = _number(record[name])
            if value is None:
                row.exclude(f"{name} is {record[name]!r}, not a number")
            else:
                setattr(row, attribute, value)
        row.group = " | ".join(record[name].strip() for name in group) if group else None
        row.extra = {key: value for key, value in record.items() if key not in (n, d, loss)}
    exclude_unusable(rows, (n, d, loss))
    if not used(rows):
        why = "; ".join(f"{row.label}: {row.reason}" for row in rows[:5]) or "it has a header only"
        more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise UserError(f"{path}: no usable row. {why}{more}")
    return rows


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the non-empty records with the line each ends on."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            records = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from error
    if not records:
        raise UserError(f"{path}: the table is empty")
    return [cell.strip() for cell in records[0][1]], records[1:]


def _number(text: str) -> float | None:
    """The float in a cell; NaN for an empty one, None for anything else."""
    text = text.strip()
    if not text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return None
