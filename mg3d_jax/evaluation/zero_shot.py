"""Zero-shot classification with CT-CLIP's protocol: a positive and a negative prompt per abnormality.

The probability is the softmax over the two prompts' similarities to the volume; AUROC is taken per class over volumes with
a known label. Source of prompts and protocol: CT-CLIP's public evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from mg3d_jax.data.abnormalities import prompt_pair

PROTOCOL = (
    "zero-shot, prompts '{pathology} is present.' / '{pathology} is not present.', softmax over the two, per volume"
)


def prompts(labels: Sequence[str]) -> list[list[str]]:
    """Positive prompts of all labels, then the negative ones, each a text of one sentence."""
    present, absent = zip(*map(prompt_pair, labels), strict=True)
    return [[prompt] for prompt in (*present, *absent)]


def probabilities(volumes: np.ndarray, prompt_embeddings: np.ndarray, logit_scale: float) -> np.ndarray:
    """P(present) `[n, L]` from normalised embeddings: volumes `[n, k]`, prompts `[2L, k]` ordered as by `prompts`."""
    positive, negative = np.split(volumes @ prompt_embeddings.T, 2, axis=1)
    return 1.0 / (1.0 + np.exp(-logit_scale * (positive - negative)))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUROC over rows whose label is 0 or 1; NaN when one of the two is absent."""
    known = labels >= 0
    present, ranks = labels[known] == 1, rankdata(scores[known])
    positives, negatives = int(present.sum()), int((~present).sum())
    if not positives or not negatives:
        return float("nan")
    # The rank-sum form: thousands of bootstrap draws make the sorting of a library call per draw too slow.
    return float((ranks[present].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def evaluate(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], groups: np.ndarray, *, draws: int = 500, seed: int = 0
) -> dict[str, float | list[float]]:
    """`auroc/<class>` and `auroc_macro`, each with a 95 % interval from resampling patients (`groups [n]`).

    Classes without both outcomes are left out of the macro mean and listed under `classes_without_both_outcomes`.
    """
    value = {name: auroc(labels[:, i], scores[:, i]) for i, name in enumerate(names)}
    usable = [name for name in names if not np.isnan(value[name])]
    columns = [list(names).index(name) for name in usable]
    rng, members = np.random.default_rng(seed), _members(groups)
    samples = np.full((draws, len(columns)), np.nan)
    for draw in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        samples[draw] = [auroc(labels[rows, c], scores[rows, c]) for c in columns]
    result: dict = {"auroc_macro": float(np.mean([value[n] for n in usable])) if usable else float("nan")}
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
