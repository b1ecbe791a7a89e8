"""The k nearest neighbours as a probe: what the most similar training volumes have, weighted by how similar they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.bootstrap import ratio
from mg3d_jax.evaluation.probes.linear import validation_part

COUNTS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07  # Wu et al. 2018, and DINO's evaluation
BLOCK = 1 << 22  # similarities that are held at a time: 32 MiB


@dataclass(frozen=True)
class Neighbours:
    """`scores` `[n, L]`: the weighted share of the known neighbours that are present. `count`: the k that was chosen."""

    scores: np.ndarray
    count: int


def nearest_neighbours(
    train_x: np.ndarray,
    train_y: np.ndarray,
    train_patients: np.ndarray,
    test_x: np.ndarray,
    *,
    seed: int = 0,
    counts: tuple[int, ...] = COUNTS,
    temperature: float = TEMPERATURE,
) -> Neighbours:
    """Scores by the k most similar training volumes, each weighted `exp(cosine / temperature)`.

    k is the one of `counts` with the smallest Brier score on the validation part of the training patients (mean over the
    classes); the neighbours of the evaluated volumes then come from all training volumes. Unknown labels do not count: a
    volume without a known neighbour gets the share among all training volumes, NaN where nothing is known.

    Args:
        train_x: `[n, k]`. train_y: int `[n, L]`, 1, 0 or -1 unknown. train_patients: `[n]`. test_x: `[m, k]`.
    """
    if not len(train_x):
        raise UserError("nearest neighbours need labelled training volumes: there are none")
    train_x, test_x = _unit(train_x), _unit(test_x)
    held = validation_part(train_patients, seed)
    tried = tuple(sorted({min(count, len(train_x)) for count in counts}))
    chosen = tried[0]
    if len(tried) > 1 and held.any():
        scores = _scores(train_x[~held], train_y[~held], train_x[held], tried, temperature)
        truth = train_y[held]
        wrong = (scores - truth) ** 2
        counted = (truth >= 0) & ~np.isnan(wrong)
        by_class = ratio(np.sum(wrong, axis=1, where=counted), counted.sum(axis=1))
        usable = ~np.isnan(by_class).any(axis=0)
        if usable.any():
            chosen = tried[int(by_class[:, usable].mean(axis=1).argmin())]
    return Neighbours(_scores(train_x, train_y, test_x, (chosen,), temperature)[0], chosen)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _scores(
    x: np.ndarray, y: np.ndarray, queries: np.ndarray, counts: tuple[int, ...], temperature: float
) -> np.ndarray:
    """`[counts, m, L]`. Of equally similar volumes the first ones count."""
    present, known = (y == 1).astype(np.float64), (y >= 0).astype(np.float64)
    among_all = ratio(present.sum(axis=0), known.sum(axis=0))
    places = np.minimum(np.array(counts), len(x)) - 1
    found = np.empty((len(counts), len(queries), y.shape[1]))
    rows = max(1, min(BLOCK // len(x), BLOCK // max(1, (places[-1] + 1) * y.shape[1])))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ x.T
        near = np.argsort(-similarity, axis=1, kind="stable")[:, : places[-1] + 1]
        cosine = np.take_along_axis(similarity, near, axis=1)
        weight = np.exp((cosine - cosine[:, :1]) / temperature)[:, :, None]
        hits = np.cumsum(weight * present[near], axis=1)[:, places]
        seen = np.cumsum(weight * known[near], axis=1)[:, places]
        shares = np.divide(hits, seen, out=np.broadcast_to(among_all, hits.shape).copy(), where=seen > 0)
        found[:, start : start + rows] = shares.transpose(1, 0, 2)
    return found
