"""Fetch, process, delete: volumes that are never all on disk at once (`mg3d prepare --fetch CMD`).

CMD is a shell command that puts one volume into an empty folder. `{dir}` is that folder; `{name}`, `{patient}`,
`{scan}` and `{split}` name the volume: `hf download ORG/SET dataset/{split}/{patient}/{scan}/{name} --repo-type dataset
--local-dir {dir}` for CT-RATE's names, or `cp STORE/{name} {dir}/`.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.listing import Example
from mg3d_jax.prepare.nifti import VolumeError

FETCH_FAILED = "fetch failed"
_TRIES = 3
_WAIT_SECONDS = 2.0
_FIELDS = ("dir", "name", "patient", "scan", "split")


def check_command(command: str) -> None:
    """Raises `UserError` for a command without `{dir}` or with a placeholder that does not exist."""
    try:
        command.format(**dict.fromkeys(_FIELDS, "x"))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--fetch {command!r}: unknown placeholder {error}; there are {_FIELDS}") from error
    if "{dir}" not in command:
        raise UserError(f"--fetch {command!r} must name {{dir}}, the folder to put the volume into")


@contextmanager
def fetched(example: Example, command: str | None) -> Iterator[Path]:
    """The path of the example's volume; with a command, of a copy that is deleted afterwards. Raises `VolumeError`."""
    if command is None or example.path.exists():
        yield example.path
        return
    with tempfile.TemporaryDirectory(prefix="mg3d-fetch-") as folder:
        values = {
            "dir": folder,
            "name": example.name,
            "patient": example.patient,
            "scan": example.scan,
            "split": example.path.parts[-4] if len(example.path.parts) >= 4 else "",
        }
        line = command.format(**{key: shlex.quote(value) for key, value in values.items()})
        message = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_WAIT_SECONDS * attempt)
            done = subprocess.run(line, shell=True, capture_output=True, text=True, errors="replace")
            wanted = Path(example.name).name
            files = [path for path in Path(folder).rglob("*") if path.name == wanted]
            if done.returncode == 0 and files:
                yield files[0]
                return
            if done.returncode in (126, 127):  # of the shell: no such command
                raise UserError(f"--fetch {command!r} cannot be run: {done.stderr.strip()[-300:]}")
            message = done.stderr.strip()[-300:] or f"exit {done.returncode}, no {wanted} in {{dir}}"
        raise VolumeError(f"{FETCH_FAILED} {_TRIES} times: {message}")
