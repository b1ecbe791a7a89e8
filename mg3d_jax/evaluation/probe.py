"""What the embeddings know of the findings, whatever the prompts: linear probe, nearest neighbours, probes of few patients.

It needs labelled training volumes, of other patients than the evaluated ones.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.charts import COLOURS, Chart, plain_axes
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import class_scores
from mg3d_jax.evaluation.base import NEVER, Embedded, Evaluation, EvaluationOptions, every_key
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.probes.few_patients import FRACTIONS, SEEDS, few_shot
from mg3d_jax.evaluation.probes.heads import ProbeHead, head_of
from mg3d_jax.evaluation.probes.linear import KINDS, ProbeResult, linear_probe
from mg3d_jax.evaluation.probes.neighbours import nearest_neighbours
from mg3d_jax.html import Section, Table
from mg3d_jax.options import choice, key, problem

logger = logging.getLogger(__name__)
PROTOCOL = (
    "fitted to the embeddings of the training volumes; penalty and number of neighbours chosen on a fifth of the training "
    "patients; interval by resampling the evaluated patients"
)
FEW_PROTOCOL = (
    "everything chosen and fitted within the part of the patients; smaller parts lie in larger ones; a class that a part "
    "shows one outcome of scores as chance; mean over seeds with its 95 % interval (Student's t)"
)
NAMED = 5  # classes of a long list
METHODS = {"linear": "linear probe", "neighbours": "nearest neighbours"}


@dataclass(frozen=True)
class ProbeOptions(EvaluationOptions):
    """Probes of the embeddings."""

    every: int = every_key(NEVER)
    kind: str = key(
        "multi_label",
        "multi_label, or multi_class: labels that exclude one another, of volumes with one present label",
        neutral="multi_label",
    )
    fractions: tuple[float, ...] = key(
        FRACTIONS,
        "percent of the training patients for the probes of few patients; empty: none",
        neutral=FRACTIONS,
    )
    online_fractions: tuple[float, ...] = key(
        (), "those of them that a run in training measures, too; each takes as many fits as there are seeds", neutral=()
    )
    seeds: int = key(SEEDS, "draws of each part of the patients", neutral=SEEDS)
    seed: int = key(0, "of the validation part, and the first of the draws", neutral=0)
    draws: int = key(1000, "resamplings of the evaluated patients for the intervals", neutral=1000)


@dataclass(frozen=True)
class Fitted:
    """Probes of one set of embeddings, and the logits `[n, L]` of the evaluated volumes by method."""

    linear: ProbeResult
    logits: Mapping[str, np.ndarray]
    neighbours: int
    train: Embedded  # without the patients that are evaluated
    shared_patients: int


class Probe(Evaluation):
    """AUROC of probes that were fitted to the embeddings of training volumes. Nothing where there are none."""

    options = ProbeOptions
    needs = ("volumes", "train")

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._last: tuple[Embedded, Fitted] | None = None

    @staticmethod
    def problems(options: ProbeOptions, config: Any) -> list[str]:
        found = choice("evaluations.probe.kind", options.kind, KINDS)
        for name in ("fractions", "online_fractions"):
            if wrong := [percent for percent in getattr(options, name) if not 0 < percent <= 100]:
                found.append(problem(f"evaluations.probe.{name}", wrong[0], "percent above 0 and up to 100"))
        if options.seeds < 1:
            found.append(problem("evaluations.probe.seeds", options.seeds, "must be at least 1"))
        return found

    def lacks(self, found: Embedded) -> str:
        if found.train is None or not len(found.train.volumes):
            return "needs labelled training volumes: give --train-data or --train-embeddings"
        return "" if found.label_names else "needs labels of the volumes that it scores"

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`probe/METHOD/auroc_macro`, with several classes `probe/METHOD/accuracy` too; and for each of `online_fractions` the
        mean over the draws of that share of the training patients, `probe/linear/PERCENT_percent/auroc_macro`."""
        if (fitted := self.fit(found)) is None:
            return {}
        result: dict[str, float] = {}
        for method, logits in fitted.logits.items():
            quick = class_scores.quick(
                found.labels, logits, found.label_names, kind=self.settings.kind, left_out=fitted.linear.not_learned
            )
            result |= {f"probe/{method}/{name}": value for name, value in quick.items() if "auroc/" not in name}
        for row in self._few_shot(found, fitted, self.settings.online_fractions):
            result[f"probe/linear/{row['percent']:g}_percent/auroc_macro"] = row["auroc_macro"]
        return result

    def full(self, found: Embedded) -> dict[str, Any]:
        if (fitted := self.fit(found)) is None:
            return {}
        settings, names = self.settings, found.label_names
        result: dict[str, Any] = {
            "protocol": PROTOCOL,
            "kind": settings.kind,
            "train": {"volumes": len(fitted.train.volumes), "patients": len(np.unique(fitted.train.patients))},
            "evaluated": {"volumes": len(found.volumes), "patients": len(np.unique(found.patients))},
            "shared_patients_left_out": fitted.shared_patients,
        }
        for method, logits in fitted.logits.items():
            result[method] = class_scores.scored(
                found.labels,
                logits,
                names,
                found.patients,
                kind=settings.kind,
                draws=settings.draws,
                left_out=fitted.linear.not_learned,
            )
        learned = [i for i in range(len(names)) if i not in fitted.linear.not_learned]
        result["linear"]["penalties"] = {names[i]: float(fitted.linear.penalties[i]) for i in learned}
        result["linear"]["penalties_at_edge"] = [names[i] for i in fitted.linear.at_edge]
        result["neighbours"]["count"] = fitted.neighbours
        near = result["neighbours"]
        result["by_class"] = {
            name: {
                "auroc": value,
                "auroc_low": low,
                "auroc_high": high,
                "auroc_neighbours": near[f"auroc/{name}"],
                "penalty": result["linear"]["penalties"][name],
            }
            for name, value, (low, high) in class_scores.class_rows(result["linear"])
        }
        result["few_shot"] = self._few_shot(found, fitted, self.settings.fractions)
        return result

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        found: dict[str, float | list[float]] = {}
        for method in METHODS if result else ():
            found |= class_scores.flat(result[method], _protocol_of(method, result["kind"]))
        for row in result.get("few_shot", ()):
            protocol = _protocol_of("linear", result["kind"], row["percent"])
            found[f"{protocol}/seeds={row['seeds']}/auroc_macro"] = row["auroc_macro"]
            if row["seeds"] > 1:
                found[f"{protocol}/seeds={row['seeds']}/auroc_macro_95"] = row["auroc_macro_95"]
        return found

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        if (fitted := self.fit(found)) is None:
            return {}
        return {
            "ids": found.volume_ids,
            "patients": found.patients,
            "labels": found.labels,
            "left_out": np.array(fitted.linear.not_learned, int),
            "kind": np.array(self.settings.kind, str),
        } | {f"logits_{method}": logits for method, logits in fitted.logits.items()}

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for method in METHODS if "kind" in arrays else ():
            kind, weights = str(arrays["kind"]), draws.weights(arrays["patients"])
            left_out = arrays["left_out"].tolist()
            values = class_scores.resampled(
                arrays["labels"], arrays[f"logits_{method}"], weights, kind=kind, left_out=left_out
            )
            found |= {f"{_protocol_of(method, kind)}/{name}": drawn for name, drawn in values.items()}
        return found

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        if not result:
            return []
        return [_summary(result), *([_few_section(result)] if result["few_shot"] else []), _class_section(result)]

    def head(self, found: Embedded, facts: Mapping[str, Any]) -> ProbeHead:
        """The linear probe as a head that can be saved and exported. `UserError` without training volumes."""
        fitted = self.fit(found)
        if fitted is None:
            raise UserError("a probe needs labelled training volumes: there are none")
        train = {"volumes": len(fitted.train.volumes), "patients": len(np.unique(fitted.train.patients))}
        return head_of(fitted.linear, found.label_names, self.settings.kind, dict(facts) | {"fitted_to": train})

    def fit(self, found: Embedded) -> Fitted | None:
        """None without training volumes, or without labels. Of the same embeddings once.

        Training volumes of patients that are also evaluated are left out; classes are found by name. `UserError` where no
        patient or no class remains.
        """
        if found.train is None or self.lacks(found):
            return None
        if self._last is None or self._last[0] is not found:
            self._last = (found, _fit(found, self.settings))
        return self._last[1]

    def _few_shot(self, found: Embedded, fitted: Fitted, fractions: Sequence[float]) -> list[dict[str, Any]]:
        """A row for each share: the macro mean of every seed. All patients are one draw: the probe itself."""
        settings, train = self.settings, fitted.train
        parts = [percent for percent in fractions if percent < 100]
        seeds = range(settings.seed, settings.seed + settings.seeds)
        rows: dict[float, dict[str, Any]] = {}

        def add(percent: float, patients: int, result: ProbeResult) -> None:
            # Classes that no number of patients would teach are in no mean; those that this part lacks are.
            values = class_scores.quick(
                found.labels,
                result.scores,
                found.label_names,
                kind=settings.kind,
                left_out=fitted.linear.not_learned,
            )
            row = rows.setdefault(percent, {"percent": percent, "patients": patients, "values": [], "not_learned": []})
            row["values"].append(values.get("auroc_macro", float("nan")))
            row["not_learned"].append(len(result.not_learned) - len(fitted.linear.not_learned))

        for shot in few_shot(
            train.volumes,
            train.labels,
            train.patients,
            found.volumes,
            fractions=parts,
            seeds=list(seeds),
            kind=settings.kind,
        ):
            add(shot.percent, shot.patients, shot.result)
        if any(percent == 100 for percent in fractions):
            add(100.0, len(np.unique(train.patients)), fitted.linear)
        return [_with_interval(row) for row in rows.values()]


def _fit(found: Embedded, settings: ProbeOptions) -> Fitted:
    train, shared = found.train_of_others()
    if train is None:
        raise UserError(
            "all patients of the training volumes are evaluated, too: a probe of them would measure memory. Give another "
            "split as training data"
        )
    if shared:
        logger.warning("probe: %d training patients are evaluated, too: they are left out of the fit", shared)
    train = dataclasses.replace(
        train, labels=_same_classes(train, found.label_names, settings.kind), label_names=found.label_names
    )
    x, labels, patients = train.volumes, train.labels, train.patients
    linear = linear_probe(x, labels, patients, found.volumes, seed=settings.seed, kind=settings.kind)
    judged = class_scores.judged_labels(labels, settings.kind)
    near = nearest_neighbours(x, judged, patients, found.volumes, seed=settings.seed)
    with np.errstate(divide="ignore"):  # a share of 0 or 1 is an infinite logit
        odds = np.log(near.scores) - (0 if settings.kind == class_scores.MULTI_CLASS else np.log1p(-near.scores))
    return Fitted(linear, {"linear": linear.scores, "neighbours": odds}, near.count, train, shared)


def _same_classes(train: Embedded, names: Sequence[str], kind: str) -> np.ndarray:
    """The labels of the training volumes for these classes, by name; unknown for those that they lack."""
    if kind == class_scores.MULTI_CLASS and set(train.label_names) != set(names):
        raise UserError(
            f"the training volumes have the classes {', '.join(train.label_names)}, the evaluated ones {', '.join(names)}: "
            "classes that exclude one another must be the same"
        )
    column = {name: place for place, name in enumerate(train.label_names)}
    if not column.keys() & set(names):
        raise UserError(
            f"the training volumes have labels for {', '.join(train.label_names)}, the evaluated ones for "
            f"{', '.join(names)}: no class is in both; rename the columns"
        )
    if lacking := [name for name in names if name not in column]:
        logger.warning("probe: the training volumes have no labels for %s", ", ".join(lacking))
    unknown = np.full(len(train.labels), -1, np.int8)
    return np.stack([train.labels[:, column[name]] if name in column else unknown for name in names], axis=1)


def _with_interval(row: dict[str, Any]) -> dict[str, Any]:
    from scipy.stats import t

    values = np.array(row["values"])
    mean, count = float(values.mean()), len(values)
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    found = {"auroc_macro": mean, "auroc_macro_95": [mean - half, mean + half], "seeds": count}
    return row | found | {"not_learned": float(np.mean(row["not_learned"]))}


def _protocol_of(method: str, kind: str, percent: float = 100.0) -> str:
    return f"probe/method={method}/labels={kind}/train_patients={percent:g}%"


def _summary(result: Mapping[str, Any]) -> Section:
    rows, ends = [], []
    for method, words in METHODS.items():
        one = result[method]
        title = f"{words} (k = {one['count']})" if method == "neighbours" else words
        for name, text in class_scores.MEANINGS.items():
            if f"{name}_95" in one:
                low, high = one[f"{name}_95"]
                rows.append((f"{title}: {text}", f"{one[name]:.3f}", f"{low:.3f} to {high:.3f}"))
                ends.append((one[name], low, high))
    table = Table(
        ("probe", "value", "95 % interval", "0 to 1"),
        rows,
        numbers=(1,),
        intervals=ends,
        more=class_scores.left_out_text(result["linear"]),
    )
    train = result["train"]
    protocol = f"{result['protocol']}; {train['volumes']:,} training volumes of {train['patients']:,} patients"
    warnings = []
    if shared := result["shared_patients_left_out"]:
        warnings.append(f"{shared} patients are in the training and the evaluated set: they are left out of the fit.")
    if edge := result["linear"]["penalties_at_edge"]:
        rest = f" and {len(edge) - NAMED} more classes" if len(edge) > NAMED else ""
        warnings.append(
            f"The penalty of the linear probe is at the edge of those tried for {', '.join(edge[:NAMED])}{rest}."
        )
    headline = [("AUROC of a linear probe", f"{result['linear']['auroc_macro']:.3f}")]
    return Section("Probes of the embeddings", protocol, table, warnings=warnings, headline=headline)


def _few_section(result: Mapping[str, Any]) -> Section:
    rows = [
        (
            f"{row['percent']:g} %",
            f"{row['patients']:,}",
            f"{row['auroc_macro']:.3f}",
            "" if row["seeds"] < 2 else "{:.3f} to {:.3f}".format(*row["auroc_macro_95"]),
            str(row["seeds"]),
            f"{row['not_learned']:g}",
        )
        for row in result["few_shot"]
    ]
    head = ("patients", "number", "AUROC, macro mean", "95 % interval", "draws", "classes with one outcome")
    table = Table(head, rows, numbers=(1, 2, 4, 5))
    chart = Chart("AUROC by number of training patients", lambda axes: _curve(axes, result["few_shot"]))
    return Section("Linear probe of few patients", FEW_PROTOCOL, table, charts=[chart])


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    patients, means = [row["patients"] for row in rows], [row["auroc_macro"] for row in rows]
    for row in rows:
        axes.plot([row["patients"]] * len(row["values"]), row["values"], ".", color=COLOURS[0], alpha=0.35)
    axes.plot(patients, means, "o-", color=COLOURS[0])
    axes.axhline(0.5, color=COLOURS[-1], linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="training patients (every draw a dot)", ylabel="AUROC, macro mean")
    axes.set_xticks(patients, [f"{count:,}" for count in patients])
    axes.minorticks_off()
    plain_axes(axes)


def _class_section(result: Mapping[str, Any]) -> Section:
    near = {name: value for name, value, _ in class_scores.class_rows(result["neighbours"])}
    rows = class_scores.class_rows(result["linear"])
    penalties = result["linear"]["penalties"]
    table = Table(
        ("class", "linear probe", "95 % interval", "nearest neighbours", "C", "0 to 1; the line is chance"),
        [
            (name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", f"{near[name]:.3f}", f"{penalties[name]:g}")
            for name, value, (low, high) in rows
        ],
        numbers=(1, 3, 4),
        intervals=[(value, low, high) for _, value, (low, high) in rows],
    )
    return Section("Probes by class", "AUROC of each class; C: the chosen penalty", table, on_terminal=False)
