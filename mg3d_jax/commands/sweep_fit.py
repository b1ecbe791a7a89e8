"""`mg3d sweep fit`: laws of a sweep or of any table."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d_jax.errors import UserError

if TYPE_CHECKING:
    from mg3d_jax.scaling.fit.laws import Form

REFUSED = 3
"""Exit code of `fit`, `advise`, `predict` and `check` where everything was written, but no law, no advice or no agreement
can be given."""
DEFAULT_DRAWS = 1000
ISOFLOP, METRIC = "isoflop", "metric"
FORMS = ("nd", "nd-tied", "nd-no-floor", "x", "x-no-floor", "nus", "nus-1", "nus-effective", ISOFLOP, METRIC)
VARIABLES = ("n", "d", "u", "s", "x")


def add_parser(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a law to a sweep or to a table",
        description="Fits a law, judges it, writes fit.json, fit.html, runs.csv, draws.csv and plots with their CSV files. "
        f"Where the runs allow no law it writes the data, says why, and ends with exit code {REFUSED}.",
    )
    fit.add_argument("--workdir", type=Path, help="the sweep's folder: collects its runs")
    fit.add_argument(
        "--table", type=Path, help="instead: a CSV file of runs (needs --loss, --out and the form's columns)"
    )
    fit.add_argument(
        "--form",
        choices=FORMS,
        default="nd",
        help="nd: E + A/N^alpha + B/D^beta (default); nd-tied: one exponent; x: one variable; nus: repeated data, U unique and "
        "S seen, nus-1 with one coefficient, nus-effective where they wear out; isoflop: parabolas per --compute; metric: a "
        "metric (--loss) of a loss (--x)",
    )
    for name, what in zip(
        VARIABLES, ("model size N", "data size D", "unique data U", "data seen S", "one variable"), strict=True
    ):
        fit.add_argument(f"--{name}", metavar="COLUMN", help=f"column of the {what} (only with --table)")
    fit.add_argument("--loss", help="column of the loss; with --workdir: metric of summary.json, default as declared")
    fit.add_argument("--compute", metavar="COLUMN", help="column of the FLOPs (--table); without it 6 N D")
    fit.add_argument(
        "--group", action="append", default=[], help="column(s) whose equal values share noise, e.g. the run (--table)"
    )
    fit.add_argument(
        "--subset",
        action="append",
        default=[],
        help="column(s) that name the data subset within a data amount (--table)",
    )
    fit.add_argument("--out", type=Path, help="folder for the results; with --workdir default WORKDIR/fit")
    fit.add_argument("--draws", type=int, default=DEFAULT_DRAWS, help="draws; 0: no intervals (default 1000)")
    fit.add_argument("--seed", type=int, default=0, help="of the random starts and the draws (default 0)")
    fit.add_argument(
        "--residuals", choices=("log", "raw"), default="log", help="of the logarithm of the loss (default) or of it"
    )
    fit.add_argument(
        "--holdout-compute", type=float, metavar="C", help="back-test: fit runs up to C FLOPs, predict the others too"
    )
    fit.add_argument(
        "--chance",
        type=float,
        help="loss of guessing, to which the law bends: log(pool) of a contrastive loss. With --form metric: of the metric "
        "(default 0; AUROC has 0.5)",
    )
    fit.add_argument("--ceiling", type=float, default=1.0, help="of the metric (--form metric)")


def fit(args: argparse.Namespace) -> int:
    if args.draws < 0:
        raise UserError(f"--draws {args.draws}: it must be 0 or more")
    if (args.table is None) == (args.workdir is None):
        raise UserError("give either --table T.csv (with --n, --d, --loss, --out) or --workdir DIR")
    if args.form in (ISOFLOP, METRIC):
        return _fit_other(args)
    if args.chance is not None and not 0 < args.chance < math.inf:
        raise UserError(f"--chance {args.chance:g}: the loss of guessing is above 0 and finite")
    document, out = _fit_table(args) if args.table else _fit_sweep(args)
    from mg3d_jax.scaling.fit import outputs

    print(outputs.summary(document))
    print(f"wrote {out}/fit.html, fit.json, runs.csv, draws.csv" + "".join(f", {name}" for name in document["plots"]))
    if document["refusal"]:
        print(f"mg3d sweep fit: no law: {document['refusal']}", file=sys.stderr)
        return REFUSED
    return 0


def _table_rows(args: argparse.Namespace, variables: tuple[str, ...], *more: str) -> list[Any]:
    from mg3d_jax.scaling.fit import table

    needed = [name.lower() for name in variables] + ["loss", "out", *more]
    if absent := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise UserError(f"--table with --form {args.form} needs {', '.join(absent)} too")
    if foreign := [
        f"--{name}" for name in VARIABLES if getattr(args, name) and name.upper() not in {v.upper() for v in variables}
    ]:
        raise UserError(f"--form {args.form} is of {', '.join(variables)}; it takes no {', '.join(foreign)}")
    table.make_folder(args.out)
    named = {name: getattr(args, name.lower()) for name in variables}
    rows = table.read_table(args.table, named, args.loss, args.group, subset=args.subset, compute=args.compute)
    if not args.compute and {"N"} < set(variables):
        for row in rows:
            row.compute = 6 * row.sizes["N"] * row.sizes.get("D", row.sizes.get("S", 0.0))
    return rows


def _form(args: argparse.Namespace) -> Form:
    from mg3d_jax.scaling.fit.laws import FORMS, with_chance

    return with_chance(FORMS[args.form], args.chance or 0.0)


def _fit_table(args: argparse.Namespace) -> tuple[dict, Path]:
    from mg3d_jax.scaling.fit import outputs

    form = _form(args)
    rows = _table_rows(args, form.variables)
    names = {name: getattr(args, name.lower()) for name in form.variables} | {
        "loss": args.loss,
        "source": args.table.name,
    }
    options = outputs.Options(form, args.draws, args.seed, args.residuals == "raw")
    if args.holdout_compute and any(row.compute != row.compute for row in rows):
        raise UserError("--holdout-compute needs --compute COLUMN: the FLOPs are not known from this form's variables")
    return outputs.write(args.out, rows, names, options, holdout_compute=args.holdout_compute), args.out


def _fit_sweep(args: argparse.Namespace) -> tuple[dict, Path]:
    from mg3d_jax.devices import leave_accelerators_alone

    leave_accelerators_alone()
    from mg3d_jax.scaling.fit import outputs
    from mg3d_jax.scaling.sweep import collect, declaration

    if given := [f"--{name}" for name in (*VARIABLES, "group", "subset", "compute") if getattr(args, name)]:
        raise UserError(f"{', '.join(given)} only go with --table; a sweep declares its model_size and data_size")
    form, declared = _form(args), declaration.read_declaration(args.workdir)
    named = collect.variables_of(declared)
    if not set(form.variables) <= set(named):
        raise UserError(
            f"--form {args.form} is of {', '.join(form.variables)}: fit it to the sweep's runs.csv with --table"
        )
    loss, out = args.loss or declared.loss, args.out or args.workdir / "fit"
    rows = collect.rows(args.workdir, declared, loss, form.variables)
    refusal, warnings = collect.objections(declared, rows, loss, bounded=bool(form.chance))
    names = {name: named[name] for name in form.variables} | {"loss": loss, "source": f"sweep {declared.name}"}
    options = outputs.Options(form, args.draws, args.seed, args.residuals == "raw")
    held_out = args.holdout_compute
    return outputs.write(
        out, rows, names, options, refusal=refusal, warnings=warnings, holdout_compute=held_out
    ), out  # fmt: skip


def _fit_other(args: argparse.Namespace) -> int:
    """IsoFLOP profiles, or a metric of the loss."""
    from mg3d_jax.scaling.fit import other, table

    if args.workdir:
        raise UserError(f"--form {args.form} takes a table: give the sweep's fit/runs.csv with --table")
    if args.form == ISOFLOP and args.chance is not None:
        raise UserError("--chance is of laws and of --form metric; parabolas have none")
    if args.form == ISOFLOP:
        rows = table.used(_table_rows(args, ("N",), "compute"))
        document = other.write_isoflop(args.out, rows)
    else:
        rows = table.used(_table_rows(args, ("x",)))
        document = other.write_metric(args.out, rows, args.chance or 0.0, args.ceiling, args.draws, args.seed)
    print(other.summary(document))
    print(f"wrote {args.out}/fit.json and its CSV and plot")
    if document["refusal"]:
        print(f"mg3d sweep fit: no result: {document['refusal']}", file=sys.stderr)
        return REFUSED
    return 0
