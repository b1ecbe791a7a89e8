"""`mg3d finetune`: trains a task from a recipe, and says with intervals what it reached on held-out data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError
from mg3d_jax.training import distributed

if TYPE_CHECKING:
    from mg3d_jax.config import Config

TEST = "test"  # folder of a run for the final evaluation
EVALUATED_BY = {"vocabulary": "zero_shot"}  # a task whose evaluation has another name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d finetune",
        description="Trains a downstream task: the loop of `mg3d train` with a task in place of the objectives. The recipes "
        "are configs/downstream/*.py. At the end the task's evaluation of --test (or of data.valid) is written to "
        "WORKDIR/test: every number with an interval. The same command resumes.",
        epilog="Joined to the file by a colon, `small` is the size of the recipe's miniature (mg3d phantom --layout).",
    )
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="where checkpoints, metrics and the evaluation go")
    parser.add_argument(
        "--init-from",
        metavar="SOURCE",
        help="a run (RUN or RUN@STEP), a folder of `mg3d import` or of `mg3d export`: gives model and weights; without it "
        "the model of the recipe starts from random weights",
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="FOLDER", help="prepared folder(s) of other patients")
    parser.add_argument("--batch-size", type=int, default=16, help="volumes per call of the evaluation (default: 16)")
    distributed.add_arguments(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command. Returns 75 where the run was stopped with everything saved."""
    overrides, own = config_lib.split_overrides(argv)
    args = _parser().parse_args(own)
    config = config_lib.load(recipe_with(args.config, args.init_from), overrides)
    tasks = [name for name, options in config.tasks.items() if options.weight > 0]
    if not tasks:
        raise UserError(f"{args.config} trains no task: set e.g. tasks.classification.weight=1.0, or use `mg3d train`")
    with distributed.joined(args):
        from mg3d_jax.trainer import Trainer  # after the processes have joined: nothing may look for devices before
        from mg3d_jax.training.stopping import DONE

        code = distributed.ended(Trainer(config, args.workdir).run())
        if code == DONE:
            evaluate_tasks(config, tasks, args.workdir, args.test or list(config.data.valid), args.batch_size)
        return code


def recipe_with(config: str, source: str | None) -> str:
    """`FILE[:ARG]` with what to start from in the argument. A step is `RUN@STEP`, as everywhere."""
    if not source:
        return config
    file, _, argument = config.partition(":")
    return f"{file}:{','.join([*filter(None, [argument]), source])}"


def evaluate_tasks(config: Config, tasks: list[str], workdir: Path, folders: list[str], batch_size: int) -> None:
    """Writes and prints the evaluations that are called as the tasks are, of the last checkpoint (the best one where the
    configuration says by which metric)."""
    import jax

    from mg3d_jax.commands.evaluate import print_tables
    from mg3d_jax.evaluation.evaluate import evaluate
    from mg3d_jax.registry import EVALUATIONS
    from mg3d_jax.training.checkpoints import Checkpoints
    from mg3d_jax.training.restore import restore_run

    only = [one for name in tasks if (one := EVALUATED_BY.get(name, name)) in EVALUATIONS]
    if not folders or not only or jax.process_count() > 1:
        lacking = "no held-out data (--test FOLDER)" if not folders else "no evaluation of its own"
        why = "several processes" if folders and only else lacking
        print(f"not evaluated: {why}; later: mg3d evaluate --workdir {workdir} --data FOLDER --only {' '.join(tasks)}")
        return
    best = Checkpoints(workdir, best_metric=config.training.best_metric, best_mode=config.training.best_mode).best()
    evaluated = evaluate(
        restore_run(workdir, best), folders, only=only, batch_size=batch_size, train_folders=config.data.train,
        train_patients=config.data.subset(),
    )  # fmt: skip
    written = evaluated.write(workdir / TEST)
    print_tables(evaluated.document)
    if best is not None and set(folders) & set(config.data.valid):
        print(
            f"! step {best} was chosen on the data that it is evaluated on: give --test for a number without that gain"
        )
    print(f"written: {', '.join(map(str, written))}")
