"""Zero-shot classification: a finding is scored by how similar a volume is to what says that it is present or absent.

Classes, prompts, scoring and thresholds are chosen by name, and every number's key says them. Beside each AUROC stands what
it is read against: the same labels scored without the image (`baselines.severity`), the same embeddings with a linear probe,
the positive prompts alone, and other prompt sets. `diagnosis.warnings` says in words why a number is low.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import baselines, class_sets, diagnosis
from mg3d_jax.evaluation import prompts as prompts_lib
from mg3d_jax.evaluation import scoring as scoring_lib
from mg3d_jax.evaluation import zero_shot_numbers as numbers_lib
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions, Phrasings, Prompts
from mg3d_jax.evaluation.bootstrap import DRAWS, PatientDraws, interval
from mg3d_jax.evaluation.zero_shot_shown import shown
from mg3d_jax.html import Section
from mg3d_jax.options import choice, key

logger = logging.getLogger(__name__)
OTHERS = tuple(prompts_lib.PROMPT_SETS)
PROBE_ON_TRAIN, PROBE_IN_FOLDS = "linear_probe_on_train", f"linear_probe_{baselines.FOLDS}_folds_by_patient"


@dataclass(frozen=True)
class ZeroShotOptions(EvaluationOptions):
    classes: str = key(
        class_sets.ALL,
        f"which labels: all, {', '.join(class_sets.CLASS_SETS)}, or names with commas between them",
        neutral=class_sets.ALL,
    )
    prompts: str = key(
        "ct_clip",
        f"{', '.join(prompts_lib.PROMPT_SETS)}, or a file: .json or .csv with class, present, absent",
        neutral="ct_clip",
    )
    scoring: str = key("softmax", f"from similarities to a score: {', '.join(scoring_lib.SCORINGS)}", neutral="softmax")
    thresholds: str = key(
        "half", f"from a score to a decision, for F1 and the like: {', '.join(scoring_lib.THRESHOLDS)}", neutral="half"
    )
    compare_prompts: tuple[str, ...] = key(
        OTHERS, "sets of prompts whose macro AUROC is measured beside the chosen one", neutral=OTHERS
    )


class ZeroShot(Evaluation):
    """AUROC, AUPRC, F1, balanced accuracy and calibration of every labelled class from prompts alone, and their means."""

    options = ZeroShotOptions

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._last: tuple[Embedded, dict[str, np.ndarray]] | None = None
        if problems := self.problems(self.settings, None):
            raise UserError("; ".join(problems))

    @staticmethod
    def problems(options: Any, config: Any) -> list[str]:
        name = "evaluations.zero_shot"
        found = [
            *choice(f"{name}.scoring", options.scoring, scoring_lib.SCORINGS),
            *choice(f"{name}.thresholds", options.thresholds, scoring_lib.THRESHOLDS),
        ]
        if not prompts_lib.is_file(options.prompts):
            found += choice(f"{name}.prompts", options.prompts, [*prompts_lib.PROMPT_SETS, "FILE.json", "FILE.csv"])
        for one in options.compare_prompts:
            found += choice(f"{name}.compare_prompts", one, prompts_lib.PROMPT_SETS)
        if options.scoring == "positive" and options.thresholds == "half":
            found.append(
                f"{name}.thresholds = 'half' has no meaning for {name}.scoring = 'positive': choose train_youden or train_f1"
            )
        return found

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("volumes", "train") if self.settings.thresholds.startswith("train_") else ("volumes",)

    def prompts(self, label_names: Sequence[str]) -> dict[str, dict[str, Phrasings]]:
        classes = class_sets.classes_of(self.settings.classes, label_names)
        names = dict.fromkeys((self.settings.prompts, *self.settings.compare_prompts))
        return {_title(name): dict(prompts_lib.prompts_of(name, classes)) for name in names}

    def exported(self, label_names: Sequence[str]) -> dict[str, Any]:
        """How volumes are scored, for users of the weights alone: `classes` (label -> `present`, `absent`, lists of
        sentences), `prompts`, `scoring` and a `protocol` in words. Labels without prompts are left out, as in an evaluation
        of all labels."""
        classes, title = class_sets.classes_of(self.settings.classes, label_names), _title(self.settings.prompts)
        pairs = prompts_lib.prompts_of(self.settings.prompts, classes)
        return {
            "prompts": title,
            "scoring": self.settings.scoring,
            "protocol": f"zero-shot, {len(pairs)} classes ({class_sets.protocol_name(tuple(pairs))}), prompts {title}, "
            f"{scoring_lib.SCORINGS[self.settings.scoring]}, per volume",
            "classes": {
                label: {"present": [*present], "absent": [*absent]} for label, (present, absent) in pairs.items()
            },
        }

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`auroc_macro` and `auroc/CLASS` of the chosen protocol, without intervals, and under `zero_shot/` the means of the
        other metrics and of other prompts and scorings. A class without both outcomes has no AUROC and is not part of the
        mean, which is NaN where no class is left."""
        arrays = self._scored(found)
        ranked, decided = numbers_lib.prefixes(arrays)
        values = {name: float(value[0]) for name, value in numbers_lib.measure(arrays, None).items()}
        chosen = {
            name.removeprefix(decided).removeprefix(ranked): v for name, v in values.items() if name.startswith(ranked)
        }
        areas = {name: v for name, v in chosen.items() if name.startswith("auroc/") and not np.isnan(v)}
        means = {name: v for name, v in chosen.items() if "/" not in name and name != "auroc_macro"}
        others = values | {name: float(value[0]) for name, value in numbers_lib.spread(arrays, None).items()}
        means |= {
            name[name.index("prompts=") :]: value
            for name, value in others.items()
            if "/prompts=" in name and name.endswith("/auroc_macro") and not name.startswith(ranked)
        }
        return {"auroc_macro": chosen["auroc_macro"]} | areas | {f"zero_shot/{name}": v for name, v in means.items()}

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        if self._last is None or self._last[0] is not found:  # the probe takes a while, and `full` needs it too
            self._last = (found, self._with_probe(found))
        return self._last[1]

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        weights = draws.weights(arrays["patients"])
        return numbers_lib.measure(arrays, weights) | numbers_lib.spread(arrays, weights)

    def full(self, found: Embedded) -> dict[str, Any]:
        arrays = self.arrays(found)
        weights = PatientDraws(arrays["patients"]).weights(arrays["patients"])
        values = numbers_lib.measure(arrays, weights)
        numbers: dict[str, Any] = {}
        for name, value in values.items():
            if not np.isnan(value[0]) or name.endswith("auroc_macro"):
                numbers |= {name: float(value[0]), f"{name}_95": interval(value)}
        numbers |= {name: float(value[0]) for name, value in numbers_lib.spread(arrays, None).items()}
        ranked, decided = numbers_lib.prefixes(arrays)
        classes = [str(name) for name in arrays["classes"]]
        primary = {
            name.removeprefix(p): v for p in (ranked, decided) for name, v in numbers.items() if name.startswith(p)
        }
        undefined = [name for name in classes if f"auroc/{name}" not in primary]
        result = {
            "protocol": self._protocol(arrays),
            "choices": numbers_lib.choices(arrays),
            **{name: v for name, v in primary.items() if "/" not in name or name.startswith("auroc/")},
            "classes_without_both_outcomes": undefined,
            "classes_without_prompts": [str(name) for name in arrays["without_prompts"]],
            "by_class": numbers_lib.by_class(arrays, numbers),
            "numbers": numbers,
            **numbers_lib.curves(arrays, weights[: 1 + numbers_lib.BAND_DRAWS]),
        }
        general = prompts_lib.by_general_pattern(str(arrays["prompts"]), classes)
        return result | {"warnings": diagnosis.warnings(arrays, values, result, found.volumes, general)}

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return dict(result["numbers"])

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        return shown(result)

    def _with_probe(self, found: Embedded) -> dict[str, np.ndarray]:
        arrays, train = self._scored(found), _of_others(found)
        classes = [str(name) for name in arrays["classes"]]
        if train is not None and set(classes) <= set(train.label_names):
            labels = train.labels[:, [train.label_names.index(name) for name in classes]]
            scores, name = baselines.probe(train.volumes, labels, train.patients, found.volumes), PROBE_ON_TRAIN
        else:
            scores = baselines.cross_validated_probe(found.volumes, arrays["labels"], found.patients)
            name = PROBE_IN_FOLDS
        return arrays | {"probe": scores, "probe_name": np.array(name)}

    def _scored(self, found: Embedded) -> dict[str, np.ndarray]:
        """All but the probe."""
        if not len(found.volumes):
            raise UserError("zero-shot classification: there are no volumes to evaluate")
        classes = class_sets.classes_of(self.settings.classes, found.label_names)
        title, sets = self._chosen(found.prompts, classes)
        scored = [name for name in classes if name in sets[title].classes]
        columns = [found.label_names.index(name) for name in scored]
        labels, chosen = found.labels[:, columns], _of_classes(sets[title], scored)
        similarity = scoring_lib.similarities(found.volumes, chosen)
        scores = scoring_lib.score(self.settings.scoring, similarity, found.logit_scale)
        cuts = scoring_lib.thresholds(
            self.settings.thresholds, self.settings.scoring, labels, scores, self._train_scores(found, scored, chosen)
        )
        others = {
            f"similarity/{name}": scoring_lib.similarities(found.volumes, _of_classes(one, scored))
            for name, one in sets.items()
            if name != title and set(scored) <= set(one.classes)
        }
        return {
            "ids": found.volume_ids,
            "patients": found.patients,
            "classes": np.array(scored, str),
            "labels": labels,
            "severity": baselines.severity(found.labels)[:, columns].astype(np.int16),
            "logit_scale": np.array(found.logit_scale),
            "threshold": cuts,
            "without_prompts": np.array([name for name in classes if name not in scored], str),
            "class_set": np.array(class_sets.protocol_name(scored)),
            "prompts": np.array(title),
            "scoring": np.array(self.settings.scoring),
            "thresholds": np.array(self.settings.thresholds),
            f"similarity/{title}": similarity,
        } | others

    def _chosen(self, sets: Mapping[str, Prompts], classes: Sequence[str]) -> tuple[str, Mapping[str, Prompts]]:
        """The name of the chosen set. Embeddings from a file may have one of another name: it is taken where it is the only
        one and none was asked for by name."""
        title = _title(self.settings.prompts)
        if title not in sets and len(sets) == 1 and title == ZeroShotOptions.prompts:
            title = next(iter(sets))
        if title not in sets:
            raise UserError(
                f"zero-shot classification with prompts = {title!r}: the embeddings have prompts by the name of "
                f"{', '.join(sets) or 'nothing'}. Choose one of these, or embed others"
            )
        missing = [name for name in classes if name not in sets[title].classes]
        if missing and (self.settings.classes != class_sets.ALL or len(missing) == len(classes)):
            raise UserError(
                f"zero-shot classification: the prompts {title!r} have none for {', '.join(missing)}; they are for "
                f"{', '.join(sets[title].classes) or 'no class'}. Embed prompts for every class, or choose other classes"
            )
        return title, sets

    def _train_scores(
        self, found: Embedded, classes: Sequence[str], prompts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        if found.train is None or not self.settings.thresholds.startswith("train_"):
            return None
        if missing := [name for name in classes if name not in found.train.label_names]:
            raise UserError(
                f"thresholds = {self.settings.thresholds!r}: the training volumes are not labelled for "
                f"{', '.join(missing)}: choose thresholds = 'half', or fewer classes"
            )
        if (train := _of_others(found)) is None:
            raise UserError(
                f"thresholds = {self.settings.thresholds!r}: all patients of the training volumes are evaluated, too: give "
                "another split as training data, or choose thresholds = 'half'"
            )
        columns = [train.label_names.index(name) for name in classes]
        similarity = scoring_lib.similarities(train.volumes, prompts)
        return train.labels[:, columns], scoring_lib.score(self.settings.scoring, similarity, found.logit_scale)

    def _protocol(self, arrays: Mapping[str, np.ndarray]) -> str:
        title = str(arrays["prompts"])
        about = prompts_lib.PROMPT_SETS.get(title)
        return (
            f"zero-shot, {len(arrays['classes'])} classes ({arrays['class_set']}), prompts {title}"
            + (f" ({about.meaning})" if about else "")
            + f", {scoring_lib.SCORINGS[self.settings.scoring]}, per volume; thresholds: "
            f"{scoring_lib.THRESHOLDS[self.settings.thresholds]}; intervals: 95 % of {DRAWS} draws of patients"
        )


def _of_others(found: Embedded) -> Embedded | None:
    """`Embedded.train_of_others`; what is left out is said."""
    train, shared = found.train_of_others()
    if train is not None and shared:
        logger.warning("zero-shot: %d training patients are evaluated, too: their volumes are left out", shared)
    return train


def _title(prompts: str) -> str:
    return Path(prompts).stem if prompts_lib.is_file(prompts) else prompts


def _of_classes(prompts: Prompts, classes: Sequence[str]) -> np.ndarray:
    return prompts.embeddings[:, [prompts.classes.index(name) for name in classes]]
