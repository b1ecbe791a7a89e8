"""What an evaluation declares, what it is given, and how its result is shown.

`mg3d evaluate` and the evaluation during training embed a prepared data set once and hand it to every evaluation of
`registry.EVALUATIONS`. Nothing here imports JAX: the page of a run shows results without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.html import Section
from mg3d_jax.registry import EVALUATIONS

if TYPE_CHECKING:
    from mg3d_jax.data.pipeline import PreparedData
    from mg3d_jax.evaluation.embed import Embedder

NEEDS = ("volumes", "reports", "model")
Text = Sequence[str]  # its sentences


@dataclass(frozen=True)
class Embedded:
    """A prepared data set as a model sees it. Embeddings are float32 `[., k]` and l2-normalised.

    What no evaluation of the call needs has length 0 (`volumes` with all that is known of them, `reports`) or is None
    (`model`).
    """

    volumes: np.ndarray  # [n, k], in the order of the records
    labels: np.ndarray  # int8 [n, L]: 1 present, 0 absent, -1 unknown
    label_names: tuple[str, ...]  # L
    patient_id: np.ndarray  # [n]
    report_id: np.ndarray  # [n]
    reports: np.ndarray  # [m, k], every distinct report once
    report_ids: np.ndarray  # [m]
    texts: np.ndarray  # [t, k], those that the evaluation asked for
    logit_scale: float  # 1 / temperature
    model: Model | None = None


@dataclass(frozen=True)
class Model:
    """For an evaluation that needs more than embeddings: `embedder.setup` has the modules and the mesh of `params`."""

    embedder: Embedder
    params: Any
    data: PreparedData


class Evaluation:
    """One evaluation. Its results stand under the name with which it is registered.

    `needs`: which of `NEEDS` it reads. "volumes" are the embeddings of all records with their labels, patients and report
    ids; "reports" adds those of every distinct report; "model" the model itself.
    """

    needs: tuple[str, ...] = ("volumes",)

    def texts(self, label_names: Sequence[str]) -> Sequence[Text]:
        """Further texts to embed, e.g. prompts: `Embedded.texts` has one row for each."""
        return ()

    def metrics(self, found: Embedded) -> dict[str, float]:
        """What a training run logs: few numbers, quickly. They are named `evaluation/KEY` there, beside those of others."""
        return {}

    def full(self, found: Embedded) -> dict[str, Any]:
        """What `evaluation.json` says: JSON, with the protocol of its numbers under `protocol`."""
        raise NotImplementedError

    def section(self, result: Mapping[str, Any]) -> Section:
        """How a result of `full`, read from a file, is shown."""
        raise NotImplementedError


def chosen(names: Iterable[str] | None = None) -> dict[str, Evaluation]:
    """The evaluations of these names, or all that are registered. `UserError` for a name that is not."""
    return {name: EVALUATIONS[name] for name in (EVALUATIONS if names is None else names)}


def sections(document: Mapping[str, Any]) -> dict[str, Section]:
    """How the results in a document of `evaluation.json` are shown. Results whose evaluation is not known here are left out."""
    found = {name: one for name, one in EVALUATIONS.items() if document.get(name)}
    return {name: one.section(document[name]) for name, one in found.items()}


def merge_metrics(by_evaluation: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several evaluations as one. `UserError` where two of them use one name."""
    merged: dict[str, float] = {}
    for name, metrics in by_evaluation.items():
        if twice := sorted(merged.keys() & metrics.keys()):
            raise UserError(
                f"the evaluation {name!r} names a metric as another one does: {', '.join(twice)}; rename it"
            )
        merged |= metrics
    return merged
