"""Cross-modal retrieval: recall at k between volumes and reports, in a gallery of its own for each protocol.

In the first one, `distinct`, the gallery of reports holds every distinct report once. Scans that share a report are all
correct answers to it: counting only the same index (as public code does) punishes a model for a duplicate. A tie counts as a
miss: a constant model scores 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.charts import COLOURS, Chart, plain_axes
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import galleries as galleries_lib
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, weighted_mean, weighted_median
from mg3d_jax.evaluation.galleries import GALLERIES, Pairs
from mg3d_jax.evaluation.ranking import chance, ranks_by_group
from mg3d_jax.html import Section, Table
from mg3d_jax.options import choice, key
from mg3d_jax.prepare.names import excluded_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)
DEFAULT_KS = (1, 5, 10, 50, 100)
DIRECTIONS = ("report_to_volume", "volume_to_report")
PRIMARY = "distinct"
PROTOCOL = "recall@k over distinct reports; all scans that share a report are correct; ties count against"


@dataclass(frozen=True)
class RetrievalOptions(EvaluationOptions):
    """What is searched."""

    galleries: tuple[str, ...] = key(
        (),
        f"what is searched, by name: {', '.join(GALLERIES)}; empty: all, those of chest scans only with `exclude`",
        neutral=(),
    )
    exclude: str = key(
        "", "a file that names volumes, scans or patients that are no chest scans, one a line, e.g. no_chest_valid.txt",
        neutral="",
    )  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """Of every query of one gallery and direction."""

    ranks: np.ndarray  # [q], 1 = first
    correct: np.ndarray  # [q]: how many answers are
    gallery: int
    ids: np.ndarray  # [q]
    patients: np.ndarray  # [q]


class Retrieval(Evaluation):
    """Recall at k in both directions, median ranks, and what a random order would give, for each gallery."""

    options = RetrievalOptions
    needs = ("volumes", "reports")

    @staticmethod
    def problems(options: RetrievalOptions, config: Any) -> list[str]:
        found = [
            line for name in options.galleries for line in choice("evaluations.retrieval.galleries", name, GALLERIES)
        ]
        if not found and not options.exclude and (chest := [n for n in options.galleries if GALLERIES[n].chest]):
            found.append(
                f"evaluations.retrieval.galleries = {options.galleries!r}: {', '.join(chest)} need the list of volumes that "
                "are no chest scans; set evaluations.retrieval.exclude to that file"
            )
        if options.exclude and not Path(options.exclude).is_file():
            found.append(f"evaluations.retrieval.exclude = {options.exclude!r}: there is no such file")
        return found

    @property
    def names(self) -> list[str]:
        """The galleries that are measured; the first is the one of the numbers without a gallery in their name."""
        chosen = self.settings.galleries or [
            name for name, one in GALLERIES.items() if self.settings.exclude or not one.chest
        ]
        return sorted(dict.fromkeys(chosen), key=lambda name: name != PRIMARY)

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`report_to_volume/recall@K`, `.../median_rank`, and the same in the other direction, of the first gallery."""
        measured = _measure(found, self._select(found, self.names[0]), self.names[0])
        kept = ("/recall@", "/median_rank")
        return {
            name: value for name, value in _numbers(measured, DEFAULT_KS).items() if any(part in name for part in kept)
        }

    def full(self, found: Embedded) -> dict[str, Any]:
        by_gallery: dict[str, Any] = {}
        for name in self.names:
            pairs = self._select(found, name)
            measured = _measure(found, pairs, name)
            about = {"protocol": GALLERIES[name].protocol, "volumes": len(pairs.volumes), "reports": len(pairs.reports)}
            about |= {"left_out": dict(pairs.left_out)}
            by_gallery[name] = about | _numbers(measured, DEFAULT_KS) | _intervals(measured, DEFAULT_KS)
        lists = [one["left_out"] for name, one in by_gallery.items() if GALLERIES[name].chest]
        if lists and not any(galleries_lib.NO_CHEST in left_out for left_out in lists):
            logger.warning("%s: names no volume, scan or patient that is here", self.settings.exclude)
        first = self.names[0]
        protocol = PROTOCOL if first == PRIMARY else GALLERIES[first].protocol
        primary = {name: value for name, value in by_gallery[first].items() if "/" in name}
        not_measured = [name for name in GALLERIES if name not in by_gallery and not self.settings.galleries]
        return (
            {"protocol": protocol, "gallery": first} | primary | {"galleries": by_gallery, "need_exclude": not_measured}
        )

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return {
            _flat_key(gallery, name): value
            for gallery, numbers in result["galleries"].items()
            for name, value in numbers.items()
            if "/" in name
        }

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name in self.names:
            for direction, one in _measure(found, self._select(found, name), name).items():
                fields = {
                    "ranks": one.ranks,
                    "gallery": np.array(one.gallery),
                    "ids": one.ids,
                    "patients": one.patients,
                }
                arrays |= {f"{name}/{direction}/{field}": value for field, value in fields.items()}
        return arrays

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name in arrays:
            place, _, field = name.rpartition("/")
            if field == "ranks":
                gallery, direction = place.split("/")
                one = Ranks(
                    arrays[name], np.zeros(0), int(arrays[f"{place}/gallery"]), arrays[f"{place}/ids"],
                    arrays[f"{place}/patients"],
                )  # fmt: skip
                drawn = _resampled(one, DEFAULT_KS, draws)
                found |= {_flat_key(gallery, f"{direction}/{key}"): values for key, values in drawn.items()}
        return found

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        headline = [
            (
                f"recall at 10, {direction.replace('_', ' ')} (of {result[f'{direction}/gallery']:,})",
                f"{result[key]:.3f}",
            )
            for direction in _directions(result)
            if (key := f"{direction}/recall@10") in result
        ]
        several = len(result.get("galleries", ())) > 1
        charts = [Chart("Recall at k, its interval and chance", lambda axes: _curves(axes, result))]
        if several:
            charts.append(Chart("Recall at 10 by gallery", lambda axes: _by_gallery(axes, result)))
        summary = Section(
            "Retrieval",
            result.get("protocol", ""),
            _recall_table(result),
            lambda axes: _curves(axes, result),
            charts=charts if _directions(result) else (),
            headline=headline,
        )
        return [summary, _side_by_side(result)] if several else [summary]

    def _select(self, found: Embedded, name: str) -> Pairs:
        gallery, excluded = GALLERIES[name], frozenset[str]()
        if gallery.chest:
            if not self.settings.exclude:
                raise UserError(
                    f"the gallery {name!r} needs the list of volumes that are no chest scans: give it with --exclude FILE "
                    "(evaluations.retrieval.exclude)"
                )
            excluded = frozenset(excluded_names(Path(self.settings.exclude)))
        return galleries_lib.select(found, gallery, excluded)


def _measure(found: Embedded, pairs: Pairs, name: str) -> dict[str, Ranks]:
    """Both directions of a gallery."""
    ties = GALLERIES[name].ties
    volumes, reports = found.volumes[pairs.volumes], found.reports[pairs.reports]
    of_volume, of_report = pairs.volume_groups, pairs.report_groups
    return {
        "report_to_volume": Ranks(
            ranks_by_group(reports, volumes, of_report, of_volume, ties=ties),
            _group_sizes(of_report, of_volume), len(volumes),
            _report_ids(found, pairs, name), found.patients[pairs.owners],
        ),
        "volume_to_report": Ranks(
            ranks_by_group(volumes, reports, of_volume, of_report, ties=ties),
            _group_sizes(of_volume, of_report), len(reports),
            found.volume_ids[pairs.volumes], found.patients[pairs.volumes],
        ),
    }  # fmt: skip


def _report_ids(found: Embedded, pairs: Pairs, name: str) -> np.ndarray:
    """Of the queries: a copy of a report is named by its volume."""
    copies = GALLERIES[name].reports == galleries_lib.COPIES
    return found.volume_ids[pairs.owners] if copies else found.report_ids[pairs.reports]


def _group_sizes(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """How many candidates are of the group of each query."""
    groups, counts = np.unique(candidates, return_counts=True)
    return counts[np.searchsorted(groups, queries)]


def _numbers(measured: Mapping[str, Ranks], ks: Sequence[int]) -> dict[str, float]:
    result: dict[str, float] = {}
    for direction, one in measured.items():
        result[f"{direction}/gallery"] = one.gallery
        result[f"{direction}/median_rank"] = float(np.median(one.ranks))
        for k in [k for k in ks if k < one.gallery]:
            result[f"{direction}/recall@{k}"] = float(np.mean(one.ranks <= k))
            result[f"{direction}/chance@{k}"] = float(np.mean(chance(one.correct, one.gallery, k)))
    return result


def _intervals(measured: Mapping[str, Ranks], ks: Sequence[int]) -> dict[str, list[float]]:
    """`DIRECTION/recall@K_95` and `DIRECTION/median_rank_95`, over patients."""
    return {
        f"{direction}/{name}_95": interval(values)
        for direction, one in measured.items()
        for name, values in _resampled(one, ks, PatientDraws(one.patients)).items()
    }


def _resampled(one: Ranks, ks: Sequence[int], draws: PatientDraws) -> dict[str, np.ndarray]:
    """`median_rank` and `recall@K` in every draw of patients."""
    weights, kept = draws.weights(one.patients), [k for k in ks if k < one.gallery]
    recalls = weighted_mean(one.ranks[:, None] <= np.array(kept, np.int64)[None, :], weights)
    found = {f"recall@{k}": recalls[:, column] for column, k in enumerate(kept)}
    return found | {"median_rank": weighted_median(one.ranks, weights)}


def _flat_key(gallery: str, name: str) -> str:
    return f"retrieval/gallery={gallery}/{name}"


def recall(
    volumes: np.ndarray,
    volume_reports: np.ndarray,
    reports: np.ndarray,
    report_ids: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Recall in both directions, with chance, in the gallery `distinct`.

    Args:
        volumes: `[n, k]` normalised; volume_reports: `[n]` id of each volume's report.
        reports: `[m, k]` normalised, distinct; report_ids: `[m]`, each of them has a volume, and each volume one of them.

    Returns:
        `report_to_volume/recall@k`, `volume_to_report/recall@k`, median ranks, and what a random order would give.
    """
    names = np.zeros(0, str)
    measured = {
        direction: Ranks(
            ranks_by_group(queries, candidates, of_query, of_candidate),
            _group_sizes(of_query, of_candidate), len(candidates), names, names,
        )
        for direction, queries, candidates, of_query, of_candidate in (
            ("report_to_volume", reports, volumes, report_ids, volume_reports),
            ("volume_to_report", volumes, reports, volume_reports, report_ids),
        )
    }  # fmt: skip
    return _numbers(measured, ks)


def _directions(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in result if "/recall@" in key))


def _ks(result: Mapping[str, Any], direction: str) -> list[int]:
    start = f"{direction}/recall@"
    return sorted(int(key.removeprefix(start)) for key in result if key.startswith(start) and not key.endswith("_95"))


def _recall_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for direction in _directions(result):
        gallery = result.get(f"{direction}/gallery")
        label = direction.replace("_", " ") + (f", of {gallery}" if gallery is not None else "")
        for k in _ks(result, direction):
            value, by_chance = result[f"{direction}/recall@{k}"], result.get(f"{direction}/chance@{k}")
            ends = " to ".join(f"{end:.3f}" for end in result.get(f"{direction}/recall@{k}_95", ()))
            beside = ("", "")
            if by_chance is not None:
                beside = (f"{by_chance:.3f}", f"{value / by_chance:.1f}" if by_chance else "")
            rows.append((label, str(k), f"{value:.3f}", ends, *beside))
    head = ("direction", "k", "recall at k", "95 % interval", "chance", "times chance")
    return Table(head, rows, numbers=(1, 2, 4, 5))


def _side_by_side(result: Mapping[str, Any]) -> Section:
    """The galleries beside each other: the same model, other questions."""
    rows = []
    for name, one in result["galleries"].items():
        for direction in _directions(one):
            values = [f"{one[key]:.3f}" if (key := f"{direction}/recall@{k}") in one else "" for k in DEFAULT_KS]
            median = f"{one[f'{direction}/median_rank']:.0f}"
            to = direction.rpartition("_to_")[2]
            rows.append((name, f"to {to}", str(one[f"{direction}/gallery"]), *values, median))
    head = ("gallery", "search", "of", *(f"at {k}" for k in DEFAULT_KS), "rank")
    more = [f"{name}: {one['protocol']}." for name, one in result["galleries"].items()]
    if missing := result.get("need_exclude"):
        more.append(f"Not measured without a list of what is no chest scan (--exclude): {', '.join(missing)}.")
    table = Table(head, rows, numbers=range(2, len(head)), more=" ".join(more))
    protocol = "recall at k and median rank of the same embeddings; only what is searched differs"
    return Section("Retrieval by gallery", protocol, table, on_terminal=False)


def _curves(axes: Axes, result: Mapping[str, Any]) -> None:
    """Recall over k with its interval, and chance, named at the end of each line."""
    plain_axes(axes)
    for direction, colour in zip(_directions(result), COLOURS, strict=False):
        ks = _ks(result, direction)
        label = f"{direction.replace('_', ' ')}, of {result[f'{direction}/gallery']:,}"
        values = [result[f"{direction}/recall@{k}"] for k in ks]
        low, high = np.array([result.get(f"{direction}/recall@{k}_95", (np.nan, np.nan)) for k in ks]).T
        axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            ks,
            values,
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.6,
            label=label,
        )
        axes.plot(ks, [result[f"{direction}/chance@{k}"] for k in ks], ":", color=colour, linewidth=1)
    axes.plot([], [], ":", color="0.5", linewidth=1, label="chance")
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="k", ylabel="recall")
    shown = sorted({k for direction in _directions(result) for k in _ks(result, direction)})
    axes.set_xticks(shown, list(map(str, shown)))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _by_gallery(axes: Axes, result: Mapping[str, Any]) -> None:
    """The same embeddings in every gallery: a dot with its interval per direction."""
    plain_axes(axes, grid="x")
    names = list(result["galleries"])[::-1]
    for offset, direction, colour in zip((0.13, -0.13), _directions(result), COLOURS, strict=False):
        key = f"{direction}/recall@10"
        rows = [(place + offset, result["galleries"][name]) for place, name in enumerate(names)]
        rows = [(place, one) for place, one in rows if key in one]
        for place, one in rows:
            axes.plot(one.get(f"{key}_95", (np.nan, np.nan)), (place, place), color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(
            [one[key] for _, one in rows], [place for place, _ in rows], "o", color=colour, markersize=5,
            label=direction.replace("_", " "),
        )  # fmt: skip
    axes.set_yticks(
        range(len(names)), [f"{name} ({result['galleries'][name]['report_to_volume/gallery']:,})" for name in names]
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(names) - 0.4), xlabel="recall at 10")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
