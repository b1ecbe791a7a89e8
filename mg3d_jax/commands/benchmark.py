"""`mg3d benchmark`: downstream recipes from scratch and from pre-trained weights, with paired intervals."""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mg3d_jax import config_files
from mg3d_jax import options as options_lib
from mg3d_jax.config.files import OVERRIDE
from mg3d_jax.errors import AGAIN, UserError
from mg3d_jax.evaluation import benchmark
from mg3d_jax.evaluation.benchmark import Cell
from mg3d_jax.scaling.sweep.executors.local import Process
from mg3d_jax.scaling.sweep.runner import Stop

logger = logging.getLogger(__name__)
RECIPES = "downstream"  # folder of the configs
LOG_FILE = "benchmark.log"


def recipes() -> list[str]:
    """Names of the tasks that a recipe came with the package for."""
    return sorted(path.stem for path in (config_files.SHIPPED / RECIPES).glob("*.py"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d benchmark",
        description="Fine-tunes every task from random weights and from each --init-from, with the labels of some shares of "
        "the patients and several seeds, one `mg3d finetune` after another; the same command goes on after an interruption. "
        "Writes benchmark.json and the page benchmark.html: differences with paired intervals.",
        epilog=f"Overrides {OVERRIDE}KEY=VALUE go to every run.",
    )
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="folder of the runs and the tables")
    add(
        "--data",
        required=True,
        type=Path,
        metavar="DATA",
        help="DATA/TASK/train and test, or DATA/TASK/fold0, fold1, ...",
    )
    add("--tasks", nargs="+", default=["all"], help=f"all that DATA has, or names of {', '.join(recipes())}")
    add(
        "--init-from",
        nargs="+",
        default=[],
        metavar="[NAME=]SOURCE",
        help="runs, folders of `mg3d import` or of `mg3d export`; random weights are the reference",
    )
    add("--percent", nargs="+", type=float, default=[100.0], help="of the training patients, nested (default: 100)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--arg", default="", help="argument of every recipe, e.g. small or probe")
    add("--commands", action="store_true", help="print the commands of the runs that are not done, for a scheduler")
    add("--summary", action="store_true", help="only write the tables of what is done")
    return parser


def main(argv: list[str]) -> int:
    """The command. Returns 75 where it was stopped: run it again; 1 where a run failed."""
    overrides, own = options_lib.split_overrides(argv, OVERRIDE)
    args = _parser().parse_args(own)
    cells = benchmark.grid(
        _tasks(args.tasks, args.data), args.data, benchmark.starts(args.init_from), args.percent, args.seeds
    )
    commands = {cell: cell.words(args.workdir, _recipe(cell.task, args.arg), overrides) for cell in cells}
    if args.commands:
        for cell, words in commands.items():
            if not cell.done(args.workdir):
                print(shlex.join(["mg3d", *words]))
        return 0
    code = 0 if args.summary else _run_all(commands, args.workdir)
    if code != AGAIN:
        _report(args.workdir, cells)
    return code


def _recipe(task: str, argument: str) -> str:
    path = str(Path("configs", RECIPES, f"{task}.py"))
    return f"{path}:{argument}" if argument else path


def _tasks(names: list[str], data: Path) -> list[str]:
    """The chosen tasks; of `all`, those that the data are there for, with a word on the others."""
    known = recipes()
    if names != ["all"]:
        if unknown := sorted(set(names) - set(known)):
            raise UserError(f"--tasks {' '.join(unknown)}: there are {', '.join(known)}")
        return names
    found = [name for name in known if benchmark.task_data(data / name) is not None]
    if not found:
        raise UserError(
            f"{data} has no prepared folder of any task: DATA/TASK/train and DATA/TASK/test; TASK: {', '.join(known)}"
        )
    if others := sorted(set(known) - set(found)):
        logger.info(f"not in {data}, left out: {', '.join(others)}")
    return found


def _run_all(commands: dict[Cell, list[str]], workdir: Path) -> int:
    """Runs what is not done. A run that fails does not stop the others."""
    running: list[Process] = []
    stop, failed = Stop(lambda: running), []
    try:
        for number, (cell, words) in enumerate(commands.items(), start=1):
            label = f"[{number}/{len(commands)}] {cell.folder}"
            if cell.done(workdir):
                logger.info(f"{label}: done before, skipped")
                continue
            logger.info(f"{label}: starts, or goes on")
            code = _run(words, workdir / cell.folder, running)
            if stop.asked or code == AGAIN:
                logger.info(f"asked to stop at {label}; the same command goes on")
                return AGAIN
            if code:
                failed.append(cell)
                logger.warning(f"{label}: failed with exit code {code}, see {workdir / cell.folder / LOG_FILE}")
    finally:
        stop.restore()
    return 1 if failed else 0


def _run(words: list[str], folder: Path, running: list[Process]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "mg3d_jax", *words], stdout=log, stderr=log)
    running[:] = [Process(process)]
    return process.wait()


def _report(workdir: Path, cells: list[Cell]) -> None:
    summary = benchmark.summarise(workdir, cells)
    written = benchmark.write(workdir, summary)
    found = benchmark.table(summary)
    shown = Table()
    for head in found.head:
        shown.add_column(str(head), overflow="fold")
    for row in found.rows:
        shown.add_row(*map(str, row))
    console = Console()
    console.print(shown)
    console.print(summary["protocol"], highlight=False)
    if found.more:
        console.print(found.more, highlight=False)
    print(f"written: {', '.join(map(str, written))}")
