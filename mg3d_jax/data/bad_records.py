"""Records that turn out damaged while training: skipped, counted, named; too many of them end the run."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_lines

logger = logging.getLogger(__name__)

BAD_RECORDS_NAME = "bad_records.jsonl"


@dataclass(eq=False)
class BadRecords:
    """Names each bad record once, in a warning and as a line of `folder / "bad_records.jsonl"`.

    Threads, data workers and the processes of a run share the file (a line is one appending write) and count by it, also
    over a resume. Without a folder every process counts for itself.

    `limit` is `data.max_bad_records`: with one more distinct record, `add` raises `UserError`.
    """

    folder: Path | None
    limit: int
    _seen: set[tuple[str, int]] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def _path(self) -> Path | None:
        return self.folder and self.folder / BAD_RECORDS_NAME

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def add(self, folder: Path, record: int, name: str, reason: str) -> None:
        """Record `record` of the prepared `folder` is damaged. Raises `UserError` above the limit."""
        with self._lock:
            key = (str(folder), record)
            if key not in self._seen:
                self._seen |= read_bad_records(self._path)
                if key not in self._seen:
                    self._seen.add(key)
                    self._write({"folder": str(folder), "record": record, "name": name, "reason": reason})
            if len(self._seen) > self.limit:
                where = f", listed in {self._path}" if self._path else ""
                raise UserError(
                    f"{len(self._seen)} damaged records{where}, more than data.max_bad_records = {self.limit}; the last: "
                    f"{reason}"
                )

    def _write(self, line: dict[str, Any]) -> None:
        logger.warning("skipped in training: %s", line["reason"])
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)


def read_bad_records(path: Path | None) -> set[tuple[str, int]]:
    """{(prepared folder, record)} of a `bad_records.jsonl`; none where it does not exist. A line that was cut off by a
    kill is not one."""
    entries = read_lines(path)[0] if path else []
    return {(entry["folder"], entry["record"]) for entry in entries if "folder" in entry and "record" in entry}
