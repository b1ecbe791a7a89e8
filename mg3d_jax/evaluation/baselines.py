"""What a zero-shot AUROC is read against: the same labels scored without the image, and the same embeddings without prompts."""

from __future__ import annotations

import numpy as np

from mg3d_jax.evaluation.probes import linear_probe

FOLDS = 5


def severity(labels: np.ndarray) -> np.ndarray:
    """How many OTHER findings are known to be present, `[n, L]` for labels `[n, L]` in {1, 0, -1 unknown}.

    As a score it knows nothing of the finding itself: it says how ill the patient is. A copy of a finding's labels under
    another name is the finding itself and does not count: mappings of Rad-ChestCT have one calcification for two findings.
    """
    present = labels == 1
    copies = (
        np.unique(labels, axis=1, return_inverse=True)[1].reshape(-1) if labels.size else np.arange(labels.shape[1])
    )
    own = present.astype(np.int64) @ (copies[:, None] == copies[None, :])
    return present.sum(axis=1, keepdims=True) - own


def cross_validated_probe(volumes: np.ndarray, labels: np.ndarray, patients: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scores `[n, L]` of linear probes, each volume by one that saw no volume of its patient; NaN where there are fewer than
    `3 * FOLDS` patients, or for a class of which a fold's other patients show one outcome only.

    Args:
        volumes: `[n, k]`. labels: `[n, L]`. patients: `[n]`.
    """
    distinct, of = np.unique(patients, return_inverse=True)
    found = np.full(labels.shape, np.nan)
    if len(distinct) < 3 * FOLDS:
        return found
    fold = (np.random.default_rng(seed).permutation(len(distinct)) % FOLDS)[of]
    for held in range(FOLDS):
        others = fold != held
        found[~others] = probe(volumes[others], labels[others], patients[others], volumes[~others], seed)
    return np.where(np.isnan(found).any(axis=0), np.nan, found)


def probe(
    volumes: np.ndarray, labels: np.ndarray, patients: np.ndarray, evaluated: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Scores `[n, L]` of `evaluated [n, k]` by a linear probe on `volumes [m, k]` with `labels [m, L]`; NaN for classes
    without both outcomes among them.

    Without the intercept of the probe: the prevalence among the other patients must not order the folds.
    """
    volumes, evaluated = np.nan_to_num(volumes), np.nan_to_num(evaluated)
    fitted = linear_probe(volumes, labels, patients, evaluated, seed=seed)
    scores = (evaluated - volumes.mean(axis=0, dtype=np.float64)) @ fitted.weight
    scores[:, list(fitted.not_learned)] = np.nan
    return scores
