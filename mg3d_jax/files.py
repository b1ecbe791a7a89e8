"""Small files that are written whole or not at all, and JSON with one object per line."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError

logger = logging.getLogger(__name__)


def partial_path(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Deletes what killed processes left of writing `path`. Only for files that one process at a time writes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        leftover.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes through a temporary name: the file is either complete or as it was, even after a crash of the machine; of
    the program alone where it is not `durable`, which saves the wait for the disk where files are many and easily remade.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8. What is no text, of a file name that is not UTF-8, becomes `\\udcXX`, as JSON has it too."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, document: Any, *, allow_nan: bool = False) -> None:
    """Writes JSON whole or not at all; strict, or with NaN as Python's own reader knows it."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def read_json(path: Path, *, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file. `UserError` where it cannot be read, or where its content is none: then with `remedy`."""
    remedy = f"; {remedy}" if remedy else ""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}){remedy}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, not a JSON object{remedy}")
    return document


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON objects, one per line, whole or not at all."""
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one per line, and the number of damaged lines; `([], 0)` without the file.

    A program may be writing the last line, or a kill may have cut it short: a last line without its end is no damage.
    """
    if not path.exists():
        return [], 0
    found, damaged = [], 0
    whole, newline, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    for line in (whole + newline).split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            damaged += 1
    return found, damaged


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of `read_lines`; a warning says how many damaged lines were left out."""
    found, damaged = read_lines(path)
    if damaged:
        logger.warning("%s: %d damaged of %d lines are left out", path, damaged, damaged + len(found))
    return found
