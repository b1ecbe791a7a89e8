"""From rows to what a reader gets: `fit.json`, `runs.csv`, and the plots, each with its own CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.files import write_json
from mg3d_jax.scaling.fit import plots, table
from mg3d_jax.scaling.fit.bootstrap import LEVELS, Bootstrap, bootstrap
from mg3d_jax.scaling.fit.certified import TERM_PARAMETERS, Fit, fit_law, refuse
from mg3d_jax.scaling.fit.laws import FORMULA, HUBER_DELTA, PARAMETERS, log_residuals
from mg3d_jax.scaling.fit.table import Row

UNSTABLE_SHARE = 0.10
"""A term that vanishes in more than this share of the resamplings is not identified: its 80 % interval reaches zero."""


def fit_rows(
    rows: Sequence[Row], *, draws: int, seed: int = 0, refusal: str | None = None
) -> tuple[Fit, Bootstrap | None]:
    """Fits the used rows and, if there is a law, resamples it `draws` times. `refusal`: why they must not be fitted."""
    chosen = table.used(rows)
    n, d, loss = table.columns(chosen)
    fit = refuse(refusal) if refusal else fit_law(n, d, loss, seed=seed)
    if fit.law is None:
        return fit, None
    if draws == 0:
        fit.warnings.append("no intervals: 0 bootstrap draws were asked for")
        return fit, None
    groups = [row.group for row in chosen]
    drawn = bootstrap(n, d, loss, fit.law, draws=draws, seed=seed, groups=groups if groups[0] is not None else None)
    for scale, names in zip(("E", "A", "B"), TERM_PARAMETERS, strict=True):
        share = drawn.zero_share(scale)
        if share > UNSTABLE_SHARE and scale not in fit.not_identified:
            reason = f"its term is zero in {share:.0%} of the bootstrap draws"
            fit.not_identified.update(dict.fromkeys(names, reason))
            fit.warnings.extend(f"{name} is not identified: {reason}" for name in names)
    for name in ("alpha", "beta"):
        low, high = drawn.interval(name, 90)
        if name not in fit.not_identified and high > 3 * low:
            fit.warnings.append(f"{name} is known only to lie in {low:.3g} .. {high:.3g} (90 %)")
    if drawn.groups < 20:
        fit.warnings.append(
            f"intervals from {drawn.groups} runs or groups of runs are rough: fewer than 20 to draw from"
        )
    return fit, drawn


def fit_document(rows: Sequence[Row], fit: Fit, drawn: Bootstrap | None, names: Mapping[str, str]) -> dict[str, Any]:
    """The content of `fit.json`. `names` says what N, D and loss are (columns, metric, units)."""
    estimate = fit.law.as_dict() if fit.law else dict.fromkeys(PARAMETERS)
    intervals = (
        {name: {str(level): list(drawn.interval(name, level)) for level in LEVELS} for name in PARAMETERS}
        if drawn
        else dict.fromkeys(PARAMETERS)
    )
    by_status = {
        status: [{"run": row.label, "reason": row.reason} for row in rows if row.status == status]
        for status in (table.EXCLUDED, table.MISSING)
    }
    return {
        "law": FORMULA,
        "status": "refused" if fit.refusal else ("fitted, some not identified" if fit.not_identified else "fitted"),
        "refusal": fit.refusal,
        "params": {name: None if name in fit.not_identified else estimate[name] for name in PARAMETERS},
        "estimate": estimate,
        "not_identified": dict(fit.not_identified),
        "objective": fit.objective,
        "objective_definition": f"sum over used rows of Huber(delta={HUBER_DELTA:g}) of log(loss) - log(predicted)",
        "intervals": intervals,
        "bootstrap": {"draws": len(drawn.draws), "groups": drawn.groups, "seed": drawn.seed} if drawn else None,
        "certificate": asdict(fit.certificate) if fit.certificate else None,
        "warnings": list(fit.warnings),
        "columns": dict(names),
        "rows": {
            "used": len(table.used(rows)),
            "excluded": len(by_status[table.EXCLUDED]),
            "missing": len(by_status[table.MISSING]),
        },
        "excluded": by_status[table.EXCLUDED],
        "missing": by_status[table.MISSING],
    }


def write_runs(path: Path, rows: Sequence[Row], fit: Fit) -> None:
    """Every row with its state: used (with what the law says of it), excluded or missing (with the reason)."""
    extra = list(dict.fromkeys(key for row in rows for key in row.extra))
    head = ["run", "status", "reason", "N", "D", "loss", "predicted", "log_residual", "group"]
    extra = [key for key in extra if key not in head]
    lines = []
    for row in rows:
        predicted = residual = ""
        if row.status == table.USED and fit.law is not None:
            predicted = repr(float(fit.law(row.n, row.d)))
            residual = repr(float(log_residuals(fit.law, row.n, row.d, row.loss)))
        numbers = ["" if np.isnan(v) else repr(float(v)) for v in (row.n, row.d, row.loss)]
        fixed = [row.label, row.status, row.reason, *numbers, predicted, residual, row.group or ""]
        lines.append(fixed + ["" if row.extra.get(key) is None else row.extra[key] for key in extra])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head + extra, *lines])


def write(
    out: Path,
    rows: Sequence[Row],
    names: Mapping[str, str],
    *,
    draws: int,
    seed: int = 0,
    refusal: str | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Fits and writes everything into `out`; returns the content of `fit.json`. `warnings` join the fit's own."""
    out.mkdir(parents=True, exist_ok=True)
    fit, drawn = fit_rows(rows, draws=draws, seed=seed, refusal=refusal)
    fit.warnings.extend(warnings)
    document = fit_document(rows, fit, drawn, names)
    write_runs(out / "runs.csv", rows, fit)
    document["plots"] = plots.draw_all(out, table.used(rows), fit, drawn, names)
    write_json(out / "fit.json", document)
    return document


def summary(document: Mapping[str, Any]) -> str:
    """What the terminal shows: parameters with their 90 % intervals, rows, warnings."""
    counts = document["rows"]
    lines = [f"{document['law']}: {document['status']}"]
    for name in PARAMETERS:
        value, interval = document["params"][name], document["intervals"][name]
        if value is None:
            lines.append(f"  {name:<5} not identified")
        else:
            band = f"   90 % interval {interval['90'][0]:.5g} .. {interval['90'][1]:.5g}" if interval else ""
            lines.append(f"  {name:<5} {value:.6g}{band}")
    if document["objective"] is not None:
        lines.append(f"  objective {document['objective']:.6g} ({document['objective_definition']})")
    lines.append(f"rows: {counts['used']} used, {counts['excluded']} excluded, {counts['missing']} missing")
    for status in ("excluded", "missing"):
        shown = document[status][:10]
        lines += [f"  {status}: {one['run']}: {one['reason']}" for one in shown]
        if rest := len(document[status]) - len(shown):
            lines.append(f"  {status}: and {rest} more, see runs.csv")
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    return "\n".join(lines)
