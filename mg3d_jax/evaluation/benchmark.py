"""Downstream recipes from scratch and from pre-trained weights, on the same few labels: which start is better, and how surely.

A cell is one fine-tuning: a task, what it starts from, a share of the patients, a seed. It is done when its evaluation on the
test patients is written. Starts are compared by `evaluation.compare`: paired over test patients, and over seeds where there are
several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.bootstrap import DRAWS
from mg3d_jax.evaluation.compare import FILE, compare
from mg3d_jax.files import write_json, write_text
from mg3d_jax.html import Section, Table, number, render

SCRATCH = "scratch"
# The metric that stands for a task: the first of these that it has. What is written comes before what a head beside it finds.
PRIMARY = ("f1_micro", "bleu_4", "rouge_l", "auroc_macro", "dice/mean")
TRAIN, TEST, FOLD = "train", "test", "fold"  # folders of a task's data


@dataclass(frozen=True)
class Start:
    """What runs start from: a name for tables, and a run or folder ("" for random weights)."""

    name: str
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning."""

    task: str
    start: Start
    percent: float  # of the training patients; 100: all
    seed: int
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Below the folder of the benchmark."""
        return Path("runs", self.task, f"{self.start.name}-{self.percent:g}percent-seed{self.seed}")

    def words(self, workdir: Path, recipe: str, more: Sequence[str] = ()) -> list[str]:
        """The words of its `mg3d` command."""
        percent = 0.0 if self.percent == 100 else self.percent
        start = ["--init-from", self.start.source] if self.start.source else []
        return [
            "finetune", "--config", recipe, *start, "--workdir", str(workdir / self.folder), "--test", *self.test,
            f"--config.data.train={self.train!r}", f"--config.data.patients_percent={percent}",
            f"--config.seed={self.seed}", *more,
        ]  # fmt: skip

    def done(self, workdir: Path) -> bool:
        """Whether its test patients were evaluated."""
        return self.scores(workdir).is_file()

    def scores(self, workdir: Path) -> Path:
        return workdir / self.folder / TEST / FILE


def task_data(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The training and test folders of a task: `train` and `test`, or `fold0` for the test and the other folds to train on;
    None where there is neither."""
    folds = sorted(path for path in folder.glob(f"{FOLD}*") if path.is_dir())
    if (folder / TRAIN).is_dir() and (folder / TEST).is_dir():
        return (str(folder / TRAIN),), (str(folder / TEST),)
    if len(folds) > 1:
        return tuple(map(str, folds[1:])), (str(folds[0]),)
    return None


def starts(sources: Sequence[str]) -> tuple[Start, ...]:
    """Random weights first, then every source under a name of its own: that of its folder, or `NAME=SOURCE`."""
    found = [Start(SCRATCH)]
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = Path(text.partition("@")[0]).name, text
        found.append(Start(name, source))
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--init-from: several starts are called {twice}: write NAME=SOURCE")
    return tuple(found)


def grid(
    tasks: Sequence[str], data: Path, start: Sequence[Start], percents: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """All cells: seeds outermost, so that a benchmark that is cut short has the whole table for its first seeds."""
    if wrong := [percent for percent in percents if not 0 < percent <= 100]:
        raise UserError(f"--percent {wrong[0]:g}: from above 0 to 100")
    places = {task: task_data(data / task) for task in tasks}
    if lacking := [task for task, found in places.items() if found is None]:
        raise UserError(
            f"{data} has no prepared folders for {', '.join(lacking)}: DATA/TASK/train and DATA/TASK/test, or DATA/TASK/fold0, "
            "fold1, ... (mg3d prepare --fold)"
        )
    return [
        Cell(task, one, percent, seed, *found)
        for seed in seeds
        for task, found in places.items()
        if found is not None
        for percent in percents
        for one in start
    ]


def summarise(workdir: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """What is done so far: a row for each task, share and start, with the paired difference to random weights (to the first
    start where there are none).

    Returns:
        `{"protocol", "rows", "missing"}`; `missing` are the folders of the cells that are not done.
    """
    rows: list[dict[str, Any]] = []
    groups = dict.fromkeys((cell.task, cell.percent) for cell in cells)
    for task, percent in groups:
        done: dict[str, list[Path]] = {}
        for cell in cells:
            if (cell.task, cell.percent) == (task, percent) and cell.done(workdir):
                done.setdefault(cell.start.name, []).append(cell.scores(workdir))
        for name, runs in list(done.items())[1:]:
            rows.append({"task": task, "percent": percent, "start": name} | _difference(next(iter(done.items())), runs))
    protocol = (
        "Test patients as DATA has them; the last step of each run, nothing chosen on them. a: the first start, b: the other. "
        f"Differences: paired bootstrap, {DRAWS} draws of test patients, and of seeds where there are several."
    )
    return {"protocol": protocol, "rows": rows, "missing": [str(c.folder) for c in cells if not c.done(workdir)]}


def _difference(reference: tuple[str, list[Path]], runs: list[Path]) -> dict[str, Any]:
    first, others = reference
    found = compare(others, runs)
    keys = list(found.metrics)
    chosen = next((key for name in PRIMARY for key in keys if key.endswith(f"/{name}")), keys[0] if keys else "")
    if not chosen:
        raise UserError(f"{runs[0]} and {others[0]} have no metric in common")
    about = {"against": first, "metric": chosen, "patients": found.patients, "seeds": [len(others), len(runs)]}
    return about | dict(found.metrics[chosen]) | {"notes": list(found.notes), "all": dict(found.metrics)}


def _short(metric: str) -> str:
    """Its name without the protocol: "auroc_macro", "dice/mean"."""
    return next((name for name in PRIMARY if metric.endswith(f"/{name}")), metric.rpartition("/")[2])


HEAD = ("task", "labels", "start", "metric", "value", "difference", "95 % interval", "seeds")


def table(summary: dict[str, Any]) -> Table:
    """The rows as text: the value of the start and, in brackets, of the one that it is compared with."""
    rows = []
    for row in summary["rows"]:
        low, high = row["difference_95"]
        rows.append((
            row["task"], f"{row['percent']:g} %", f"{row['start']} ({row['against']})", _short(row["metric"]),
            f"{number(row['b'])} ({number(row['a'])})", f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}",
            " / ".join(map(str, row["seeds"])),
        ))  # fmt: skip
    more = f"not done yet: {len(summary['missing'])} runs" if summary["missing"] else ""
    return Table(HEAD, rows, numbers=(4, 5), more=more)


def write(workdir: Path, summary: dict[str, Any]) -> list[Path]:
    """`benchmark.json` and the page `benchmark.html`; returns their paths."""
    found = [workdir / "benchmark.json", workdir / "benchmark.html"]
    write_json(found[0], summary, allow_nan=True)
    section = Section("Downstream tasks", summary["protocol"], table(summary))
    notes = sorted({note for row in summary["rows"] for note in row["notes"]})
    title, facts = "Benchmark of downstream tasks", [("folder", str(workdir))]
    page = render("benchmark.html", title, heading=title, facts=facts, shown=[section], warnings=notes)
    write_text(found[1], page)
    return found
