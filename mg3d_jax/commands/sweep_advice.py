"""`mg3d sweep advise | predict | check`: what follows from a fitted law."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d_jax.commands.sweep_fit import REFUSED
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json

if TYPE_CHECKING:
    import numpy as np

    from mg3d_jax.scaling.fit.advise import Advice, Rung
    from mg3d_jax.scaling.fit.laws import Law


def add_parsers(commands: argparse._SubParsersAction) -> None:
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


def _add_advise(commands: argparse._SubParsersAction) -> None:
    advise = commands.add_parser(
        "advise",
        help="the best size and data amount for a compute budget",
        description="Minimises the fitted law over the sizes that can be built, at their counted FLOPs. "
        f"Exit code {REFUSED} where the budget is too far from the fitted runs or the law is not determined.",
    )
    _add_shared(advise, "its models are the ladder", "sizes are continuous, C = --flops-per N D", "--ladder")
    advise.add_argument("--ladder", metavar="FILE[:ARG]", help="a sweep file whose models can be built too (--workdir)")
    advise.add_argument("--flops-per", type=float, default=6.0, help="FLOPs per parameter and datum (--fit; default 6)")
    budget = advise.add_mutually_exclusive_group(required=True)
    budget.add_argument("--compute", type=float, help="budget in FLOPs")
    budget.add_argument("--device-hours", type=float, help="budget in hours of one device")
    advise.add_argument("--flops-per-second", type=float, help="of one device; with --workdir default as measured")
    advise.add_argument("--unique-data", type=float, help="the most unique data there is")


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="the loss that the law expects of a run, written down before it",
        description="Predicts the loss of a training config (--workdir) or of a point (--fit). --register FILE writes it with "
        "a digest, for `mg3d sweep check` after the run.",
    )
    _add_shared(predict, "needs --config", "needs --at", "--config")
    predict.add_argument("--config", metavar="FILE[:ARG]", help="training config of the run (--workdir)")
    predict.add_argument(
        "--at", action="append", default=[], metavar="NAME=VALUE", help="e.g. --at N=1e9 --at D=2e10 (--fit)"
    )
    predict.add_argument("--register", type=Path, metavar="FILE", help="writes the prediction with its digest")


def _add_shared(command: argparse.ArgumentParser, of_sweep: str, of_fit: str, settings_of: str) -> None:
    """Whose law, overrides of the config that `settings_of` names, and how far it may be asked."""
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, help=f"the sweep's folder, fitted before; {of_sweep}")
    where.add_argument("--fit", type=Path, help=f"folder of a fit; {of_fit}")
    command.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help=f"for {settings_of}"
    )
    command.add_argument(
        "--most-extrapolation", type=float, default=100.0, help="FLOPs over the largest fitted run (default 100)"
    )


def read_fit(folder: Path) -> tuple[dict[str, Any], Law, np.ndarray]:
    """`fit.json` of a folder, its law and its draws [draws, parameters]. `UserError` where there is no law."""
    import numpy as np

    from mg3d_jax.scaling.fit.laws import FORMS, Law, with_chance

    if not (folder / "fit.json").is_file():
        raise UserError(f"{folder}: no fit.json: fit a law first, with mg3d sweep fit")
    document = read_json(folder / "fit.json")
    if document.get("schema") is None:
        raise UserError(f"{folder / 'fit.json'} is of an earlier version: fit again with mg3d sweep fit")
    if document.get("refusal") or document["form"] not in FORMS:
        raise UserError(f"{folder}: there is no law to use: {document.get('refusal') or document['form']}")
    form = with_chance(FORMS[document["form"]], document.get("chance") or 0.0)
    law = Law.of(form, **document["estimate"])
    with (folder / "draws.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    return document, law, np.asarray(lines, np.float64).reshape(-1, len(form.parameters))


def advise(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.fit import advise as advice_lib

    if wrong := [
        f"--{name.replace('_', '-')} {value:g}"
        for name in ("compute", "device_hours", "flops_per_second", "unique_data", "flops_per", "most_extrapolation")
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf
    ]:
        raise UserError(f"{', '.join(wrong)}: it must be above 0 and finite")
    folder = args.fit or args.workdir / "fit"
    document, law, draws = read_fit(folder)
    if "N" not in law.form.variables:
        raise UserError(f"{folder}: advice needs a law of N and data, this is {law.form.formula}")
    rungs, speed = _sweep_ladder(args, law) if args.workdir else (_continuous(args, document), args.flops_per_second)
    if args.device_hours and not speed:
        raise UserError("--device-hours needs --flops-per-second of one device")
    advice = advice_lib.advise(
        law,
        draws,
        rungs,
        args.compute or 3600 * args.device_hours * speed,
        largest_fitted=(document["fitted"].get("compute") or [None, None])[1],
        unique_data=args.unique_data,
        most_extrapolation=args.most_extrapolation,
        not_identified=list(document["not_identified"]),
    )
    _show_advice(advice, document)
    return REFUSED if advice.refusal else 0


def _continuous(args: argparse.Namespace, document: dict[str, Any]) -> list[Rung]:
    from mg3d_jax.scaling.fit.advise import continuous_ladder

    if args.ladder or args.settings:
        raise UserError("--ladder and --set go with --workdir")
    smallest, largest = document["fitted"]["N"]
    return continuous_ladder(smallest, largest, args.flops_per)


def _sweep_ladder(args: argparse.Namespace, law: Law) -> tuple[list[Rung], float | None]:
    """The sizes that the sweep and --ladder can build, and the FLOP/s of one device."""
    from mg3d_jax.devices import leave_accelerators_alone

    leave_accelerators_alone()
    from mg3d_jax.scaling.sweep import collect, declaration, ladder
    from mg3d_jax.scaling.sweep.speed import Speed

    declared = declaration.read_declaration(args.workdir)
    found = _finished(args.workdir, collect.records(args.workdir, declared))
    if args.settings and not args.ladder:
        raise UserError("--set goes with --ladder")
    more = declaration.load(args.ladder, args.settings, args.workdir) if args.ladder else None
    rungs = ladder.ladder(declared, found, more, per="S" if "S" in law.form.variables else "D")
    if args.flops_per_second or not args.device_hours:
        return rungs, args.flops_per_second
    measured = Speed.measured(found)
    if measured is None or measured.device is None:
        what = "how long it trained" if measured is None else "on how many devices it trained"
        raise UserError(f"no finished run says {what}: give --flops-per-second of one device, or --compute")
    print(f"{measured.device:.3g} FLOP/s of one device, as measured over {measured.source}")
    return rungs, measured.device


def _finished(workdir: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not found:
        raise UserError(f"{workdir}: no finished run; run the sweep first, and fit it")
    return found


def _show_advice(advice: Advice, document: dict[str, Any]) -> None:
    for warning in (*document["warnings"], *advice.warnings):
        print(f"warning: {warning}")
    if advice.refusal or advice.best is None:
        print(f"mg3d sweep advise: refused: {advice.refusal}", file=sys.stderr)
        return
    ratio = "" if advice.extrapolation is None else f", {advice.extrapolation:.3g} times the largest fitted run"
    best = advice.best
    seen = "" if best.epochs is None else f" ({best.epochs:.3g} times the unique data)"
    print(f"{advice.compute:.3g} FLOPs{ratio}: N {best.n:.4g}, D {best.d:.4g}{seen}, D/N {best.d / best.n:.3g}")
    if advice.interval_n and advice.interval_d:
        print("  80 % interval: N {:.3g} .. {:.3g}, D {:.3g} .. {:.3g}".format(*advice.interval_n, *advice.interval_d))
    for one in advice.choices:
        band = "" if one.interval is None else f" (80 % {one.interval[0]:.4g} .. {one.interval[1]:.4g})"
        share = "" if one.best_share is None else f", best in {one.best_share:.0%} of the draws"
        print(f"  {one.name}: N {one.n:.4g}, D {one.d:.4g}, loss {one.loss:.5g}{band}, regret {one.regret:.2g}{share}")


def predict(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.fit import registration

    folder = args.fit or args.workdir / "fit"
    document, law, draws = read_fit(folder)
    at, compute, run, warnings = _of_point(args, law) if args.fit else _of_config(args, law)
    loss, bands = _predicted(law, draws, at, (document["lack_of_fit"] or {}).get("noise") or 0.0)
    largest = (document["fitted"].get("compute") or [None, None])[1]
    ratio = compute / largest if compute and largest else None
    if ratio and ratio > args.most_extrapolation:
        print(
            f"mg3d sweep predict: refused: {ratio:.3g} times the FLOPs of the largest fitted run; more than "
            f"{args.most_extrapolation:g} is a guess",
            file=sys.stderr,
        )
        return REFUSED
    warnings = [*document["warnings"], *warnings]
    for warning in warnings:
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
            "compute": compute,
            "run": run,
            "predicted": loss,
            "intervals": bands,
            "extrapolation": ratio,
            "warnings": warnings,
        }
        print(f"registered {args.register}, sha256 {registration.register(args.register, content)}")
    return 0


def _predicted(
    law: Law, draws: np.ndarray, at: dict[str, float], noise: float
) -> tuple[float, dict[str, list[float]] | None]:
    """The loss at a point, and its intervals with the noise of the run itself."""
    import numpy as np

    from mg3d_jax.scaling.fit import intervals, laws

    columns = {name: np.asarray([at[name]]) for name in law.form.variables}
    loss = float(law(*columns.values())[0])
    if not len(draws):
        return loss, None
    drawn = laws.predict(law.form, draws, columns)[:, 0]
    drawn = drawn * np.exp(noise * np.random.default_rng(0).normal(size=len(drawn)))
    return loss, {str(level): list(intervals.limits(drawn, loss, level)) for level in intervals.LEVELS}


def _of_point(args: argparse.Namespace, law: Law) -> tuple[dict[str, float], float | None, dict[str, str], list[str]]:
    """Where --at is, its FLOPs at 6 N D, and that it is of no run in particular."""
    if args.config or args.settings:
        raise UserError("--config and --set go with --workdir; --fit takes --at NAME=VALUE")
    at = dict(one.split("=", 1) for one in args.at if "=" in one)
    if set(at) != set(law.form.variables):
        raise UserError(f"--fit needs --at NAME=VALUE for each of {', '.join(law.form.variables)}")
    try:
        values = {name: float(at[name]) for name in law.form.variables}
    except ValueError as error:
        raise UserError(f"--at: {error}") from error
    if wrong := [f"{name}={value:g}" for name, value in values.items() if not 0 < value < math.inf]:
        raise UserError(f"--at {wrong[0]}: it must be above 0 and finite")
    seen = values.get("D", values.get("S"))
    return values, 6 * values["N"] * seen if seen and "N" in values else None, {}, []


def _of_config(args: argparse.Namespace, law: Law) -> tuple[dict[str, float], float | None, dict[str, str], list[str]]:
    """Where --config is, its FLOPs, what identifies its run, and what to beware of."""
    if args.at:
        raise UserError("--at goes with --fit; --workdir takes --config FILE")
    if not args.config:
        raise UserError("--workdir needs --config FILE: the training config of the run that is predicted")
    from mg3d_jax.devices import leave_accelerators_alone

    leave_accelerators_alone()
    from mg3d_jax import config as config_lib
    from mg3d_jax.scaling.sweep import collect, declaration, ladder

    declared = declaration.read_declaration(args.workdir)
    if not set(law.form.variables) <= set(collect.variables_of(declared)):
        raise UserError(f"{args.workdir}: the law is of {', '.join(law.form.variables)}, which a config does not say")
    config = config_lib.load(args.config, [f"--config.{one}" for one in args.settings])
    found = _finished(args.workdir, collect.records(args.workdir, declared))
    point = ladder.locate(config, declared, found, law.form.variables)
    return point.at, point.compute, {"config_hash": config_lib.config_hash(config)}, point.warnings


def check(args: argparse.Namespace) -> int:
    from mg3d_jax.scaling.fit import registration

    if (args.run is None) == (args.measured is None):
        raise UserError("give either --run RUN or --measured LOSS")
    document = registration.read(args.prediction, args.digest)
    loss = _measured(args.run, document) if args.run else args.measured
    if not 0 < loss < math.inf:
        raise UserError(f"the measured {document['loss']} is {loss:g}; it must be above 0 and finite")
    found = registration.compare(document, float(loss))
    print(
        f"{document['loss']}: predicted {found['predicted']:.6g} on {document['registered']}, measured {found['measured']:.6g} "
        f"({found['percent']:+.2f} %)"
    )
    for level, inside in found["inside"].items():
        low, high = document["intervals"][level]
        print(f"  {'inside' if inside else 'OUTSIDE'} the {level} % interval {low:.5g} .. {high:.5g}")
    if not found["inside"]:
        print("  the prediction has no interval: whether it came true is not said")
    return 0 if found["inside"].get("90", True) else REFUSED


def _measured(run: Path, document: dict[str, Any]) -> float:
    """The loss of a finished run. `UserError` where it is not the run that was predicted."""
    summary = read_json(run / "summary.json", remedy="name the folder of the finished run")
    if (state := summary.get("state")) != "done":
        raise UserError(f"{run}/summary.json says state {state!r}: the run is not done")
    expected, got = document["run"].get("config_hash"), summary.get("config_hash")
    if expected and expected != got:
        raise UserError(f"{run} has the configuration {got}; the prediction is of {expected}")
    if (loss := summary["final"].get(document["loss"])) is None:
        raise UserError(f"{run}/summary.json has no {document['loss']!r}; it has {', '.join(summary['final'])}")
    return float(loss)
