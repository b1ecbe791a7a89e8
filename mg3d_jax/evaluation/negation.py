"""Presence against absence: does the report encoder tell "X is present" from "X is not present", and does a volume?

Two questions that a low zero-shot number leaves open. The texts alone: a linear map is fitted to wordings of presence and
absence of all findings but one, and asked about that one. With volumes: each statement of a report, as the report has it,
against its opposite, by the volume of that report. If the first fails, the report encoder mixes up presence and absence; if
only the second does, the volumes do not show what is said, or were not trained to agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.charts import COLOURS, Chart, plain_axes
from mg3d_jax.evaluation.base import NEVER, Embedded, Evaluation, EvaluationOptions, Text, every_key
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, weighted_mean
from mg3d_jax.evaluation.probes.logistic import fit_binary
from mg3d_jax.html import Section, Table, number
from mg3d_jax.language.statements import chosen, statements
from mg3d_jax.options import key

PENALTY = 1.0  # scikit-learn's C, on standardised embeddings
PROTOCOL = (
    "texts: wordings of presence and absence of a finding, told apart by a linear map fitted to those of all other findings; "
    "volumes: a statement of a report against its opposite, by cosine to the volume of the report less the mean volume; ties "
    "count half; chance is 0.5; interval by resampling patients"
)
LOW = 0.9  # of the texts: below it the report encoder is to blame
KINDS = {True: "present", False: "absent", None: "state"}


@dataclass(frozen=True)
class NegationEvaluationOptions(EvaluationOptions):
    """Presence against absence."""

    every: int = every_key(NEVER)
    language: str = key(
        "en", "rules for presence and absence: a language of the package, or a .toml file", neutral="en"
    )
    most_statements: int = key(20000, "pairs of volume and statement that are compared at most", neutral=20000)
    draws: int = key(1000, "resamplings of the patients for the interval", neutral=1000)


class Negation(Evaluation):
    """How well presence is told from absence: by the texts alone, finding by finding, and by the volumes."""

    options = NegationEvaluationOptions
    needs = ("reports", "model")

    def texts(self, label_names: Sequence[str]) -> Sequence[Text]:
        rules = statements(self.settings.language)
        return [[text] for name in label_names for side in (True, False) for text in rules.wordings(name, present=side)]

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`negation/texts` and `negation/volumes`, accuracies; each is absent where there is nothing to ask."""
        by_finding, compared = self._of_texts(found), self._of_volumes(found)
        values = {}
        if by_finding:
            values["negation/texts"] = float(np.mean(list(by_finding.values())))
        if compared:
            values["negation/volumes"] = float(compared["correct"].mean())
        return values

    def full(self, found: Embedded) -> dict[str, Any]:
        by_finding, compared = self._of_texts(found), self._of_volumes(found)
        result: dict[str, Any] = {"protocol": PROTOCOL, "statements": 0}
        if by_finding:
            result |= {"texts": float(np.mean(list(by_finding.values()))), "texts_by_finding": by_finding}
        if compared:
            correct, patients = compared["correct"], compared["patients"]
            weights = PatientDraws(patients, self.settings.draws).weights(patients)
            kinds = {kind: correct[compared["kinds"] == kind] for kind in KINDS.values()}
            result |= {
                "statements": len(correct),
                "volumes": float(correct.mean()),
                "volumes_95": interval(weighted_mean(correct, weights)),
                "volumes_by_kind": {kind: float(right.mean()) for kind, right in kinds.items() if len(right)},
            }
        return result

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        names = {
            "texts": "leave_one_finding_out/accuracy",
            "volumes": "opposite_statements/accuracy",
            "volumes_95": "opposite_statements/accuracy_95",
        }
        return {f"negation/{long}": result[name] for name, long in names.items() if name in result}

    def section(self, result: Mapping[str, Any]) -> Section:
        rows, warnings, charts, headline = [], [], [], []
        if "texts" in result:
            rows.append(("texts alone, a finding left out of the fit", number(result["texts"]), ""))
            headline.append(("presence told from absence, texts (chance 0.5)", number(result["texts"])))
            by_finding = result["texts_by_finding"]
            charts.append(
                Chart(
                    "Texts alone, by finding", lambda axes: _bars(axes, by_finding), (5.0, 0.6 + 0.2 * len(by_finding))
                )
            )
            if result["texts"] < LOW:
                warnings.append(
                    f"The report encoder mixes up presence and absence ({number(result['texts'])} of the wordings are told "
                    "apart): zero-shot prompts cannot work. Train with objectives.negation.weight, or start from a "
                    "pre-trained report encoder."
                )
        if "volumes" in result:
            low, high = result["volumes_95"]
            rows.append(
                ("volume: statements against their opposites", number(result["volumes"]), f"{low:.3f} to {high:.3f}")
            )
            by_kind = result["volumes_by_kind"]
            rows += [(f"... statements of {_WORDS[kind]}", number(value), "") for kind, value in by_kind.items()]
            headline.append(("presence told from absence, volumes (chance 0.5)", number(result["volumes"])))
            if low <= 0.5 and result.get("texts", 1.0) >= LOW:
                warnings.append(
                    "The texts tell presence from absence, the volumes do not: they were not trained to agree with what a "
                    "statement says (objectives.negation.weight), or do not show it."
                )
        if not rows:
            rows = [("statements that the rules understand", "0", "")]
        table = Table(("what is told apart", "accuracy", "95 % interval"), rows, numbers=(1, 2))
        return Section(
            "Presence against absence", result["protocol"], table, warnings=warnings, charts=charts, headline=headline
        )

    def _of_texts(self, found: Embedded) -> dict[str, float]:
        """Accuracy by finding; {} for fewer than two findings."""
        names = found.label_names
        if len(names) < 2 or not len(found.texts):
            return {}
        x = found.texts.astype(np.float64)
        x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
        each = len(x) // len(names)
        present = (np.arange(len(x)) % each < each // 2).astype(np.int8)
        finding = np.arange(len(x)) // each
        labels = np.where(finding[:, None] == np.arange(len(names)), -1, present[:, None]).astype(np.int8)
        weights = fit_binary(x, labels, np.full(len(names), PENALTY))
        logits = x @ weights[:-1] + weights[-1]
        right = (logits > 0) == (present[:, None] == 1)
        return {name: float(right[finding == row, row].mean()) for row, name in enumerate(names)}

    def _of_volumes(self, found: Embedded) -> dict[str, np.ndarray]:
        """`correct`, `kinds` and `patients` of every comparison; {} where the rules understand no statement."""
        rules = statements(self.settings.language)
        pairs: list[tuple[int, str, str, str]] = []
        for row, sentence in found.sentences():
            if one := rules.parse(sentence):
                pairs.append((row, sentence, chosen(one.opposite, sentence), KINDS[one.present]))
        if not pairs:
            return {}
        if len(pairs) > self.settings.most_statements:  # evenly over all patients
            pairs = [
                pairs[i] for i in np.linspace(0, len(pairs) - 1, self.settings.most_statements).round().astype(int)
            ]
        rows, said, opposite, kinds = zip(*pairs, strict=True)
        distinct = list(dict.fromkeys((*said, *opposite)))
        assert found.model is not None
        embedder = found.model.embedder
        embedded = embedder.texts(found.model.params, embedder.tokenize([[[text]] for text in distinct])).astype(
            np.float64
        )
        place = {text: number for number, text in enumerate(distinct)}
        difference = embedded[[place[text] for text in said]] - embedded[[place[text] for text in opposite]]
        volumes = found.volumes.astype(np.float64)
        margins = np.einsum("nk,nk->n", (volumes - volumes.mean(axis=0))[list(rows)], difference)
        margins = np.nan_to_num(margins, nan=-np.inf)  # NaN counts against
        return {
            "correct": np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0)),
            "kinds": np.array(kinds),
            "patients": found.patients[list(rows)],
        }


_WORDS = {"present": "presence", "absent": "absence", "state": "how something is"}


def _bars(axes: Any, values: Mapping[str, float]) -> None:
    plain_axes(axes)
    names = list(values)[::-1]
    axes.barh(names, [values[name] for name in names], color=COLOURS[0], height=0.6)
    axes.axvline(0.5, color=COLOURS[1], linewidth=1)
    axes.set_xlim(0, 1)
