"""Zero-shot classification with CT-CLIP's protocol: a positive and a negative prompt per abnormality.

The probability is the softmax over the two prompts' similarities to the volume; AUROC is taken per class over volumes with
a known label. Source of prompts and protocol: CT-CLIP's public evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d_jax.data.abnormalities import prompt_pair
from mg3d_jax.evaluation.base import Embedded, Evaluation, Phrasings
from mg3d_jax.html import Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROTOCOL = (
    "zero-shot, prompts '{pathology} is present.' / '{pathology} is not present.', softmax over the two, per volume"
)


class ZeroShot(Evaluation):
    """AUROC of every labelled abnormality from prompts alone, and their mean."""

    needs = ("volumes",)

    def prompts(self, label_names: Sequence[str]) -> dict[str, dict[str, Phrasings]]:
        pairs = {name: prompt_pair(name) for name in label_names}
        return {"ct_clip": {name: ((present,), (absent,)) for name, (present, absent) in pairs.items()}}

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`auroc_macro` and `auroc/CLASS`, without intervals. A class without both outcomes has no AUROC and is not part of
        the mean, which is NaN where no class is left."""
        by_class = auroc_by_class(found.labels, _scores(found), found.label_names)
        return {"auroc_macro": macro_mean(by_class)} | {f"auroc/{name}": value for name, value in by_class.items()}

    def full(self, found: Embedded) -> dict[str, Any]:
        result = evaluate(found.labels, _scores(found), found.label_names, found.patients)
        return {"protocol": PROTOCOL} | result

    def section(self, result: Mapping[str, Any]) -> Section:
        classes = sorted(_classes(result), key=lambda name: -result[f"auroc/{name}"])
        keys = {"macro mean": "auroc_macro"} | {name: f"auroc/{name}" for name in classes}
        ends = {key: result.get(f"{key}_95", (float("nan"),) * 2) for key in keys.values()}
        missing = result.get("classes_without_both_outcomes")
        table = Table(
            ("abnormality", "AUROC", "95 % interval", "0 to 1; the line is chance"),
            [(name, f"{result[k]:.3f}", f"{ends[k][0]:.3f} to {ends[k][1]:.3f}") for name, k in keys.items()],
            numbers=(1,),
            classes=["total"] + [""] * len(classes),
            intervals=[(result[key], *ends[key]) for key in keys.values()],
            more=f"Left out, all present or all absent: {', '.join(missing)}." if missing else "",
        )
        return Section("Zero-shot AUROC", result.get("protocol", ""), table, lambda axes: _bars(axes, result))


def _scores(found: Embedded) -> np.ndarray:
    pairs = found.prompts["ct_clip"].embeddings
    return probabilities(found.volumes, pairs.reshape(-1, pairs.shape[-1]), found.logit_scale)


def _classes(result: Mapping[str, Any]) -> list[str]:
    return [key.removeprefix("auroc/") for key in result if key.startswith("auroc/") and not key.endswith("_95")]


def _bars(axes: Axes, result: Mapping[str, Any]) -> None:
    """AUROC per abnormality with its interval, from chance."""
    names = sorted(_classes(result), key=lambda name: result[f"auroc/{name}"])
    values = np.array([result[f"auroc/{name}"] for name in names])
    intervals = np.array([result[f"auroc/{name}_95"] for name in names]).reshape(-1, 2)
    errors = np.abs(np.stack([values - intervals[:, 0], intervals[:, 1] - values]))
    axes.barh(range(len(names)), values - 0.5, left=0.5, xerr=errors, color="tab:green", alpha=0.75, ecolor="0.3")
    axes.axvline(0.5, color="0.2", linestyle=":")
    axes.axvline(result["auroc_macro"], color="tab:red", label=f"macro mean {result['auroc_macro']:.3f}")
    axes.set_yticks(range(len(names)), names)
    axes.set(
        xlim=(0.3, 1.0), xlabel="AUROC (95 % interval; dotted: chance)", title=f"zero-shot, {len(names)} abnormalities"
    )
    axes.legend(loc="lower right")


def prompts(labels: Sequence[str]) -> list[list[str]]:
    """Positive prompts of all labels, then the negative ones, each a text of one sentence."""
    pairs = list(map(prompt_pair, labels))
    return [[pair[side]] for side in (0, 1) for pair in pairs]


def probabilities(volumes: np.ndarray, prompt_embeddings: np.ndarray, logit_scale: float) -> np.ndarray:
    """P(present) `[n, L]` from normalised embeddings: volumes `[n, k]`, prompts `[2L, k]` ordered as by `prompts`.

    In float64: near 1 float32 would make ties, which change an AUROC.
    """
    from scipy.special import expit  # slow imports: the page of a run shows results without them

    positive, negative = np.split(volumes.astype(np.float64) @ prompt_embeddings.T.astype(np.float64), 2, axis=1)
    return expit(logit_scale * (positive - negative))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUROC over rows whose label is 0 or 1; NaN when one of the two is absent. A score that is NaN counts as wrong."""
    from scipy.stats import rankdata

    known = labels >= 0
    present, values = labels[known] == 1, scores[known]
    ranks = rankdata(np.where(np.isnan(values), np.where(present, -np.inf, np.inf), values))
    positives, negatives = int(present.sum()), int((~present).sum())
    if not positives or not negatives:
        return float("nan")
    # The rank-sum form: thousands of bootstrap draws make the sorting of a library call per draw too slow.
    return float((ranks[present].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_by_class(labels: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """AUROC of every class, labels and scores `[n, L]`; classes without both outcomes are left out."""
    value = {name: auroc(labels[:, i], scores[:, i]) for i, name in enumerate(names)}
    return {name: area for name, area in value.items() if not np.isnan(area)}


def macro_mean(by_class: Mapping[str, float]) -> float:
    """Mean over the classes; NaN where there is none."""
    return float(np.mean(list(by_class.values()))) if by_class else float("nan")


def evaluate(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], groups: np.ndarray, *, draws: int = 500, seed: int = 0
) -> dict[str, float | list[float]]:
    """`auroc/<class>` and `auroc_macro`, each with a 95 % interval from resampling patients (`groups [n]`).

    Classes without both outcomes are left out of the macro mean and listed under `classes_without_both_outcomes`.
    """
    value = auroc_by_class(labels, scores, names)
    usable = list(value)
    columns = [list(names).index(name) for name in usable]
    rng, members = np.random.default_rng(seed), _members(groups)
    samples = np.full((draws, len(columns)), np.nan)
    for draw in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        samples[draw] = [auroc(labels[rows, c], scores[rows, c]) for c in columns]
    result: dict = {"auroc_macro": macro_mean(value)}
    result["auroc_macro_95"] = _interval(np.nanmean(samples, axis=1)) if usable else [float("nan")] * 2
    for position, name in enumerate(usable):
        result[f"auroc/{name}"] = value[name]
        result[f"auroc/{name}_95"] = _interval(samples[:, position])
    result["classes_without_both_outcomes"] = [name for name in names if name not in usable]
    return result


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Row numbers of every group."""
    groups = np.unique(groups, return_inverse=True)[1]
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _interval(samples: np.ndarray) -> list[float]:
    return [float(x) for x in np.nanpercentile(samples, [2.5, 97.5])]
