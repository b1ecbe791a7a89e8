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
from mg3d_jax.evaluation import classification_metrics as metrics_lib
from mg3d_jax.evaluation import prompts as prompts_lib
from mg3d_jax.evaluation import scoring as scoring_lib
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions, Phrasings, Prompts
from mg3d_jax.evaluation.bootstrap import DRAWS, PatientDraws, interval
from mg3d_jax.evaluation.zero_shot_shown import shown
from mg3d_jax.html import Section
from mg3d_jax.options import choice, key

logger = logging.getLogger(__name__)
BAND_DRAWS = 200  # for the bands of the ROC curves
OTHERS = tuple(prompts_lib.PROMPT_SETS)
PROBE_ON_TRAIN, PROBE_IN_FOLDS = "linear_probe_on_train", f"linear_probe_{baselines.FOLDS}_folds_by_patient"
SEVERITY = "severity_baseline"


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

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`auroc_macro` and `auroc/CLASS` of the chosen protocol, without intervals, and under `zero_shot/` the means of the
        other metrics and of other prompts and scorings. A class without both outcomes has no AUROC and is not part of the
        mean, which is NaN where no class is left."""
        arrays = self._scored(found)
        ranked, decided = _prefixes(arrays)
        values = {name: float(value[0]) for name, value in _measure(arrays, None).items()}
        chosen = {
            name.removeprefix(decided).removeprefix(ranked): v for name, v in values.items() if name.startswith(ranked)
        }
        areas = {name: v for name, v in chosen.items() if name.startswith("auroc/") and not np.isnan(v)}
        means = {name: v for name, v in chosen.items() if "/" not in name and name != "auroc_macro"}
        others = values | {name: float(value[0]) for name, value in _spread(arrays, None).items()}
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
        return _measure(arrays, weights) | _spread(arrays, weights)

    def full(self, found: Embedded) -> dict[str, Any]:
        arrays = self.arrays(found)
        weights = PatientDraws(arrays["patients"]).weights(arrays["patients"])
        values = _measure(arrays, weights)
        numbers: dict[str, Any] = {}
        for name, value in values.items():
            if not np.isnan(value[0]) or name.endswith("auroc_macro"):
                numbers |= {name: float(value[0]), f"{name}_95": interval(value)}
        numbers |= {name: float(value[0]) for name, value in _spread(arrays, None).items()}
        ranked, decided = _prefixes(arrays)
        classes = [str(name) for name in arrays["classes"]]
        primary = {
            name.removeprefix(p): v for p in (ranked, decided) for name, v in numbers.items() if name.startswith(p)
        }
        undefined = [name for name in classes if f"auroc/{name}" not in primary]
        result = {
            "protocol": self._protocol(arrays),
            "choices": _choices(arrays),
            **{name: v for name, v in primary.items() if "/" not in name or name.startswith("auroc/")},
            "classes_without_both_outcomes": undefined,
            "classes_without_prompts": [str(name) for name in arrays["without_prompts"]],
            "by_class": _by_class(arrays, numbers),
            "numbers": numbers,
            **_curves(arrays, weights[: 1 + BAND_DRAWS]),
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
    """The training volumes of patients that are not evaluated; None where there are none."""
    if found.train is None or (shared := np.isin(found.train.patients, found.patients)).all():
        return None
    if shared.any():
        logger.warning("zero-shot: %d training volumes are of patients that are evaluated: left out", shared.sum())
    return found.train.rows(~shared)


def _title(prompts: str) -> str:
    return Path(prompts).stem if prompts_lib.is_file(prompts) else prompts


def _of_classes(prompts: Prompts, classes: Sequence[str]) -> np.ndarray:
    return prompts.embeddings[:, [prompts.classes.index(name) for name in classes]]


def _choices(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: str(arrays[name]) for name in ("class_set", "prompts", "scoring", "thresholds")}


def _prefix(arrays: Mapping[str, np.ndarray], prompts: str, scoring_name: str) -> str:
    return f"zero_shot/classes={arrays['class_set']}/prompts={prompts}/score={scoring_name}/"


def _prefixes(arrays: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """Of the chosen protocol: for what needs no threshold, and for decisions."""
    ranked = _prefix(arrays, str(arrays["prompts"]), str(arrays["scoring"]))
    return ranked, f"{ranked}threshold={arrays['thresholds']}/"


def _scores(arrays: Mapping[str, np.ndarray], prompts: str, scoring_name: str) -> np.ndarray:
    return scoring_lib.score(scoring_name, arrays[f"similarity/{prompts}"], float(arrays["logit_scale"]))


def _with_mean(prefix: str, name: str, classes: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    by_class = {f"{prefix}{name}/{label}": value for label, value in zip(classes, values, strict=True)}
    return {f"{prefix}{name}_macro": metrics_lib.macro(values)} | by_class


def _measure(arrays: Mapping[str, np.ndarray], weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """The chosen protocol and its baselines: `[D]` by the key that says the protocol. `weights [D, n]`; None: once each."""
    weights = np.ones((1, len(arrays["labels"])), np.uint8) if weights is None else weights
    labels, classes = arrays["labels"].T, arrays["classes"]
    ranked, decided = _prefixes(arrays)
    scores = _scores(arrays, str(arrays["prompts"]), str(arrays["scoring"])).T

    def of_each(metric: Any, of: np.ndarray) -> np.ndarray:
        found = [metric(label, one, weights) for label, one in zip(labels, of, strict=True)]
        return np.array(found).reshape(len(labels), len(weights))

    found = _with_mean(ranked, "auroc", classes, of_each(metrics_lib.auroc, scores))
    found |= _with_mean(ranked, "auprc", classes, of_each(metrics_lib.average_precision, scores))
    if arrays["scoring"] == "softmax":  # the only one that gives probabilities
        found |= _with_mean(ranked, "calibration_error", classes, of_each(metrics_lib.calibration_error, scores))
        found |= _with_mean(ranked, "brier", classes, of_each(metrics_lib.brier, scores))
    found |= _decisions(decided, arrays, scores, weights)
    without = f"zero_shot/classes={arrays['class_set']}/score="
    found |= _with_mean(
        f"{without}{SEVERITY}/", "auroc", classes, of_each(metrics_lib.auroc, arrays["severity"].T * 1.0)
    )
    if "probe" in arrays and not np.isnan(arrays["probe"]).all():
        areas = [
            metrics_lib.auroc(label, one, weights) if not np.isnan(one).all() else np.full(len(weights), np.nan)
            for label, one in zip(labels, arrays["probe"].T, strict=True)
        ]
        found |= _with_mean(f"{without}{arrays['probe_name']}/", "auroc", classes, np.array(areas))
    if arrays["scoring"] != "positive":
        prefix = _prefix(arrays, str(arrays["prompts"]), "positive")
        positive = _scores(arrays, str(arrays["prompts"]), "positive").T
        found |= _with_mean(prefix, "auroc", classes, of_each(metrics_lib.auroc, positive))
    return found


def _decisions(
    prefix: str, arrays: Mapping[str, np.ndarray], scores: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """What the thresholds decide. `f1_macro` is the mean of the classes' F1 of "present", `f1_weighted` weights them by how
    often they are present, and `f1_both_outcomes_macro` is what CT-CLIP's public evaluation calls the weighted F1."""
    rates = ("f1", "f1_both_outcomes", "balanced_accuracy", "sensitivity", "specificity")
    values = {rate: np.full((len(scores), len(weights)), np.nan) for rate in rates}
    present = np.zeros((len(scores), len(weights)))
    for place, (label, one, cut) in enumerate(zip(arrays["labels"].T, scores, arrays["threshold"], strict=True)):
        if np.isnan(cut):
            continue
        counted = metrics_lib.counts(label, one, float(cut), weights)
        present[place] = np.where(np.isnan(counted.f1), 0, counted.present)
        for rate in rates:
            values[rate][place] = getattr(counted, rate)
    found: dict[str, np.ndarray] = {}
    for rate in rates:
        found |= _with_mean(prefix, rate, arrays["classes"], values[rate])
    total = present.sum(axis=0)
    weighted = (np.nan_to_num(values["f1"]) * present).sum(axis=0)
    found[f"{prefix}f1_weighted"] = np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)
    return found


def _spread(arrays: Mapping[str, np.ndarray], weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """The macro AUROC of every prompt set and scoring but those of `_measure`; of the softmax by the difference: they rank
    alike."""
    weights = np.ones((1, len(arrays["labels"])), np.uint8) if weights is None else weights
    chosen, found = str(arrays["prompts"]), {}
    for name in (one.partition("/")[2] for one in arrays if one.startswith("similarity/")):
        for how in ("softmax", "positive"):
            if name == chosen and how in ("positive", arrays["scoring"]):
                continue
            scores = _scores(arrays, name, "difference" if how == "softmax" else how).T
            areas = [metrics_lib.auroc(c, s, weights) for c, s in zip(arrays["labels"].T, scores, strict=True)]
            values = np.array(areas).reshape(len(scores), len(weights))
            found[f"{_prefix(arrays, name, how)}auroc_macro"] = metrics_lib.macro(values)
    return found


def _by_class(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for every class: how often it is present, its metrics with intervals, and its baselines; None is undefined."""
    ranked, decided = _prefixes(arrays)
    without = f"zero_shot/classes={arrays['class_set']}/score="
    sources = {
        "severity_auroc": f"{without}{SEVERITY}/auroc",
        "probe_auroc": f"{without}{arrays['probe_name']}/auroc",
        "positive_prompt_auroc": f"{_prefix(arrays, str(arrays['prompts']), 'positive')}auroc",
    }
    metrics = {name: f"{ranked}{name}" for name in ("auroc", "auprc", "calibration_error", "brier")}
    metrics |= {n: f"{decided}{n}" for n in ("f1", "balanced_accuracy", "sensitivity", "specificity")}
    rows: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(map(str, arrays["classes"])):
        label = arrays["labels"][:, place]
        present, known = int((label == 1).sum()), int((label >= 0).sum())
        row: dict[str, Any] = {
            "present": present,
            "absent": known - present,
            "unknown": len(label) - known,
            "prevalence": present / known if known else None,
        }
        for metric, source in metrics.items():
            row[metric] = numbers.get(f"{source}/{name}")
            row[f"{metric}_low"], row[f"{metric}_high"] = numbers.get(f"{source}/{name}_95", (None, None))
        row |= {column: numbers.get(f"{source}/{name}") for column, source in sources.items()}
        cut = float(arrays["threshold"][place])
        row["threshold"] = None if np.isnan(cut) else cut
        rows[name] = row | diagnosis.sign(row)
    return rows


def _curves(arrays: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    """ROC curves at even false positive rates with 95 % bands, and calibration bins; of classes with both outcomes."""
    scores = _scores(arrays, str(arrays["prompts"]), str(arrays["scoring"])).T
    curves = {
        str(name): metrics_lib.roc_curve(label, one, weights)
        for name, label, one in zip(arrays["classes"], arrays["labels"].T, scores, strict=True)
        if {0, 1} <= set(label.tolist())
    }
    if not curves:
        return {}
    every = np.stack(list(curves.values()))
    mean = metrics_lib.macro(every.reshape(len(every), -1)).reshape(every.shape[1:])
    found: dict[str, Any] = {
        "roc": {
            "false_positive_rate": _rounded(np.linspace(0, 1, metrics_lib.ROC_POINTS)),
            "macro": _band(mean),
            "classes": {name: _band(curve) for name, curve in curves.items()},
        }
    }
    if arrays["scoring"] == "softmax":
        labels = arrays["labels"].T
        pooled = metrics_lib.reliability(labels.ravel(), scores.ravel())
        found["calibration"] = {name: _rounded(values[0]) for name, values in pooled.items()}
    return found


def _band(curves: np.ndarray) -> dict[str, list[float | None]]:
    drawn = curves[1:][~np.isnan(curves[1:]).any(axis=1)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if len(drawn) else np.full((2, curves.shape[1]), np.nan)
    return {"true_positive_rate": _rounded(curves[0]), "low": _rounded(low), "high": _rounded(high)}


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
