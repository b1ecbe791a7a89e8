"""The one definition of what a batch holds: names, shapes and dtypes, from the host pipeline to the compiled step.

Axes: B patients (volume-report pairs), X Y Z voxels in RAS+ order (x to the patient's right, y anterior, z superior),
T tokens, S sentences at most per report, L labels. The host builds dicts of NumPy arrays with these names; the step
receives the same dict as global `jax.Array`s sharded over the batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

UNKNOWN_LABEL = -1
AIR_HU = -1024  # what lies outside of a scan, and the lowest HU of a prepared volume
HIGHEST_HU = 3071  # and the highest: 12-bit scanners end here; beyond it is metal, which no window shows


@dataclass(frozen=True)
class Field:
    """One array of the batch: symbolic shape (without the batch axis), dtype, and what it means."""

    shape: tuple[str | int, ...]
    dtype: type
    meaning: str
    texts: bool = False  # ids of texts along the last axis, [CLS] first and [SEP] last, then 0; all 0 for no text


NOTHING_MORE: Mapping[str, Field] = MappingProxyType({})

FIELDS: dict[str, Field] = {
    "volume": Field(("X", "Y", "Z"), np.int16, "HU, not windowed; air is -1024"),
    "token_ids": Field(("T",), np.int32, "WordPiece ids, [CLS] first, [SEP] last, then padding"),
    "token_mask": Field(("T",), np.bool_, "True where there is a token, special tokens included"),
    "sentence_index": Field(
        ("T",), np.int32, "1..S: the sentence the token belongs to; 0 for special tokens and padding"
    ),
    "word_index": Field(("T",), np.int32, "1..: the whole word the token belongs to; 0 for special tokens and padding"),
    "labels": Field(("L",), np.int8, "1 present, 0 absent, -1 unknown"),
    "report_id": Field((), np.int32, "equal for scans that share one report: never each other's negatives"),
    "patient_id": Field((), np.int32, "equal for scans of one patient"),
    "valid": Field(
        (), np.bool_, "False for rows that only pad the last batch of an evaluation, and for damaged records"
    ),
    "record_index": Field(
        (), np.int32, "position in the prepared data set: names the bad batch when a loss is not finite"
    ),
}

# Fields that a batch has where an objective or task reads them (`objectives.base.Objective.reads`) and the records hold them.
OF_RECORDS: dict[str, Field] = {
    "mask": Field(
        ("X", "Y", "Z"),
        np.int8,
        "class of each voxel: 0 background, k the k-th of the manifest's `mask_names`, -1 unknown",
    ),
}


def abstract(
    batch_size: int,
    volume_size: tuple[int, int, int],
    tokens: int,
    labels: int,
    more: Mapping[str, Field] = NOTHING_MORE,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, batch axis first, and dtype of every field: enough to trace what takes a batch.

    Args:
        more: fields that objectives add (`objectives.base.TextFields`), of numbers or of these symbols.
    """
    import jax  # here: the commands that read files import this module and never need jax

    sizes: dict[str | int, int] = {"T": tokens, "L": labels}
    sizes.update(zip("XYZ", volume_size, strict=True))
    return {
        name: jax.ShapeDtypeStruct((batch_size, *(int(sizes.get(axis, axis)) for axis in one.shape)), one.dtype)
        for name, one in {**FIELDS, **more}.items()
    }


def zeros(more: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Arrays of zeros, of one report, for fields that objectives add."""
    return {name: np.zeros(tuple(map(int, one.shape)), one.dtype) for name, one in more.items()}


def check(batch: dict[str, np.ndarray], more: Mapping[str, Field] = NOTHING_MORE) -> None:
    """Raises `ValueError` naming the first field that is missing, unknown, or of the wrong rank or dtype."""
    fields = {**FIELDS, **more}
    if missing := fields.keys() - batch.keys():
        raise ValueError(f"batch lacks {sorted(missing)}")
    if unknown := batch.keys() - fields.keys():
        raise ValueError(f"batch has unknown fields {sorted(unknown)}")
    for name, field in fields.items():
        array = batch[name]
        if array.ndim != len(field.shape) + 1 or array.dtype != field.dtype:
            shape = ", ".join(("B", *map(str, field.shape)))
            raise ValueError(
                f"batch[{name!r}] is {array.dtype}{array.shape}, expected {np.dtype(field.dtype)}[{shape}]"
            )
