"""Retrieval of volumes by a volume: are its neighbours alike in their findings?

Two measures are in use under one name. SPECTRE takes the mean average precision over volumes with exactly the same labels,
the query left out. CT-CLIP's "MAP" is a mean Jaccard index of the labels, and its public script leaves the query in the
gallery and never empties its list of results between the values of k; the figure is given here as that script computes it,
as `legacy_ct_clip_map`, because published numbers are of that kind. The two are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, weighted_mean
from mg3d_jax.evaluation.ranking import neighbours
from mg3d_jax.html import Section, Table, number
from mg3d_jax.options import key

KS = (1, 5, 10, 50)
MEASURES = {
    "map": "mean average precision over volumes with the same labels, the query left out (SPECTRE's definition)",
    "map_other_patients": "the same, with every volume of the query's patient left out",
    "jaccard": "mean Jaccard index of the labels, the query left out",
    "legacy_ct_clip_map": "what CT-CLIP's script calls MAP: mean Jaccard index with the query in the gallery, averaged over "
    "all k up to this one",
}
PROTOCOL = (
    "volume to volume by cosine; for average precision a tie counts against; volumes with an unknown label are left out"
)


@dataclass(frozen=True)
class VolumeRetrievalOptions(EvaluationOptions):
    """When it is measured."""

    every: int = key(0, "steps between measurements in training; 0: training.evaluate_every, -1: never", neutral=-1)


class VolumeRetrieval(Evaluation):
    """Mean average precision and mean Jaccard index at k among the neighbours of a volume."""

    options = VolumeRetrievalOptions
    needs = ("volumes",)

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`volume_to_volume/map@K` and `volume_to_volume/jaccard@K`."""
        kept = _known(found)
        values = _average_precision(found.volumes[kept], found.labels[kept], np.arange(len(kept)))
        jaccard = _jaccard(found.volumes[kept], found.labels[kept])
        return {
            f"volume_to_volume/{name}@{k}": _mean(of[:, column])
            for name, of in (("map", values), ("jaccard", jaccard))
            for column, k in enumerate(KS)
        }

    def full(self, found: Embedded) -> dict[str, Any]:
        measured, patients = self._measure(found), found.patients[_known(found)]
        result: dict[str, Any] = {"protocol": PROTOCOL, "volumes": len(patients)}
        result["volumes_with_unknown_labels"] = len(found.volumes) - len(patients)
        for name, values in measured.items():
            result[f"{name}/queries"] = int((~np.isnan(values[:, 0])).sum())
            for column, k in enumerate(KS):
                result[f"{name}@{k}"] = _mean(values[:, column])
        if len(patients):
            draws = PatientDraws(patients)
            drawn = {name: _drawn(values, patients, draws) for name, values in measured.items()}
            result |= {f"{name}@{k}_95": interval(of[:, i]) for name, of in drawn.items() for i, k in enumerate(KS)}
        return result

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return {_flat_key(name): value for name, value in result.items() if "@" in name}

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        kept = _known(found)
        about = {"ids": found.volume_ids, "patients": found.patients, "labels": found.labels}
        return {name: array[kept] for name, array in about.items()} | self._measure(found)

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name in MEASURES:
            values = _drawn(arrays[name], arrays["patients"], draws)
            found |= {_flat_key(f"{name}@{k}"): values[:, column] for column, k in enumerate(KS)}
        return found

    def section(self, result: Mapping[str, Any]) -> Section:
        rows = [
            (name, *(number(result[f"{name}@{k}"]) for k in KS), str(result[f"{name}/queries"])) for name in MEASURES
        ]
        head = ("measure", *(f"at {k}" for k in KS), "queries")
        more = " ".join(f"{name}: {words}." for name, words in MEASURES.items())
        if unknown := result["volumes_with_unknown_labels"]:
            more += f" Left out: {unknown} volumes with unknown labels."
        table = Table(head, rows, numbers=range(1, len(head)), more=more)
        return Section("Volume to volume", result.get("protocol", ""), table)

    @staticmethod
    def _measure(found: Embedded) -> dict[str, np.ndarray]:
        """Every measure of every volume with known labels, `[n, len(KS)]`; NaN where it is undefined for a volume."""
        kept = _known(found)
        volumes, labels, patients = found.volumes[kept], found.labels[kept], found.patients[kept]
        return {
            "map": _average_precision(volumes, labels, np.arange(len(kept))),
            "map_other_patients": _average_precision(volumes, labels, patients),
            "jaccard": _jaccard(volumes, labels),
            "legacy_ct_clip_map": _legacy(volumes, labels),
        }


def _known(found: Embedded) -> np.ndarray:
    """Rows of the volumes whose labels are all known."""
    return np.flatnonzero((found.labels >= 0).all(axis=1) & (found.labels.shape[1] > 0))


def _average_precision(volumes: np.ndarray, labels: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Average precision at each k, `[n, len(KS)]`: the precision at the rank of every correct neighbour within k, summed and
    divided by the smaller of k and the number of correct ones. NaN for volumes without any.

    Args:
        excluded: `[n]`: what shares a value with the query is neither found nor counted.
    """
    groups = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    excluded = np.unique(excluded, return_inverse=True)[1]
    near = neighbours(volumes, max(KS), candidates=np.arange(len(volumes)), excluded=excluded, groups=groups)
    hit = (near >= 0) & (groups[near] == groups[:, None])
    precision = np.cumsum(hit, axis=1) / np.arange(1, max(KS) + 1)
    both = np.unique(np.stack([groups, excluded]), axis=1, return_inverse=True)[1].ravel()
    correct = np.bincount(groups)[groups] - np.bincount(both)[both]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([(precision * hit)[:, :k].sum(axis=1) / np.minimum(correct, k) for k in KS], axis=1)


def _jaccard(volumes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean Jaccard index of the query's labels and those of its k neighbours, `[n, len(KS)]`; NaN for a query without any
    finding, of which the index says nothing."""
    everyone = np.arange(len(volumes))
    near = neighbours(volumes, max(KS), candidates=everyone, excluded=everyone)
    found = _mean_overlap(labels, near)
    found[labels.sum(axis=1) == 0] = np.nan
    return found


def _legacy(volumes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As CT-CLIP's volume_to_volume.py: only volumes with a finding are in the gallery, the query among them; of ties the
    first counts; what is given at one k is the mean over all queries of this k and of those before it."""
    gallery = np.flatnonzero(labels.sum(axis=1) > 0)
    near = neighbours(volumes, max(KS), candidates=gallery, excluded=None)
    return np.cumsum(_mean_overlap(labels, near), axis=1) / np.arange(1, len(KS) + 1)


def _mean_overlap(labels: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Mean Jaccard index at each k, `[n, len(KS)]`; NaN without a neighbour. 0 of two volumes without findings."""
    present, overlap = labels == 1, np.full(near.shape, np.nan)
    for column in range(near.shape[1]):  # not all at once: [n, 50, L] is large
        rows = np.flatnonzero(near[:, column] >= 0)
        other = present[near[rows, column]]
        either = (present[rows] | other).sum(axis=1)
        overlap[rows, column] = (present[rows] & other).sum(axis=1) / np.maximum(either, 1)
    count = np.cumsum(~np.isnan(overlap), axis=1)
    total = np.cumsum(np.nan_to_num(overlap), axis=1)
    with np.errstate(invalid="ignore"):
        return np.stack([total[:, k - 1] / count[:, k - 1] for k in KS], axis=1)


def _drawn(values: np.ndarray, patients: np.ndarray, draws: PatientDraws) -> np.ndarray:
    """The mean over the volumes of which it is defined, in every draw of patients: `[1 + draws, len(KS)]`."""
    defined = ~np.isnan(values[:, 0])
    return weighted_mean(values[defined], draws.weights(patients[defined]))


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else float("nan")


def _flat_key(name: str) -> str:
    return f"volume_retrieval/{name}"
