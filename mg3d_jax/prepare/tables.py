"""Tables (csv, xlsx) that describe volumes: rows of strings -> labels, and what a DICOM tag says of a volume."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata

LABEL_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": UNKNOWN_LABEL}
Row = dict[str, str]
Value = TypeVar("Value")


def find_table(folder: Path, stem: str) -> Path | None:
    """`stem.csv` or `stem.xlsx` in `folder`, whichever is there."""
    return next(
        (folder / f"{stem}{suffix}" for suffix in (".csv", ".xlsx") if (folder / f"{stem}{suffix}").is_file()), None
    )


def read_table(path: Path) -> list[Row]:
    """Rows of a csv or xlsx as dicts of strings. Raises `UserError` where it is missing, empty or unreadable."""
    import pandas as pd

    if not path.is_file():
        raise UserError(f"{path} does not exist: the table is needed; check --root and --split")
    try:
        if path.suffix.lower() == ".xlsx":
            frame = pd.read_excel(path, dtype=str, keep_default_na=False)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ImportError as error:
        raise UserError(f"{path}: reading xlsx needs openpyxl: pip install openpyxl") from error
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    if frame.empty:
        raise UserError(f"{path} has no rows")
    frame.columns = [str(column).strip() for column in frame.columns]
    return frame.to_dict("records")


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
        if (text := row[name].strip()) not in LABEL_VALUES:
            raise UserError(
                f"{path}: the label in column {name!r} is {text!r}, in row {list(row.values())[:1]}: expected 1, 0, -1 "
                "or nothing"
            )
    return tuple(LABEL_VALUES[row[name].strip()] for name in names)
