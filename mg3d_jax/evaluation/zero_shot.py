"""Zero-shot classification with CT-CLIP's protocol: a positive and a negative prompt per abnormality.

The probability is the softmax over the two prompts' similarities to the volume; AUROC is taken per class over volumes with
a known label. Source of prompts and protocol: CT-CLIP's public evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from mg3d_jax.data.abnormalities import prompt_pair

PROTOCOL = (
    "zero-shot, prompts '{pathology} is present.' / '{pathology} is not present.', softmax over the two, per volume"
)


def prompts(labels: Sequence[str]) -> list[list[str]]:
    """Positive prompts of all labels, then the negative ones, each a text of one sentence."""
    pairs = list(map(prompt_pair, labels))
    return [[pair[side]] for side in (0, 1) for pair in pairs]


def probabilities(volumes: np.ndarray, prompt_embeddings: np.ndarray, logit_scale: float) -> np.ndarray:
    """P(present) `[n, L]` from normalised embeddings: volumes `[n, k]`, prompts `[2L, k]` ordered as by `prompts`.

    In float64: near 1 float32 would make ties, which change an AUROC.
    """
    positive, negative = np.split(volumes.astype(np.float64) @ prompt_embeddings.T.astype(np.float64), 2, axis=1)
    return expit(logit_scale * (positive - negative))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUROC over rows whose label is 0 or 1; NaN when one of the two is absent. A score that is NaN counts as wrong."""
    known = labels >= 0
    present, values = labels[known] == 1, scores[known]
    ranks = rankdata(np.where(np.isnan(values), np.where(present, -np.inf, np.inf), values))
    positives, negatives = int(present.sum()), int((~present).sum())
    if not positives or not negatives:
        return float("nan")
    # The rank-sum form: thousands of bootstrap draws make the sorting of a library call per draw too slow.
    return float((ranks[present].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_by_class(labels: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """AUROC of every class, labels and scores `[n, L]`; classes without both outcomes are left out."""
    value = {name: auroc(labels[:, i], scores[:, i]) for i, name in enumerate(names)}
    return {name: area for name, area in value.items() if not np.isnan(area)}


def macro_mean(by_class: Mapping[str, float]) -> float:
    """Mean over the classes; NaN where there is none."""
    return float(np.mean(list(by_class.values()))) if by_class else float("nan")


def evaluate(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], groups: np.ndarray, *, draws: int = 500, seed: int = 0
) -> dict[str, float | list[float]]:
    """`auroc/<class>` and `auroc_macro`, each with a 95 % interval from resampling patients (`groups [n]`).

    Classes without both outcomes are left out of the macro mean and listed under `classes_without_both_outcomes`.
    """
    value = auroc_by_class(labels, scores, names)
    usable = list(value)
    columns = [list(names).index(name) for name in usable]
    rng, members = np.random.default_rng(seed), _members(groups)
    samples = np.full((draws, len(columns)), np.nan)
    for draw in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        samples[draw] = [auroc(labels[rows, c], scores[rows, c]) for c in columns]
    result: dict = {"auroc_macro": macro_mean(value)}
    result["auroc_macro_95"] = _interval(np.nanmean(samples, axis=1)) if usable else [float("nan")] * 2
    for position, name in enumerate(usable):
        result[f"auroc/{name}"] = value[name]
        result[f"auroc/{name}_95"] = _interval(samples[:, position])
    result["classes_without_both_outcomes"] = [name for name in names if name not in usable]
    return result


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Row numbers of every group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _interval(samples: np.ndarray) -> list[float]:
    return [float(x) for x in np.nanpercentile(samples, [2.5, 97.5])]
