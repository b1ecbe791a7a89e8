"""`qa.html` and `qa.png`: three orthogonal slices and the histogram of a sample of records, and the warnings in a
table, so that a person sees in seconds whether a preparation is right."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import html
from mg3d_jax.data.record import Record
from mg3d_jax.data.records import RecordReader
from mg3d_jax.files import write_text

QUALITY_NAME = "qa.jsonl"  # a line per record: what was found in its file
_WINDOW = (-1000, 600)  # HU shown: lung and soft tissue at once
_DPI = 80
_LISTED = 200
_WRITTEN, _LETTERS = 3, 58  # warnings in the picture, and their length


def sample_indices(count: int, quality: list[dict[str, Any]], wanted: int) -> list[int]:
    """Records to draw: half of them with warnings (if there are), the others spread over the set."""
    wanted = min(wanted, count)
    odd = [i for i, line in enumerate(quality) if line["warnings"]]
    some_odd = [odd[i * len(odd) // min(len(odd), wanted // 2)] for i in range(min(len(odd), wanted // 2))]
    spread = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    return sorted(dict.fromkeys([*some_odd, *spread]))[: max(wanted, len(some_odd))] if wanted else []


def draw(records: list[Record], quality: list[dict[str, Any]]) -> bytes:
    """PNG: one row per record: coronal, sagittal and axial slice through the middle as a radiologist sees them (the
    patient's right on the left), in true proportions, and the histogram of HU."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.1 * len(records)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(records), 4, squeeze=False)
    for row, record, line in zip(axes, records, quality, strict=True):
        volume, spacing = record.volume, np.sqrt((record.affine[:3, :3] ** 2).sum(0))
        middle = [n // 2 for n in volume.shape]
        # RAS+ arrays: x grows to the patient's right, which is drawn on the left; z and y grow upwards.
        planes = (
            ("coronal", volume[::-1, middle[1], :].T, spacing[2] / spacing[0], ("R", "L", "S", "I")),
            ("sagittal", volume[middle[0], ::-1, :].T, spacing[2] / spacing[1], ("A", "P", "S", "I")),
            ("axial", volume[::-1, :, middle[2]].T, spacing[1] / spacing[0], ("R", "L", "A", "P")),
        )
        for axis, (name, plane, aspect, (left, right, top, bottom)) in zip(row, planes, strict=False):
            axis.imshow(plane, origin="lower", cmap="gray", vmin=_WINDOW[0], vmax=_WINDOW[1], aspect=aspect)
            axis.set(xticks=[], yticks=[], title=name)
            style = {"color": "yellow", "fontsize": 9, "transform": axis.transAxes, "ha": "center", "va": "center"}
            for x, y, letter in ((0.04, 0.5, left), (0.96, 0.5, right), (0.5, 0.95, top), (0.5, 0.05, bottom)):
                axis.text(x, y, letter, **style)
        counts, edges = np.histogram(volume, bins=np.arange(-1050, 1551, 25))
        row[3].fill_between(edges[:-1], counts, step="post")
        row[3].set(
            yscale="log", xlabel="HU", title=f"{_times(volume.shape)} voxels of {_times(np.round(spacing, 2))} mm"
        )
        row[0].set_ylabel(record.name, fontsize=8)
        if line["warnings"]:
            row[3].text(0.5, 0.97, _short(line["warnings"]), fontsize=7, color="red", va="top",
                        ha="center", transform=row[3].transAxes,
                        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0})  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _short(warnings: list[str]) -> str:
    """The first warnings, cut to fit the picture, and how many more there are; the table below it has them whole."""
    lines = [w if len(w) <= _LETTERS else w[: _LETTERS - 3] + "..." for w in warnings[:_WRITTEN]]
    return "\n".join([*lines, *([f"+ {len(warnings) - _WRITTEN} more"] if len(warnings) > _WRITTEN else [])])


def page(manifest: dict[str, Any], quality: list[dict[str, Any]], png: bytes) -> str:
    """The page as HTML, with its picture inside."""
    reasons = Counter(warning.split(":")[0] for line in quality for warning in line["warnings"])
    decisions = Counter(line["decision"] for line in quality)
    spacings = Counter(_times(line["spacing"]) for line in quality)
    warned = [(line["name"], "; ".join(line["warnings"])) for line in quality if line["warnings"]]
    bad = [(item["path"], item["reason"]) for item in manifest["bad"]]
    facts = {
        "records": manifest["records"],
        "patients": len(manifest["patients"]),
        "distinct reports": manifest["unique_reports"],
        "grid": _times(manifest["grid"]),
        "spacing, mm": _times(manifest["spacing"]) if manifest["spacing"] else "varies",
        "recipe version": manifest["recipe_version"],
        "with warnings": len(warned),
        "bad": len(bad),
    }
    lists = {
        "What the stored numbers were taken for": [_counts("decision", decisions)],
        "Warnings": [_counts("warning", reasons), _list(("volume", "warnings"), warned)],
        "Bad files": [_list(("path", "reason"), bad)],
        "Spacings of the files": [_counts("mm", spacings)],
    }
    title = f"{manifest['source']} {manifest['split']}: {manifest['records']} records"
    caption = f"Slices and histograms; HU {_WINDOW[0]} to {_WINDOW[1]} are shown."
    return html.render(
        "preparation.html", title, heading=title, facts=facts.items(), png=png, caption=caption, lists=lists
    )


def _times(numbers: Iterable[float]) -> str:
    """`48 x 48 x 32`."""
    return " x ".join(f"{number:g}" for number in numbers)


def _counts(name: str, counted: Counter[str]) -> html.Table:
    return _list((name, "volumes"), counted.most_common(), numbers=(1,))


def _list(head: tuple[str, ...], rows: list[tuple], *, numbers: tuple[int, ...] = ()) -> html.Table:
    """A table of the first rows, which says how many more there are."""
    left = len(rows) - _LISTED
    more = f"and {left:,} more, in {QUALITY_NAME} and manifest.json" if left > 0 else ""
    return html.Table(head, rows[:_LISTED], numbers=numbers, more=more)


def write_page(folder: Path, manifest: dict[str, Any], quality: list[dict[str, Any]], samples: int) -> None:
    """Writes `qa.png` and `qa.html` of a folder whose records and manifest are there."""
    indices = sample_indices(manifest["records"], quality, samples)
    if not indices:
        return
    reader = RecordReader(folder)
    png = draw([reader[i] for i in indices], [quality[i] for i in indices])
    (folder / "qa.png").write_bytes(png)
    write_text(folder / "qa.html", page(manifest, quality, png))
