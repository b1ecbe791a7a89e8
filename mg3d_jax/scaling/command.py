"""`mg3d sweep plan | run | status | fit`: scaling-law sweeps, and laws of any table of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.errors import UserError

DEFAULT_DRAWS = 1000


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mg3d sweep", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    fit = commands.add_parser(
        "fit",
        help="fit the law to a sweep or to a table",
        description="Fits L = E + A/N^alpha + B/D^beta; writes fit.json, runs.csv and plots with their CSV files.",
    )
    fit.add_argument("--workdir", type=Path, help="the sweep's folder: collects its runs")
    fit.add_argument("--table", type=Path, help="instead: a CSV file of runs (needs --n, --d, --loss and --out)")
    fit.add_argument("--n", help="column of the model size N")
    fit.add_argument("--d", help="column of the data size D")
    fit.add_argument("--loss", help="column of the loss (with --workdir: the metric, default from the sweep's config)")
    fit.add_argument(
        "--group", action="append", default=[], help="column(s) whose equal values are drawn together by the bootstrap"
    )
    fit.add_argument("--out", type=Path, help="folder for the results (with --workdir: default WORKDIR/fit)")
    fit.add_argument("--draws", type=int, default=DEFAULT_DRAWS, help="bootstrap draws; 0: no intervals (default 1000)")
    fit.add_argument("--seed", type=int, default=0, help="of the random starts and the bootstrap (default 0)")
    return top


def main(argv: list[str]) -> int:
    """Runs one subcommand; the exit code is 0 if it did what it was asked."""
    args = parser().parse_args(argv)
    return {"fit": _fit}[args.command](args)


def _fit(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling import report, table

    if args.draws < 0:
        raise UserError(f"--draws {args.draws}: it must be 0 or more")
    if (args.table is None) == (args.workdir is None):
        raise UserError("give either --table T.csv (with --n, --d, --loss, --out) or --workdir DIR")
    if absent := [f"--{name}" for name in ("n", "d", "loss", "out") if getattr(args, name) is None]:
        raise UserError(f"--table needs {', '.join(absent)} too")
    rows = table.read_table(args.table, args.n, args.d, args.loss, args.group)
    names = {"N": args.n, "D": args.d, "loss": args.loss, "table": str(args.table)}
    document = report.write_report(args.out, rows, names, draws=args.draws, seed=args.seed)
    print(report.summary(document))
    print(f"wrote {args.out}/fit.json, runs.csv, {', '.join(document['plots'])}")
    return 0
