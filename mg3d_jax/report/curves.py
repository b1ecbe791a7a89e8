"""Which metrics share a chart, and the charts themselves, as SVG."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mg3d_jax import charts
from mg3d_jax.charts import COLOURS

LOG_RANGE = 30.0  # positive series that span more than this factor get a logarithmic axis
MOST_POINTS, SMOOTHED_FROM, WINDOW_SHARE = 400, 60, 0.03
LEGEND_LETTERS = 64  # of one line of a legend
MOST_NAMED = 8  # series of one chart that the legend names


@dataclass(frozen=True)
class Panel:
    """One chart: `patterns` of metric names (whole match), in the order of its series.

    `scale`: "linear", "log", "share" (from 0, in per cent), "unit" (0 to 1), or "auto": by the range of the values.
    `main`: of many series, the one to stand out. `smooth`: long noisy training series get a running mean.
    """

    title: str
    patterns: tuple[str, ...]
    scale: str = "auto"
    unit: str = ""
    main: str = ""
    smooth: bool = True


EVALUATION = "Evaluation while training"
# Sections of the page in order. The first panel with a matching pattern takes a metric.
PANELS: dict[str, tuple[Panel, ...]] = {
    "Optimisation": (
        Panel("learning rate", (r"learning_rate(/.*)?",), "linear", smooth=False),
        Panel("gradient norm before clipping", (r"gradient_norm(/.*)?",), "auto"),
        Panel("size of the update over that of the parameters", (r"update_ratio(/.*)?",), "log"),
        Panel("temperature", (r".*/temperature", r"temperature"), "linear", smooth=False),
        Panel("finite updates, real rows", (r"finite", r"valid_share"), "unit", smooth=False),
    ),
    "Speed": (
        Panel("throughput, samples", (r"samples_per_second",), "linear", "samples/s"),
        Panel("throughput, tokens", (r"tokens_per_second",), "linear", "tokens/s"),
        Panel("waiting for data", (r"data_wait_share",), "share"),
        Panel("model-FLOPs utilisation", (r"mfu",), "share"),
        Panel("memory", (r"(device|host)_memory.*_gib",), "linear", "GiB"),
    ),
    EVALUATION: (
        Panel("zero-shot AUROC", (r"auroc_macro", r"auroc/.*"), "linear", main="auroc_macro"),
        Panel("recall, volumes of a report", (r"report_to_volume/recall@\d+",), "unit"),
        Panel("recall, reports of a volume", (r"volume_to_report/recall@\d+",), "unit"),
        Panel("median rank", (r".*/median_rank",), "auto"),
    ),
}
HIDDEN = ("step", "split", "samples_seen", "trained_seconds", "epoch")


@dataclass
class Series:
    """Values of a metric in one split, by step."""

    name: str
    split: str
    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def collect(metrics: Iterable[dict[str, Any]]) -> dict[str, dict[str, Series]]:
    """`{metric: {split: series}}`. A step that was written twice (a resumed run) counts once, the later one."""
    by_step: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in metrics:
        split = str(line.get("split", "train"))
        for name, value in line.items():
            if name not in HIDDEN and isinstance(value, int | float):
                by_step[name][split][line["step"]] = float(value)
    return {
        name: {
            split: Series(name, split, list(points), [points[s] for s in points])
            for split, points in ((split, dict(sorted(p.items()))) for split, p in splits.items())
        }
        for name, splits in by_step.items()
    }


def sections(
    metrics: Iterable[dict[str, Any]], objectives: Sequence[str]
) -> dict[str, list[tuple[Panel, list[Series]]]]:
    """Every metric in exactly one chart: "Losses" first (the total, then each objective's), then `PANELS`, with them what
    evaluations of a user's own log, the details of each objective, and the rest under "Other"."""
    found = collect(metrics)
    rest = dict(found)

    def take(panel: Panel) -> tuple[Panel, list[Series]] | None:
        names = [n for p in panel.patterns for n in sorted(rest, key=_natural) if re.fullmatch(p, n)]
        series = [one for name in dict.fromkeys(names) for one in rest.pop(name).values()]
        return (panel, series) if series else None

    def by_prefix(names: Iterable[str]) -> list[tuple[Panel, list[Series]] | None]:
        """One chart for all that have the same name before the slash."""
        prefixes = dict.fromkeys(name.partition("/")[0] for name in sorted(names))
        return [take(Panel(_readable(p), (rf"{re.escape(p)}(/.*)?",))) for p in prefixes]

    losses = [Panel("total loss", ("loss",)), *(Panel(_readable(name), (re.escape(name),)) for name in objectives)]
    grouped = {"Losses": [take(panel) for panel in losses]}
    grouped |= {title: [take(panel) for panel in panels] for title, panels in PANELS.items()}
    grouped[EVALUATION] += by_prefix([name for name in rest if rest[name].keys() == {"evaluation"}])
    grouped["Inside the objectives"] = [
        take(Panel(_readable(name), (re.escape(name),), "linear"))
        for objective in objectives
        for name in sorted(n for n in rest if n.startswith(f"{objective}/"))
    ]
    grouped["Other"] = by_prefix(rest)
    kept = {title: [chart for chart in row if chart is not None] for title, row in grouped.items()}
    return {title: row for title, row in kept.items() if row}


def _natural(name: str) -> list:
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def _readable(name: str) -> str:
    return name.removesuffix("_gib").replace("_", " ").replace("/", ": ")


def draw(panel: Panel, series: Sequence[Series]) -> str:
    """The chart as an SVG document without a background."""
    return charts.svg(charts.Chart(panel.title, lambda axes: _fill(axes, panel, series), (4.7, 2.55)))


def _fill(axes: Any, panel: Panel, series: Sequence[Series]) -> None:
    names = list(dict.fromkeys(one.name for one in series))
    several_splits = len({one.split for one in series}) > 1
    many = len(names) > MOST_NAMED or bool(panel.main and len(names) > 2)
    for one in series:
        # One metric: splits differ by colour. Several: metrics do, and what is not training is marked by points.
        index = names.index(one.name) + (len(names) == 1 and one.split != "train")
        look = {"color": COLOURS[index % len(COLOURS)], "label": _label(one, names, several_splits), "linewidth": 1.5}
        if many and one.name != (panel.main or names[0]):
            look = {"color": COLOURS[-1], "linewidth": 0.7, "alpha": 0.5, "marker": ""}
        _line(axes, one, look, smooth=panel.smooth)
    _axes(axes, panel, series)
    labels = axes.get_legend_handles_labels()[1]
    if labels and (several_splits or len(names) > 1):
        # Above the axes, where it covers no curve: as many columns as fit.
        columns = max(1, LEGEND_LETTERS // (max(map(len, labels)) + 4))
        spaces = {"handlelength": 1.2, "labelspacing": 0.25, "columnspacing": 1.0, "borderaxespad": 0.1}
        axes.figure.legend(loc="outside upper left", frameon=False, fontsize=8, ncols=columns, **spaces)


def _label(one: Series, names: Sequence[str], several_splits: bool) -> str:
    """What tells the series of a chart apart: the split of a single metric; else what names do not have in common."""
    if len(names) == 1:
        return {"train": "training", "valid": "held out"}.get(one.split, one.split)
    endings = [name.rpartition("/")[2] for name in names]
    ending = one.name.rpartition("/")[2]
    label = ending if endings.count(ending) == 1 else one.name
    if any(name.startswith(f"{one.name}/") for name in names):
        label = "all"
    return _readable(label) + (f", {one.split}" if several_splits and one.split != "train" else "")


def _line(axes: Any, one: Series, look: dict[str, Any], *, smooth: bool) -> None:
    steps, values = _finite(one)
    if one.split != "train" or len(steps) == 1:
        look = ({"marker": "o", "markersize": 3.2} if len(steps) <= SMOOTHED_FROM else {}) | look
    elif smooth and len(steps) >= SMOOTHED_FROM:
        axes.plot(*_thinned(steps, values), color=look["color"], linewidth=0.6, alpha=0.28)
        values = _smoothed(values)
    axes.plot(*_thinned(steps, values), **look)


def _finite(one: Series) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(one.steps, float), np.array(one.values, float)
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred running mean, over fewer values towards the ends."""
    half = max(2, round(len(values) * WINDOW_SHARE))
    ones = np.ones(2 * half + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points, the last one among them: pages stay small."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
    return steps[kept], values[kept]


def _axes(axes: Any, panel: Panel, series: Sequence[Series]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

    charts.plain_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step", fontsize=8)
    if panel.unit:
        axes.set_ylabel(panel.unit, fontsize=8)
    values = np.concatenate([_finite(one)[1] for one in series])
    if _is_log(panel.scale, values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter("")
    elif panel.scale == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, max(1.1 * float(values.max(initial=0.0)), 1e-3))
    elif panel.scale == "unit":
        axes.set_ylim(-0.02, 1.02)
    elif panel.unit in ("samples/s", "tokens/s", "GiB"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _is_log(scale: str, values: np.ndarray) -> bool:
    positive = len(values) > 0 and float(values.min()) > 0
    if scale == "log":
        return positive
    return scale == "auto" and positive and math.log(float(values.max()) / float(values.min())) > math.log(LOG_RANGE)
