"""Retrieval in two passes: embeddings find the candidates, the fused pair of report and volume puts the best in order.

Only runs that train the fused pair (`objectives.alignment.fused_weight`) have what is read here. A fusion of every report with
every volume would cost as much as the product of both; of the nearest few it does not. Both passes count: the logits of the
embeddings are added to those of the fusion, as BLIP retrieves (arXiv 2201.12086).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import galleries
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, weighted_mean
from mg3d_jax.evaluation.galleries import GALLERIES
from mg3d_jax.evaluation.ranking import ranks_by_group, similarity_blocks
from mg3d_jax.html import Section, Table
from mg3d_jax.options import key

KS = (1, 5, 10)


@dataclass(frozen=True)
class RescoringOptions(EvaluationOptions):
    """How many are looked at again."""

    top: int = key(0, "nearest candidates of each query that the fused pair puts in order; 0: off", neutral=0)
    embeddings: float = key(
        1.0, "weight of the embeddings' logits beside the fused pair's; 0: the fused pair alone", neutral=1.0
    )


class Rescoring(Evaluation):
    """Recall at k before and after the nearest candidates were put in order by their fused pairs, in the gallery `distinct`."""

    options = RescoringOptions

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("volumes", "reports", "model") if self.settings.top else ()

    @staticmethod
    def problems(options: RescoringOptions, config: Any) -> list[str]:
        for name in ("top", "embeddings"):
            if getattr(options, name) < 0:
                return [f"evaluations.rescoring.{name} = {getattr(options, name)}: must be at least 0"]
        alignment = config.objectives["alignment"] if config is not None else None
        if options.top and alignment is not None and not alignment.fused_weight:
            return [
                f"evaluations.rescoring.top = {options.top}: nothing trains the fused pair; set "
                "objectives.alignment.fused_weight above 0"
            ]
        return []

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`report_to_volume/recall@K` after the second pass, and the same in the other direction."""
        return {
            name: value for name, value in self.full(found).items() if "/recall@" in name and not name.endswith("_95")
        }

    def full(self, found: Embedded) -> dict[str, Any]:
        if not self.settings.top:
            return {}
        if found.model is None or not found.model.embedder.config.objectives["alignment"].fused_weight:
            raise UserError(
                f"rescoring.top = {self.settings.top}: this run did not train the fused pair "
                "(objectives.alignment.fused_weight = 0): leave rescoring off"
            )
        pairs = galleries.select(found, GALLERIES["distinct"])
        volumes, reports = found.volumes[pairs.volumes], found.reports[pairs.reports]
        to_volume, to_report = (
            _nearest(*sides, self.settings.top) for sides in ((reports, volumes), (volumes, reports))
        )
        wanted = {(int(v), r) for r, row in enumerate(to_volume) for v in row}
        wanted |= {(v, int(r)) for v, row in enumerate(to_report) for r in row}
        from mg3d_jax.evaluation.pair_scores import pair_scores  # needs JAX, which pages of results do not

        scores = pair_scores(found, found.model, pairs, sorted(wanted))
        weight = self.settings.embeddings
        protocol = (
            f"{GALLERIES['distinct'].protocol}; the nearest {self.settings.top} put in order by the logits of their fused "
            f"pairs{f' and {weight:g} times those of their embeddings' if weight else ''}"
        )
        result: dict[str, Any] = {"protocol": protocol, "top": self.settings.top, "embeddings": weight}
        of_report, of_volume = pairs.report_groups, pairs.volume_groups
        for direction, near, correct, before, patients in (
            ("report_to_volume", to_volume, of_report[:, None] == of_volume[to_volume],
             ranks_by_group(reports, volumes, of_report, of_volume), found.patients[pairs.owners]),
            ("volume_to_report", to_report, of_volume[:, None] == of_report[to_report],
             ranks_by_group(volumes, reports, of_volume, of_report), found.patients[pairs.volumes]),
        ):  # fmt: skip
            to_reports = direction == "volume_to_report"
            queries = range(len(near))
            table = np.array([[scores[(q, int(c)) if to_reports else (int(c), q)] for c in near[q]] for q in queries])
            ours, theirs = (volumes, reports) if to_reports else (reports, volumes)
            table += weight * found.logit_scale * np.einsum("qk,qck->qc", ours, theirs[near])
            result |= _numbers(direction, before, second_ranks(table, correct, before), patients)
        return result

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        protocol = f"rescoring/top={result['top']}/embeddings={result['embeddings']:g}" if result else ""
        return {f"{protocol}/{name}": value for name, value in result.items() if "/" in name}

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        rows = []
        for name, value in result.items():
            direction, _, measure = name.partition("/")
            if measure.startswith("recall@") and not measure.endswith("_95"):
                low, high = result[f"{name}_95"]
                first = result[f"{direction}/first_pass/{measure}"]
                words = [direction.replace("_", " "), measure.replace("@", " at "), f"{first:.3f}"]
                rows.append([*words, f"{value:.3f}", f"{low:.3f} to {high:.3f}"])
        columns = ["direction", "", "embeddings alone", "with the second pass", "95 % over patients"]
        return [Section("Retrieval in two passes", result["protocol"], Table(columns, rows))]


def second_ranks(scores: np.ndarray, correct: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Ranks [q] after the second pass: where a correct one is among the candidates, its place by score (ties and what is not
    a number count against it), else the rank before.

    Args:
        scores, correct: [q, top] of the candidates of each query.
        before: [q], ranks of the first pass, 1 is first.
    """
    best = np.where(correct, scores, -np.inf).max(1)
    ahead = (~(scores < best[:, None]) & ~correct).sum(1)
    return np.where(correct.any(1), 1 + ahead, before)


def _nearest(queries: np.ndarray, candidates: np.ndarray, top: int) -> np.ndarray:
    """[q, top]: the nearest candidates of each query, nearest first; as many as there are where `top` is more."""
    found = [np.argsort(-block, axis=1, kind="stable")[:, :top] for _, block in similarity_blocks(queries, candidates)]
    return np.concatenate(found)


def _numbers(direction: str, before: np.ndarray, after: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    draws = PatientDraws(patients)
    weights = draws.weights(patients)
    for k in KS:
        found[f"{direction}/recall@{k}"] = float(np.mean(after <= k))
        found[f"{direction}/recall@{k}_95"] = interval(weighted_mean((after <= k).astype(np.float64), weights))
        found[f"{direction}/first_pass/recall@{k}"] = float(np.mean(before <= k))
    return found
