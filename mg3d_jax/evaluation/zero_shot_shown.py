"""How a result of the zero-shot evaluation is shown: on the terminal, on pages and in `evaluation.png`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.charts import COLOURS, Chart, plain_axes
from mg3d_jax.html import Section, Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAN = float("nan")
BESIDE = {"severity_auroc": "severity", "probe_auroc": "probe", "positive_prompt_auroc": "positive prompt"}
HEADLINES = {
    "severity_auroc": "the same of the severity baseline",
    "probe_auroc": "the same of a linear probe",
    "positive_prompt_auroc": "the same of the positive prompt alone",
}


def shown(result: Mapping[str, Any]) -> list[Section]:
    """The sections of a result, also of one that an earlier version wrote with AUROCs alone."""
    found = [_auroc(result)]
    if result.get("by_class"):
        found += [_prompts(result), _decisions(result)]
    return found


def _classes(result: Mapping[str, Any]) -> list[str]:
    """Those with an AUROC, the largest first."""
    names = [key.removeprefix("auroc/") for key in result if key.startswith("auroc/") and not key.endswith("_95")]
    return sorted(names, key=lambda name: -result[f"auroc/{name}"])


def baselines(result: Mapping[str, Any]) -> dict[str, float]:
    """The macro AUROC of what stands beside the prompts, by its name in a row of `by_class`; those that there are."""
    parts = {"severity_auroc": "/score=severity_baseline/", "probe_auroc": "/score=linear_probe"}
    choices, numbers = result.get("choices", {}), result.get("numbers", {})
    parts["positive_prompt_auroc"] = f"/prompts={choices.get('prompts')}/score=positive/"
    found = {}
    for column, part in parts.items():
        values = [value for key, value in numbers.items() if part in key and key.endswith("/auroc_macro")]
        if values and not np.isnan(values[0]):
            found[column] = values[0]
    return found


def _auroc(result: Mapping[str, Any]) -> Section:
    classes, by_class, macro = _classes(result), result.get("by_class", {}), baselines(result)
    keys = {"macro mean": "auroc_macro"} | {name: f"auroc/{name}" for name in classes}
    ends = {key: result.get(f"{key}_95", (NAN,) * 2) for key in keys.values()}
    rows = []
    for name, key in keys.items():
        beside = macro if key == "auroc_macro" else by_class.get(name, {})
        cells = [number(beside.get(column)) for column in BESIDE if column in macro]
        rows.append((name, f"{result[key]:.3f}", f"{ends[key][0]:.3f} to {ends[key][1]:.3f}", *cells))
    missing = result.get("classes_without_both_outcomes")
    beside = [title for column, title in BESIDE.items() if column in macro]
    table = Table(
        ("abnormality", "AUROC", "95 % interval", *beside, "0 to 1; the line is chance"),
        rows,
        numbers=(1, *range(3, 3 + len(beside))),
        classes=["total", *("changed" if by_class.get(name, {}).get("inverted") else "" for name in classes)],
        intervals=[(result[key], *ends[key]) for key in keys.values()],
        more=f"Left out, all present or all absent: {', '.join(missing)}." if missing else "",
    )
    low, high = ends["auroc_macro"]
    headline = [(f"zero-shot macro AUROC, 95 % {low:.3f} to {high:.3f}", f"{result['auroc_macro']:.3f}")]
    headline += [(HEADLINES[column], f"{value:.3f}") for column, value in macro.items()]
    charts = [
        Chart("AUROC, its interval and its baselines", lambda axes: bars(axes, result), (9.6, _height(result)), True)
    ]
    if result.get("roc"):
        charts.append(Chart("ROC curves, with the band of the mean", lambda axes: _roc(axes, result)))
    if result.get("calibration"):
        charts.append(Chart("Calibration, all classes together", lambda axes: _calibration(axes, result)))
    return Section(
        "Zero-shot AUROC",
        result.get("protocol", ""),
        table,
        lambda axes: bars(axes, result),
        warnings=result.get("warnings", ()),
        charts=charts if classes else (),
        headline=headline,
    )


def _prompts(result: Mapping[str, Any]) -> Section:
    """Macro AUROC of every set of prompts, by the pair and by the positive prompt alone."""
    choices = result["choices"]
    found: dict[str, dict[str, float]] = {}
    for key, value in result["numbers"].items():
        if "/prompts=" in key and key.endswith("/auroc_macro"):
            name, _, rest = key.partition("/prompts=")[2].partition("/score=")
            found.setdefault(name, {})["pair" if not rest.startswith("positive") else "positive"] = value
    rows = [
        (
            name + (" (chosen)" if name == choices["prompts"] else ""),
            number(one.get("pair")),
            number(one.get("positive")),
        )
        for name, one in sorted(found.items(), key=lambda item: -item[1].get("pair", NAN))
    ]
    table = Table(("prompts", "both prompts", "positive alone"), rows, numbers=(1, 2))
    return Section("Zero-shot: other prompts", "macro AUROC of the same classes", table)


def _decisions(result: Mapping[str, Any]) -> Section:
    columns = ("f1", "balanced_accuracy", "sensitivity", "specificity", "auprc", "prevalence", "threshold")
    titles = ("F1", "balanced accuracy", "sensitivity", "specificity", "AUPRC", "prevalence", "threshold")
    macro = [number(result.get(f"{name}_macro")) for name in columns[:5]]
    rows: list[tuple[str, ...]] = [("macro mean", *macro, "", "")]
    rows += [(name, *(number(result["by_class"][name].get(column)) for column in columns)) for name in _classes(result)]
    table = Table(
        ("abnormality", *titles),
        rows,
        numbers=range(1, 8),
        classes=["total"] + [""] * (len(rows) - 1),
        more=f"F1 with the classes weighted by how often they are present: {number(result.get('f1_weighted'))}; as CT-CLIP's "
        f"weighted F1, over both outcomes of each class: {number(result.get('f1_both_outcomes_macro'))}.",
    )
    return Section(
        "Zero-shot: decisions",
        f"thresholds: {result['choices']['thresholds']}; AUPRC needs none, its chance level is the prevalence",
        table,
        on_terminal=False,
    )


def _height(result: Mapping[str, Any]) -> float:
    return 1.4 + 0.24 * len(_classes(result))


def bars(axes: Axes, result: Mapping[str, Any]) -> None:
    """AUROC per abnormality with its interval, from chance, with the severity baseline and the probe as marks."""
    names = _classes(result)[::-1]
    values = np.array([result[f"auroc/{name}"] for name in names])
    intervals = np.array([result[f"auroc/{name}_95"] for name in names]).reshape(-1, 2)
    errors = np.clip(np.stack([values - intervals[:, 0], intervals[:, 1] - values]), 0, None)
    colours = [COLOURS[1] if value < 0.5 else COLOURS[0] for value in values]
    axes.barh(
        range(len(names)), values - 0.5, left=0.5, xerr=errors, color=colours, alpha=0.8, ecolor="0.35", height=0.62,
        error_kw={"linewidth": 1},
    )  # fmt: skip
    marks = (("severity_auroc", "D", COLOURS[7], "severity baseline"), ("probe_auroc", "o", COLOURS[2], "linear probe"))
    for column, marker, colour, title in marks:
        found = [
            (row.get(column), place) for place, row in enumerate(result.get("by_class", {}).get(n, {}) for n in names)
        ]
        if points := [(value, place) for value, place in found if value is not None]:
            style: dict[str, Any] = {"s": 20, "color": colour, "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
            axes.scatter(*zip(*points, strict=True), marker=marker, label=title, **style)
    axes.axvline(0.5, color="0.35", linewidth=0.9)
    mean = result["auroc_macro"]
    if not np.isnan(mean):
        axes.axvline(mean, color=COLOURS[3], linestyle="--", linewidth=1, label=f"macro mean {mean:.3f}")
    axes.set_yticks(range(len(names)), names)
    lowest = min([0.3, *(intervals[:, 0][~np.isnan(intervals[:, 0])] - 0.02)])
    axes.set(xlim=(max(0.0, lowest), 1.01), xlabel="AUROC with 95 % interval; 0.5 is chance")
    axes.margins(y=0.02)
    plain_axes(axes, "x")
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)


def _roc(axes: Axes, result: Mapping[str, Any]) -> None:
    """Every class thin, their mean with its band."""
    roc = result["roc"]
    grid = np.array(roc["false_positive_rate"])
    for one in roc["classes"].values():
        axes.plot(grid, one["true_positive_rate"], color=COLOURS[7], alpha=0.45, linewidth=0.8)
    macro = {name: np.array(values, float) for name, values in roc["macro"].items()}
    axes.fill_between(grid, macro["low"], macro["high"], color=COLOURS[0], alpha=0.25, linewidth=0)
    axes.plot(grid, macro["true_positive_rate"], color=COLOURS[0], linewidth=2, label="mean of the classes, 95 %")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.9, linestyle=":", label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    plain_axes(axes, "both")
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def _calibration(axes: Axes, result: Mapping[str, Any]) -> None:
    """Observed share over probability; the area of a dot is how many volumes it stands for."""
    bins = {name: np.array(values, float) for name, values in result["calibration"].items()}
    filled = bins["count"] > 0
    size = 12 + 180 * bins["count"][filled] / max(1.0, bins["count"].max())
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.9, linestyle=":", label="calibrated")
    axes.plot(bins["probability"][filled], bins["observed"][filled], color=COLOURS[0], linewidth=1)
    axes.scatter(
        bins["probability"][filled], bins["observed"][filled], s=size, color=COLOURS[0], alpha=0.6, linewidth=0
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability", ylabel="observed share")
    plain_axes(axes, "both")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
