"""Labels and report texts from csv tables, for embeddings of any data set. Without JAX.

A label table has a column with the ids of the volumes and a column per class: 1 present, 0 absent, empty, -1 or nan unknown.
Rad-ChestCT has a column per abnormality and place instead; which of its abnormalities stand for a finding of CT-RATE is not
agreed on, and the mappings in use are here by name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.rad_chestct import MAPPINGS
from mg3d_jax.errors import UserError
from mg3d_jax.prepare.reports import report_sentences

logger = logging.getLogger(__name__)

ID_COLUMNS = ("volume_id", "VolumeName", "NoteAcc_DEID", "id")  # else the first column
VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": -1, "nan": -1}
FINDINGS = ("Findings_EN", "findings", "Findings")
IMPRESSION = ("Impressions_EN", "impression", "Impression", "impressions")
WHOLE = ("report", "text", "Report")
UNNAMED = "Unnamed: "  # what pandas calls a column without a name


@dataclass(frozen=True)
class LabelTable:
    """Labels by volume, as a table has them."""

    where: str
    ids: np.ndarray  # [r], distinct, without the suffix of a file
    names: tuple[str, ...]  # L
    labels: np.ndarray  # int8 [r, L]: 1 present, 0 absent, -1 unknown

    def of(self, volume_ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """The labels of these volumes, int8 `[n, L]`. `UserError` names volumes without a row; rows without a volume are
        counted in a warning."""
        row = {name: number for number, name in enumerate(self.ids.tolist())}
        wanted = [bare(str(name)) for name in volume_ids]
        if lost := [name for name in wanted if name not in row]:
            raise UserError(
                f"{self.where}: {len(lost)} of {len(wanted)} volumes have no row, e.g. {lost[0]!r}; its ids are like "
                f"{str(self.ids[0])!r}: give the table of these volumes"
            )
        if spare := len(self.ids) - len(set(wanted)):
            logger.warning("%s: %d rows are of volumes without an embedding", self.where, spare)
        return self.labels[[row[name] for name in wanted]].reshape(len(wanted), len(self.names))


def bare(name: str) -> str:
    """`valid_1_a_1.nii.gz -> valid_1_a_1`, `trn00001.npz -> trn00001`."""
    for suffix in (".gz", ".nii", ".npz"):
        name = name.removesuffix(suffix)
    return name


def read_labels(paths: Sequence[Path], *, mapping: str = "") -> LabelTable:
    """The labels of one table, or of several with the same columns, one after the other.

    Args:
        mapping: one of `MAPPINGS`: the tables are Rad-ChestCT's `img*_Abnormality_and_Location_Labels.csv`.

    Raises:
        UserError: a file cannot be read, an id is there twice, or a value is no label; it names the file, row and column.
    """
    if mapping and mapping not in MAPPINGS:
        raise UserError(f"--label-mapping {mapping!r}: choose one of {', '.join(MAPPINGS)}")
    tables = [_rad_chestct(path, MAPPINGS[mapping]) if mapping else _plain(path) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if table.names != first.names:
            raise UserError(f"{table.where} and {first.where} have other columns: give tables of one kind")
    where = ", ".join(table.where for table in tables)
    ids = np.concatenate([table.ids for table in tables])
    found, count = np.unique(ids, return_counts=True)
    if (count > 1).any():
        raise UserError(
            f"{where}: {int((count > 1).sum())} volumes have more than one row, e.g. {str(found[count > 1][0])!r}: leave one"
        )
    return LabelTable(where, ids, first.names, np.concatenate([table.labels for table in tables]))


def mapping_of_each(mapping: str, tables: Sequence[Path], train: Sequence[Path]) -> tuple[str, str]:
    """For which of two groups of tables a mapping is: for those that are Rad-ChestCT's own. Where none is it stays with
    `tables`, of which `read_labels` then says what they lack."""
    of_train = any(map(_is_rad_chestct, train))
    return mapping if any(map(_is_rad_chestct, tables)) or not of_train else "", mapping if of_train else ""


def _is_rad_chestct(path: Path) -> bool:
    """By its columns ABNORMALITY*PLACE."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return "*" in file.readline()


def _plain(path: Path) -> LabelTable:
    frame, id_column = _read(path)
    if id_column == "NoteAcc_DEID" and _is_rad_chestct(path):
        raise UserError(
            f"{path}: has Rad-ChestCT's own {len(frame.columns) - 1:,} labels: say which stand for a finding, with "
            f"--label-mapping {'|'.join(MAPPINGS)}"
        )
    for name in [name for name in frame.columns if (name.startswith(UNNAMED) or not name) and name != id_column]:
        if (frame[name].str.strip() != "").any():
            raise UserError(
                f"{path}: column {frame.columns.get_loc(name) + 1} has no name: name it as its class, or take it out; "
                "pandas writes none with to_csv(index=False)"
            )
        frame = frame.drop(columns=name)  # of a comma at the end of every line
    names = tuple(name for name in frame.columns if name != id_column)
    if not names:
        other = next((mark for mark in ";\t|" if mark in id_column), "")
        remedy = f"separate them with commas, not {other!r}" if other else "one per class is needed"
        raise UserError(f"{path}: has no column beside {id_column!r}: {remedy}")
    return LabelTable(str(path), _ids(frame[id_column]), names, _labels(path, frame, id_column, names))


def _rad_chestct(path: Path, mapping: Mapping[str, tuple[str, ...]]) -> LabelTable:
    wanted = {abnormality for abnormalities in mapping.values() for abnormality in abnormalities}
    frame, id_column = _read(path, lambda column: column.partition("*")[0] in wanted or column in ID_COLUMNS)
    columns: dict[str, list[str]] = {name: [] for name in wanted}
    for column in frame.columns:
        if column != id_column:
            columns[column.partition("*")[0]].append(column)
    if lost := sorted(name for name, found in columns.items() if not found):
        raise UserError(
            f"{path}: has no column ABNORMALITY*PLACE for {', '.join(lost)}: --label-mapping is for Rad-ChestCT's "
            "img*_Abnormality_and_Location_Labels.csv"
        )
    names = tuple(name for name in ABNORMALITIES if name in mapping)
    labels = []
    for name in names:
        parts = [column for abnormality in mapping[name] for column in columns[abnormality]]
        values = _labels(path, frame, id_column, parts)
        absent = (values == 0).all(axis=1)
        labels.append(np.where((values == 1).any(axis=1), 1, np.where(absent, 0, -1)))
    return LabelTable(str(path), _ids(frame[id_column]), names, np.stack(labels, axis=1).astype(np.int8))


def _read(path: Path, keep: Any = None) -> tuple[Any, str]:
    """A table of strings, and its column of ids."""
    import pandas as pd

    if not path.is_file():
        raise UserError(f"{path} does not exist: a csv with a column of ids and one per class is needed")
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        with warnings.catch_warnings():
            # pandas takes a field too many for an index, or drops it; both would shift or lose labels.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            head = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].str.strip()
            frame = pd.read_csv(path, usecols=keep, index_col=False, **options)
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path}: rows have more fields than the first line: give every column a name") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not a readable csv ({error})") from error
    if twice := sorted(set(head[head.duplicated() & (head != "")])):
        raise UserError(f"{path}: has the column {', '.join(map(repr, twice))} more than once: leave one")
    frame.columns = [str(column).strip() for column in frame.columns]
    if frame.empty:
        raise UserError(f"{path}: has no rows")
    return frame, next((name for name in ID_COLUMNS if name in frame.columns), str(frame.columns[0]))


def _ids(column: Any) -> np.ndarray:
    return np.array([bare(str(name).strip()) for name in column], str)


def _labels(path: Path, frame: Any, id_column: str, names: Sequence[str]) -> np.ndarray:
    found = np.zeros((len(frame), len(names)), np.int8)
    for place, name in enumerate(names):
        values = frame[name].str.strip().str.lower().map(VALUES)
        if values.isna().any():
            row = int(np.flatnonzero(values.isna())[0])
            raise UserError(
                f"{path}: row {row + 2} ({frame[id_column].iloc[row]}), column {name!r}: {frame[name].iloc[row]!r} is no "
                "label; 1 is present, 0 absent, and empty, -1 or nan unknown. A column that is no class has to go"
            )
        found[:, place] = values.to_numpy(np.int8)
    return found


def read_reports(path: Path) -> dict[str, tuple[str, ...]]:
    """Sentences by id, of a csv with a column of ids (of reports or of volumes) and `Findings_EN` and `Impressions_EN` as
    CT-RATE has them, or one column `report`. `UserError` where it has neither."""
    frame, id_column = _read(path)

    def column(names: Sequence[str]) -> Any:
        return next((frame[name] for name in names if name in frame.columns), None)

    findings, impression = column(FINDINGS), column(IMPRESSION)
    if findings is None and impression is None:
        findings = column(WHOLE)
    if findings is None and impression is None:
        raise UserError(
            f"{path}: has no column with texts, only {list(frame.columns)}: name it `report`, or `findings` and `impression`"
        )
    empty = [""] * len(frame)
    texts = zip(
        empty if findings is None else findings, empty if impression is None else impression, strict=True
    )  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for name, text in zip(_ids(frame[id_column]).tolist(), texts, strict=True):
        sentences = report_sentences(*map(str, text))
        if found.setdefault(name, sentences) != sentences:
            raise UserError(f"{path}: {name!r} has several rows with different texts: leave one")
    return found
