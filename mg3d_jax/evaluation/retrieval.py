"""Cross-modal retrieval: recall at k between volumes and reports.

The gallery of reports holds every distinct report once. Scans that share a report are all correct answers to it: counting
only the same index (as public code does) punishes a model for a duplicate. A tie counts as a miss: a constant model scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEFAULT_KS = (1, 5, 10, 50, 100)
PROTOCOL = "recall@k over distinct reports; all scans that share a report are correct; ties count against"


def ranks(similarity: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Rank (1 = first) of the best correct candidate for each query.

    Args:
        similarity: `[queries, candidates]`. correct: bool of the same shape, at least one True per row.
    """
    best = np.where(correct, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + np.sum(~(similarity < best) & ~correct, axis=1)  # so that NaN counts against


def recall(
    volumes: np.ndarray,
    volume_reports: np.ndarray,
    reports: np.ndarray,
    report_ids: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Recall in both directions, with chance.

    Args:
        volumes: `[n, k]` normalised; volume_reports: `[n]` id of each volume's report.
        reports: `[m, k]` normalised, distinct; report_ids: `[m]`.

    Returns:
        `report_to_volume/recall@k`, `volume_to_report/recall@k`, median ranks, and what a random order would give.
    """
    correct = report_ids[:, None] == volume_reports[None, :]
    similarity = reports @ volumes.T
    result: dict[str, float] = {}
    for direction, sims, hits in (
        ("report_to_volume", similarity, correct),
        ("volume_to_report", similarity.T, correct.T),
    ):
        rank, gallery = ranks(sims, hits), sims.shape[1]
        result[f"{direction}/gallery"] = gallery
        result[f"{direction}/median_rank"] = float(np.median(rank))
        for k in [k for k in ks if k < gallery]:
            result[f"{direction}/recall@{k}"] = float(np.mean(rank <= k))
            result[f"{direction}/chance@{k}"] = float(np.mean(_chance(hits.sum(axis=1), gallery, k)))
    return result


def _chance(correct: np.ndarray, gallery: int, k: int) -> np.ndarray:
    """Probability that a random order has one of `correct` among the first k: 1 - C(gallery - correct, k) / C(gallery, k)."""
    steps = np.arange(k)[None, :]
    missing = np.clip(gallery - correct[:, None] - steps, 0, None) / (gallery - steps)
    return 1.0 - np.prod(missing, axis=1)
