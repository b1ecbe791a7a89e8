"""Results of forms that are no sum of power laws: IsoFLOP profiles and metrics of the loss, with their files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.files import write_json
from mg3d_jax.scaling.fit import isoflop, metric, plots, table
from mg3d_jax.scaling.fit.table import Row


def write_isoflop(out: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Profiles of rows with `N` and FLOPs: `fit.json`, `isoflop.csv`, `isoflop.png`; returns the former."""
    table.make_folder(out)
    rows = [row for row in rows if row.compute == row.compute and row.compute > 0]
    n, compute, loss = (np.asarray(v) for v in zip(*((r.sizes["N"], r.compute, r.loss) for r in rows), strict=True))
    found = isoflop.isoflop(n, compute, loss)
    names = {"N": "N", "loss": "loss"}
    document = {"schema": 2, "form": "isoflop", **found.as_dict(), "plots": plots.draw_isoflop(out, rows, found, names)}
    write_json(out / "fit.json", document)
    return document


def write_metric(
    out: Path, rows: Sequence[Row], chance: float, ceiling: float, draws: int, seed: int
) -> dict[str, Any]:
    """A metric (`loss` of the rows) of a loss (`x`): `fit.json`, `metric.csv`; returns the former."""
    table.make_folder(out)
    sizes, values = table.columns(rows, ("x",))
    try:
        found = metric.fit_metric(sizes["x"], values, chance=chance, ceiling=ceiling, draws=min(draws, 200), seed=seed)
    except ValueError as error:
        document: dict[str, Any] = {"schema": 2, "form": "metric", "refusal": str(error), "shapes": [], "warnings": []}
        write_json(out / "fit.json", document)
        return document
    outside = int(np.sum((values < chance) | (values > ceiling)))
    warnings = [f"{outside} runs lie outside of chance {chance:g} .. ceiling {ceiling:g}"] if outside else []
    with (out / "metric.csv").open("w", newline="", encoding="utf-8") as file:
        lines = zip((r.label for r in rows), sizes["x"], values, *(one(sizes["x"]) for one in found), strict=True)
        csv.writer(file).writerows([["run", "loss", "metric", *(one.shape for one in found)], *lines])
    shapes = [asdict(one) for one in found]
    document = {"schema": 2, "form": "metric", "refusal": None, "shapes": shapes, "warnings": warnings}
    write_json(out / "fit.json", document)
    return document


def summary(document: Mapping[str, Any]) -> str:
    lines = [f"warning: {warning}" for warning in document["warnings"]]
    if document["form"] == "metric":
        for one in document["shapes"]:
            bands = "".join(f", {name} 90 % {low:.4g} .. {high:.4g}" for name, (low, high) in one["intervals"].items())
            lines.append(
                f"{one['shape']}: k {one['k']:.5g}, L0 {one['L0']:.5g}, root mean square error {one['rmse']:.4g}{bands}"
            )
    elif document["exponent"] is not None:
        band = document["interval"]
        shown = f" (90 % {band[0]:.4g} .. {band[1]:.4g})" if band else ""
        lines.append(f"best N = {document['scale']:.5g} C^{document['exponent']:.5g}{shown}")
    return "\n".join(lines)
