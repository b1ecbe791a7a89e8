"""From embeddings to scores, and from scores to decisions: what zero-shot protocols do, each by its name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.classification_metrics import counts

SCORINGS: dict[str, str] = {
    "softmax": "softmax over the two prompts' similarities times exp(temperature), as CT-CLIP",
    "difference": "similarity to the positive minus similarity to the negative prompt",
    "positive": "similarity to the positive prompt alone",
}
TUNED = "closest_to_corner_tuned_on_the_evaluated_labels"
THRESHOLDS: dict[str, str] = {
    "half": "probability 0.5, where both prompts are equally similar",
    "train_youden": "the largest sensitivity + specificity on training volumes",
    "train_f1": "the largest F1 on training volumes",
    TUNED: "closest to the corner of the ROC curve among 100 thresholds, tuned on the evaluated labels, as CT-CLIP",
}
STEPS = 100


def similarities(volumes: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Cosines `[2, n, L]` of normalised volumes `[n, k]` and prompts `[2, L, k]`, present before absent. In float64: near
    certainty float32 would make ties, which change an AUROC."""
    return np.einsum("nk,slk->snl", volumes.astype(np.float64), prompts.astype(np.float64), optimize=True)


def score(name: str, similarity: np.ndarray, logit_scale: float) -> np.ndarray:
    """Scores `[n, L]` from `similarities [2, n, L]`, by one of `SCORINGS`.

    Args:
        logit_scale: 1 / temperature; where a model keeps its logarithm, the exponential of that.
    """
    from scipy.special import expit  # slow import: the page of a run shows results without it

    present, absent = similarity
    if name == "positive":
        return present
    return expit(logit_scale * (present - absent)) if name == "softmax" else present - absent


def probabilities(volumes: np.ndarray, prompts: np.ndarray, logit_scale: float) -> np.ndarray:
    """P(present) `[n, L]` by CT-CLIP's formula, from normalised volumes `[n, k]` and prompts `[2, L, k]`."""
    return score("softmax", similarities(volumes, prompts), logit_scale)


def thresholds(
    name: str, scoring: str, labels: np.ndarray, scores: np.ndarray, train: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """The threshold of every class `[L]`; NaN where the labels that it is taken from lack an outcome.

    Args:
        name: one of `THRESHOLDS`. labels, scores: of the evaluated volumes, `[n, L]`.
        train: labels and scores `[m, L]` of training volumes; None where there are none.

    Raises:
        UserError: the rule needs training volumes and there are none.
    """
    count = scores.shape[1]
    if name == "half":
        return np.full(count, 0.5 if scoring == "softmax" else 0.0)
    if name == TUNED:
        return np.array([_each(_closest_to_corner, labels[:, c], scores[:, c], scoring) for c in range(count)])
    if train is None:
        raise UserError(
            f"thresholds = {name!r} are taken from training volumes and none are given: name a prepared folder with "
            "--train-data, or a file with --train-embeddings and --train-labels; or choose thresholds = 'half'"
        )
    rule = _best_f1 if name == "train_f1" else _youden
    return np.array([_each(rule, train[0][:, c], train[1][:, c], scoring) for c in range(count)])


Rule = Callable[[np.ndarray, np.ndarray, str], float]


def _each(rule: Rule, labels: np.ndarray, scores: np.ndarray, scoring: str) -> float:
    known = (labels >= 0) & ~np.isnan(scores)
    labels, scores = labels[known], scores[known]
    return rule(labels, scores, scoring) if len(np.unique(labels)) == 2 else float("nan")


def _closest_to_corner(labels: np.ndarray, scores: np.ndarray, scoring: str) -> float:
    lowest, highest = (0.0, 1.0) if scoring == "softmax" else (float(scores.min()), float(scores.max()))
    best, found = np.inf, float("nan")
    for threshold in np.linspace(lowest, highest, STEPS):
        above = float(np.nextafter(threshold, np.inf))  # there a score has to be larger, here to reach it
        one = counts(labels, scores, above)
        distance = np.hypot(1 - one.sensitivity[0], 1 - one.specificity[0])
        if distance <= best:  # of equals the last one
            best, found = distance, above
    return found


def _cuts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every score as a threshold, ascending, with the present and the absent that reach it."""
    cuts = np.unique(scores)
    present, absent = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    return cuts, len(present) - np.searchsorted(present, cuts), len(absent) - np.searchsorted(absent, cuts)


def _between(cuts: np.ndarray, best: int) -> float:
    """Halfway to the next lower score: the threshold is for volumes that were not seen."""
    return float(cuts[best] if best == 0 else (cuts[best - 1] + cuts[best]) / 2)


def _youden(labels: np.ndarray, scores: np.ndarray, scoring: str) -> float:
    cuts, present, absent = _cuts(labels, scores)
    return _between(cuts, int(np.argmax(present / present[0] - absent / absent[0])))


def _best_f1(labels: np.ndarray, scores: np.ndarray, scoring: str) -> float:
    cuts, present, absent = _cuts(labels, scores)
    return _between(cuts, int(np.argmax(2 * present / (present[0] + present + absent))))
