"""The segmentation of a run (`tasks.segmentation`) on held-out masks: Dice, normalised surface distance, Hausdorff distance."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions, Model
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, ratio, weighted_sum
from mg3d_jax.evaluation.segmentation_metrics import METRICS, dice, scores
from mg3d_jax.html import Section, Table
from mg3d_jax.options import key

if TYPE_CHECKING:
    from mg3d_jax.evaluation.embed import Embedder

logger = logging.getLogger(__name__)
PROTOCOL = (
    "on the prepared grid, by sliding windows with an overlap of {overlap:g} and Gaussian blending; each class by itself, mean "
    "over the volumes where it can be measured: Dice where the reference has the class, the normalised surface distance "
    "(surfaces as voxels, tolerance {tolerance:g} mm) where it or the prediction has it, the 95th percentile of the Hausdorff "
    "distance (mm) where both have it; all classes: mean of the classes; interval by resampling patients"
)
TITLES = {"dice": "Dice", "surface": "Surface", "hd95": "HD95 mm"}


@dataclass(frozen=True)
class SegmentationEvaluationOptions(EvaluationOptions):
    """The trained segmentation."""

    overlap: float = key(0.5, "share of a window that the next one covers, too", neutral=0.5)
    windows: int = key(4, "windows of a volume that go through the network together", neutral=4)
    tolerance: float = key(2.0, "of the normalised surface distance, mm", neutral=2.0)
    draws: int = key(1000, "resamplings of the patients for the intervals", neutral=1000)


@dataclass(frozen=True)
class _Scored:
    values: Mapping[str, np.ndarray]  # of each of METRICS, [n, C - 1]
    missed: np.ndarray  # bool [n, C - 1]: in the reference, and nowhere in the prediction
    invented: np.ndarray  # the other way round
    ids: np.ndarray  # [n]
    patients: np.ndarray  # [n]
    names: tuple[str, ...]  # C - 1


class Segmentation(Evaluation):
    """Dice and surface distances of the run's segmentation. Nothing where the run has none, or the data no masks."""

    options = SegmentationEvaluationOptions
    needs = ("model",)

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._compiled: tuple[Any, Any] | None = None  # of which embedder
        self._last: tuple[Any, _Scored] | None = None  # of which parameters

    @staticmethod
    def problems(options: SegmentationEvaluationOptions, config: Any) -> list[str]:
        """An overlap, a number of windows or a tolerance that cannot be."""
        found = []
        if not 0 <= options.overlap < 1:
            found.append(f"evaluations.segmentation.overlap = {options.overlap}: a share from 0 to below 1")
        if options.windows < 1:
            found.append(f"evaluations.segmentation.windows = {options.windows}: must be at least 1")
        if options.tolerance < 0:
            found.append(f"evaluations.segmentation.tolerance = {options.tolerance}: must not be negative")
        return found

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`segmentation/dice`, the mean of the classes, and `segmentation/dice/CLASS`; no surfaces, which take long."""
        if (model := _with_masks(found)) is None:
            return {}
        names, rows = _class_names(model), []
        for _, labels, mask in self._predictions(model, max_bad_records=model.embedder.config.data.max_bad_records):
            labels = np.where(mask < 0, 0, labels)
            rows.append([dice(labels == one, mask == one) for one in range(1, len(names) + 1)])
        means = _class_means(np.array(rows), np.ones((1, len(rows)), np.uint8))[0]
        by_class = {f"segmentation/dice/{name}": float(x) for name, x in zip(names, means, strict=True)}
        return {"segmentation/dice": float(_macro(means[None])[0])} | by_class

    def full(self, found: Embedded) -> dict[str, Any]:
        if (model := _with_masks(found)) is None:
            return {}
        one = self._remembered(model)
        weights = PatientDraws(one.patients, self.settings.draws).weights(one.patients)
        drawn = {name: _class_means(one.values[name], weights) for name in METRICS}
        rows = {title: self._row(one, drawn, column) for column, title in enumerate(one.names)}
        result: dict[str, Any] = {}
        for name, values in drawn.items():
            macro = _macro(values)
            result |= {name: float(macro[0]), f"{name}_95": interval(macro)}
        protocol = PROTOCOL.format(overlap=self.settings.overlap, tolerance=self.settings.tolerance)
        counted = {"volumes": len(one.ids), "tolerance": self.settings.tolerance}
        return {"protocol": protocol} | counted | result | {"by_class": rows}

    @staticmethod
    def _row(one: _Scored, drawn: Mapping[str, np.ndarray], column: int) -> dict[str, Any]:
        row: dict[str, Any] = {"volumes": int(np.sum(~np.isnan(one.values["dice"][:, column])))}
        for name, values in drawn.items():
            low, high = interval(values[:, column])
            row |= {name: float(values[0, column]), f"{name}_low": low, f"{name}_high": high}
        return row | {"missed": int(one.missed[:, column].sum()), "invented": int(one.invented[:, column].sum())}

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        if not result:
            return {}
        found: dict[str, float | list[float]] = {}
        for name, base in _keys(result["tolerance"]).items():
            found |= {f"{base}/mean": result[name], f"{base}/mean_95": result[f"{name}_95"]}
            found |= {f"{base}/{title}": row[name] for title, row in result["by_class"].items()}
        return found

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        if (model := _with_masks(found)) is None:
            return {}
        one = self._remembered(model)
        about = {"ids": one.ids, "patients": one.patients, "names": np.array(one.names, str)}
        return about | dict(one.values) | {"tolerance": np.array(self.settings.tolerance)}

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        if "dice" not in arrays:
            return {}
        weights, found = draws.weights(arrays["patients"]), {}
        for name, base in _keys(float(arrays["tolerance"])).items():
            values = _class_means(arrays[name], weights)
            found[f"{base}/mean"] = _macro(values)
            found |= {f"{base}/{title}": values[:, column] for column, title in enumerate(arrays["names"].tolist())}
        return found

    def section(self, result: Mapping[str, Any]) -> Section:
        rows: list[Sequence[str]] = []
        for title, row in [("all classes", result), *result["by_class"].items()]:
            low, high = row["dice_95"] if "dice_95" in row else (row["dice_low"], row["dice_high"])
            counts = [str(row[name]) for name in ("volumes", "missed", "invented")] if "missed" in row else [""] * 3
            rows.append(
                (
                    title,
                    f"{row['dice']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{row['surface']:.3f}",
                    f"{row['hd95']:.1f}",
                    *counts,
                )
            )
        head = ("", "Dice", "95 % interval", TITLES["surface"], TITLES["hd95"], "volumes", "missed", "invented")
        table = Table(head, rows, numbers=(1, 3, 4, 5, 6, 7), classes=["total"] + [""] * (len(rows) - 1))
        headline = [("Dice of the trained segmentation", f"{result['dice']:.3f}")]
        return Section("Segmentation", result["protocol"], table, headline=headline)

    def _remembered(self, model: Model) -> _Scored:
        """Of the same parameters once: the document, its arrays and its page ask one after another."""
        if self._last is None or self._last[0] is not model.params:
            self._last = (model.params, self._scored(model))
        return self._last[1]

    def _scored(self, model: Model) -> _Scored:
        names, values, missed, invented, about = _class_names(model), [], [], [], []
        for index, labels, mask in self._predictions(model):
            record = model.data.read(index)
            spacing = np.linalg.norm(record.affine[:3, :3], axis=0)
            values.append(scores(labels, mask, len(names) + 1, spacing, self.settings.tolerance))
            labels = np.where(mask < 0, 0, labels)
            there = np.array([[np.any(x == one) for one in range(1, len(names) + 1)] for x in (labels, mask)])
            missed.append(there[1] & ~there[0])
            invented.append(there[0] & ~there[1])
            about.append(record)
        return _Scored(
            {name: np.stack([row[name] for row in values]) for name in METRICS},
            np.array(missed),
            np.array(invented),
            np.array([record.name for record in about], str),
            np.array([record.patient for record in about], str),
            names,
        )

    def _predictions(self, model: Model, **bad_records: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number of the record, predicted classes and mask [X, Y, Z] of every record, one after the other."""
        from mg3d_jax import sharding  # where results are only shown there may be no JAX

        embedder = model.embedder
        if self._compiled is None or self._compiled[0] is not embedder:
            self._compiled = (embedder, embedder.compiled(partial(_segment, embedder, self.settings)))
        shards = sharding.batch_shards(embedder.setup.mesh)  # a volume per device: they may be large
        walk = partial(embedder.walk, fields=("mask",), batch_size=shards)
        with model.progress("segment", len(model.data)) as progress:
            for rows in walk(self._compiled[1], model.params, model.data, progress=progress, **bad_records):
                yield from zip(rows["record_index"].tolist(), rows["classes"], rows["mask"], strict=True)


def _segment(embedder: Embedder, settings: SegmentationEvaluationOptions, params: Any, batch: dict[str, Any]) -> Any:
    """`{"classes": int8 [rows, X, Y, Z], ...}`, with what else the batch has passed through."""
    import jax.numpy as jnp

    from mg3d_jax.evaluation.segmenter import logits_of
    from mg3d_jax.evaluation.sliding_window import SlidingWindow

    windows = SlidingWindow(embedder.config.model.volume_size, settings.overlap, settings.windows)
    logits = logits_of(embedder.setup, params, batch["volume"], windows)
    found = {"classes": jnp.argmax(logits, axis=-1).astype(jnp.int8)}
    return found | {name: array for name, array in batch.items() if name not in ("volume", "labels")}


def _with_masks(found: Embedded) -> Model | None:
    """The model, where it segments and the data have masks of its classes."""
    model = found.model
    if model is None or "segmentation_head" not in model.params:
        return None
    trained, here = model.embedder.config.tasks["segmentation"].num_classes, len(model.data.mask_names)
    if not model.data.masks or trained != here:
        logger.warning("segmentation: left out, the run has %d classes and the masks of the data %d", trained, here)
        return None
    return model


def _class_names(model: Model) -> tuple[str, ...]:
    return tuple(model.data.mask_names[1:])


def _keys(tolerance: float) -> dict[str, str]:
    """The start of the keys of each metric, which say its protocol."""
    base = "segmentation/grid=prepared"
    surface = f"{base}/tolerance={tolerance:g}mm/surface"
    return {"dice": f"{base}/dice", "surface": surface, "hd95": f"{base}/hd95"}


def _class_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over the volumes with a finite value, `[D, C - 1]`, of `values [n, C - 1]` in every draw of `weights [D, n]`."""
    finite = np.isfinite(values)
    return ratio(weighted_sum(np.where(finite, values, 0.0), weights), weighted_sum(finite, weights))


def _macro(means: np.ndarray) -> np.ndarray:
    """The mean over the classes that have a value: `[D, C - 1] -> [D]`; NaN without any."""
    known = ~np.isnan(means)
    return ratio(np.where(known, means, 0.0).sum(axis=1), known.sum(axis=1))
