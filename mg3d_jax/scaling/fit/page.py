"""The page of a fit: one HTML file that opens without a network, warnings first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d_jax import html
from mg3d_jax.files import write_text

FILE = "fit.html"
CAPTIONS = {
    "loss_vs_n": "Loss against N, residuals below",
    "loss_vs_d": "Loss against D, residuals below",
    "loss_vs_x": "Loss against x, residuals below",
    "loss_vs_u": "Loss against unique data",
    "loss_vs_s": "Loss against data seen",
    "loss_vs_c": "Loss against compute",
    "residual_means": "Mean residual of every value of every column, two standard errors; marked: more than noise",
    "residuals": "Residuals of the robust fit",
    "contours": "Equal loss over N and D, and the best N",
    "isoflop": "IsoFLOP profiles",
    "predicted_vs_actual": "Predicted against measured, runs that were fitted",
    "held_out": "Predicted against measured, runs that were held out",
}


def write(out: Path, document: Mapping[str, Any]) -> None:
    """Writes `fit.html` beside the `fit.json` and the plots of `document`."""
    write_text(out / FILE, render(out, document))


def render(out: Path, document: Mapping[str, Any]) -> str:
    pictures = [name for name in document["plots"] if name.endswith(".png")]
    lack = document["lack_of_fit"]
    title = f"{document['columns'].get('source', 'scaling law')}: {document['columns']['loss']}"
    facts = [("form", document["law"]), ("status", document["status"]), ("runs", document["rows"]["used"])]
    if lack:
        facts += [("residuals", f"{lack['rms']:.2%}")]
        facts += [("noise of a run", f"{lack['noise']:.2%}")] if lack["noise"] is not None else []
    return html.render(
        "scaling.html",
        title,
        heading=title,
        facts=facts,
        document=document,
        parameters=_parameters(document),
        tests=_tests(lack),
        left_out=_left_out(document),
        scores=_scores(document["back_test"]),
        excluded=html.Table(
            ("run", "state", "reason"),
            [(one["run"], state, one["reason"]) for state in ("excluded", "missing") for one in document[state]],
        ),
        pictures=[(CAPTIONS.get(name[:-4], name), (out / name).read_bytes()) for name in pictures],
    )


def _parameters(document: Mapping[str, Any]) -> html.Table:
    rows = []
    for name, value in document["estimate"].items():
        bands = document["intervals"][name]
        shown = [f"{bands[level][0]:.4g} to {bands[level][1]:.4g}" if bands else "" for level in ("80", "90")]
        least = ((document["lack_of_fit"] or {}).get("least_squares") or {}).get(name)
        rows.append(
            (
                name,
                "" if value is None else f"{value:.5g}",
                *shown,
                "" if least is None else f"{least:.5g}",
                document["not_identified"].get(name, ""),
            )
        )
    return html.Table(("parameter", "value", "80 %", "90 %", "least squares", "not identified"), rows, (1, 2, 3, 4))


def _tests(lack: Mapping[str, Any] | None) -> html.Table:
    tests = lack["tests"] if lack else []
    rows = [
        (one["column"], f"{one['shift']:.3%}", f"{one['share']:.2g}", f"{one['limit']:.2g}", one["worst"])
        for one in tests
    ]
    classes = ["changed" if one["warns"] else "" for one in tests]
    return html.Table(("column", "explains", "by chance", "said below", "furthest off"), rows, (1, 2, 3), classes)


def _left_out(document: Mapping[str, Any]) -> html.Table:
    found = (document["lack_of_fit"] or {}).get("without_each_size") or []
    head = ("size left out", "its mean residual", *document["estimate"])
    rows = [
        (
            f"{one['left_out']:.4g}",
            "" if one["mean_residual"] is None else f"{one['mean_residual']:+.2%}",
            *(f"{one[name]:.4g}" for name in document["estimate"]),
        )
        for one in found
    ]
    return html.Table(head, rows, tuple(range(1, len(head))))


def _scores(tested: Mapping[str, Any] | None) -> html.Table:
    rows = [
        (
            one["method"],
            f"{one['log_rmse']:.4f}",
            f"{one['mean_absolute_percent']:.2f} %",
            f"{one['bias_percent']:+.2f} %",
        )
        for one in (tested["scores"] if tested else [])
    ]
    more = (
        ""
        if not tested or tested["covered"] is None
        else f"{tested['covered']:.0%} of them lie in the law's 90 % interval."
    )
    return html.Table(("method", "log-RMSE", "mean error", "bias"), rows, (1, 2, 3), more=more)
