"""Pairs to look at: what is found first for some reports, what was written for some volumes, with slices beside the texts."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.evaluation.base import Embedded, Text
from mg3d_jax.evaluation.ranking import ranks_by_group

SHOWN = 3  # volumes of an example
WINDOW = (-1000.0, 400.0)  # HU
HEIGHT = 150  # pixels of a picture
QUERIES = 2000  # reports among which the examples are chosen
Volume = Callable[[int], tuple[np.ndarray, np.ndarray]]  # row -> (int16 HU [X, Y, Z] RAS+, spacing in mm [3])


@dataclass(frozen=True)
class Answer:
    """A volume that was found: `place` 1 is the first; `picture` is a PNG, empty where there are no volumes to draw."""

    volume: str
    place: int
    similarity: float
    correct: bool
    picture: bytes


@dataclass(frozen=True)
class Example:
    """A report, and the volumes that are nearest to it; its own stands last where it is not among them."""

    title: str
    report: str
    text: Text
    rank: int
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Written:
    """A written report beside the true one: `picture` is a PNG, empty where there are no volumes to draw. Labels by whether
    they are stated and there (`hit`), stated only (`false`) or there only (`missed`)."""

    volume: str
    f1: float
    written: Text
    report: Text
    hit: Sequence[str]
    false: Sequence[str]
    missed: Sequence[str]
    picture: bytes


def written_examples(document: Mapping[str, Any], volume: Volume | None = None) -> list[Written]:
    """The examples in the result of `evaluation.generation`, with slices of their volumes."""
    chosen = document.get("generation", {}).get("examples", ())
    return [
        Written(
            **{name: value for name, value in one.items() if name != "row"},
            picture=slices(*volume(one["row"])) if volume else b"",
        )
        for one in chosen
    ]


def retrieval_examples(found: Embedded, volume: Volume | None = None, *, seed: int = 0) -> list[Example]:
    """Reports whose volume is found first, at the median and last, with their first `SHOWN` answers.

    Args:
        volume: reads the volume of a row; without it there are no pictures.
    """
    owned = np.flatnonzero(np.isin(found.report_ids, found.volume_reports))
    if len(owned) < 2 or not found.report_texts:
        return []
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(owned)[:QUERIES])
    ranks = ranks_by_group(found.reports[rows], found.volumes, found.report_ids[rows], found.volume_reports)
    order = np.argsort(ranks, kind="stable")
    places = {"found first": 0, "at the median": len(order) // 2, "found last": len(order) - 1}
    return [_example(found, rows[order[place]], title, volume) for title, place in places.items()]


def _similarity(found: Embedded, row: int) -> np.ndarray:
    return np.nan_to_num(found.volumes @ found.reports[row], nan=-np.inf)


def _rank(found: Embedded, row: int) -> int:
    similarity, own = _similarity(found, row), found.volume_reports == found.report_ids[row]
    return 1 + int(np.sum((similarity >= similarity[own].max()) & ~own))


def _example(found: Embedded, row: int, title: str, volume: Volume | None) -> Example:
    similarity, own = _similarity(found, row), found.volume_reports == found.report_ids[row]
    order = np.lexsort((own, -similarity))  # a wrong one before a right one among equals
    shown = list(order[:SHOWN])
    if not own[shown].any():
        shown.append(next(i for i in order if own[i]))
    places = np.empty(len(order), int)
    places[order] = np.arange(1, len(order) + 1)
    answers = [
        Answer(
            str(found.volume_ids[i]),
            int(places[i]),
            float(similarity[i]),
            bool(own[i]),
            slices(*volume(i)) if volume else b"",
        )
        for i in shown
    ]
    return Example(title, str(found.report_ids[row]), found.report_texts[row], _rank(found, row), answers)


def slices(volume: np.ndarray, spacing: np.ndarray) -> bytes:
    """A PNG with the middle axial slice (anterior up, patient's right at the left) and the middle coronal one beside it.

    Args:
        volume: int16 HU [X, Y, Z], RAS+. spacing: mm per voxel [3].
    """
    from PIL import Image

    low, high = WINDOW
    grey = (np.clip((volume.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    _, y, z = (size // 2 for size in volume.shape)
    panels = []
    for plane, (across, up) in ((grey[:, :, z], (0, 1)), (grey[:, y, :], (0, 2))):
        width = round(HEIGHT * plane.shape[0] * spacing[across] / (plane.shape[1] * spacing[up]))
        image = Image.fromarray(np.ascontiguousarray(plane[::-1, ::-1].T))
        panels.append(image.resize((max(width, 1), HEIGHT), Image.Resampling.BICUBIC))
    whole = Image.new("L", (sum(panel.width for panel in panels) + 2, HEIGHT), 255)
    whole.paste(panels[0], (0, 0))
    whole.paste(panels[1], (panels[0].width + 2, 0))
    buffer = io.BytesIO()
    whole.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
