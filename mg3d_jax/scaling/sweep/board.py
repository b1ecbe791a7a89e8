"""Where every run of a sweep stands, for people: a table for a terminal, the same as text, one line for a log."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.progress import format_seconds
from mg3d_jax.scaling.sweep import plan, states
from mg3d_jax.scaling.sweep.declaration import RUNS_FOLDER, Run, Sweep
from mg3d_jax.training.schedule import total_steps

COLORS = {states.DONE: "green", states.RUNNING: "cyan", states.QUEUED: "blue", states.FAILED: "red"}


@dataclass(frozen=True)
class Line:
    """One run. `total` steps and `eta`, in seconds, are None where they are not known."""

    run: str
    state: str
    step: int
    total: int | None = None
    eta: float | None = None
    loss: float | None = None
    who: str = ""  # is at it, or what it waits for
    failure: str = ""  # the last one

    def cells(self) -> list[str]:
        steps = f"{self.step:,}" + (f"/{self.total:,}" if self.total else "")
        loss = "" if self.loss is None else f"{self.loss:.5g}"
        eta = "" if self.eta is None else format_seconds(self.eta)
        return [self.run, self.state, steps, eta, loss, self.who, self.failure]


def look(workdir: Path, sweep: Sweep) -> list[Line]:
    """Where every declared run stands now."""
    return [_line(workdir, sweep, run) for run in sweep.runs]


def _line(workdir: Path, sweep: Sweep, run: Run) -> Line:
    folder, status = states.run_folder(workdir, run), states.status(workdir, run)
    total, batch_size = _length(run)
    if status.state == states.DONE:
        loss = read_json(folder / states.SUMMARY_FILE)["final"].get(sweep.loss)
        return Line(run.id, status.state, status.step, status.step, loss=loss)
    split, _, name = sweep.loss.partition("/")
    loss = states.last_metrics(folder, split).get(name)
    waits = states.waits_for(run) if status.action != "wait" else None
    who = waits.detail if waits else status.detail if status.action == "wait" else ""
    failure = states.read_state(folder).get("last_failure") or ("" if status.action == "wait" else status.detail)
    eta = None
    rate = states.last_metrics(folder, "train").get("samples_per_second") if status.state == states.RUNNING else None
    if rate and total:
        eta = max(total - status.step, 0) * batch_size / rate
    return Line(run.id, status.state, status.step, total, eta, loss, who, failure)


@functools.cache
def _length(run: Run) -> tuple[int | None, int]:
    """Steps of the run, None where config or data are not there any more; and its batch size."""
    with contextlib.suppress(UserError, OSError):
        config = run.config()
        records = 0 if config.training.steps else plan.data_size(config)[1]
        steps = None if records is None else total_steps(config.training, config.data.batch_size, records)
        return steps, config.data.batch_size
    return None, 0


def counts(lines: Sequence[Line]) -> str:
    """`2 done, 1 running`."""
    return ", ".join(f"{count} {state}" for state, count in Counter(line.state for line in lines).items())


def head(sweep: Sweep) -> list[str]:
    return ["run", "state", "step", "ETA", sweep.loss, "who", "last failure"]


def text(workdir: Path, sweep: Sweep, lines: Sequence[Line]) -> str:
    """The table as text, and folders that the sweep does not declare."""
    said = [plan.align([head(sweep), *(line.cells() for line in lines)]), counts(lines)]
    declared = {run.id for run in sweep.runs}
    others = [folder.name for folder in sorted((workdir / RUNS_FOLDER).glob("*")) if folder.name not in declared]
    if others:
        said.append(f"not declared by the sweep, so not part of the fit: {', '.join(others)}")
    return "\n".join(said)


def table(sweep: Sweep, lines: Sequence[Line]) -> Table:
    """The same for a terminal."""
    found = Table(title=f"{sweep.name}: {counts(lines)}", box=None)
    for name in head(sweep):
        found.add_column(name, justify="right" if name in ("step", "ETA", sweep.loss) else "left", overflow="fold")
    for line in lines:
        found.add_row(*line.cells(), style=COLORS.get(line.state, ""))
    return found


def log_line(lines: Sequence[Line]) -> str:
    """The same in one line: counts, and how far the runs are that train."""
    at = [f"{line.run} {line.cells()[2]}" for line in lines if line.state == states.RUNNING]
    return counts(lines) + (f"; {', '.join(at)}" if at else "")
