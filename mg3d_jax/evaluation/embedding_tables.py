"""Arrays of embeddings as one parquet table, for pandas and friends: a row for each volume, report, sentence and prompt.

df = pandas.read_parquet(FILE); df[df.kind == "volume"].embedding
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError

logger = logging.getLogger(__name__)

# kind -> (embeddings, {column: array})
_KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "volume": ("volume_embeddings", {
        "id": "volume_ids", "patient_id": "patient_ids", "scan_id": "scan_ids", "report_id": "volume_report_ids",
    }),
    "report": ("report_embeddings", {"id": "report_ids", "text": "report_texts"}),
    "sentence": ("sentence_embeddings", {"report_id": "sentence_report_ids", "text": "sentence_texts"}),
}  # fmt: skip
_TEXTS = ("kind", "id", "patient_id", "scan_id", "report_id", "text", "prompt_set", "class")
_HEADER = b"mg3d"  # of what belongs to no row


def write_parquet(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays that `embedding_files` names."""
    pyarrow, parquet = _pyarrow(path)
    parts = [_rows(kind, arrays) for kind, (name, _) in _KINDS.items() if name in arrays]
    parts += [_prompt_rows(name, arrays) for name in sorted(arrays) if name.partition("@")[0] == "prompt_embeddings"]
    header: dict[str, Any] = {name: arrays[name].tolist() for name in ("logit_scale", "about") if name in arrays}
    header |= {name: arrays[name].tolist() for name in ("label_names", "prompt_set") if name in arrays}
    width = arrays["volume_embeddings"].shape[1]
    fields = [pyarrow.field(name, pyarrow.string()) for name in _TEXTS]
    fields += [pyarrow.field("present", pyarrow.bool_()), pyarrow.field("labels", pyarrow.list_(pyarrow.int8()))]
    fields += [pyarrow.field("embedding", pyarrow.list_(pyarrow.float32(), width))]
    schema = pyarrow.schema(fields, metadata={_HEADER: json.dumps(header).encode()})
    tables = []
    for part in parts:
        embeddings = np.ascontiguousarray(part.pop("embedding"), np.float32)
        count = len(embeddings)
        columns = [pyarrow.array(part.get(field.name, [None] * count), field.type) for field in list(schema)[:-1]]
        columns.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.reshape(-1)), width))
        tables.append(pyarrow.Table.from_arrays(columns, schema=schema))
    parquet.write_table(pyarrow.concat_tables(tables), path, compression="zstd")


def _rows(kind: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    name, columns = _KINDS[kind]
    part: dict[str, Any] = {column: arrays[of].tolist() for column, of in columns.items() if of in arrays}
    if kind == "volume" and "labels" in arrays:
        part["labels"] = arrays["labels"].tolist()
    return part | {"kind": [kind] * len(arrays[name]), "embedding": arrays[name]}


def _prompt_rows(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    of = name.partition("@")[2]
    classes = arrays[f"classes@{of}" if of else "classes"].tolist()
    count = 2 * len(classes)
    return {
        "kind": ["prompt"] * count,
        "prompt_set": [of] * count,
        "class": classes * 2,
        "present": [True] * len(classes) + [False] * len(classes),
        "embedding": arrays[name].reshape(count, -1),
    }


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    """The arrays of `write_parquet`. `UserError` where the file is no such table."""
    pyarrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
    if missing := [name for name in ("kind", "embedding") if name not in table.column_names]:
        raise UserError(
            f"{path}: lacks the columns {missing}; it has {table.column_names}. `kind` is volume, report, sentence or prompt"
        )
    try:
        header = json.loads((table.schema.metadata or {}).get(_HEADER, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: the metadata {_HEADER.decode()!r} is no JSON ({error})") from error
    kinds, arrays = np.array(table.column("kind").to_pylist(), str), {}
    for kind, (name, columns) in _KINDS.items():
        rows = table.filter(pyarrow.array(kinds == kind))
        if not rows.num_rows and kind != "volume":
            continue
        arrays[name] = _embeddings(path, rows)
        for column, of in columns.items():
            values = rows.column(column).to_pylist() if column in rows.column_names else []
            if any(value is not None for value in values):
                arrays[of] = np.array(["" if value is None else value for value in values], str)
        if kind == "volume" and "label_names" in header:
            arrays["labels"] = _labels(path, rows, len(header["label_names"]))
        elif kind == "volume" and "labels" in rows.column_names and rows.column("labels").null_count < rows.num_rows:
            logger.warning(
                "%s: labels are not read, because the file does not name them; give them with --labels", path
            )
    arrays |= _prompts(path, table.filter(pyarrow.array(kinds == "prompt")))
    return arrays | {name: np.array(value) for name, value in header.items()}


def _labels(path: Path, rows: Any, count: int) -> np.ndarray:
    lists = rows.column("labels").to_pylist() if "labels" in rows.column_names else [None]
    if any(one is None or len(one) != count or None in one for one in lists):
        raise UserError(f"{path}: the column labels needs {count} numbers for each volume, as label_names says")
    return np.array(lists).reshape(len(lists), count)


def _embeddings(path: Path, rows: Any) -> np.ndarray:
    lists = rows.column("embedding").combine_chunks()
    if not len(lists):
        return np.zeros((0, 0), np.float32)
    if not hasattr(lists, "value_lengths"):
        raise UserError(f"{path}: the column embedding holds {lists.type}: lists of numbers are needed")
    if lists.null_count or len(lists.value_lengths().unique()) > 1:
        raise UserError(f"{path}: the embeddings have different lengths, or some rows have none")
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)


def _prompts(path: Path, rows: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if not rows.num_rows:
        return found
    if missing := [name for name in ("prompt_set", "class", "present") if name not in rows.column_names]:
        raise UserError(f"{path}: the rows of prompts lack the columns {missing}")
    sets = np.array([name or "" for name in rows.column("prompt_set").to_pylist()], str)
    classes, present = (
        np.array(rows.column("class").to_pylist(), str),
        np.array(rows.column("present").to_pylist(), bool),
    )
    embeddings = _embeddings(path, rows)
    for name in dict.fromkeys(sets.tolist()):
        sides = [np.flatnonzero((sets == name) & (present == side)) for side in (True, False)]
        if sorted(classes[sides[0]]) != sorted(classes[sides[1]]):
            raise UserError(f"{path}: the prompts {name!r} lack the present or the absent one of a class")
        order = [side[np.argsort(classes[side], kind="stable")] for side in sides]
        back = np.argsort(np.argsort(classes[sides[0]], kind="stable"), kind="stable")  # in the order of the file
        suffix = f"@{name}" if name else ""
        found[f"prompt_embeddings{suffix}"] = np.stack([embeddings[side[back]] for side in order])
        found[f"classes{suffix}"] = classes[sides[0]]
    return found


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow, or use .npz") from error
    return pyarrow, parquet
