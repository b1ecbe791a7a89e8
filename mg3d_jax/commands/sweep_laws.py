"""`mg3d sweep fit | advise | predict | check`: laws of a sweep or of any table, and what follows from them."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json

REFUSED = 3
"""Exit code where everything was written, but no law, no advice or no agreement can be given."""
DEFAULT_DRAWS = 1000
ISOFLOP, METRIC = "isoflop", "metric"
FORMS = ("nd", "nd-tied", "nd-no-floor", "x", "x-no-floor", "nus", "nus-1", ISOFLOP, METRIC)
VARIABLES = ("n", "d", "u", "s", "x")


def add_parsers(commands: argparse._SubParsersAction) -> None:
    _add_fit(commands)
    _add_advise(commands)
    _add_predict(commands)
    check = commands.add_parser(
        "check",
        help="compare a registered prediction with what came out",
        description="Compares a prediction of `predict --register` with the loss that was then measured. A changed file is "
        f"refused. Exit code {REFUSED} where the loss lies outside of the 90 %% interval.",
    )
    check.add_argument("prediction", type=Path, help="the registered file")
    check.add_argument("--run", type=Path, help="folder of the run: its summary.json has the loss")
    check.add_argument("--measured", type=float, help="instead: the measured loss")
    check.add_argument("--digest", help="what `predict` printed (or its beginning): the file must be that one")


def _add_fit(commands: argparse._SubParsersAction) -> None:
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
        "S seen, nus-1 with one coefficient; isoflop: parabolas per --compute; metric: a metric (--loss) of a loss (--x)",
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
    fit.add_argument("--chance", type=float, default=0.0, help="of the metric (--form metric; AUROC has 0.5)")
    fit.add_argument("--ceiling", type=float, default=1.0, help="of the metric (--form metric)")


def _add_advise(commands: argparse._SubParsersAction) -> None:
    advise = commands.add_parser(
        "advise",
        help="the best size and data amount for a compute budget",
        description="Minimises the fitted law over the sizes that can be built, at their counted FLOPs. "
        f"Exit code {REFUSED} where the budget is too far from the fitted runs or the law is not determined.",
    )
    where = advise.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, help="the sweep's folder, fitted before: its models are the ladder")
    where.add_argument("--fit", type=Path, help="folder of a fit of a table: sizes are continuous, C = --flops-per N D")
    advise.add_argument("--ladder", metavar="FILE[:ARG]", help="a sweep file whose models can be built too (--workdir)")
    advise.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="for --ladder")
    advise.add_argument("--flops-per", type=float, default=6.0, help="FLOPs per parameter and datum (--fit; default 6)")
    budget = advise.add_mutually_exclusive_group(required=True)
    budget.add_argument("--compute", type=float, help="budget in FLOPs")
    budget.add_argument("--device-hours", type=float, help="budget in hours of one device")
    advise.add_argument("--flops-per-second", type=float, help="of one device; with --workdir default as measured")
    advise.add_argument("--unique-data", type=float, help="the most D there is")
    advise.add_argument(
        "--most-extrapolation", type=float, default=100.0, help="budget over the largest fitted (default 100)"
    )


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="the loss that the law expects of a run, written down before it",
        description="Predicts the loss of a training config (--workdir) or of a point (--fit). --register FILE writes it with "
        "a digest, for `mg3d sweep check` after the run.",
    )
    where = predict.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, help="the sweep's folder, fitted before")
    where.add_argument("--fit", type=Path, help="folder of a fit; needs --at")
    predict.add_argument("--config", metavar="FILE[:ARG]", help="training config of the run (--workdir)")
    predict.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="for --config"
    )
    predict.add_argument(
        "--at", action="append", default=[], metavar="NAME=VALUE", help="e.g. --at N=1e9 --at D=2e10 (--fit)"
    )
    predict.add_argument("--register", type=Path, metavar="FILE", help="writes the prediction with its digest")
    predict.add_argument(
        "--most-extrapolation", type=float, default=100.0, help="FLOPs over the largest fitted (default 100)"
    )


def fit(args: argparse.Namespace) -> int:
    if args.draws < 0:
        raise UserError(f"--draws {args.draws}: it must be 0 or more")
    if (args.table is None) == (args.workdir is None):
        raise UserError("give either --table T.csv (with --n, --d, --loss, --out) or --workdir DIR")
    if args.form in (ISOFLOP, METRIC):
        return _fit_other(args)
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


def _fit_table(args: argparse.Namespace) -> tuple[dict, Path]:
    from mg3d_jax.scaling.fit import laws, outputs

    form = laws.FORMS[args.form]
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
    leave_accelerators_alone()
    from mg3d_jax.scaling.fit import laws, outputs
    from mg3d_jax.scaling.sweep import collect, declaration, rate_check

    if given := [f"--{name}" for name in (*VARIABLES, "group", "subset", "compute") if getattr(args, name)]:
        raise UserError(f"{', '.join(given)} only go with --table; a sweep declares its model_size and data_size")
    form = laws.FORMS[args.form]
    if set(form.variables) != {"N", "D"}:
        raise UserError(
            f"--form {args.form} is of {', '.join(form.variables)}: fit it to the sweep's runs.csv with --table"
        )
    declared = declaration.read_declaration(args.workdir)
    loss, out = args.loss or declared.loss, args.out or args.workdir / "fit"
    rows = collect.rows(args.workdir, declared, loss)
    names = {"N": declared.model_size, "D": declared.data_size, "loss": loss, "source": f"sweep {declared.name}"}
    checks = rate_check.checks(declared, rows, loss, declared.model_size)
    document = outputs.write(
        out,
        rows,
        names,
        outputs.Options(form, args.draws, args.seed, args.residuals == "raw"),
        refusal=collect.incomparable(declared, rows, loss),
        warnings=[*collect.versions_warning(rows), *rate_check.warnings(checks)],
        holdout_compute=args.holdout_compute,
    )
    return document, out


def _fit_other(args: argparse.Namespace) -> int:
    """IsoFLOP profiles, or a metric of the loss."""
    from mg3d_jax.scaling.fit import other, table

    if args.workdir:
        raise UserError(f"--form {args.form} takes a table: give the sweep's fit/runs.csv with --table")
    if args.form == ISOFLOP:
        rows = table.used(_table_rows(args, ("N",), "compute"))
        document = other.write_isoflop(args.out, rows)
    else:
        rows = table.used(_table_rows(args, ("x",)))
        document = other.write_metric(args.out, rows, args.chance, args.ceiling, args.draws, args.seed)
    print(other.summary(document))
    print(f"wrote {args.out}/fit.json and its CSV and plot")
    if document["refusal"]:
        print(f"mg3d sweep fit: no result: {document['refusal']}", file=sys.stderr)
        return REFUSED
    return 0


def read_fit(folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """`fit.json` of a folder, its law and its draws [draws, parameters]. `UserError` where there is no law."""
    import numpy as np

    from mg3d_jax.scaling.fit.laws import FORMS as LAWS
    from mg3d_jax.scaling.fit.laws import Law

    document = read_json(folder / "fit.json", remedy="fit again with mg3d sweep fit")
    if document.get("schema") is None:
        raise UserError(f"{folder / 'fit.json'} is of an earlier version: fit again with mg3d sweep fit")
    if document.get("refusal") or document["form"] not in LAWS:
        raise UserError(f"{folder}: there is no law to use: {document.get('refusal') or document['form']}")
    form = LAWS[document["form"]]
    law = Law.of(form, **document["estimate"])
    with (folder / "draws.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    return document, law, np.asarray(lines, np.float64).reshape(-1, len(form.parameters))


def advise(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.fit import advise as advice_lib

    folder = args.fit or args.workdir / "fit"
    document, law, draws = read_fit(folder)
    if set(law.form.variables) != {"N", "D"}:
        raise UserError(f"{folder}: advice needs a law of N and D, this is {law.form.formula}")
    speed = args.flops_per_second
    if args.workdir:
        leave_accelerators_alone()
        from mg3d_jax.scaling.sweep import declaration, ladder

        declared = declaration.read_declaration(args.workdir)
        found = ladder.records(args.workdir, declared)
        more = declaration.load(args.ladder, args.settings, args.workdir) if args.ladder else None
        rungs = ladder.ladder(declared, found, more)
        speed = speed or (ladder.flops_per_second(found) if args.device_hours else None)
    else:
        sizes = document["fitted"]["N"]
        rungs = advice_lib.continuous_ladder(min(sizes), max(sizes), args.flops_per)
    if args.device_hours and not speed:
        raise UserError("--device-hours needs --flops-per-second of one device")
    compute = args.compute or 3600 * args.device_hours * speed
    advice = advice_lib.advise(
        law,
        draws,
        rungs,
        compute,
        largest_fitted=(document["fitted"].get("compute") or [None, None])[1],
        unique_data=args.unique_data,
        most_extrapolation=args.most_extrapolation,
        not_identified=list(document["not_identified"]),
    )
    _show_advice(advice, document)
    return REFUSED if advice.refusal else 0


def _show_advice(advice: Any, document: dict[str, Any]) -> None:
    for warning in (*document["warnings"], *advice.warnings):
        print(f"warning: {warning}")
    if advice.refusal:
        print(f"mg3d sweep advise: refused: {advice.refusal}", file=sys.stderr)
        return
    ratio = "" if advice.extrapolation is None else f", {advice.extrapolation:.3g} times the largest fitted run"
    best = advice.best
    print(f"{advice.compute:.3g} FLOPs{ratio}: N {best.n:.4g}, D {best.d:.4g}, D/N {best.d / best.n:.3g}")
    if advice.interval_n:
        print("  80 % interval: N {:.3g} .. {:.3g}, D {:.3g} .. {:.3g}".format(*advice.interval_n, *advice.interval_d))
    for one in advice.choices:
        band = "" if one.interval is None else f" (80 % {one.interval[0]:.4g} .. {one.interval[1]:.4g})"
        share = "" if one.best_share is None else f", best in {one.best_share:.0%} of the draws"
        print(f"  {one.name}: N {one.n:.4g}, D {one.d:.4g}, loss {one.loss:.5g}{band}, regret {one.regret:.2g}{share}")


def predict(args: argparse.Namespace) -> int:
    import numpy as np

    from mg3d_jax.scaling.fit import intervals, registration
    from mg3d_jax.scaling.fit.laws import predict as predicted_by

    folder = args.fit or args.workdir / "fit"
    document, law, draws = read_fit(folder)
    at, run = _point(args, law.form.variables, document)
    columns = {name: np.asarray([at[name]]) for name in law.form.variables}
    loss = float(law(*columns.values())[0])
    drawn = predicted_by(law.form, draws, columns)[:, 0]
    noise = (document["lack_of_fit"] or {}).get("noise") or 0.0
    drawn = drawn * np.exp(noise * np.random.default_rng(0).normal(size=len(drawn)))  # of the run itself
    bands = (
        {str(level): list(intervals.limits(drawn, loss, level)) for level in intervals.LEVELS} if len(drawn) else None
    )
    largest = (document["fitted"].get("compute") or [None, None])[1]
    compute = at.get("compute", 6 * at["N"] * at.get("D", at.get("S", 0.0)) if "N" in at else None)
    ratio = compute / largest if compute and largest else None
    if ratio and ratio > args.most_extrapolation:
        print(
            f"mg3d sweep predict: refused: {ratio:.3g} times the FLOPs of the largest fitted run; more than "
            f"{args.most_extrapolation:g} is a guess",
            file=sys.stderr,
        )
        return REFUSED
    for warning in document["warnings"]:
        print(f"warning: {warning}")
    point = ", ".join(f"{name} {value:.5g}" for name, value in at.items())
    band = f", 90 % {bands['90'][0]:.5g} .. {bands['90'][1]:.5g} with the noise of a run" if bands else ", no interval"
    print(f"{document['columns']['loss']} at {point}: {loss:.6g}{band}")
    if args.register:
        content = {
            "loss": document["columns"]["loss"],
            "law": document["law"],
            "estimate": document["estimate"],
            "fit_sha256": registration.file_digest(folder / "fit.json"),
            "at": at,
            "run": run,
            "predicted": loss,
            "intervals": bands,
            "extrapolation": ratio,
            "warnings": document["warnings"],
        }
        print(f"registered {args.register}, sha256 {registration.register(args.register, content)}")
    return 0


def _point(
    args: argparse.Namespace, variables: tuple[str, ...], document: dict[str, Any]
) -> tuple[dict[str, float], dict]:
    """Where the prediction is made, and what identifies the run."""
    if args.fit:
        at = dict(one.split("=", 1) for one in args.at if "=" in one)
        if set(at) != set(variables):
            raise UserError(f"--fit needs --at NAME=VALUE for each of {', '.join(variables)}")
        try:
            return {name: float(at[name]) for name in variables}, {}
        except ValueError as error:
            raise UserError(f"--at: {error}") from error
    if not args.config:
        raise UserError("--workdir needs --config FILE: the training config of the run that is predicted")
    leave_accelerators_alone()
    from mg3d_jax import config as config_lib
    from mg3d_jax.scaling.sweep import declaration, ladder

    declared = declaration.read_declaration(args.workdir)
    if set(variables) != {"N", "D"}:
        raise UserError(f"{args.workdir}: the law is not of N and D")
    config = config_lib.load(args.config, [f"--config.{one}" for one in args.settings])
    point = ladder.locate(config, declared, ladder.records(args.workdir, declared)[0]["vocab_size"])
    return {"N": point.n, "D": point.d, "compute": point.compute}, {"config_hash": config_lib.config_hash(config)}


def check(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.fit import registration

    if (args.run is None) == (args.measured is None):
        raise UserError("give either --run RUN or --measured LOSS")
    document = registration.read(args.prediction, args.digest)
    loss = args.measured
    if args.run:
        summary = read_json(args.run / "summary.json")
        expected, got = document["run"].get("config_hash"), summary.get("config_hash")
        if expected and expected != got:
            raise UserError(f"{args.run} has the configuration {got}; the prediction is of {expected}")
        loss = summary["final"].get(document["loss"])
        if loss is None:
            raise UserError(
                f"{args.run}/summary.json has no {document['loss']!r}; it has {', '.join(summary['final'])}"
            )
    found = registration.compare(document, float(loss))
    print(
        f"{document['loss']}: predicted {found['predicted']:.6g} on {document['registered']}, measured {found['measured']:.6g} "
        f"({found['percent']:+.2f} %)"
    )
    for level, inside in found["inside"].items():
        low, high = document["intervals"][level]
        print(f"  {'inside' if inside else 'OUTSIDE'} the {level} % interval {low:.5g} .. {high:.5g}")
    return 0 if found["inside"].get("90", True) else REFUSED


def leave_accelerators_alone() -> None:
    """What a sweep counts, it traces on the CPU: the accelerators belong to its trainers, which are other processes."""
    import jax

    jax.config.update("jax_platforms", "cpu")
