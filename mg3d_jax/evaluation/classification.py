"""The classification head of a run (`tasks.classification`) on held-out data: what fine-tuning is judged by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.evaluation import class_scores
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions, Model
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.html import Section, Table
from mg3d_jax.options import key

if TYPE_CHECKING:
    from mg3d_jax.evaluation.embed import Embedder

logger = logging.getLogger(__name__)
HEAD = "classification_head"
PROTOCOL = (
    "the head that the run was trained with, volumes with a known label; interval by resampling patients; F1, balanced "
    "accuracy and calibration at the head's own probabilities, without a threshold chosen on the evaluated labels"
)


@dataclass(frozen=True)
class ClassificationEvaluationOptions(EvaluationOptions):
    """The classification head."""

    draws: int = key(1000, "resamplings of the patients for the intervals", neutral=1000)


@dataclass(frozen=True)
class _Scored:
    labels: np.ndarray  # [n, L]
    logits: np.ndarray  # float64 [n, L]
    ids: np.ndarray  # [n]
    patients: np.ndarray  # [n]
    names: tuple[str, ...]
    kind: str


class Classification(Evaluation):
    """AUROC and more of the head's scores. Nothing where the run has no head."""

    options = ClassificationEvaluationOptions
    needs = ("model",)

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._compiled: tuple[Any, Any] | None = None  # of which embedder
        self._last: tuple[Any, _Scored] | None = None  # of which parameters

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`classification/auroc_macro`, `classification/auroc/CLASS`; with several classes `classification/accuracy`."""
        if (model := _with_head(found)) is None:
            return {}
        one = self._scores(model, max_bad_records=model.embedder.config.data.max_bad_records)
        result = class_scores.quick(one.labels, one.logits, one.names, kind=one.kind)
        return {f"classification/{name}": value for name, value in result.items()}

    def full(self, found: Embedded) -> dict[str, Any]:
        if (model := _with_head(found)) is None:
            return {}
        one = self._remembered(model)
        result = class_scores.scored(
            one.labels, one.logits, one.names, one.patients, kind=one.kind, draws=self.settings.draws
        )
        rows = {
            name: {"auroc": value, "auroc_low": low, "auroc_high": high}
            for name, value, (low, high) in class_scores.class_rows(result)
        }
        return {"protocol": PROTOCOL, "kind": one.kind, "volumes": len(one.logits)} | result | {"by_class": rows}

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return class_scores.flat(result, _protocol_of(result["kind"])) if result else {}

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        if (model := _with_head(found)) is None:
            return {}
        one = self._remembered(model)
        kind = np.array(one.kind, str)
        return {"ids": one.ids, "patients": one.patients, "labels": one.labels, "logits": one.logits, "kind": kind}

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        if "logits" not in arrays:
            return {}
        kind, weights = str(arrays["kind"]), draws.weights(arrays["patients"])
        found = class_scores.resampled(arrays["labels"], arrays["logits"], weights, kind=kind)
        return {f"{_protocol_of(kind)}/{name}": values for name, values in found.items()}

    def section(self, result: Mapping[str, Any]) -> Section:
        rows, ends = _rows(result)
        table = Table(
            ("", "value", "95 % interval", "0 to 1"),
            rows,
            numbers=(1,),
            classes=["total" if row[0] in class_scores.MEANINGS.values() else "" for row in rows],
            intervals=ends,
            more=class_scores.left_out_text(result),
        )
        headline = [("AUROC of the trained head", f"{result['auroc_macro']:.3f}")]
        return Section("Classification head", result["protocol"], table, headline=headline)

    def _remembered(self, model: Model) -> _Scored:
        """Of the same parameters once: the document, its arrays and its page ask one after another."""
        if self._last is None or self._last[0] is not model.params:
            self._last = (model.params, self._scores(model))
        return self._last[1]

    def _scores(self, model: Model, **bad_records: Any) -> _Scored:
        embedder, data = model.embedder, model.data
        if self._compiled is None or self._compiled[0] is not embedder:
            self._compiled = (embedder, embedder.compiled(_logits_of(embedder)))
        with model.progress("classify", len(data)) as progress:
            rows = list(embedder.walk(self._compiled[1], model.params, data, progress=progress, **bad_records))
        whole = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        about = [data.text(index) for index in whole["record_index"]]
        return _Scored(
            whole["labels"],
            whole["logits"].astype(np.float64),
            np.array([text.name for text in about], str),
            np.array([text.patient for text in about], str),
            tuple(data.label_names),
            embedder.config.tasks["classification"].kind,
        )


def _with_head(found: Embedded) -> Model | None:
    """The model, where it has a head for the labels of the data."""
    model = found.model
    if model is None or HEAD not in model.params:
        return None
    trained, here = model.embedder.config.tasks["classification"].num_labels, len(model.data.label_names)
    if trained != here:
        logger.warning("classification: left out, the head has %d labels and the data %d", trained, here)
        return None
    return model


def _logits_of(embedder: Embedder) -> Any:
    """`(params, batch) -> {"logits": [rows, L], ...}`, with what else the batch has passed through."""
    import jax.numpy as jnp  # where results are only shown there may be no JAX

    from mg3d_jax.training import inputs

    def logits(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        inside = {"volume": inputs.window(batch["volume"], embedder.config.data.windows)}
        pooled = embedder.setup.model.apply({"params": params}, inside, ("volume_pooled",), method="compute")
        head = params[HEAD]
        found = pooled["volume_pooled"].astype(jnp.float32) @ head["kernel"] + head["bias"]
        return {"logits": found} | {name: array for name, array in batch.items() if name != "volume"}

    return logits


def _protocol_of(kind: str) -> str:
    return f"classification/head=trained/labels={kind}"


def _rows(result: Mapping[str, Any]) -> tuple[list[Sequence[str]], list[tuple[float, float, float]]]:
    """Rows of the table and their drawn intervals; a number without an interval is a line."""
    rows: list[Sequence[str]] = []
    ends: list[tuple[float, float, float]] = []
    for name, text in class_scores.MEANINGS.items():
        if name in result:
            low, high = result.get(f"{name}_95", [result[name]] * 2)
            rows.append((text, f"{result[name]:.3f}", f"{low:.3f} to {high:.3f}" if f"{name}_95" in result else ""))
            ends.append((result[name], low, high))
    for name, value, (low, high) in class_scores.class_rows(result):
        rows.append((name, f"{value:.3f}", f"{low:.3f} to {high:.3f}"))
        ends.append((value, low, high))
    return rows, ends
