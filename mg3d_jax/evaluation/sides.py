"""Left against right: does a scan agree more with a sentence of its report than with the same sentence of the other side?

Only the words of the side differ between the two, so chance is 1/2 for every sentence, whatever else the model knows. A
model that was trained with flipped volumes, or reads volumes in another orientation than it was trained with, stays there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.charts import COLOURS, Chart
from mg3d_jax.evaluation.base import NEVER, Embedded, Evaluation, EvaluationOptions, every_key
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval, weighted_mean
from mg3d_jax.html import Section, Table, number
from mg3d_jax.options import key

SIDES = ("left", "right")
PROTOCOL = (
    "a sentence that names one side against the same sentence with the other side, by cosine to the volume of its report; "
    "ties count half; chance is 0.5; interval by resampling patients"
)
_WORDS = re.compile(r"\b(left|right)(?=\b|-)", re.IGNORECASE)


@dataclass(frozen=True)
class SidesOptions(EvaluationOptions):
    """Left against right."""

    every: int = every_key(NEVER)
    most_sentences: int = key(20000, "pairs of volume and sentence that are compared at most", neutral=20000)
    draws: int = key(1000, "resamplings of the patients for the interval", neutral=1000)


def side_of(sentence: str) -> str | None:
    """The side that a sentence names, "left" or "right"; None where it names none or both."""
    found = {word.lower() for word in _WORDS.findall(sentence)}
    return found.pop() if len(found) == 1 else None


def other_side(sentence: str) -> str:
    """The sentence with left and right exchanged; capitals are kept."""

    def exchange(match: re.Match[str]) -> str:
        word = match.group()
        new = SIDES[1 - SIDES.index(word.lower())]
        return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new

    return _WORDS.sub(exchange, sentence)


class Sides(Evaluation):
    """How often a volume prefers the side that its report names, and which side is taken for which."""

    options = SidesOptions
    needs = ("reports", "model")

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`sides/accuracy`; absent where no report names a single side."""
        sentences, rows = _pairs(found, self.settings.most_sentences)
        if not sentences:
            return {}
        return {"sides/accuracy": float(_correct(_margins(found, sentences, rows)).mean())}

    def full(self, found: Embedded) -> dict[str, Any]:
        sentences, rows = _pairs(found, self.settings.most_sentences)
        if not sentences:
            return {"protocol": PROTOCOL, "sentences": 0}
        margins = _margins(found, sentences, rows)
        correct, named = _correct(margins), np.array([side_of(sentence) for sentence in sentences])
        patients = found.patients[rows]
        weights = PatientDraws(patients, self.settings.draws).weights(patients)
        examples = np.argsort(-margins)
        return {
            "protocol": PROTOCOL,
            "sentences": len(sentences),
            "patients": len(np.unique(patients)),
            "accuracy": float(correct.mean()),
            "accuracy_95": interval(weighted_mean(correct, weights)),
            "confusion": {side: _taken_for(named == side, correct, side) for side in SIDES},
            "clearest": [sentences[i] for i in examples[:3]],
            "most_wrong": [sentences[i] for i in examples[::-1][:3] if margins[i] < 0],
        }

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        names = ("accuracy", "accuracy_95")
        return {f"sides/exchanged_sentences/{name}": result[name] for name in names if name in result}

    def section(self, result: Mapping[str, Any]) -> Section:
        if not result["sentences"]:
            nothing = Table(("what", "value"), [("sentences that name one side", "0")])
            return Section("Left against right", result["protocol"], nothing)
        low, high = result["accuracy_95"]
        confusion = result["confusion"]
        rows = [(f"report says {side}", *(number(confusion[side][other]) for other in SIDES)) for side in SIDES]
        table = Table(("", "taken for left", "taken for right"), rows, numbers=(1, 2))
        warnings = []
        if low <= 0.5 <= high:
            warnings.append(
                f"Sides are not told apart: {result['accuracy']:.3f} ({low:.3f} to {high:.3f}) includes chance. Flips of the "
                "left-right axis in training, or an orientation that differs from training, have this effect."
            )
        elif high < 0.5:
            warnings.append(
                f"Sides are exchanged: {result['accuracy']:.3f} is below chance. Check the orientation of the volumes."
            )
        title = f"{result['sentences']:,} sentences that name one side"
        return Section(
            "Left against right",
            result["protocol"],
            table,
            warnings=warnings,
            charts=[Chart(title, lambda axes: _matrix(axes, confusion), (3.4, 2.9))],
            headline=[("side of a finding (chance 0.5)", f"{result['accuracy']:.3f}")],
        )


def _pairs(found: Embedded, most: int) -> tuple[list[str], np.ndarray]:
    """Sentences that name one side, and for each the row of the volume that it belongs to."""
    pairs = [(sentence, row) for row, sentence in found.sentences() if side_of(sentence)]
    if len(pairs) > most:  # evenly over all patients
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).round().astype(int)]
    return [sentence for sentence, _ in pairs], np.array([row for _, row in pairs], int)


def _margins(found: Embedded, sentences: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """By how much each volume is nearer to its sentence than to that of the other side. NaN counts against."""
    assert found.model is not None
    embedder = found.model.embedder
    texts = [[[text]] for sentence in sentences for text in (sentence, other_side(sentence))]
    rows_of_texts = embedder.texts(found.model.params, embedder.tokenize(texts)).reshape(len(sentences), 2, -1)
    similarity = np.einsum("nk,nsk->ns", found.volumes[rows].astype(np.float64), rows_of_texts.astype(np.float64))
    return np.nan_to_num(similarity[:, 0] - similarity[:, 1], nan=-np.inf)


def _correct(margins: np.ndarray) -> np.ndarray:
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))


def _taken_for(named: np.ndarray, correct: np.ndarray, side: str) -> dict[str, float]:
    """Shares of the sentences that name `side`; NaN where there are none."""
    right = float(correct[named].mean()) if named.any() else float("nan")
    return {other: right if other == side else 1 - right for other in SIDES}


def _matrix(axes: Any, confusion: Mapping[str, Mapping[str, float]]) -> None:
    values = np.array([[confusion[side][other] for other in SIDES] for side in SIDES])
    axes.imshow(np.nan_to_num(values), vmin=0, vmax=1, cmap="Blues", alpha=0.8)
    for (i, j), value in np.ndenumerate(values):
        axes.text(
            j, i, number(value, 2), ha="center", va="center", color="white" if value > 0.6 else COLOURS[0], fontsize=13
        )
    axes.set_xticks((0, 1), [f"taken for {side}" for side in SIDES])
    axes.set_yticks((0, 1), [f"report says {side}" for side in SIDES], rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
