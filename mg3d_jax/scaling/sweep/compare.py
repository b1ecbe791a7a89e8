"""What each variant of a sweep reached, with intervals over seeds: the ablation table.

Seeds are paired: a variant's difference to the reference is taken seed by seed, so that what a seed gives to both
cancels. Intervals are 95 % Student intervals; with three seeds they are wide, and say so. A run that another one of the sweep
starts from is a stage of that one, and no variant. Several numbers of patients are columns beside one another.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from mg3d_jax import charts
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.scaling.sweep import collect, states
from mg3d_jax.scaling.sweep.declaration import Sweep

METRICS = (
    "evaluation/auroc_macro",
    "evaluation/report_to_volume/recall@10",
    "evaluation/probe/linear/1_percent/auroc_macro",
    "evaluation/probe/linear/10_percent/auroc_macro",
    "evaluation/probe/linear/auroc_macro",
    "evaluation/classification/auroc_macro",
    "valid/volume_reconstruction",
    "valid/report_reconstruction/token_loss",
)
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over `n` seeds with its 95 % interval; the interval is NaN for one seed, everything is for none."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        finite = np.asarray([v for v in values if math.isfinite(v)], np.float64)
        if finite.size == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = float(finite.mean())
        if finite.size == 1:
            return cls(mean, math.nan, math.nan, 1)
        half = stats.t.ppf(0.5 + LEVEL / 2, finite.size - 1) * finite.std(ddof=1) / math.sqrt(finite.size)
        return cls(mean, mean - half, mean + half, int(finite.size))

    def text(self, *, digits: int = 3, signed: bool = False) -> str:
        """`0.812 (0.790 to 0.834)`, or `-` where nothing was measured."""
        if self.n == 0:
            return "-"
        form = f"{'+' if signed else ''}.{digits}f"
        interval = "" if self.n == 1 else f" ({self.low:{form}} to {self.high:{form}})"
        return f"{self.mean:{form}}{interval}"


Finals = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> metric -> value


def finals(workdir: Path, sweep: Sweep) -> tuple[dict[str, dict[int, dict[str, float]]], list[str]]:
    """The final metrics of every finished run, and the ids of the runs that are not done.

    Metrics are named as in `summary.json`, and where a sweep has several numbers of patients as `of_patients` says.
    """
    stages = {Path(run.after).name for run in sweep.runs}
    runs = [run for run in sweep.runs if run.id not in stages]
    found: dict[str, dict[int, dict[str, float]]] = {run.model: {} for run in runs}
    missing, several = [], len(_patients(sweep)) > 1
    for run in runs:
        if states.status(workdir, run).state != states.DONE:
            missing.append(run.id)
            continue
        final = collect.write_record(workdir, run)["final"]
        values = {k: math.nan if v is None else float(v) for k, v in final.items()}
        if several:
            values = {of_patients(name, run.patients): value for name, value in values.items()}
        found[run.model].setdefault(run.seed, {}).update(values)
    if not any(found.values()):
        raise UserError(f"{workdir}: no run is done yet; train them with `mg3d sweep run`")
    return found, missing


def of_patients(metric: str, patients: int) -> str:
    """How a metric is called in a sweep of several numbers of training patients."""
    return f"{metric}, {patients} patients"


def _patients(sweep: Sweep) -> list[int]:
    return sorted({run.patients for run in sweep.runs})


def columns(found: Finals, sweep: Sweep, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics of the table: those `wanted`, or those of `METRICS` that any run has; each for every number of patients.

    `UserError` where a run has none of `METRICS`.
    """
    counts, known = _patients(sweep), {name for seeds in found.values() for final in seeds.values() for name in final}
    names = wanted or METRICS
    if len(counts) > 1:
        names = [of_patients(name, count) for name in names for count in counts]
    chosen = tuple(name for name in names if wanted or name in known)
    if not chosen:
        raise UserError(
            f"no run has a metric that is compared by default; choose with --metric: {', '.join(sorted(known))}"
        )
    return chosen


def compare(found: Finals, metrics: Sequence[str] = METRICS) -> list[dict]:
    """One row per variant: `{"variant", "seeds", METRIC: Estimate, METRIC + " difference": Estimate}`.

    The first variant is the reference, whose differences are empty. A metric that a variant lacks (its objective is off)
    is empty there.
    """
    known = {name for seeds in found.values() for final in seeds.values() for name in final}
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(f"no run has the metric {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    reference, rows = next(iter(found)), []
    for variant, seeds in found.items():
        row: dict = {"variant": variant, "seeds": sorted(seeds)}
        for metric in metrics:
            row[metric] = Estimate.of([final.get(metric, math.nan) for final in seeds.values()])
            shared = [] if variant == reference else sorted(seeds.keys() & found[reference].keys())
            pairs = [(seeds[s].get(metric, math.nan), found[reference][s].get(metric, math.nan)) for s in shared]
            row[f"{metric} difference"] = Estimate.of([a - b for a, b in pairs])
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict], metrics: Sequence[str] = METRICS) -> str:
    """The table as it stands in documents: mean (95 % interval), and below it the difference to the first row."""
    lines = ["| variant | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for row in rows:
        cells = []
        for metric in metrics:
            digits, difference = 3 if abs(rows[0][metric].mean) >= 0.1 else 4, row[f"{metric} difference"]
            cells.append(row[metric].text(digits=digits))
            if difference.n:
                cells[-1] += f"; {difference.text(digits=digits, signed=True)}"
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(out: Path, rows: Sequence[dict], metrics: Sequence[str] = METRICS) -> list[str]:
    """`compare.json`, `compare.csv`, `compare.md` and `compare.png` in `out`; returns their names."""
    out.mkdir(parents=True, exist_ok=True)
    columns = [name for metric in metrics for name in (metric, f"{metric} difference")]
    plain = [
        {"variant": row["variant"], "seeds": row["seeds"]} | {c: _numbers(row[c]) for c in columns} for row in rows
    ]
    write_json(out / "compare.json", {"reference": rows[0]["variant"], "level": LEVEL, "rows": plain})
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "column", "mean", "low", "high", "seeds"])
        for row in rows:
            for column in columns:
                estimate = row[column]
                writer.writerow([row["variant"], column, estimate.mean, estimate.low, estimate.high, estimate.n])
    (out / "compare.md").write_text(markdown(rows, metrics) + "\n", encoding="utf-8")
    _plot(out / "compare.png", rows, metrics)
    return ["compare.json", "compare.csv", "compare.md", "compare.png"]


def _numbers(estimate: Estimate) -> dict[str, float | int | None]:
    values = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {k: v if math.isfinite(v) else None for k, v in values.items()} | {"seeds": estimate.n}


@charts.plain_text()
def _plot(path: Path, rows: Sequence[dict], metrics: Sequence[str]) -> None:
    """One panel per metric, one line per variant: the mean with its interval, the reference as a dashed line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(1.6 + 2.8 * len(metrics), 1.2 + 0.36 * len(rows)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics), sharey=True))
    for panel, metric in zip(panels, metrics, strict=True):
        for y, row in enumerate(rows):
            estimate = row[metric]
            if estimate.n > 1:
                panel.plot([estimate.low, estimate.high], [y, y], color="0.6", linewidth=2)
            if estimate.n:
                panel.plot(estimate.mean, y, "o", color="black" if y == 0 else "C0")
        if rows[0][metric].n:
            panel.axvline(rows[0][metric].mean, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(metric, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(path, dpi=130)
