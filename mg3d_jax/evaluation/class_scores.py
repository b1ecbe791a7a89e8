"""Metrics of scores that somebody learned from labels: the head of a run, a probe. Several findings, or one class of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mg3d_jax.evaluation import classification_metrics as metrics
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, ratio, weighted_mean, weighted_sum
from mg3d_jax.evaluation.probes.linear import class_of

MULTI_CLASS = "multi_class"
HALF = 0.5
# What is said of every kind, by the name of its number.
MEANINGS = {
    "auroc_macro": "AUROC, macro mean",
    "auprc_macro": "average precision, macro mean",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1 at probability 1/2, macro mean",
    "balanced_accuracy_macro": "balanced accuracy at probability 1/2, macro mean",
    "brier_macro": "Brier score, macro mean",
    "calibration_error_macro": "expected calibration error, macro mean",
}


def probabilities(logits: np.ndarray, kind: str) -> np.ndarray:
    """`[n, L]`: a sigmoid for each, or with "multi_class" a softmax over them."""
    from scipy.special import expit, softmax

    return softmax(logits, axis=1) if kind == MULTI_CLASS else expit(logits)


def judged_labels(labels: np.ndarray, kind: str) -> np.ndarray:
    """The labels that scores are compared with: with "multi_class" the volume's class against the rest, -1 where a volume
    has no single present label."""
    if kind != MULTI_CLASS:
        return labels
    classes = class_of(labels)
    one_hot = (classes[:, None] == np.arange(labels.shape[1])).astype(np.int8)
    return np.where(classes[:, None] >= 0, one_hot, np.int8(-1))


def quick(
    labels: np.ndarray, logits: np.ndarray, names: Sequence[str], *, kind: str, left_out: Sequence[int] = ()
) -> dict[str, float]:
    """`auroc_macro` and `auroc/CLASS`, with "multi_class" `accuracy` too; no intervals. What is undefined is left out."""
    labels = judged_labels(labels, kind)
    scores = probabilities(logits, kind) if kind == MULTI_CLASS else logits
    found = {name: metrics.auroc(labels[:, i], scores[:, i]) for i, name in enumerate(names) if i not in left_out}
    found = {name: value for name, value in found.items() if not np.isnan(value)}
    result = {"auroc_macro": float(np.mean(list(found.values())))} if found else {}
    if kind == MULTI_CLASS and (known := labels[:, 0] >= 0).any():
        result["accuracy"] = float(_right(labels[known], logits[known]).mean())
    return result | {f"auroc/{name}": value for name, value in found.items()}


def scored(
    labels: np.ndarray,
    logits: np.ndarray,
    names: Sequence[str],
    patients: np.ndarray,
    *,
    kind: str,
    draws: int,
    left_out: Sequence[int] = (),
) -> dict[str, Any]:
    """The numbers of `MEANINGS` that belong to the kind, and `auroc/CLASS`; AUROC and accuracies with `..._95`.

    Args:
        labels: `[n, L]`. logits: `[n, L]`. patients: `[n]`, resampled for the intervals.
        left_out: columns that were not learned.

    Classes without both outcomes among the evaluated volumes are in no mean; `classes_without_both_outcomes` names them,
    and `classes_not_learned` those of `left_out`.
    """
    weights = PatientDraws(patients, draws).weights(patients)
    by_class, usable, drawn = _drawn(labels, logits, kind, weights, left_out)
    result: dict[str, Any] = {}
    for name, values in drawn.items():
        result |= {name: float(values[0]), f"{name}_95": interval(values)}
    result |= _at_half(judged_labels(labels, kind)[:, usable], probabilities(logits, kind)[:, usable], kind)
    for place, column in enumerate(usable):
        values = by_class[place]
        result |= {f"auroc/{names[column]}": float(values[0]), f"auroc/{names[column]}_95": interval(values)}
    missing = [name for i, name in enumerate(names) if i not in usable and i not in left_out]
    return result | {
        "classes_without_both_outcomes": missing,
        "classes_not_learned": [names[i] for i in left_out],
    }


def resampled(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray, *, kind: str, left_out: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """The numbers of `scored` that have an interval, `[D]` for `weights [D, n]`; not those of single classes."""
    return _drawn(labels, logits, kind, weights, left_out)[2]


def _drawn(
    labels: np.ndarray, logits: np.ndarray, kind: str, weights: np.ndarray, left_out: Sequence[int]
) -> tuple[np.ndarray, list[int], dict[str, np.ndarray]]:
    """AUROC of the usable classes `[classes, D]`, their columns, and the numbers over all of them `[D]`."""
    labels = judged_labels(labels, kind)
    scores = probabilities(logits, kind) if kind == MULTI_CLASS else logits
    both = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    usable = [i for i in range(labels.shape[1]) if both[i] and i not in left_out]
    by_class = np.array([metrics.auroc(labels[:, i], scores[:, i], weights) for i in usable])
    by_class = by_class.reshape(len(usable), len(weights))
    drawn = {"auroc_macro": metrics.macro(by_class)}
    if kind == MULTI_CLASS:
        known = labels[:, 0] >= 0
        truth, mine = (labels[known] == 1)[:, usable], weights[:, known]
        right = _right(labels[known], logits[known])
        drawn["accuracy"] = weighted_mean(right, mine)
        found, there = weighted_sum(right[:, None] * truth, mine), weighted_sum(truth, mine)
        drawn["balanced_accuracy"] = metrics.macro(ratio(found, there).T)
    return by_class, usable, drawn


def _right(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Is the most likely class the one that is present?"""
    return (logits.argmax(axis=1) == labels.argmax(axis=1)).astype(np.float64)


def _at_half(labels: np.ndarray, likely: np.ndarray, kind: str) -> dict[str, float]:
    """What needs no interval here: means over the usable classes."""
    columns = range(labels.shape[1])

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else float("nan")

    result = {"auprc_macro": mean([metrics.average_precision(labels[:, i], likely[:, i]) for i in columns])}
    if kind == MULTI_CLASS:
        return result
    counts = [metrics.counts(labels[:, i], likely[:, i], HALF) for i in columns]
    return result | {
        "f1_macro": mean([float(one.f1[0]) for one in counts]),
        "balanced_accuracy_macro": mean([float(one.balanced_accuracy[0]) for one in counts]),
        "brier_macro": mean([metrics.brier(labels[:, i], likely[:, i]) for i in columns]),
        "calibration_error_macro": mean([metrics.calibration_error(labels[:, i], likely[:, i]) for i in columns]),
    }


def flat(result: Mapping[str, Any], protocol: str) -> dict[str, float | list[float]]:
    """The numbers of `scored` under `protocol/NAME`."""
    kept = (*MEANINGS, *(f"{name}_95" for name in MEANINGS))
    return {f"{protocol}/{key}": value for key, value in result.items() if key in kept or key.startswith("auroc/")}


def class_rows(result: Mapping[str, Any]) -> list[tuple[str, float, list[float]]]:
    """Name, AUROC and interval of every class, the highest first."""
    names = [key.removeprefix("auroc/") for key in result if key.startswith("auroc/") and not key.endswith("_95")]
    rows = [(name, result[f"auroc/{name}"], result[f"auroc/{name}_95"]) for name in names]
    return sorted(rows, key=lambda row: -row[1])


def left_out_text(result: Mapping[str, Any]) -> str:
    """Which classes are in no number, and why; "" where all are."""
    texts = {
        "classes_without_both_outcomes": "all present or all absent among the evaluated volumes",
        "classes_not_learned": "of one outcome only among the training volumes",
    }
    found = [f"{why}: {', '.join(result[key])}" for key, why in texts.items() if result.get(key)]
    return f"Left out, {'; '.join(found)}." if found else ""
