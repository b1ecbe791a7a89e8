"""Do written reports say what is there? Findings that a labeller reads in a text against the known ones.

A labeller is looked up by name (`registry.LABELLERS`); one of your own is a function of label names that returns a function
of reports, registered in a module that `plugins` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.evaluation.base import Text
from mg3d_jax.evaluation.bootstrap import ratio, weighted_sum
from mg3d_jax.language.labels import RuleLabeller

# Reports -> int8 [n, L]: 1 stated as present, 0 stated as absent, -1 not spoken of.
Labeller = Callable[[Sequence[Text]], np.ndarray]
LabellerOf = Callable[[Sequence[str]], Labeller]  # of label names

MEANINGS: dict[str, str] = {
    "precision_micro": "precision of findings",
    "recall_micro": "recall of findings",
    "f1_micro": "F1 of findings",
    "f1_macro": "F1, mean of classes",
}


def rules(label_names: Sequence[str]) -> Labeller:
    """The rules of `language.labels`."""
    labeller = RuleLabeller(label_names)
    codes = {True: 1, False: 0, None: UNKNOWN_LABEL}

    def label(reports: Sequence[Text]) -> np.ndarray:
        found = [[codes[value] for value in labeller(sentences).values()] for sentences in reports]
        return np.array(found, np.int8).reshape(len(reports), len(label_names))

    return label


def outcomes(stated: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """bool `[n, L]`: what is stated and there ("hit"), stated only ("false"), and there only ("missed").

    Args:
        stated: bool `[n, L]`. labels: `[n, L]` in {1, 0, -1}; what is not known does not count.
    """
    known, present = labels != UNKNOWN_LABEL, labels == 1
    return {"hit": stated & present, "false": stated & known & ~present, "missed": ~stated & present}


def scores(found: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `MEANINGS` in every draw `[D]`, and `precision`, `recall`, `f1` of each class `[D, L]`.

    A class that is neither there nor stated has no F1 (NaN), and is in no mean; one that is only one of the two has 0.

    Args:
        found: `outcomes`. weights: `[D, n]`, how often each report counts.
    """
    hit, false, missed = (weighted_sum(found[name], weights) for name in ("hit", "false", "missed"))
    by_class = {
        "precision": ratio(hit, hit + false),
        "recall": ratio(hit, hit + missed),
        "f1": ratio(2 * hit, 2 * hit + false + missed),
    }
    hits, falses, misses = (counts.sum(axis=1) for counts in (hit, false, missed))
    total = {
        "precision_micro": ratio(hits, hits + falses),
        "recall_micro": ratio(hits, hits + misses),
        "f1_micro": ratio(2 * hits, 2 * hits + falses + misses),
    }
    known = ~np.isnan(by_class["f1"])
    mean = ratio(np.where(known, by_class["f1"], 0.0).sum(axis=1), known.sum(axis=1).astype(float))
    return total | {"f1_macro": mean} | by_class
