"""What an evaluation declares, what it is given, and how its result is shown.

`mg3d evaluate` and the evaluation during training embed a prepared data set once and hand it to every evaluation of
`registry.EVALUATIONS`; `mg3d evaluate --embeddings` reads it from a file instead. Nothing here imports JAX: the page of a
run shows results without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.html import Section
from mg3d_jax.options import checked_options, key
from mg3d_jax.progress import Progress
from mg3d_jax.registry import EVALUATIONS

if TYPE_CHECKING:
    from mg3d_jax.data.pipeline import PreparedData
    from mg3d_jax.evaluation.bootstrap import PatientDraws
    from mg3d_jax.evaluation.embed import Embedder

NEEDS = ("volumes", "reports", "train", "model")
NEVER = -1
Text = Sequence[str]  # its sentences
Phrasings = tuple[Sequence[str], Sequence[str]]  # sentences that say "present", and those that say "absent"


def every_key(default: int) -> Any:
    """The option `every` with this default."""
    meaning = f"steps between measurements in training; 0: training.evaluate_every, {NEVER}: never"
    return key(default, meaning, neutral=default)


@dataclass(frozen=True)
class EvaluationOptions:
    """What every evaluation can be told; options of its own are fields of a subclass."""

    every: int = every_key(0)


@dataclass(frozen=True)
class Prompts:
    """A pair of prompts per class, embedded: `[2, L, k]`, present before absent, each l2-normalised."""

    classes: tuple[str, ...]  # L
    embeddings: np.ndarray


@dataclass(frozen=True)
class Embedded:
    """A labelled set of volumes as a model sees it. Embeddings are float32 `[., k]` and l2-normalised; ids are strings.

    What no evaluation of the call needs has length 0 (`volumes` with all that is known of them, `reports`) or is None
    (`train`, `model`).
    """

    volumes: np.ndarray  # [n, k], in the order of the records
    volume_ids: np.ndarray  # [n]
    scans: np.ndarray  # [n]: of which scan a volume is a reconstruction
    patients: np.ndarray  # [n]
    volume_reports: np.ndarray  # [n]: id of the report that belongs to the volume; "" where none is known
    labels: np.ndarray  # int8 [n, L]: 1 present, 0 absent, -1 unknown
    label_names: tuple[str, ...]  # L
    reports: np.ndarray  # [m, k]
    report_ids: np.ndarray  # [m], distinct
    report_texts: tuple[Text, ...]  # m texts; empty where they are not known
    prompts: Mapping[str, Prompts]  # those that the evaluation asked for, or that the file has, by name
    texts: np.ndarray  # [t, k], those that the evaluation asked for
    logit_scale: float  # 1 / temperature
    train: Embedded | None = None  # labelled volumes that the evaluated ones may be compared with: probes, thresholds
    model: Model | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # where it comes from; the result repeats them

    def train_of_others(self) -> tuple[Embedded | None, int]:
        """The training volumes of patients that are not evaluated, None where there are none; and how many of the training
        patients are evaluated, too: what they teach would be memory."""
        if self.train is None:
            return None, 0
        shared = np.isin(self.train.patients, self.patients)
        count = len(np.unique(self.train.patients[shared]))
        if not count:
            return self.train, 0
        return None if shared.all() else self.train.rows(~shared), count

    def sentences(self) -> Iterator[tuple[int, str]]:
        """The sentences of the reports, each with the row of the volume that its report belongs to."""
        texts = dict(zip(self.report_ids.tolist(), self.report_texts, strict=True)) if self.report_texts else {}
        for row, report in enumerate(self.volume_reports.tolist()):
            for sentence in texts.get(report, ()):
                yield row, sentence

    def rows(self, rows: np.ndarray) -> Embedded:
        """These volumes only."""
        fields = ("volumes", "volume_ids", "scans", "patients", "volume_reports", "labels")
        return replace(self, **{name: getattr(self, name)[rows] for name in fields})


@dataclass(frozen=True)
class Model:
    """For an evaluation that needs more than embeddings: `embedder.setup` has the modules and the mesh of `params`."""

    embedder: Embedder
    params: Any
    data: PreparedData
    train: PreparedData | None = None  # the training volumes, where the caller has any; nothing of them is read yet
    shows: bool = False  # does long work print how far it is? Not where a training run around it does

    def progress(self, label: str, total: int, unit: str = "volumes") -> Progress:
        """Of a second pass over the data, or whatever else takes its time."""
        return Progress(label, total, unit=unit, shown=self.shows)


class Evaluation:
    """One evaluation. Its results stand under the name with which its class is registered.

    Class attributes:
        options: frozen dataclass, `EvaluationOptions` or a subclass; its keys are `evaluations.NAME.KEY` of a configuration.
        needs: which of `NEEDS` it reads. "volumes" are the embeddings of all records with their labels, patients and
            report ids; "reports" adds those of every distinct report; "train" those of the training volumes, where the
            caller has any; "model" the model itself. A property where it depends on the options.

    Args:
        settings: an instance of `options`; the defaults without it.
    """

    options: type = EvaluationOptions
    needs: tuple[str, ...] = ("volumes",)

    def __init__(self, settings: Any = None):
        self.settings = checked_options(type(self).options)() if settings is None else settings

    @staticmethod
    def problems(options: Any, config: Any) -> list[str]:
        """`(own options, whole config) -> [problem, ...]`, said before anything is built."""
        return []

    def prompts(self, label_names: Sequence[str]) -> Mapping[str, Mapping[str, Phrasings]]:
        """Pairs of prompts to embed, `{name of the set: {class: (present, absent)}}`: `Embedded.prompts` has them, several
        phrasings as their mean direction. Not asked where the embeddings come from a file."""
        return {}

    def texts(self, label_names: Sequence[str]) -> Sequence[Text]:
        """Further texts to embed: `Embedded.texts` has one row for each."""
        return ()

    def lacks(self, found: Embedded) -> str:
        """What it would need beside that, in words, e.g. "needs ...: give ..."; "" where it has all."""
        return ""

    def metrics(self, found: Embedded) -> dict[str, float]:
        """What a training run logs: few numbers, quickly. They are named `evaluation/KEY` there, beside those of others."""
        return {}

    def full(self, found: Embedded) -> dict[str, Any]:
        """What `evaluation.json` says: JSON, with the protocol of its numbers under `protocol`."""
        raise NotImplementedError

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        """The numbers of a result of `full` for `metrics.json`: each key says the whole protocol of its number."""
        return {}

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        """What a comparison of two models needs, for `scores.npz`: scores or ranks of every volume or query, whatever names
        them (`ids`, the same for both models, and `patients`), and what is true of them. No objects."""
        return {}

    def files(self, found: Embedded) -> Mapping[str, str]:
        """Further text files that `mg3d evaluate` writes, by name: what is too long for `evaluation.json`."""
        return {}

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        """The numbers of `flat`, by the same keys, in every draw of patients: `[1 + draws]`, first the data as they are.

        Args:
            arrays: those of `arrays`, read from a file.
        """
        return {}

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        """How a result of `full`, read from a file, is shown. The first section is its summary."""
        return [self.section(result)]

    def section(self, result: Mapping[str, Any]) -> Section:
        """The same, of an evaluation that has one section only."""
        raise NotImplementedError


def chosen(names: Iterable[str] | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Evaluation]:
    """The evaluations of these names, or all that are registered. `UserError` for a name that is not.

    Args:
        options: settings by name, e.g. `config.evaluations`; the defaults for names that it lacks.
    """
    return {name: EVALUATIONS[name]((options or {}).get(name)) for name in (EVALUATIONS if names is None else names)}


def sections(document: Mapping[str, Any]) -> list[Section]:
    """How the results in a document of `evaluation.json` are shown. Results whose evaluation is not known here are left out."""
    return [section for name, one in chosen().items() if document.get(name) for section in one.sections(document[name])]


def merge_metrics(by_evaluation: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several evaluations as one. `UserError` where two of them use one name."""
    merged: dict[str, float] = {}
    for name, metrics in by_evaluation.items():
        if twice := sorted(merged.keys() & metrics.keys()):
            raise UserError(
                f"the evaluation {name!r} names a metric as another one does: {', '.join(twice)}; rename it"
            )
        merged |= metrics
    return merged
