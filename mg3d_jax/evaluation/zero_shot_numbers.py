"""The numbers of the zero-shot evaluation, each by the key that says its protocol, from the arrays that `scores.npz` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mg3d_jax.evaluation import classification_metrics as metrics_lib
from mg3d_jax.evaluation import scoring as scoring_lib
from mg3d_jax.evaluation.bootstrap import ratio

BAND_DRAWS = 200  # for the bands of the ROC curves
SEVERITY = "severity_baseline"
INVERTED = 0.45  # an AUROC below this, or an interval that ends below 0.5, is on the wrong side of chance
FEW = 10


def sign(row: Mapping[str, Any]) -> dict[str, Any]:
    """`inverted`, and for a class that is, its AUROC with the sign turned; from a row of `by_class`. A class with fewer than
    `FEW` volumes of one outcome is on the wrong side of chance too often to be called so."""
    area, high = row["auroc"], row["auroc_high"]
    many = min(row["present"], row["absent"]) >= FEW
    inverted = area is not None and many and (area < INVERTED or high < 0.5)
    return {"inverted": inverted, "turned_auroc": 1 - area if inverted else None}


def choices(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: str(arrays[name]) for name in ("class_set", "prompts", "scoring", "thresholds")}


def _prefix(arrays: Mapping[str, np.ndarray], prompts: str, scoring_name: str) -> str:
    return f"zero_shot/classes={arrays['class_set']}/prompts={prompts}/score={scoring_name}/"


def prefixes(arrays: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """Of the chosen protocol: for what needs no threshold, and for decisions."""
    ranked = _prefix(arrays, str(arrays["prompts"]), str(arrays["scoring"]))
    return ranked, f"{ranked}threshold={arrays['thresholds']}/"


def _scores(arrays: Mapping[str, np.ndarray], prompts: str, scoring_name: str) -> np.ndarray:
    return scoring_lib.score(scoring_name, arrays[f"similarity/{prompts}"], float(arrays["logit_scale"]))


def _with_mean(prefix: str, name: str, classes: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    by_class = {f"{prefix}{name}/{label}": value for label, value in zip(classes, values, strict=True)}
    return {f"{prefix}{name}_macro": metrics_lib.macro(values)} | by_class


def measure(arrays: Mapping[str, np.ndarray], weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """The chosen protocol and its baselines: `[D]` by the key that says the protocol. `weights [D, n]`; None: once each."""
    weights = np.ones((1, len(arrays["labels"])), np.uint8) if weights is None else weights
    labels, classes = arrays["labels"].T, arrays["classes"]
    ranked, decided = prefixes(arrays)
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
    weighted = (np.nan_to_num(values["f1"]) * present).sum(axis=0)
    found[f"{prefix}f1_weighted"] = ratio(weighted, present.sum(axis=0))
    return found


def spread(arrays: Mapping[str, np.ndarray], weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """The macro AUROC of every prompt set and scoring but those of `measure`; of the softmax by the difference: they rank
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


def by_class(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for every class: how often it is present, its metrics with intervals, and its baselines; None is undefined."""
    ranked, decided = prefixes(arrays)
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
        rows[name] = row | sign(row)
    return rows


def curves(arrays: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
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
