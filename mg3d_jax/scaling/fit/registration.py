"""Predictions that are written down before the run: a file with a digest, and the comparison after it.

The digest covers the whole content, so that a changed number shows. It is printed when the file is written: kept elsewhere
(a commit, a message), it shows a file that was exchanged as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json

KIND = "mg3d scaling-law prediction"
DIGEST = "sha256"


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content without its own digest, keys in order."""
    rest = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def register(path: Path, content: Mapping[str, Any]) -> str:
    """Writes the prediction with its digest, which it returns. `UserError` where the file is there already."""
    if path.exists():
        raise UserError(f"{path} is there already; a registered prediction is not written over: name another file")
    document = {"kind": KIND, "registered": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **content}
    document[DIGEST] = digest(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return str(document[DIGEST])


def read(path: Path, expected: str | None = None) -> dict[str, Any]:
    """A registered prediction. `UserError` where it was changed, or is not the one with the digest `expected`."""
    document = read_json(path)
    if document.get("kind") != KIND:
        raise UserError(f"{path} is no registered prediction (mg3d sweep predict --register FILE)")
    if document.get(DIGEST) != digest(document):
        raise UserError(f"{path} was changed after it was registered: its content does not match its digest; refused")
    if expected and not str(document[DIGEST]).startswith(expected):
        raise UserError(f"{path} has the digest {document[DIGEST]}, not {expected}: another prediction; refused")
    return document


def compare(document: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """How far `loss` is from the prediction, and whether it lies in its intervals."""
    predicted = document["predicted"]
    inside = {level: low <= loss <= high for level, (low, high) in (document["intervals"] or {}).items()}
    return {
        "predicted": predicted,
        "measured": loss,
        "log_error": math.log(loss / predicted),
        "percent": 100 * (loss / predicted - 1),
        "inside": inside,
    }
