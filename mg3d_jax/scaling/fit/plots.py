"""Plots of a fit: loss against each size and the FLOPs, residuals, contours, IsoFLOP, predicted against measured.

Each PNG has a CSV of what it shows.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from mg3d_jax import charts
from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.fit.holdout import LAW, BackTest
from mg3d_jax.scaling.fit.isoflop import IsoFlop
from mg3d_jax.scaling.fit.laws import Law, log_residuals
from mg3d_jax.scaling.fit.table import Row

if TYPE_CHECKING:
    from mg3d_jax.scaling.fit.outputs import Result

STEMS = (
    "loss_vs_n", "loss_vs_d", "loss_vs_x", "loss_vs_u", "loss_vs_s", "loss_vs_c", "residuals", "residual_means",
    "predicted_vs_actual", "held_out", "contours", "isoflop",
)  # fmt: skip
MOST_CURVES = 6
CURVE_POINTS = 100
COLOURS = matplotlib.colormaps["viridis"]


@charts.plain_text()
def draw_all(
    out: Path,
    rows: Sequence[Row],
    result: Result,
    names: Mapping[str, str],
    tested: BackTest | None = None,
    profiles: IsoFlop | None = None,
) -> list[str]:
    """Writes the plots and their CSV files into `out`; returns the names. Without a law only the data are drawn."""
    for stem in STEMS:
        for ending in ("png", "csv"):
            (out / f"{stem}.{ending}").unlink(missing_ok=True)  # of an earlier fit: never beside another fit.json
    if not rows:
        return []
    form = result.fit.form
    written = [_against(out, name, rows, result, names) for name in form.variables]
    if not any(np.isnan(row.compute) for row in rows):
        written.append(_against_compute(out, rows, result, names))
    if result.fit.law is not None:
        written += [_residuals(out, rows, result, names), _predicted(out, rows, result, names)]
        if result.lack is not None and result.lack.groups:
            written.append(_means(out, result))
        if set(form.variables) == {"N", "D"}:
            written.append(_contours(out, rows, result, names))
    if tested is not None and tested.predictions:
        written.append(_held_out(out, tested, names))
    if profiles is not None:
        written.append(_isoflop(out, rows, profiles, names))
    return [f"{stem}.{ending}" for stem in written for ending in ("png", "csv")]


@charts.plain_text()
def draw_isoflop(out: Path, rows: Sequence[Row], profiles: IsoFlop, names: Mapping[str, str]) -> list[str]:
    """The IsoFLOP plot alone."""
    stem = _isoflop(out, rows, profiles, names)
    return [f"{stem}.png", f"{stem}.csv"]


def _against(out: Path, axis: str, rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> str:
    """Loss against one size, coloured by another; with a law: its curves, their 80 % band, and residuals below."""
    law, drawn, stem = result.fit.law, result.drawn, f"loss_vs_{axis.lower()}"
    sizes, loss = table.columns(rows, result.fit.form.variables)
    other = next((name for name in sizes if name != axis), axis)
    horizontal, colour = sizes[axis], sizes[other]
    norm = LogNorm(*_log_limits(colour, 1.02))
    figure = Figure(figsize=(7.5, 6.2 if law else 4.6), layout="constrained")
    if law is None:
        main, below = figure.subplots(), None
    else:
        main, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    lines: list[list[Any]] = [
        ["point", a, c, value, "", ""] for a, c, value in zip(horizontal, colour, loss, strict=True)
    ]
    levels = _levels(colour) if other != axis else colour[:1]
    if law is not None and len(sizes) <= 2:
        across = np.geomspace(*_log_limits(horizontal, 1.3), CURVE_POINTS)
        for level in levels:
            columns = {name: across if name == axis else np.full(CURVE_POINTS, level) for name in sizes}
            curve = law(*columns.values())
            main.plot(across, curve, color=COLOURS(norm(level)), linewidth=1.3)
            low, high = drawn.band(columns, 80) if drawn else (curve, curve)
            if drawn:
                main.fill_between(across, low, high, color=COLOURS(norm(level)), alpha=0.15, linewidth=0)
            lines += [["curve", *one] for one in zip(across, columns[other], curve, low, high, strict=True)]
    if below is not None:
        assert law is not None
        below.scatter(horizontal, log_residuals(law, sizes, loss), c=colour, norm=norm, cmap=COLOURS, s=14)
        below.axhline(0, color="0.4", linewidth=0.8)
        below.set_ylabel("log residual")
    dots = main.scatter(horizontal, loss, c=colour, norm=norm, cmap=COLOURS, s=22, edgecolors="white", linewidths=0.4)
    if law is None and len(levels) == len(np.unique(colour)):
        for level in levels:
            line = np.flatnonzero(colour == level)
            line = line[np.argsort(horizontal[line], kind="stable")]
            main.plot(horizontal[line], loss[line], color=COLOURS(norm(level)), linewidth=0.8, alpha=0.6)
    if other != axis:
        bar = figure.colorbar(dots, ax=main if below is None else [main, below], label=f"{other}: {names[other]}")
        _level_ticks(bar, levels)
    main.set_title(_title(result), fontsize=10)
    main.set_ylabel(names["loss"])
    _size_axis(below or main, f"{axis}: {names[axis]}", horizontal)
    main.tick_params(labelbottom=below is None)
    _loss_axis(main, "y", loss)
    return _save(
        out, stem, figure, ["kind", axis, other if other != axis else "same", "loss", "low_80", "high_80"], lines
    )


def _against_compute(out: Path, rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> str:
    """Loss against FLOPs, runs of one size joined."""
    first = result.fit.form.variables[0]
    sizes, loss = table.columns(rows, result.fit.form.variables)
    compute, colour = np.asarray([row.compute for row in rows]), sizes[first]
    norm = LogNorm(*_log_limits(colour, 1.02))
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    panel = figure.subplots()
    if len(np.unique(colour)) <= 12:
        for level in np.unique(colour):
            line = np.flatnonzero(colour == level)
            line = line[np.argsort(compute[line], kind="stable")]
            panel.plot(compute[line], loss[line], color=COLOURS(norm(level)), linewidth=0.8, alpha=0.6)
    dots = panel.scatter(compute, loss, c=colour, norm=norm, cmap=COLOURS, s=22, edgecolors="white", linewidths=0.4)
    _level_ticks(figure.colorbar(dots, ax=panel, label=f"{first}: {names[first]}"), _levels(colour))
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    panel.set_xlabel("C: training FLOPs")
    panel.set_ylabel(names["loss"])
    _loss_axis(panel, "y", loss)
    return _save(out, "loss_vs_c", figure, ["compute", first, "loss"], zip(compute, colour, loss, strict=True))


def _residuals(out: Path, rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> str:
    """Log residuals against every variable and the prediction, to show trends that the law leaves."""
    law = result.fit.law
    assert law is not None  # else there is no such plot
    sizes, loss = table.columns(rows, law.form.variables)
    residual, predicted = log_residuals(law, sizes, loss), law(*sizes.values())
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, len(sizes) + 1, sharey=True)
    axes[0].set_ylabel("log(loss) - log(predicted)")
    for panel, (name, values) in zip(axes, {**sizes, "predicted": predicted}.items(), strict=True):
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.scatter(values, residual, s=14, color=COLOURS(0.35))
        if name == "predicted":
            panel.set_xlabel(f"predicted {names['loss']}")
            _loss_axis(panel, "x", values)
        else:
            _size_axis(panel, f"{name}: {names[name]}", values)
        panel.grid(alpha=0.25)
    spread = float(np.sqrt(np.mean(residual**2)))
    figure.suptitle(f"Residuals of {len(rows)} runs: root mean square {spread:.2%} of the loss", fontsize=10)
    lines = zip([row.label for row in rows], *sizes.values(), predicted, residual, strict=True)
    return _save(out, "residuals", figure, ["run", *sizes, "predicted", "log_residual"], lines)


def _means(out: Path, result: Result) -> str:
    """Mean residual of every value of every column that was looked at, with two standard errors."""
    assert result.lack is not None
    groups, noise = result.lack.groups, result.lack.noise or 0.0
    warned = {one.column for one in result.lack.tests if one.warns}
    across = min(len(groups), 3)
    figure = Figure(figsize=(3.6 * across, 2.9 * -(-len(groups) // across)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(-(-len(groups) // across), across)).ravel()
    lines: list[list[Any]] = []
    for panel, (name, found) in zip(panels, groups.items(), strict=False):
        mean = [100 * one.mean for one in found]
        error = [200 * noise / one.rows**0.5 for one in found]
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.errorbar(range(len(found)), mean, error, fmt="o", color="#b4540a" if name in warned else COLOURS(0.35))
        panel.set_xticks(range(len(found)), [_short(one.value) for one in found], rotation=35, ha="right", fontsize=7)
        panel.set_title(name, fontsize=9)
        lines += [[name, one.value, one.rows, one.mean, one.standard_errors] for one in found]
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    figure.supylabel("mean residual, % of the loss", fontsize=8)
    return _save(
        out, "residual_means", figure, ["column", "value", "rows", "mean_log_residual", "standard_errors"], lines
    )


def _short(label: str) -> str:
    try:
        return format_size(float(label))
    except ValueError:
        return label[:18]


def _predicted(out: Path, rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> str:
    law = result.fit.law
    assert law is not None  # else there is no such plot
    sizes, loss = table.columns(rows, law.form.variables)
    predicted = law(*sizes.values())
    figure, panel = _square(np.concatenate([loss, predicted]), names)
    colour = next(iter(sizes.values()))
    dots = panel.scatter(predicted, loss, c=colour, norm=LogNorm(*_log_limits(colour, 1.02)), cmap=COLOURS, s=18)
    first = law.form.variables[0]
    bar = figure.colorbar(dots, ax=panel, label=f"{first}: {names[first]}")
    _level_ticks(bar, _levels(colour))
    panel.set_title("In-sample: the fit saw these runs", fontsize=10)
    lines = zip([row.label for row in rows], *sizes.values(), loss, predicted, strict=True)
    return _save(out, "predicted_vs_actual", figure, ["run", *sizes, "loss", "predicted"], lines)


def _held_out(out: Path, tested: BackTest, names: Mapping[str, str]) -> str:
    """Predicted against measured of the runs that the fit did not see, by the law and by the naive guesses."""
    methods = [score.method for score in tested.scores]
    loss = np.asarray([one["loss"] for one in tested.predictions])
    guesses = {name: np.asarray([one[name] for one in tested.predictions]) for name in methods}
    figure, panel = _square(np.concatenate([loss, *guesses.values()]), names)
    for (name, guess), colour in zip(guesses.items(), charts.COLOURS, strict=False):
        score = next(one for one in tested.scores if one.method == name)
        size = 34 if name == LAW else 14
        panel.scatter(guess, loss, s=size, color=colour, label=f"{name} ({score.log_rmse:.4f})", alpha=0.85)
    panel.legend(fontsize=7, title="log-RMSE", title_fontsize=7)
    panel.set_title(f"Held out: {tested.held_out} runs above {tested.limit:.2g} FLOPs", fontsize=10)
    head = list(tested.predictions[0])
    return _save(out, "held_out", figure, head, ([one[key] for key in head] for one in tested.predictions))


def _square(values: np.ndarray, names: Mapping[str, str]) -> tuple[Figure, Any]:
    """A figure of predicted against measured with its diagonal."""
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panel = figure.subplots()
    limits = _log_limits(values, 1.02)
    panel.plot(limits, limits, color="0.4", linewidth=0.8)
    _loss_axis(panel, "x", values)
    _loss_axis(panel, "y", values)
    panel.set_xlim(limits)
    panel.set_ylim(limits)
    panel.set_aspect("equal")
    panel.set_xlabel(f"predicted {names['loss']}")
    panel.set_ylabel(f"measured {names['loss']}")
    return figure, panel


def _contours(out: Path, rows: Sequence[Row], result: Result, names: Mapping[str, str]) -> str:
    """Lines of equal loss over N and D, the runs, and the best N for every product N * D with its 80 % band."""
    law = result.fit.law
    assert law is not None
    sizes, _ = table.columns(rows, law.form.variables)
    limits = {name: _log_limits(values, 3.0) for name, values in sizes.items()}
    n, d = (np.geomspace(*limits[name], CURVE_POINTS) for name in ("N", "D"))
    surface = law(*np.meshgrid(n, d))
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    panel = figure.subplots()
    shown = panel.contourf(n, d, surface, levels=20, cmap="viridis_r", alpha=0.75)
    panel.contour(n, d, surface, levels=20, colors="white", linewidths=0.4)
    panel.scatter(sizes["N"], sizes["D"], s=14, color="black", label="runs")
    products = np.geomspace((sizes["N"] * sizes["D"]).min(), 30 * (sizes["N"] * sizes["D"]).max(), 30)
    best = np.asarray([_best_size(law, result, one, limits["N"]) for one in products])
    inside = [limits["N"][0] <= n <= limits["N"][1] and limits["D"][0] <= p / n <= limits["D"][1]
              for n, p in zip(best[:, 0], products, strict=True)]  # fmt: skip
    label = "best N where FLOPs go as N D" + ("" if any(inside) else ": outside")
    panel.plot(best[:, 0], products / best[:, 0], color="#b4540a", label=label)
    if result.drawn is not None:
        panel.fill_betweenx(products / best[:, 0], best[:, 1], best[:, 2], color="#b4540a", alpha=0.2, linewidth=0)
    for which, name in (("x", "N"), ("y", "D")):
        _size_axis(panel, f"{name}: {names[name]}", sizes[name], which)
        panel.set(**{f"{which}lim": limits[name]})
    figure.colorbar(shown, ax=panel, label=names["loss"])
    panel.legend(fontsize=8, loc="lower right")
    lines = ([one, *three, one / three[0]] for one, three in zip(products, best, strict=True))
    return _save(out, "contours", figure, ["N_times_D", "best_N", "low_80", "high_80", "best_D"], lines)


def _best_size(law: Law, result: Result, product: float, limits: tuple[float, float]) -> tuple[float, float, float]:
    """The N of the least loss where N D is `product`, and the 10 and 90 % points of it over the draws."""
    n = np.geomspace(limits[0] / 10, limits[1] * 10, 200)
    best = n[np.argmin(law(n, product / n))]
    if result.drawn is None:
        return float(best), float(best), float(best)
    drawn = result.drawn.predictions({"N": n, "D": product / n})
    low, high = np.quantile(n[np.argmin(drawn, axis=1)], (0.1, 0.9))
    return float(best), float(low), float(high)


def _isoflop(out: Path, rows: Sequence[Row], profiles: IsoFlop, names: Mapping[str, str]) -> str:
    """Loss over N at every budget with its parabola; kept minima filled, flagged ones open."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    panel = figure.subplots()
    lines: list[list[Any]] = []
    norm = LogNorm(*_log_limits(np.asarray([one.compute for one in profiles.profiles]), 1.1))
    for one in profiles.profiles:
        colour = COLOURS(norm(one.compute))
        chosen = [row for row in rows if abs(np.log(row.compute / one.compute)) < 0.05]
        n = np.asarray([row.sizes["N"] for row in chosen])
        panel.scatter(n, [row.loss for row in chosen], s=16, color=colour)
        if one.coefficients is not None and len(n):
            across = np.geomspace(n.min(), n.max(), 60)
            panel.plot(
                across, np.polyval(one.coefficients, np.log(across)), color=colour, label=f"{one.compute:.2g} FLOPs"
            )
        if one.n is not None and one.loss is not None:
            panel.scatter(
                [one.n], [one.loss], s=60, marker="D", edgecolors=colour, facecolors="none" if one.flag else colour
            )
        lines.append([one.compute, one.runs, one.n, one.loss, one.flag])
    panel.legend(fontsize=7)
    _size_axis(panel, f"N: {names['N']}", np.asarray([row.sizes["N"] for row in rows]))
    panel.set_ylabel(names["loss"])
    text = "no power law of the minima" if profiles.exponent is None else f"best N goes as C^{profiles.exponent:.3f}"
    panel.set_title(f"IsoFLOP profiles: {text}; open: flagged, not used", fontsize=10)
    return _save(out, "isoflop", figure, ["compute", "runs", "minimum_N", "minimum_loss", "flag"], lines)


def _title(result: Result) -> str:
    fit = result.fit
    if fit.law is None:
        return f"No law: {(fit.refusal or '').split(';')[0]}"
    text = ", ".join(f"{name} {value:.4g}" for name, value in fit.law.as_dict().items())
    if fit.not_identified:
        text += f"   (not identified: {', '.join(fit.not_identified)})"
    return f"{fit.form.formula}; bands: 80 %\n{text}" if result.drawn else f"{fit.form.formula}\n{text}"


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


def _size_axis(panel: Any, label: str, values: np.ndarray, which: str = "x") -> None:
    """A log axis whose ticks read `2M`, `50k`; they sit at the sizes themselves where those are few."""
    panel.set(**{f"{which}scale": "log", f"{which}label": label})
    axis = getattr(panel, f"{which}axis")
    distinct = np.unique(values)
    if len(distinct) <= MOST_CURVES and np.all(distinct[1:] > 1.2 * distinct[:-1]):
        axis.set_major_locator(FixedLocator(distinct.tolist()))
        axis.set_minor_locator(NullLocator())
    else:
        decades = np.log10(distinct[-1] / distinct[0])
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 3.0)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value)))


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
