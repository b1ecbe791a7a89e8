"""Linear probes of few patients: what the embeddings are worth where labels are scarce."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes.linear import FewClassesError, ProbeResult, linear_probe

FRACTIONS = (1.0, 5.0, 10.0, 100.0)  # percent of the patients
SEEDS = 5


@dataclass(frozen=True)
class Shot:
    """One probe of a part of the patients."""

    percent: float
    seed: int
    patients: int
    volumes: int
    result: ProbeResult


def subset(patients: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """bool `[n]`: the volumes of that share of the patients, at least one. Of one seed, smaller subsets lie in larger ones."""
    names = np.unique(patients)
    count = max(1, math.ceil(len(names) * percent / 100 - 1e-9))
    return np.isin(patients, np.random.default_rng(seed).permutation(names)[:count])


def few_shot(
    train_x: np.ndarray,
    train_y: np.ndarray,
    train_patients: np.ndarray,
    test_x: np.ndarray,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = tuple(range(SEEDS)),
    kind: str = "multi_label",
) -> Iterator[Shot]:
    """A linear probe for each share of the patients and each seed, which draws the patients and the validation part.

    Everything is chosen and fitted within the subset, as if there were no other patients; arguments as of `linear_probe`.
    A multi-class probe whose subset shows fewer than two classes is left out.
    """
    if wrong := [percent for percent in fractions if not 0 < percent <= 100]:
        raise UserError(f"shares of the patients are percent above 0 and up to 100, not {wrong[0]}")
    for percent in fractions:
        for seed in seeds:
            rows = subset(train_patients, percent, seed)
            try:
                result = linear_probe(train_x[rows], train_y[rows], train_patients[rows], test_x, seed=seed, kind=kind)
            except FewClassesError:
                continue
            yield Shot(percent, seed, len(np.unique(train_patients[rows])), int(rows.sum()), result)
