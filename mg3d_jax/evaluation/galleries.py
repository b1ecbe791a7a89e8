"""What is searched in retrieval, by name: which volumes and reports take part, which answers are correct, what a tie is.

"distinct" is the sound protocol. Others are those that published numbers follow, so that they can stand beside it: with
copies of a report in the gallery and only one of them correct, a model is punished for what it cannot know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import Embedded
from mg3d_jax.evaluation.ranking import AGAINST, FIRST, TIES
from mg3d_jax.prepare.names import without_suffix

DISTINCT, COPIES, TEXTS = "distinct", "copies", "texts"
SHARED, OWN = "shared", "own"
NO_CHEST = "volumes that the list names"


@dataclass(frozen=True)
class Gallery:
    """How a gallery is made.

    Args:
        chest: without the volumes that the option `exclude` names.
        one_per_scan: the first reconstruction of each scan only.
        reports: "distinct": each report once; "copies": one for each volume; "texts": volumes and reports whose text was
            there before are left out.
        correct: "shared": all volumes of the report; "own": the volume at the same place only.
        source: whose protocol it is.
    """

    chest: bool = False
    one_per_scan: bool = False
    reports: str = DISTINCT
    correct: str = SHARED
    ties: str = AGAINST
    source: str = ""

    @property
    def protocol(self) -> str:
        """In words."""
        kept = "chest scans" if self.chest else "all scans"
        volumes = "the first reconstruction of each scan" if self.one_per_scan else "every volume"
        reports = {
            DISTINCT: "each report once",
            COPIES: "a copy of the report for each volume",
            TEXTS: "scans whose report text another one has are left out",
        }[self.reports]
        correct = "all volumes of a report are correct" if self.correct == SHARED else "only its own volume is correct"
        words = f"{kept}, {volumes}, {reports}; {correct}; {TIES[self.ties]}"
        return f"{words}; {self.source}" if self.source else words


GALLERIES: Mapping[str, Gallery] = {
    "distinct": Gallery(),
    "all": Gallery(reports=COPIES),
    "one_per_scan": Gallery(one_per_scan=True),
    "chest": Gallery(chest=True),
    "chest_one_per_scan": Gallery(chest=True, one_per_scan=True),
    "ct_clip": Gallery(reports=COPIES, correct=OWN, ties=FIRST, source="as CT-CLIP's report_to_volume.py"),
    "colipri": Gallery(
        chest=True, one_per_scan=True, reports=TEXTS, source="after COLIPRI, which compares the text of the findings"
    ),
    "radfinder": Gallery(
        one_per_scan=True, reports=COPIES, correct=OWN, ties=FIRST, source="as RadFinder's retrieval task"
    ),
}


@dataclass(frozen=True)
class Pairs:
    """What takes part, as rows of an `Embedded`. A volume and a report of one group belong together, and each group has
    both."""

    volumes: np.ndarray  # [n]
    reports: np.ndarray  # [m], rows of `Embedded.reports`, with repeats where each volume has a copy
    volume_groups: np.ndarray  # [n]
    report_groups: np.ndarray  # [m]
    owners: np.ndarray  # [m]: the (first) volume that a report belongs to, a row
    left_out: Mapping[str, int]  # why -> how many


def select(found: Embedded, gallery: Gallery, excluded: frozenset[str] = frozenset()) -> Pairs:
    """The volumes and reports of a gallery. `UserError` where none is left.

    Args:
        excluded: names of volumes, scans or patients that are no chest scans, without file suffix.
    """
    left_out: dict[str, int] = {}
    row_of = {name: row for row, name in enumerate(found.report_ids.tolist())}
    report_rows = np.array([row_of.get(name, -1) for name in found.volume_reports.tolist()], np.int64)
    kept = np.flatnonzero(report_rows >= 0)
    _count(left_out, "volumes without a report", len(report_rows) - len(kept))
    if gallery.chest:
        names = (found.volume_ids, found.scans, found.patients)
        named = np.array([any(without_suffix(str(of[row])) in excluded for of in names) for row in kept], bool)
        _count(left_out, NO_CHEST, int(named.sum()))
        kept = kept[~named]
    if gallery.one_per_scan:
        kept = _first_of(kept, list(zip(found.patients[kept], found.scans[kept], strict=True)), found, left_out)
    if gallery.reports == TEXTS:
        kept = _distinct_texts(kept, report_rows, found, left_out)
    if not len(kept):
        raise UserError(
            f"retrieval: of {len(found.volumes)} volumes none is left ({_words(left_out)}): give volumes with the ids of "
            "their reports"
        )
    of_volume = report_rows[kept]
    if gallery.reports == COPIES:
        own = np.arange(len(kept)) if gallery.correct == OWN else of_volume
        return Pairs(kept, of_volume, own, own, kept, left_out)
    reports, first = np.unique(of_volume, return_index=True)
    _count(left_out, "reports without a volume", len(found.reports) - len(reports))
    return Pairs(kept, reports, of_volume, reports, kept[first], left_out)


def _first_of(
    kept: np.ndarray, scans: Sequence[tuple[str, str]], found: Embedded, left_out: dict[str, int]
) -> np.ndarray:
    """Of each scan the reconstruction with the lowest number."""

    def rank(row: int) -> tuple[list[int], str]:
        name = str(found.volume_ids[row])
        return [int(part) for part in re.findall(r"\d+", name)], name

    best: dict[tuple[str, str], int] = {}
    for row, scan in zip(kept.tolist(), scans, strict=True):
        if scan not in best or rank(row) < rank(best[scan]):
            best[scan] = row
    _count(left_out, "further reconstructions", len(kept) - len(best))
    return np.array(sorted(best.values()), np.int64)


def _distinct_texts(kept: np.ndarray, report_rows: np.ndarray, found: Embedded, left_out: dict[str, int]) -> np.ndarray:
    """Volumes whose report has a text that none before has; the ids of reports stand in where texts are not known."""
    seen: dict[str, int] = {}
    for row in kept.tolist():
        report = int(report_rows[row])
        text = " ".join(found.report_texts[report]) if found.report_texts else str(found.report_ids[report])
        seen.setdefault(text, row)
    _count(left_out, "volumes whose report text is there already", len(kept) - len(seen))
    return np.array(list(seen.values()), np.int64)


def _count(left_out: dict[str, int], why: str, number: int) -> None:
    if number:
        left_out[why] = number


def _words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {why}" for why, number in left_out.items()) or "there are none"
