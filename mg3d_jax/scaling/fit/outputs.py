"""From rows to what a reader gets: `fit.json`, `runs.csv`, `draws.csv`, the plots, each with its own CSV, and one page."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.files import write_json
from mg3d_jax.scaling.fit import intervals, isoflop, lack_of_fit, page, plots, random_effects, table
from mg3d_jax.scaling.fit.certified import Fit, fit_form, reduced_fit, refuse
from mg3d_jax.scaling.fit.holdout import BackTest, back_test
from mg3d_jax.scaling.fit.intervals import LEVELS, Draws
from mg3d_jax.scaling.fit.isoflop import IsoFlop
from mg3d_jax.scaling.fit.lack_of_fit import LackOfFit
from mg3d_jax.scaling.fit.laws import HUBER_DELTA, ND, Form, log_residuals
from mg3d_jax.scaling.fit.solver import Problem
from mg3d_jax.scaling.fit.table import Row

SCHEMA = 2  # of fit.json; 1 had no `schema`
UNSTABLE_SHARE = 0.10
"""A term that vanishes in more than this share of the draws is not identified: its 80 % interval reaches zero."""
FITTED, PARTLY, REFUSED = "fitted", "fitted, some not identified", "refused"


@dataclass(frozen=True)
class Options:
    """How rows are fitted. `raw`: residuals of the loss instead of its logarithm."""

    form: Form = ND
    draws: int = 1000
    seed: int = 0
    raw: bool = False


@dataclass(frozen=True)
class Result:
    """A fit with all that is said of it. `no_interval`: why there are no draws."""

    fit: Fit
    drawn: Draws | None = None
    no_interval: str | None = None
    lack: LackOfFit | None = None
    reduced: Fit | None = None


def fit_rows(rows: Sequence[Row], options: Options, refusal: str | None = None) -> Result:
    """Fits the used rows and, if there is a law, judges it and draws others that the runs allow.

    `refusal`: why the rows must not be fitted.
    """
    form = options.form
    chosen = sorted(
        table.used(rows), key=lambda row: (*(row.sizes[name] for name in form.variables), row.loss, row.label)
    )
    sizes, loss = table.columns(chosen, form.variables)
    fit = refuse(refusal, form) if refusal else fit_form(form, sizes, loss, seed=options.seed, raw=options.raw)
    if fit.law is None:
        return Result(fit)
    problem = Problem.of(form, sizes, loss, raw=options.raw)
    kinds = clusters(chosen, form.variables)
    if len(set(kinds.get(intervals.SUBSET, range(2)))) == 1:
        fit.notes.append("all runs see one data subset: law and intervals are of these data, not of others like them")
    names = [row.label for row in chosen]
    lack = lack_of_fit.judge(problem, sizes, fit.law, _extra(chosen), names, random_effects.partitions(kinds))
    fit.warnings.extend(lack.warnings)
    drawn: Draws | str = "no draws were asked for"
    if options.draws:
        drawn = intervals.draw(problem, fit.law, kinds, draws=options.draws, seed=options.seed, usable=lack.kept)
    if isinstance(drawn, str):
        fit.warnings.append(f"no intervals: {drawn}")
    else:
        _judge_draws(fit, drawn)
    reduced = reduced_fit(fit, sizes, loss, raw=options.raw)
    if isinstance(drawn, str):
        return Result(fit, None, drawn, lack, reduced)
    return Result(fit, drawn, None, lack, reduced)


def clusters(rows: Sequence[Row], variables: Sequence[str]) -> dict[str, np.ndarray]:
    """Labels [rows] of what may share noise: runs of one cell, of one data subset, of one group."""
    labels = {intervals.CELL: np.asarray([" ".join(f"{row.sizes[name]:.9g}" for name in variables) for row in rows])}
    for kind in (intervals.SUBSET, intervals.GROUP):
        if any(getattr(row, kind) is not None for row in rows):
            labels[kind] = np.asarray([getattr(row, kind) or row.label for row in rows])
    return labels


def _extra(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Further columns that residuals may depend on."""
    keys = dict.fromkeys(key for row in rows for key in (row.extra if row.tested is None else row.tested))
    return {key: [row.extra.get(key) for row in rows] for key in keys}


def _judge_draws(fit: Fit, drawn: Draws) -> None:
    """Terms that vanish in many draws are not identified; wide exponents are noted."""
    for scale in fit.form.scales:
        share = drawn.zero_share(scale)
        if share > UNSTABLE_SHARE and scale not in fit.not_identified:
            reason = f"its term is zero in {share:.0%} of the draws"
            names = fit.form.own(scale)
            fit.not_identified.update(dict.fromkeys(names, reason))
            fit.warnings.extend(f"{name} is not identified: {reason}" for name in names)
    for name in fit.form.exponents:
        low, high = drawn.interval(name, 90)
        if name not in fit.not_identified and high > 3 * low:
            fit.notes.append(f"{name} is known only to lie in {low:.3g} .. {high:.3g} (90 %)")


def fit_document(rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> dict[str, Any]:
    """The content of `fit.json` (`docs/scaling.md`). `names` says what the variables and the loss are."""
    fit, drawn, form = result.fit, result.drawn, result.fit.form
    estimate = fit.law.as_dict() if fit.law else dict.fromkeys(form.parameters)
    bands = (
        {name: {str(level): list(drawn.interval(name, level)) for level in LEVELS} for name in form.parameters}
        if drawn
        else dict.fromkeys(form.parameters)
    )
    by_status = {
        status: [{"run": row.label, "reason": row.reason} for row in rows if row.status == status]
        for status in (table.EXCLUDED, table.MISSING)
    }
    return {
        "schema": SCHEMA,
        "form": form.name,
        "law": form.formula,
        "chance": form.chance or None,
        "status": REFUSED if fit.refusal else (PARTLY if fit.not_identified else FITTED),
        "refusal": fit.refusal,
        "params": {name: None if name in fit.not_identified else estimate[name] for name in form.parameters},
        "estimate": estimate,
        "not_identified": dict(fit.not_identified),
        "reduced": _reduced(result.reduced),
        "objective": fit.objective,
        "objective_definition": f"sum over used rows of Huber(delta={HUBER_DELTA:g}) of log(loss) - log(predicted)",
        "intervals": bands,
        "no_intervals": result.no_interval,
        "bootstrap": drawn.as_dict() if drawn else None,
        "lack_of_fit": result.lack.as_dict() if result.lack else None,
        "certificate": asdict(fit.certificate) if fit.certificate else None,
        "warnings": list(fit.warnings),
        "notes": list(fit.notes),
        "columns": dict(names),
        "rows": {"used": len(table.used(rows))} | {status: len(found) for status, found in by_status.items()},
        "fitted": _ranges(table.used(rows), form),
        **by_status,
    }


def _reduced(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None or fit.law is None:
        return None
    return {"law": fit.form.formula, "params": fit.law.as_dict(), "objective": fit.objective}


def _ranges(rows: Sequence[Row], form: Form) -> dict[str, list[float]]:
    """Smallest and largest of every variable and of the FLOPs among the fitted runs."""
    if not rows:
        return {}
    found = {name: [row.sizes[name] for row in rows] for name in form.variables} | {
        "compute": [r.compute for r in rows]
    }
    return {name: [min(v), max(v)] for name, v in found.items() if not np.isnan(v).any()}


def write_runs(path: Path, rows: Sequence[Row], result: Result) -> None:
    """Every row with its state: used (with what the law says of it), excluded or missing (with the reason)."""
    fit, form = result.fit, result.fit.form
    extra = list(dict.fromkeys(key for row in rows for key in row.extra))
    head = [
        "run",
        "status",
        "reason",
        *form.variables,
        "loss",
        "compute",
        "predicted",
        "log_residual",
        "group",
        "subset",
    ]
    extra = [key for key in extra if key not in head]
    lines = []
    for row in rows:
        predicted = residual = ""
        if row.status == table.USED and fit.law is not None:
            sizes, loss = table.columns([row], form.variables)
            predicted = repr(float(fit.law(*sizes.values())[0]))
            residual = repr(float(log_residuals(fit.law, sizes, loss)[0]))
        numbers = [row.sizes[name] for name in form.variables] + [row.loss, row.compute]
        shown = ["" if np.isnan(v) else repr(float(v)) for v in numbers]
        fixed = [row.label, row.status, row.reason, *shown, predicted, residual, row.group or "", row.subset or ""]
        lines.append(fixed + ["" if row.extra.get(key) is None else row.extra[key] for key in extra])
    _write_csv(path, head + extra, lines)


def _write_csv(path: Path, head: Sequence[str], lines: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *lines])


def write(
    out: Path,
    rows: Sequence[Row],
    names: Mapping[str, str],
    options: Options,
    *,
    refusal: str | None = None,
    warnings: Sequence[str] = (),
    holdout_compute: float | None = None,
) -> dict[str, Any]:
    """Fits and writes everything into `out`; returns the content of `fit.json`. `warnings` join the fit's own.

    `holdout_compute`: runs of more FLOPs are not fitted but predicted.
    """
    table.make_folder(out)
    tested: BackTest | None = None
    if holdout_compute is not None and not refusal:
        tested = back_test(rows, options.form, holdout_compute, lambda below: fit_rows(below, options))
    result = fit_rows(rows, options, refusal)
    result.fit.warnings[:0] = list(warnings)
    result.fit.warnings.extend(tested.warnings if tested else [])
    document = fit_document(rows, result, names)
    document["back_test"] = tested.as_dict() if tested else None
    profiles = _profiles(rows, options.form)
    document["isoflop"] = profiles.as_dict() if profiles else None
    write_runs(out / "runs.csv", rows, result)
    draws = result.drawn.values if result.drawn else np.zeros((0, len(options.form.parameters)))
    _write_csv(out / "draws.csv", options.form.parameters, draws.tolist())
    document["plots"] = plots.draw_all(out, table.used(rows), result, names, tested, profiles)
    write_json(out / "fit.json", document)
    page.write(out, document)
    return document


def _profiles(rows: Sequence[Row], form: Form) -> IsoFlop | None:
    """IsoFLOP profiles where some budget has several sizes."""
    chosen = table.used(rows)
    if "N" not in form.variables or not chosen or any(np.isnan(row.compute) for row in chosen):
        return None
    n, compute, loss = (
        np.asarray(v, np.float64) for v in zip(*((r.sizes["N"], r.compute, r.loss) for r in chosen), strict=True)
    )
    number = isoflop.budgets(compute)
    several = [len(np.unique(n[number == k])) >= isoflop.LEAST_SIZES for k in range(number.max() + 1)]
    return isoflop.isoflop(n, compute, loss) if sum(several) >= isoflop.LEAST_MINIMA else None


def summary(document: Mapping[str, Any]) -> str:
    """What the terminal shows: warnings, parameters with their 90 % intervals, rows."""
    counts = document["rows"]
    lines = [f"warning: {warning}" for warning in document["warnings"]]
    lines.append(f"{document['law']}: {document['status']}")
    for name, value in document["params"].items():
        interval = document["intervals"][name]
        if value is None:
            lines.append(f"  {name:<5} not identified")
        else:
            band = f"   90 % interval {interval['90'][0]:.5g} .. {interval['90'][1]:.5g}" if interval else ""
            lines.append(f"  {name:<5} {value:.6g}{band}")
    if reduced := document["reduced"]:
        values = ", ".join(f"{name} {value:.6g}" for name, value in reduced["params"].items())
        lines.append(f"  what the runs determine: {reduced['law']} with {values}")
    if lack := document["lack_of_fit"]:
        noise = "" if lack["noise"] is None else f", noise of a run {lack['noise']:.2%}"
        lines.append(f"  residuals: root mean square {lack['rms']:.2%} of the loss{noise}")
    if document["objective"] is not None:
        lines.append(f"  objective {document['objective']:.6g} ({document['objective_definition']})")
    if tested := document["back_test"]:
        lines += [
            f"  above {tested['limit']:.3g} FLOPs: {s['method']}: log-RMSE {s['log_rmse']:.4f}"
            for s in tested["scores"]
        ]
    lines.append(f"rows: {counts['used']} used, {counts['excluded']} excluded, {counts['missing']} missing")
    for status in ("excluded", "missing"):
        shown = document[status][:10]
        lines += [f"  {status}: {one['run']}: {one['reason']}" for one in shown]
        if rest := len(document[status]) - len(shown):
            lines.append(f"  {status}: and {rest} more, see runs.csv")
    lines += [f"note: {note}" for note in document["notes"]]
    return "\n".join(lines)
