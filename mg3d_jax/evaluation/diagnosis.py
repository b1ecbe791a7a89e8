"""Why a zero-shot number is what it is: plain sentences for whoever reads it, each with the numbers it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mg3d_jax.evaluation.bootstrap import interval
from mg3d_jax.evaluation.scoring import TUNED
from mg3d_jax.evaluation.zero_shot_numbers import FEW, prefixes

NOTABLE = 0.03  # a difference of AUROCs that is worth a sentence, where its interval leaves 0 out
ALIKE = 0.98  # mean cosine of volumes that can hardly be told apart


def warnings(
    arrays: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    result: Mapping[str, Any],
    volumes: np.ndarray,
    general: Sequence[str],
) -> list[str]:
    """What a reader should know before using the macro AUROC of `result`.

    Args:
        arrays, values: of the evaluation: scores, and `[1 + draws]` of every metric by its key.
        volumes: `[n, k]` embeddings.
        general: classes that a published set of prompts does not word.
    """
    if np.isnan(result["auroc_macro"]):
        return [
            "No class has both outcomes among the known labels: there is no AUROC.",
            *_about_labels(result, general),
        ]
    found = [*_against_baselines(arrays, values), *_other_prompts(arrays, result)]
    inverted = {name: row for name, row in result["by_class"].items() if row["inverted"]}
    if inverted:
        each = [f"{name} {row['auroc']:.2f} (turned {row['turned_auroc']:.2f})" for name, row in inverted.items()]
        found.append(
            f"Inverted prompt? On the wrong side of chance: {', '.join(each)}. Look at the wording of these prompts, and at "
            "the column of the labels."
        )
    mean = volumes.astype(np.float64).mean(axis=0)
    if (alike := float(mean @ mean)) > ALIKE:
        found.append(
            f"The volumes lie close together (mean cosine {alike:.3f}): the model hardly tells them apart, or it has collapsed."
        )
    if (error := result.get("calibration_error_macro", 0.0)) > 0.1:
        found.append(
            f"The probabilities are not calibrated: they are {error:.2f} away from the observed share on average. Use them to "
            "rank, not to decide at 0.5."
        )
    if result["choices"]["thresholds"] == TUNED:
        found.append(
            "F1, balanced accuracy, sensitivity and specificity use thresholds tuned on the evaluated labels: they are too "
            "good, and do not compare with thresholds from training volumes."
        )
    return found + _about_labels(result, general)


def _macro(values: Mapping[str, np.ndarray], part: str) -> np.ndarray | None:
    """The draws of the macro AUROC whose key has this part."""
    found = [value for key, value in values.items() if key.endswith("/auroc_macro") and part in key]
    return found[0] if found and not np.isnan(found[0][0]) else None


def _against_baselines(arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> list[str]:
    found = []
    pair = values[f"{prefixes(arrays)[0]}auroc_macro"]
    severity, probe = _macro(values, "/score=severity_baseline/"), _macro(values, "/score=linear_probe")
    if severity is not None:
        low, high = interval(pair - severity)
        if low <= 0:
            found.append(
                f"{pair[0]:.2f} is not above the severity baseline of {severity[0]:.2f} (difference "
                f"{pair[0] - severity[0]:+.2f}, 95 % {low:+.2f} to {high:+.2f}): the count of a patient's "
                "other findings scores as well without the image."
            )
    if probe is not None:
        where = (
            "trained on the training volumes"
            if "on_train" in str(arrays["probe_name"])
            else "in folds of these patients"
        )
        low = interval(probe - pair)[0]
        if probe[0] - pair[0] > NOTABLE and low > 0:
            found.append(
                f"A linear probe ({where}) reaches {probe[0]:.2f} on the same embeddings, the prompts {pair[0]:.2f}: the "
                "findings are in the embeddings, the prompts do not reach them."
            )
        elif probe[0] < 0.65 and pair[0] < 0.65:
            found.append(
                f"A linear probe ({where}) reaches only {probe[0]:.2f} on the same embeddings: the findings are hardly in the "
                "embeddings, and other prompts will not help."
            )
    positive = _macro(values, f"/prompts={arrays['prompts']}/score=positive/")
    if positive is not None and arrays["scoring"] != "positive" and positive[0] - pair[0] > NOTABLE:
        low, high = interval(positive - pair)
        if low > 0:
            found.append(
                f"The positive prompt alone reaches {positive[0]:.2f}, the pair {pair[0]:.2f} (difference "
                f"{positive[0] - pair[0]:+.2f}, 95 % {low:+.2f} to {high:+.2f}): the sign of the pair is not learned. The "
                "model reads which finding a prompt names, and not whether it denies it."
            )
    return found


def _other_prompts(arrays: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> list[str]:
    """Where another set of prompts reaches clearly more by the same scoring."""
    how = "positive" if arrays["scoring"] == "positive" else "softmax"
    spread = {
        key.partition("/prompts=")[2].partition("/")[0]: value
        for key, value in result["numbers"].items()
        if "/prompts=" in key and key.endswith(f"/score={how}/auroc_macro")
    }
    spread[str(arrays["prompts"])] = result["auroc_macro"]
    best, worst = max(spread, key=spread.__getitem__), min(spread, key=spread.__getitem__)
    if spread[best] - spread[worst] <= NOTABLE or len(spread) < 2:
        return []
    return [
        f"The wording decides: by set of prompts the macro AUROC goes from {spread[worst]:.2f} ({worst}) to {spread[best]:.2f} "
        f"({best}). To choose the best one on these labels would be tuning on them."
    ]


def _about_labels(result: Mapping[str, Any], general: Sequence[str]) -> list[str]:
    found = []
    if undefined := result["classes_without_both_outcomes"]:
        found.append(f"Undefined and not part of any mean, all present or all absent: {', '.join(undefined)}.")
    few = {
        name: row
        for name, row in result["by_class"].items()
        if name not in undefined and min(row["present"], row["absent"]) < FEW
    }
    if few and len(few) == len(result["by_class"]) - len(undefined):
        found.append(f"Every class has fewer than {FEW} volumes of one outcome: these AUROCs say little.")
    elif few:
        each = [f"{name} ({row['present']} present, {row['absent']} absent)" for name, row in few.items()]
        found.append(f"Few volumes of one outcome, so that the AUROC says little: {', '.join(each)}.")
    if without := result["classes_without_prompts"]:
        found.append(f"Not scored, because the embeddings have no prompts for them: {', '.join(without)}.")
    if general:
        found.append(
            f"The published prompts {result['choices']['prompts']} have no wording for {', '.join(general)}: they got the "
            "general pattern."
        )
    return found
