"""Texts that written reports are read against: they know nothing of the scan, or its findings alone.

A report that returns in the training data costs nothing, and templates filled with what a classifier found have won
challenges: a model that writes is worth something where it is above them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mg3d_jax.data.abnormalities import prompt_pair
from mg3d_jax.evaluation import baselines, scoring
from mg3d_jax.evaluation.base import Text

if TYPE_CHECKING:
    from mg3d_jax.data.pipeline import PreparedData


def most_frequent(data: PreparedData) -> Text:
    """The report that most records of `data` have; of equally frequent ones that whose sentences are the most frequent."""
    reports = Counter(tuple(data.text(row).sentences) for row in range(len(data)))
    sentences: Counter[str] = Counter()
    for report, count in reports.items():
        sentences.update(dict.fromkeys(set(report), count))

    def usual(report: Text) -> float:
        return float(np.mean([sentences[one] for one in report])) if report else 0.0

    most = max(reports.values())
    return max((one for one, count in reports.items() if count == most), key=lambda one: (usual(one), one))


def template(present: np.ndarray, label_names: Sequence[str]) -> Text:
    """A text made from the label set alone: each label by a sentence that it is there, or not.

    Args:
        present: bool `[L]`.
    """
    pairs = [prompt_pair(name) for name in label_names]
    return tuple(there if flag else absent for (there, absent), flag in zip(pairs, present, strict=True))


def probed(
    train: np.ndarray, labels: np.ndarray, patients: np.ndarray, evaluated: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Findings bool `[n, L]` by linear probes, each at the threshold of the largest F1 on training volumes that its probe
    did not see; a class that the training volumes show one outcome of is absent.

    Args:
        train: `[m, d]` features, with labels `[m, L]` and patients `[m]`. evaluated: `[n, d]`.
    """
    held_out = baselines.cross_validated_probe(train, labels, patients, seed)
    thresholds = scoring.thresholds("train_f1", "difference", labels, held_out, (labels, held_out))
    scores = baselines.probe(train, labels, patients, evaluated, seed)
    return np.nan_to_num(scores, nan=-np.inf) >= np.nan_to_num(thresholds, nan=np.inf)
