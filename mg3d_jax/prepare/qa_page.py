"""`qa.html` and `qa.png`: slices of a sample of records in the windows of soft tissue and lung beside their report and labels,
the histogram of HU, and all warnings by kind, so that a person sees in seconds whether a preparation is right: a report that
belongs to another scan, too."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import html
from mg3d_jax.data.record import Record
from mg3d_jax.data.records import RecordReader
from mg3d_jax.files import write_text
from mg3d_jax.prepare.quality import QUALITY_NAME

_WINDOWS = {"soft tissue": (-160, 240), "lung": (-1350, 150)}  # HU
_DPI = 80
_LISTED = 200


@dataclass(frozen=True)
class Sample:
    """One record as the page shows it."""

    name: str
    png: bytes
    about: str  # size, spacing, part of the body
    warnings: list[str]
    labels: list[str]  # present ones
    findings: str
    impression: str


def sample_indices(count: int, quality: list[dict[str, Any]], wanted: int) -> list[int]:
    """Records to draw: half of them with warnings (if there are), the others spread over the set."""
    wanted = min(wanted, count)
    odd = [i for i, line in enumerate(quality) if line["warnings"]]
    some_odd = [odd[i * len(odd) // min(len(odd), wanted // 2)] for i in range(min(len(odd), wanted // 2))]
    spread = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    return sorted(dict.fromkeys([*some_odd, *spread]))[: max(wanted, len(some_odd))] if wanted else []


def draw(record: Record) -> np.ndarray:
    """RGBA [height, width, 4]: coronal, sagittal and axial slice through the middle as a radiologist sees them (the patient's
    right on the left), in true proportions, a row per window, and the histogram of HU."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4)
    volume, spacing = record.volume, np.sqrt((record.affine[:3, :3] ** 2).sum(0))
    middle = [n // 2 for n in volume.shape]
    # RAS+ arrays: x grows to the patient's right, which is drawn on the left; z and y grow upwards.
    planes = (
        ("coronal", volume[::-1, middle[1], :].T, spacing[2] / spacing[0], ("R", "L", "S", "I")),
        ("sagittal", volume[middle[0], ::-1, :].T, spacing[2] / spacing[1], ("A", "P", "S", "I")),
        ("axial", volume[::-1, :, middle[2]].T, spacing[1] / spacing[0], ("R", "L", "A", "P")),
    )
    for row, (window, (low, high)) in enumerate(_WINDOWS.items()):
        for column, (name, plane, aspect, (left, right, top, bottom)) in enumerate(planes):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(plane, origin="lower", cmap="gray", vmin=low, vmax=high, aspect=aspect)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {window}", fontsize=9)
            style: dict[str, Any] = {
                "color": "yellow",
                "fontsize": 9,
                "transform": axis.transAxes,
                "ha": "center",
                "va": "center",
            }
            for x, y, letter in ((0.04, 0.5, left), (0.96, 0.5, right), (0.5, 0.95, top), (0.5, 0.05, bottom)):
                axis.text(x, y, letter, **style)
    axis = figure.add_subplot(grid[:, 3])
    counts, edges = np.histogram(volume, bins=np.arange(-1050, 1551, 25))
    axis.fill_between(edges[:-1], counts, step="post")
    for mark, what in ((-1000, "air"), (40, "soft tissue")):
        axis.axvline(mark, color="0.6", linewidth=0.8, linestyle=":")
        axis.text(mark, 1.01, what, fontsize=7, color="0.4", ha="center", transform=axis.get_xaxis_transform())
    axis.set(yscale="log", xlabel="HU")
    axis.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def png(picture: np.ndarray) -> bytes:
    """The bytes of a PNG of RGBA [height, width, 4]."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    metadata: Any = {"Software": None}  # the version of matplotlib is not of the data
    imsave(buffer, picture, format="png", metadata=metadata)
    return buffer.getvalue()


def _sample(record: Record, line: dict[str, Any], label_names: list[str], picture: np.ndarray) -> Sample:
    spacing = np.round(np.sqrt((record.affine[:3, :3] ** 2).sum(0)), 2)
    part = f", {line['body_part']}" if line.get("body_part") else ""
    about = f"{_times(record.volume.shape)} voxels of {_times(spacing)} mm{part}; {line['decision']}"
    present = [name for name, value in zip(label_names, record.labels, strict=True) if value == 1]
    return Sample(record.name, png(picture), about, line["warnings"], present, record.findings, record.impression)


def page(manifest: dict[str, Any], quality: list[dict[str, Any]], samples: list[Sample]) -> str:
    """The page as HTML, with its pictures inside."""
    reasons = Counter(warning.split(":")[0] for line in quality for warning in line["warnings"])
    kinds = {reason: f"kind{number}" for number, (reason, _) in enumerate(reasons.most_common())}
    decisions = Counter(line["decision"] for line in quality)
    parts = Counter(line.get("body_part") or "not told" for line in quality)
    spacings = Counter(_times(line["spacing"]) for line in quality)
    warned = [line for line in quality if line["warnings"]]
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
    rows = [(line["name"], "; ".join(line["warnings"])) for line in warned[:_LISTED]]
    classes = [" ".join(dict.fromkeys(kinds[w.split(":")[0]] for w in line["warnings"])) for line in warned[:_LISTED]]
    more = f"and {len(warned) - _LISTED:,} more, in {QUALITY_NAME}" if len(warned) > _LISTED else ""
    lists = {
        "What the stored numbers were taken for": [_counts("decision", decisions)],
        "Parts of the body": [_counts("part", parts)],
        "Bad files": [_list(("path", "reason"), bad)],
        "Spacings of the files": [_counts("mm", spacings)],
        "Texts": [_counts("cleaned of", Counter(manifest.get("cleaned", {})))],
    }
    title = f"{manifest['source']} {manifest['split']}: {manifest['records']} records"
    return html.render(
        "preparation.html",
        title,
        heading=title,
        facts=facts.items(),
        kinds=[(reason, count, kinds[reason]) for reason, count in reasons.most_common()],
        warnings=html.Table(("volume", "warnings"), rows, classes=classes, more=more),
        samples=samples,
        caption=", ".join(f"{name} {low} to {high} HU" for name, (low, high) in _WINDOWS.items()),
        lists=lists,
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
    records = [reader[i] for i in indices]
    pictures = [draw(record) for record in records]
    shown = [
        _sample(record, quality[i], manifest["label_names"], picture)
        for i, record, picture in zip(indices, records, pictures, strict=True)
    ]
    shown.sort(key=lambda sample: not sample.warnings)
    (folder / "qa.png").write_bytes(png(np.concatenate(pictures)))
    write_text(folder / "qa.html", page(manifest, quality, shown))
