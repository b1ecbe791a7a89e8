"""Plots of a fit: loss against N and D, residuals, predicted against actual. Each PNG has a CSV of what it shows."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from mg3d_jax import charts
from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.fit.bootstrap import Bootstrap
from mg3d_jax.scaling.fit.certified import Fit
from mg3d_jax.scaling.fit.laws import log_residuals
from mg3d_jax.scaling.fit.table import Row

STEMS = ("loss_vs_n", "loss_vs_d", "residuals", "predicted_vs_actual")
MOST_CURVES = 6
CURVE_POINTS = 100
COLOURS = matplotlib.colormaps["viridis"]


@charts.plain_text()
def draw_all(out: Path, rows: Sequence[Row], fit: Fit, drawn: Bootstrap | None, names: Mapping[str, str]) -> list[str]:
    """Writes the plots and their CSV files into `out`; returns the names. Without a law only the data are drawn."""
    for stem in STEMS:
        for ending in ("png", "csv"):
            (out / f"{stem}.{ending}").unlink(missing_ok=True)  # of an earlier fit: never beside another fit.json
    if not rows:
        return []
    written = [_against(out, "loss_vs_n", rows, fit, drawn, names), _against(out, "loss_vs_d", rows, fit, drawn, names)]
    if fit.law is not None:
        written += [_residuals(out, rows, fit, names), _predicted(out, rows, fit, names)]
    return [f"{stem}.{ending}" for stem in written for ending in ("png", "csv")]


def _against(
    out: Path, stem: str, rows: Sequence[Row], fit: Fit, drawn: Bootstrap | None, names: Mapping[str, str]
) -> str:
    """Loss against one size, coloured by the other; with a law: its curves, their 80 % band, and residuals below."""
    n, d, loss = table.columns(rows)
    horizontal, colour, axis, other = (n, d, "N", "D") if stem == "loss_vs_n" else (d, n, "D", "N")
    norm = LogNorm(*_log_limits(colour, 1.02))
    figure = Figure(figsize=(7.5, 6.2 if fit.law else 4.6), layout="constrained")
    if fit.law is None:
        main, below = figure.subplots(), None
    else:
        main, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    lines: list[list[Any]] = [
        ["point", a, c, value, "", ""] for a, c, value in zip(horizontal, colour, loss, strict=True)
    ]
    levels = _levels(colour)
    if fit.law is not None:
        across = np.geomspace(*_log_limits(horizontal, 1.3), CURVE_POINTS)
        for level in levels:
            fixed = np.full(CURVE_POINTS, level)
            pair = (across, fixed) if axis == "N" else (fixed, across)
            curve = fit.law(*pair)
            main.plot(across, curve, color=COLOURS(norm(level)), linewidth=1.3)
            low, high = drawn.band(pair[0], pair[1], 80) if drawn else (curve, curve)
            if drawn:
                main.fill_between(across, low, high, color=COLOURS(norm(level)), alpha=0.15, linewidth=0)
            lines += [["curve", *one] for one in zip(across, fixed, curve, low, high, strict=True)]
        assert below is not None
        below.scatter(horizontal, log_residuals(fit.law, n, d, loss), c=colour, norm=norm, cmap=COLOURS, s=14)
        below.axhline(0, color="0.4", linewidth=0.8)
        below.set_ylabel("log residual")
    dots = main.scatter(horizontal, loss, c=colour, norm=norm, cmap=COLOURS, s=22, edgecolors="white", linewidths=0.4)
    if fit.law is None and len(levels) == len(np.unique(colour)):
        for level in levels:
            line = np.flatnonzero(colour == level)
            line = line[np.argsort(horizontal[line], kind="stable")]
            main.plot(horizontal[line], loss[line], color=COLOURS(norm(level)), linewidth=0.8, alpha=0.6)
    bar = figure.colorbar(dots, ax=main if below is None else [main, below], label=f"{other}: {names[other]}")
    _level_ticks(bar, levels)
    main.set_title(_title(fit, drawn), fontsize=10)
    main.set_ylabel(names["loss"])
    _size_axis(below or main, f"{axis}: {names[axis]}", horizontal)
    main.tick_params(labelbottom=below is None)
    _loss_axis(main, "y", loss)
    return _save(out, stem, figure, ["kind", axis, other, "loss", "low_80", "high_80"], lines)


def _residuals(out: Path, rows: Sequence[Row], fit: Fit, names: Mapping[str, str]) -> str:
    """Log residuals against N, D and the prediction, to show trends that the law leaves."""
    n, d, loss = table.columns(rows)
    assert fit.law is not None  # else there is no such plot
    residual, predicted = log_residuals(fit.law, n, d, loss), fit.law(n, d)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    axes[0].set_ylabel("log(loss) - log(predicted)")
    labels = (f"N: {names['N']}", f"D: {names['D']}", f"predicted {names['loss']}")
    for panel, values, label in zip(axes, (n, d, predicted), labels, strict=True):
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.scatter(values, residual, s=14, color=COLOURS(0.35))
        if panel is axes[2]:
            panel.set_xlabel(label)
            _loss_axis(panel, "x", values)
        else:
            _size_axis(panel, label, values)
        panel.grid(alpha=0.25)
    spread = float(np.sqrt(np.mean(residual**2)))
    figure.suptitle(f"Residuals of {len(rows)} runs: root mean square {spread:.2%} of the loss", fontsize=10)
    lines = zip([row.label for row in rows], n, d, predicted, residual, strict=True)
    return _save(out, "residuals", figure, ["run", "N", "D", "predicted", "log_residual"], lines)


def _predicted(out: Path, rows: Sequence[Row], fit: Fit, names: Mapping[str, str]) -> str:
    assert fit.law is not None  # else there is no such plot
    n, d, loss = table.columns(rows)
    predicted = fit.law(n, d)
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panel = figure.subplots()
    limits = _log_limits(np.concatenate([loss, predicted]), 1.02)
    panel.plot(limits, limits, color="0.4", linewidth=0.8)
    dots = panel.scatter(predicted, loss, c=n, norm=LogNorm(*_log_limits(n, 1.02)), cmap=COLOURS, s=18)
    bar = figure.colorbar(dots, ax=panel, label=f"N: {names['N']}")
    _level_ticks(bar, _levels(n))
    _loss_axis(panel, "x", loss)
    _loss_axis(panel, "y", loss)
    panel.set_xlim(limits)
    panel.set_ylim(limits)
    panel.set_aspect("equal")
    panel.set_xlabel(f"predicted {names['loss']}")
    panel.set_ylabel(f"actual {names['loss']}")
    panel.set_title("In-sample: the fit saw these runs", fontsize=10)
    lines = zip([row.label for row in rows], n, d, loss, predicted, strict=True)
    return _save(out, "predicted_vs_actual", figure, ["run", "N", "D", "loss", "predicted"], lines)


def _title(fit: Fit, drawn: Bootstrap | None) -> str:
    if fit.law is None:
        return f"No law: {(fit.refusal or '').split(';')[0]}"
    law = fit.law
    text = f"L = {law.E:.4g} + {law.A:.4g}/N^{law.alpha:.3g} + {law.B:.4g}/D^{law.beta:.3g}"
    if fit.not_identified:
        text += f"   (not identified: {', '.join(fit.not_identified)})"
    return text + ("; bands: 80 % bootstrap" if drawn else "")


def _levels(values: np.ndarray) -> np.ndarray:
    """The distinct values if they are few, else sizes spread evenly in log over their range."""
    distinct = np.unique(values)
    if len(distinct) <= MOST_CURVES:
        return distinct
    return np.geomspace(distinct[0], distinct[-1], MOST_CURVES)


def _log_limits(values: np.ndarray, margin: float) -> tuple[float, float]:
    return float(values.min() / margin), float(values.max() * margin)


def format_size(value: float) -> str:
    """`12345678 -> '12.3M'`, `2500 -> '2.5k'`, `40 -> '40'`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _level_ticks(bar: Any, levels: np.ndarray) -> None:
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(list(levels), labels=[format_size(level) for level in levels])


def _size_axis(panel: Any, label: str, values: np.ndarray) -> None:
    """A log axis whose ticks read `2M`, `50k`; they sit at the sizes themselves where those are few."""
    panel.set_xscale("log")
    panel.set_xlabel(label)
    distinct = np.unique(values)
    if len(distinct) <= MOST_CURVES and np.all(distinct[1:] > 1.2 * distinct[:-1]):
        panel.xaxis.set_major_locator(FixedLocator(distinct.tolist()))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        decades = np.log10(distinct[-1] / distinct[0])
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 3.0)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value)))


def _loss_axis(panel: Any, which: str, loss: np.ndarray) -> None:
    """Log where the losses span more than a factor 3, else linear: a log axis over less has hardly a tick."""
    axis = getattr(panel, f"{which}axis")
    if loss.max() > 3 * loss.min():
        panel.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6))


def _save(out: Path, stem: str, figure: Figure, header: list[str], lines: Any) -> str:
    figure.savefig(out / f"{stem}.png", dpi=130)
    with (out / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return stem
