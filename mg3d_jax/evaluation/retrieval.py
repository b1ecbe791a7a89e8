"""Cross-modal retrieval: recall at k between volumes and reports.

The gallery of reports holds every distinct report once. Scans that share a report are all correct answers to it: counting
only the same index (as public code does) punishes a model for a duplicate. A tie counts as a miss: a constant model scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.evaluation.base import Embedded, Evaluation
from mg3d_jax.html import Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_KS = (1, 5, 10, 50, 100)
PROTOCOL = "recall@k over distinct reports; all scans that share a report are correct; ties count against"


class Retrieval(Evaluation):
    """Recall at k in both directions, median ranks, and what a random order would give."""

    needs = ("volumes", "reports")

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`report_to_volume/recall@K`, `.../median_rank`, and the same in the other direction."""
        kept = ("/recall@", "/median_rank")
        return {key: value for key, value in _recall(found).items() if any(part in key for part in kept)}

    def full(self, found: Embedded) -> dict[str, Any]:
        return {"protocol": PROTOCOL} | _recall(found)

    def section(self, result: Mapping[str, Any]) -> Section:
        rows = []
        for direction in _directions(result):
            gallery = result.get(f"{direction}/gallery")
            label = direction.replace("_", " ") + (f", of {gallery}" if gallery is not None else "")
            for k in _ks(result, direction):
                value, chance = result[f"{direction}/recall@{k}"], result.get(f"{direction}/chance@{k}")
                beside = ("", "") if chance is None else (f"{chance:.3f}", f"{value / chance:.1f}" if chance else "")
                rows.append((label, str(k), f"{value:.3f}", *beside))
        table = Table(("direction", "k", "recall at k", "chance", "times chance"), rows, numbers=(1, 2, 3, 4))
        return Section("Retrieval", result.get("protocol", ""), table, lambda axes: _lines(axes, result))


def _recall(found: Embedded) -> dict[str, float]:
    return recall(found.volumes, found.volume_reports, found.reports, found.report_ids)


def _directions(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in result if "/recall@" in key))


def _ks(result: Mapping[str, Any], direction: str) -> list[int]:
    return sorted(int(key.rpartition("@")[2]) for key in result if key.startswith(f"{direction}/recall@"))


def _lines(axes: Axes, result: Mapping[str, Any]) -> None:
    """Recall over k, and chance."""
    axes.set(xscale="log", xlabel="k", ylabel="recall at k (dotted: chance)", ylim=(0, 1), title="retrieval")
    for direction, colour in zip(_directions(result), ("tab:blue", "tab:orange"), strict=False):
        ks = _ks(result, direction)
        label = direction.replace("_", " ") + f" (gallery {result[f'{direction}/gallery']})"
        axes.plot(ks, [result[f"{direction}/recall@{k}"] for k in ks], "o-", color=colour, label=label)
        axes.plot(ks, [result[f"{direction}/chance@{k}"] for k in ks], ":", color=colour)
        axes.set_xticks(ks, map(str, ks))
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)


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
