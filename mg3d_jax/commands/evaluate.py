"""`mg3d evaluate`: the registered evaluations of a trained run on prepared data, or of anybody's embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mg3d_jax import options as options_lib
from mg3d_jax.evaluation.base import sections
from mg3d_jax.evaluation.document import OVERRIDE, Evaluated, configured, short_forms
from mg3d_jax.evaluation.label_tables import MAPPINGS, mapping_of_each

SHORT = {
    "classes": "which labels count: a set by name, or names with commas between them",
    "prompts": "wording of the zero-shot prompts: a set by name, or a file",
    "scoring": "from similarities to a zero-shot score, by name",
    "thresholds": "from a score to a decision, by name",
    "galleries": "what is searched in retrieval: names with commas between them",
    "exclude": "a file that names volumes, scans or patients that are no chest scans, e.g. no_chest_valid.txt",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mg3d evaluate",
        description="Evaluates a run on prepared data, or embeddings of any model from a file: zero-shot classification, "
        "retrieval, probes, and evaluations of your own. Writes evaluation.json, metrics.json (each number with its protocol "
        "in its name), classes.csv, scores.npz (for mg3d compare), evaluation.png and the page evaluation.html.",
        epilog=f"Every option of an evaluation can be set: {OVERRIDE}NAME.KEY=VALUE (docs/configuration.md lists them).",
    )
    run = parser.add_argument_group("of a run")
    run.add_argument("--workdir", type=Path, help="a run of `mg3d train`")
    run.add_argument("--data", nargs="+", help="prepared folder(s), not used in training")
    run.add_argument("--train-data", nargs="+", default=[], help="prepared folder(s) for probes and thresholds")
    run.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    run.add_argument("--batch-size", type=int, default=16, help="volumes per call (default: %(default)s)")
    run.add_argument(
        "--raw-weights",
        action="store_true",
        help="of a run with optimizer.ema: the weights themselves, not their average",
    )
    files = parser.add_argument_group("of any model")
    files.add_argument("--embeddings", type=Path, metavar="FILE", help=".npz or .parquet, as `mg3d embed` writes it")
    files.add_argument("--labels", nargs="+", type=Path, default=[], metavar="CSV", help="ids, and a column per class")
    files.add_argument(
        "--label-mapping", default="", choices=list(MAPPINGS), help="for tables that are Rad-ChestCT's own"
    )
    files.add_argument("--reports", type=Path, metavar="FILE", help="embeddings of reports, or a csv with their texts")
    files.add_argument("--train-embeddings", type=Path, metavar="FILE", help="for probes and thresholds")
    files.add_argument("--train-labels", nargs="+", type=Path, default=[], metavar="CSV", help="labels of these")
    both = parser.add_argument_group("of both")
    both.add_argument("--only", nargs="+", metavar="NAME", help="these evaluations (default: all)")
    both.add_argument("--out", type=Path, help="where to write (default: WORKDIR/evaluation, or beside FILE)")
    for name, meaning in SHORT.items():
        both.add_argument(f"--{name}", help=meaning)
    return parser


def main(argv: list[str]) -> int:
    words, own = options_lib.split_overrides(argv, OVERRIDE)
    parser = _parser()
    args = parser.parse_args(own)
    if (args.workdir is None) == (args.embeddings is None):
        parser.error("give --workdir RUN --data FOLDER, or --embeddings FILE --labels CSV")
    _check_side(parser, args)
    overrides = short_forms({name: getattr(args, name) for name in SHORT}, args.only)
    overrides |= options_lib.override_values(words, OVERRIDE)
    evaluated = _of_run(args, overrides) if args.embeddings is None else _of_files(args, overrides)
    out = args.out or (
        args.workdir / "evaluation" if args.workdir else args.embeddings.with_name(f"{args.embeddings.stem}_evaluation")
    )
    written = evaluated.write(out)
    print_tables(evaluated.document)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _check_side(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of the other side would do nothing: an error."""
    of_run = {
        "--data": args.data,
        "--train-data": args.train_data,
        "--step": args.step,
        "--raw-weights": args.raw_weights,
    }
    of_files = {
        "--labels": args.labels, "--label-mapping": args.label_mapping, "--reports": args.reports,
        "--train-embeddings": args.train_embeddings, "--train-labels": args.train_labels,
    }  # fmt: skip
    side, other = ("--workdir", of_files) if args.embeddings is None else ("--embeddings", of_run)
    if idle := [name for name, value in other.items() if value]:
        parser.error(f"{', '.join(idle)} cannot be given with {side}")
    if args.embeddings is None and not args.data:
        parser.error("--data is needed: prepared folder(s), not used in training")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    if args.train_labels and args.train_embeddings is None:
        parser.error("--train-labels are of --train-embeddings: give that file, too")


def _of_run(args: argparse.Namespace, overrides: Mapping[str, str]) -> Evaluated:
    from mg3d_jax.api import load  # imports JAX
    from mg3d_jax.evaluation.evaluate import evaluate

    run = load(args.workdir, args.step, ema=False if args.raw_weights else None)
    return evaluate(
        run.restored,
        args.data,
        only=args.only,
        overrides=overrides,
        train_folders=args.train_data,
        batch_size=args.batch_size,
    )


def _of_files(args: argparse.Namespace, overrides: Mapping[str, str]) -> Evaluated:
    from mg3d_jax.evaluation import from_files

    evaluations = configured(args.only, overrides=overrides)
    mapping, of_train = mapping_of_each(args.label_mapping, args.labels, args.train_labels)
    found = from_files.read(args.embeddings, labels=args.labels, label_mapping=mapping, reports=args.reports)
    train = None
    if args.train_embeddings is not None:
        train = from_files.read(args.train_embeddings, labels=args.train_labels, label_mapping=of_train)
    return from_files.evaluate(found, evaluations, train=train, named=args.only or ())


def print_tables(result: Mapping[str, Any]) -> None:
    """A table for each evaluation on stdout."""
    console = Console()
    console.print(f"{result['volumes']} volumes of {result['patients']} patients")
    for section in [one for one in sections(result) if one.on_terminal]:
        # A drawn interval has a heading, but no text in its row.
        columns = len(section.table.head) - bool(section.table.intervals)
        style = {"title_justify": "left", "caption_justify": "left"}
        table = Table(*map(str, section.table.head[:columns]), title=section.title, caption=section.protocol, **style)
        for row in section.table.rows:
            table.add_row(*map(str, row))
        console.print(table)
        if section.table.more:
            console.print(section.table.more)
        for warning in section.warnings:
            console.print(f"! {warning}", highlight=False)
    for name, words in result.get("left_out", {}).items():
        console.print(f"{name}: left out, it {words}", highlight=False)
