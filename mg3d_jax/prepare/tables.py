"""Tables (csv, xlsx) that describe volumes: rows of strings -> labels, and what a DICOM tag says of a volume."""

from __future__ import annotations

import ast
import csv
import io
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata

_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no"), 0),
    **dict.fromkeys(("-1", "-1.0", "", "nan", "na", "n/a", "none", "null", "unknown"), UNKNOWN_LABEL),
}
_DELIMITERS = {",": "commas", ";": "semicolons", "	": "tabs", "|": "bars"}
Row = dict[str, str]
Value = TypeVar("Value")


def find_table(folder: Path, stem: str) -> Path | None:
    """`stem.csv` or `stem.xlsx` in `folder`, whichever is there."""
    return next(
        (folder / f"{stem}{suffix}" for suffix in (".csv", ".xlsx") if (folder / f"{stem}{suffix}").is_file()), None
    )


def read_table(path: Path, notes: list[str] | None = None) -> list[Row]:
    """Rows of a csv or xlsx as dicts of strings. What is unusual about its form is added to `notes`. Raises `UserError` where
    it is missing, empty or unreadable."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the table is needed; check --root and --split")
    try:
        header, lines = _read_xlsx(path) if path.suffix.lower() == ".xlsx" else _read_csv(path, notes)
    except ImportError as error:
        raise UserError(f"{path}: reading xlsx needs openpyxl: pip install openpyxl") from error
    except (ValueError, OSError, KeyError, csv.Error, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable table: {error}") from error
    names = _distinct([name.strip() for name in header])
    rows = []
    for number, cells in lines:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise UserError(
                f"{path}: line {number} has {len(cells)} cells, the header {len(names)}: put texts that hold the delimiter in "
                "double quotes"
            )
        rows.append(dict(zip(names, [*cells, *[""] * (len(names) - len(cells))], strict=False)))
    if not rows:
        raise UserError(f"{path} has no rows")
    blank = [name for name in names if re.fullmatch(r"(\.\d+)?", name) and not any(row[name].strip() for row in rows)]
    return [{name: value for name, value in row.items() if name not in blank} for row in rows] if blank else rows


def _read_xlsx(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    import pandas as pd

    frame = pd.read_excel(path, dtype=str, keep_default_na=False, header=None)
    lines = [[str(cell) for cell in row] for row in frame.itertuples(index=False)]
    if not lines:
        raise UserError(f"{path} has no rows")
    return lines[0], list(enumerate(lines[1:], 2))


def _read_csv(path: Path, notes: list[str] | None) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """(header, [(line number, cells)]). The delimiter is that of the header's line."""
    text = _decoded(path)
    first = re.sub(r'"[^"]*"', "", text.split("\n", 1)[0])
    delimiter = max(_DELIMITERS, key=first.count) if any(map(first.count, _DELIMITERS)) else ","
    if delimiter != "," and notes is not None:
        notes.append(f"{path.name}: its cells are divided by {_DELIMITERS[delimiter]}")
    csv.field_size_limit(1 << 30)
    try:
        lines = _cells(text, delimiter, strict=True)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(
                f"{path}: a double quote opens a cell that never ends: everything behind it would be one cell"
            ) from error
        lines = _cells(text, delimiter, strict=False)  # a quote within a cell
    if not lines:
        raise UserError(f"{path} is empty")
    return lines[0][1], lines[1:]


def _cells(text: str, delimiter: str, *, strict: bool) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    return [(reader.line_num, cells) for cells in reader if cells]


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, or UTF-16 with its mark. Another encoding is named, not guessed: a wrong one garbles."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02X} in line {line}; it may be Windows-1252 or -1254, or "
            "Latin-1: save it as UTF-8 (in a spreadsheet: csv UTF-8)"
        ) from error


def _distinct(names: list[str]) -> list[str]:
    """Names of columns of which a repeated one gets a number: "x", "x.1"."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.append(f"{name}.{count}" if count else name)
    return found


def require_columns(path: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    """Raises `UserError` that names the columns a table lacks."""
    if missing := [column for column in columns if column not in rows[0]]:
        raise UserError(f"{path} lacks the columns {missing}; it has {list(rows[0])}")


def numbers(text: Any) -> tuple[float, ...] | None:
    """'0.75', '[0.34, 0.34]', '0.7 0.7 1.5' -> numbers; `None` for what is blank or not numbers."""
    text = str(text).strip()
    try:
        value = ast.literal_eval(text)
        found = tuple(float(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    except (ValueError, SyntaxError, TypeError):
        try:
            found = tuple(float(v) for v in text.replace("x", " ").replace(",", " ").split())
        except ValueError:
            return None
    return found if found and all(map(math.isfinite, found)) else None


def dicom_metadata(row: Row) -> Metadata:
    """`Metadata` of one row of a table of DICOM tags, CT-RATE's names."""
    slope, intercept = numbers(row.get("RescaleSlope", "")), numbers(row.get("RescaleIntercept", ""))
    plane, between = numbers(row.get("XYSpacing", "")), numbers(row.get("ZSpacing", ""))
    orientation = numbers(row.get("ImageOrientationPatient", ""))
    position = numbers(row.get("ImagePositionPatient", ""))
    slices = numbers(row.get("NumberofSlices", ""))
    rows, columns = numbers(row.get("Rows", "")), numbers(row.get("Columns", ""))
    if plane is not None and len(plane) == 1:
        plane = plane * 2
    spacing = None
    if plane is not None and between is not None and min(*plane, *between) > 0:
        spacing = (plane[1], plane[0], between[0])
    kernel = " ".join(str(row.get(name, "")).strip() for name in ("ConvolutionKernel", "SeriesDescription")).strip()
    return Metadata(
        scaling=(slope[0] if slope else 1.0, intercept[0]) if intercept else None,
        spacing=spacing,
        orientation=orientation if orientation and len(orientation) == 6 else None,
        position=(position[0], position[1], position[2]) if position and len(position) == 3 else None,
        slices=int(slices[0]) if slices else None,
        kernel=kernel or None,
        plane=(int(columns[0]), int(rows[0])) if rows and columns else None,
    )


def by_volume(path: Path, rows: list[Row], parse: Callable[[Row], Value], notes: list[str]) -> dict[str, Value]:
    """VolumeName -> what `parse` makes of its row. Rows that say the same again are counted in a note; `UserError` for
    those that say something else."""
    found: dict[str, Value] = {}
    for row in rows:
        name, value = row["VolumeName"].strip(), parse(row)
        if found.setdefault(name, value) != value:
            raise UserError(f"{path}: two rows of {name} differ, {found[name]} and {value}: delete the wrong one")
    if repeated := len(rows) - len(found):
        notes.append(f"{path.name}: {repeated} rows repeat a volume that has one already")
    return found


def label_table(
    path: Path | None, missing: Path, notes: list[str]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """(names, VolumeName -> labels) of a label table; where there is none, every label is unknown, with a note."""
    if path is None:
        notes.append(f"{missing} is missing: every label is unknown")
        return ABNORMALITIES, {}
    rows = read_table(path)
    require_columns(path, rows, ("VolumeName",))
    names = tuple(column for column in rows[0] if column != "VolumeName")
    return names, by_volume(path, rows, lambda row: row_labels(path, row, names), notes)


def row_labels(path: Path, row: Row, names: tuple[str, ...]) -> tuple[int, ...]:
    """Labels of one row. Raises `UserError` for anything but 1, 0, -1 and nothing."""
    for name in names:
        if label_value(row[name]) is None:
            raise UserError(
                f"{path}: the label in column {name!r} is {row[name].strip()!r}, in row {list(row.values())[:1]}: expected 1, "
                "0, -1, true, false or nothing"
            )
    return tuple(value for name in names if (value := label_value(row[name])) is not None)


def label_value(text: str) -> int | None:
    """1, 0 or -1 (unknown, also for nothing) of a cell; `None` for what is no label."""
    return _LABELS.get(text.strip().lower())


def label_columns(rows: list[Row], columns: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """(columns that hold only labels, notes on those that nearly do: the first value that is none)."""
    names, notes = [], []
    for column in columns:
        filled = [(number, row[column]) for number, row in enumerate(rows, 2) if row[column].strip()]
        wrong = [(number, text) for number, text in filled if label_value(text) is None]
        if filled and not wrong:
            names.append(column)
        elif filled and len(wrong) < 0.2 * len(filled):
            notes.append(f"column {column!r} is not taken for a label: row {wrong[0][0]} has {wrong[0][1]!r}")
    return tuple(names), notes
