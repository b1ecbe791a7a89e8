"""Contrastive loss of held-out patients over pools of a fixed size: what a scaling law of a contrastive model is fitted to.

The loss that training logs moves with the batch: `log(batch)` is its value at chance, and which patients meet is chance, too.
Here every pool has the same number of patients, drawn by their names, whatever the order and the batch of the evaluation, and
the temperature is the best one, found on the other half of the patients. The noise is that of the patients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.evaluation.base import NEVER, Embedded, Evaluation, EvaluationOptions, every_key
from mg3d_jax.html import Section, Table, number
from mg3d_jax.options import key

PROTOCOL = (
    "InfoNCE of volume to report and report to volume, mean of both, over pools of {size} patients, one volume and one report "
    "each; the temperature of each half of the patients is the best one for the other half"
)
LOG_SCALES = (0.0, 9.0)  # where the best logarithm of 1 / temperature is looked for


@dataclass(frozen=True)
class PoolLossOptions(EvaluationOptions):
    """Contrastive loss over pools of a fixed size."""

    every: int = every_key(NEVER)
    pool: int = key(128, "patients of a pool; half as many as are held out, where these are fewer", neutral=128)

    def __post_init__(self) -> None:
        if self.pool < 2:
            raise ValueError(f"pool = {self.pool}: a pool has at least 2 patients")


@dataclass(frozen=True)
class Pools:
    """Rows of volumes and of reports `[pools, P]`, and which half of the patients each pool is of."""

    volumes: np.ndarray
    reports: np.ndarray
    half: np.ndarray

    @property
    def size(self) -> int:
        return self.volumes.shape[1]


class PoolLoss(Evaluation):
    """InfoNCE over fixed pools, at the best temperature of other patients."""

    options = PoolLossOptions
    needs = ("volumes", "reports")

    def lacks(self, found: Embedded) -> str:
        if len(_pairs(found)[0]) < 4:
            return "needs at least 4 patients that have a volume and a report"
        return ""

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`pool_loss` with its two directions, `pool_loss/error` (standard error over patients) and `pool_loss/pool`."""
        if self.lacks(found):
            return {}
        result = _measure(found, self.settings.pool)
        names = {"loss": "pool_loss", "error": "pool_loss/error", "pool": "pool_loss/pool"}
        return {name: float(result[key]) for key, name in names.items()} | {
            f"pool_loss/{way}": result[way] for way in WAYS
        }

    def full(self, found: Embedded) -> dict[str, Any]:
        result = _measure(found, self.settings.pool)
        return {"protocol": PROTOCOL.format(size=result["pool"]), **result}

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return {f"pool_loss/pool_of_{result['pool']}/{name}": result[name] for name in ("loss", *WAYS)}

    def section(self, result: Mapping[str, Any]) -> Section:
        rows = [(name.replace("_", " "), number(result[name])) for name in ("loss", *WAYS, "error", "chance")]
        warnings = []
        if result["loss"] + 2 * result["error"] >= result["chance"]:
            warnings.append(
                f"The loss is not below chance, the logarithm of {result['pool']}: volumes do not know their reports."
            )
        return Section(
            f"Contrastive loss over pools of {result['pool']} patients", result["protocol"],
            Table(("nats", "value"), rows, numbers=(1,)), warnings=warnings,
            headline=[(f"InfoNCE, {result['pool']} patients", number(result["loss"]))],
        )  # fmt: skip


WAYS = ("volume_to_report", "report_to_volume")


def _pairs(found: Embedded) -> tuple[list[int], list[int]]:
    """Rows of a volume and of its report: one pair for each patient and each report, the first in the order of
    their names, so that none meets itself."""
    row_of_report = {report: row for row, report in enumerate(found.report_ids.tolist())}
    taken: dict[str, tuple[int, int]] = {}
    used: set[str] = set()
    for row in np.lexsort((found.volume_ids, found.patients)).tolist():
        patient, report = str(found.patients[row]), str(found.volume_reports[row])
        if patient not in taken and report in row_of_report and report not in used:
            taken[patient] = row, row_of_report[report]
            used.add(report)
    patients = sorted(taken, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [taken[name][0] for name in patients], [taken[name][1] for name in patients]


def _pools(found: Embedded, wanted: int) -> Pools:
    """As many whole pools of `wanted` patients as there are in either half; patients that are left over are not used."""
    volumes, reports = _pairs(found)
    count = len(volumes) // 2
    size = min(wanted, count)
    rows: list[tuple[list[int], list[int], int]] = []
    for half in (0, 1):
        of_volumes, of_reports = volumes[half::2][:count], reports[half::2][:count]
        for first in range(0, count - size + 1, size):
            rows.append((of_volumes[first : first + size], of_reports[first : first + size], half))
    return Pools(
        np.array([v for v, _, _ in rows]), np.array([r for _, r, _ in rows]), np.array([h for _, _, h in rows])
    )


def losses(similarity: np.ndarray, scale: float) -> np.ndarray:
    """InfoNCE of both directions `[2, pools, P]`, nats, of cosines `[pools, P, P]`, volumes by reports."""
    logits = scale * similarity
    own = np.diagonal(logits, axis1=1, axis2=2)
    return np.stack([np.logaddexp.reduce(logits, axis=axis) - own for axis in (2, 1)])


def best_scale(similarity: np.ndarray) -> float:
    """1 / temperature with the smallest mean loss of these pools."""
    from scipy.optimize import minimize_scalar  # here: who trains without this evaluation does not wait for SciPy

    grid = np.linspace(*LOG_SCALES, 37)
    values = [losses(similarity, math.exp(one)).mean() for one in grid]
    middle = int(np.argmin(values))
    around = grid[max(middle - 1, 0)], grid[min(middle + 1, len(grid) - 1)]
    found = minimize_scalar(lambda log: losses(similarity, math.exp(log)).mean(), bounds=around, method="bounded")
    return math.exp(found.x if found.fun < values[middle] else grid[middle])


def _measure(found: Embedded, wanted: int) -> dict[str, Any]:
    pools = _pools(found, wanted)
    volumes, reports = found.volumes[pools.volumes].astype(np.float64), found.reports[pools.reports].astype(np.float64)
    similarity = np.einsum("npk,nqk->npq", volumes, reports)
    by_half = [similarity[pools.half == half] for half in (0, 1)]
    scales = [best_scale(one) for one in by_half]
    each = np.concatenate([losses(by_half[half], scales[1 - half]).reshape(2, -1) for half in (0, 1)], axis=1)
    of_patients = each.mean(axis=0)
    return {
        "loss": float(of_patients.mean()),
        **{way: float(value) for way, value in zip(WAYS, each.mean(axis=1), strict=True)},
        "error": float(of_patients.std(ddof=1) / math.sqrt(len(of_patients))),
        "chance": math.log(pools.size),
        "pool": pools.size,
        "pools": len(pools.volumes),
        "patients": len(of_patients),
        "temperatures": [1 / scale for scale in scales],
    }
