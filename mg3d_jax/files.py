"""JSON files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError


def write_json(path: Path, document: Mapping[str, Any], *, allow_nan: bool = False) -> None:
    """Writes JSON so that a reader never sees half a file; strict, or with NaN as Python's own reader knows it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(document, indent=2, allow_nan=allow_nan) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, not a JSON object")
    return document
