"""Trains runs by any command line: a launcher of this project, another host by ssh, a cloud's scheduler.

The template is a line of shell in which these stand for the run, quoted: `{command}` (the training command as one word, as
`--command={command}` takes it), `{words}` (the same as words), `{config}`, `{folder}`, `{overrides}` (words) and `{run}`.
`${name}` stays the shell's.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mg3d_jax.errors import AGAIN, UserError
from mg3d_jax.scaling.sweep import states
from mg3d_jax.scaling.sweep.executors.base import Executor, Job, Start, open_log
from mg3d_jax.scaling.sweep.executors.local import Process, told_when_we_die
from mg3d_jax.training.ownership import LOCK_FILE

NAMES = ("command", "words", "run", "folder", "config", "overrides")
PLACES = re.compile(r"(?<!\$)\{(" + "|".join(NAMES) + r")\}")
TRAINS = {"command", "words", "config"}  # a template without any of them trains nothing


def fill(template: str, start: Start) -> str:
    """The line of shell for one run."""
    values = {
        "command": shlex.quote(shlex.join(start.command)),
        "words": shlex.join(start.command),
        "run": shlex.quote(start.run.id),
        "folder": shlex.quote(str(start.folder)),
        "config": shlex.quote(start.run.base),
        "overrides": shlex.join(start.run.overrides),
    }
    return PLACES.sub(lambda found: values[found.group(1)], template)


class Detached(Job):
    """A training of which only its folder tells, and `alive` where there is such a command."""

    outlives = True

    def __init__(self, start: Start, alive: str, before: str):
        self._folder = start.folder
        self.label = "handed to a command"
        self.facts = {"alive": alive, "lock": before}

    def poll(self) -> int | None:
        if (self._folder / states.SUMMARY_FILE).is_file():
            return 0
        if states.holder(self._folder) is not None or Command.alive(self.facts, self._folder):
            return None
        return None if states.holder(self._folder) is not None else AGAIN


class Command(Executor):
    """One command line per run."""

    name = "command"
    options: ClassVar[Mapping[str, str]] = {
        "command": "line of shell that trains a run, with {command}, {words}, {config}, {folder}, {overrides}, {run}",
        "detached": "true: the command returns once the run is handed over; how it goes is read from its folder",
        "alive": "line of shell whose exit code is 0 as long as a detached run is queued or trains",
    }

    def __init__(self, options: Mapping[str, str], *, at_once: int = 1):
        super().__init__(options, at_once=at_once)
        self._template, self._alive = options.get("command", ""), options.get("alive", "")
        if not TRAINS & set(PLACES.findall(self._template)):
            raise UserError(
                f"--option command={self._template!r}: write a line of shell with {{command}}, {{words}} or {{config}} in "
                "it, e.g. --option 'command=ssh host {command}'"
            )
        detached = options.get("detached", "false")
        if detached not in ("true", "false"):
            raise UserError(f"--option detached={detached}: true or false")
        self._detached = detached == "true"
        if self._alive and not self._detached:
            raise UserError("--option alive only goes with detached=true")

    def start(self, start: Start) -> Job:
        line = fill(self._template, start)
        before = _lock_note(start.folder)
        with open_log(start, line) as output:
            process = subprocess.Popen(
                [*told_when_we_die(), "bash", "-c", line],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        if not self._detached:
            return Process(process, group=True)
        if process.wait():
            return Process(process)  # nothing was handed over
        return Detached(start, fill(self._alive, start), before)

    @staticmethod
    def alive(facts: Mapping[str, Any], folder: Path) -> bool:
        """By the command that says so; without one, until a trainer has come and gone."""
        if facts["alive"]:
            return subprocess.run(["bash", "-c", facts["alive"]], capture_output=True).returncode == 0
        return _lock_note(folder) == facts["lock"]


def _lock_note(folder: Path) -> str:
    """What the run's last trainer said of itself."""
    path = folder / LOCK_FILE
    return path.read_text(errors="replace") if path.is_file() else ""
