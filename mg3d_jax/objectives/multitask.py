"""The weighted sum of the enabled objectives.

An objective is a pure function `(features, batch, options) -> (loss, metrics)`: `features` is what the model returned,
reduced by `per_patient`; `batch` what the pipeline gave; `options` its part of `config.objectives`. It has a row in
`OBJECTIVES` and a weight in the config; weight 0 switches it off, and the model then does not compute what only it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mg3d_jax.objectives.contrastive import info_nce, sigmoid_contrastive
from mg3d_jax.objectives.discrimination import patient_discrimination
from mg3d_jax.objectives.matching import sentence_matching
from mg3d_jax.objectives.reconstruction import mean_of_sums, normalize_patches, patch_sums, sentence_sums, token_sums

Features = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Objective = Callable[[Features, Batch, ConfigDict], tuple[jax.Array, Metrics]]


def alignment(features: Features, batch: Batch, options: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Global alignment over the global batch (method.md, loss 1): two pairs, each with its own weight.

    (a) volume embedding against report embedding; (b) the fused patient embedding against the two uni-modal ones side by
    side. A report without any sentence has no embedding and takes no part.
    """
    scale = features["logit_scale"]
    common = {
        "group_ids": batch["report_id"],
        "valid": batch["valid"] & features["report_has_text"],
        "block_size": options.block_size or None,
    }
    volume, report = features["volume_embedding"], features["report_embedding"]
    if options.form == "sigmoid":
        loss, metrics = sigmoid_contrastive(volume, report, scale=scale, bias=features["logit_bias"], **common)
    else:
        loss, metrics = info_nce(volume, report, temperature=1.0 / scale, **common)
    loss *= options.volume_report_weight
    metrics |= {"temperature": 1.0 / scale}
    if options.fused_weight:
        single = jnp.concatenate([report, volume], axis=-1)
        fused, fused_metrics = info_nce(features["fused_embedding"], single, temperature=options.temperature, **common)
        loss += options.fused_weight * fused
        metrics |= {"fused_loss": fused, "fused_accuracy": fused_metrics["accuracy"]}
    return loss, metrics


def volume_reconstruction(features: Features, batch: Batch, options: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Report-guided masked volume modelling (method.md, loss 2)."""
    means = mean_of_sums(features["voxel_sums"], batch["valid"])
    return means["loss"], {"patches": means["count"]}


def report_reconstruction(features: Features, batch: Batch, options: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Volume-guided masked report modelling with the sentence-alignment term (method.md, loss 2)."""
    tokens = mean_of_sums(features["token_sums"], batch["valid"])
    sentences = mean_of_sums(features["sentence_sums"], batch["valid"])
    metrics = {"tokens": tokens["count"], "token_loss": tokens["loss"], "accuracy": tokens["accuracy"]}
    metrics["sentence_loss"] = sentences["loss"]
    return tokens["loss"] + options.sentence_weight * sentences["loss"], metrics


def matching(features: Features, batch: Batch, options: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Sentence-wise semantic matching between patients (method.md, loss 3). Scans of one patient are never paired."""
    return sentence_matching(
        features["z"],
        features["sentence_targets"],
        features["sentence_mask"] & batch["valid"][:, None],
        group_ids=batch["patient_id"],
        high=options.high,
        low=options.low,
        average=options.average,
        block_size=options.block_size or None,
    )


def discrimination(features: Features, batch: Batch, options: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Patient discrimination (method.md, loss 4)."""
    return patient_discrimination(
        features["fused_volume_embedding"],
        features["z"],
        features["sentence_mask"],
        temperature=options.temperature,
        group_ids=batch["report_id"],
        valid=batch["valid"],
        block_size=options.block_size or None,
    )


OBJECTIVES: dict[str, Objective] = {
    "alignment": alignment,
    "volume_reconstruction": volume_reconstruction,
    "report_reconstruction": report_reconstruction,
    "matching": matching,
    "discrimination": discrimination,
}

# What the objectives read of the model's features as it is: one row per patient, small.
SMALL_FEATURES = (
    "volume_embedding", "report_embedding", "report_has_text", "fused_embedding", "fused_volume_embedding", "z",
    "sentence_targets", "sentence_mask",
)  # fmt: skip


def enabled(objectives: ConfigDict) -> tuple[str, ...]:
    """Names of the objectives with a positive weight, in the table's order."""
    return tuple(name for name in OBJECTIVES if objectives[name].weight > 0)


def per_patient(features: Features, objectives: ConfigDict) -> Features:
    """The model's features, reduced to what the losses need: embeddings, and for the reconstructions sums per patient."""
    small = {name: features[name] for name in SMALL_FEATURES if name in features}
    if "voxel_prediction" in features:
        target = features["patches"]
        if objectives.volume_reconstruction.normalize_target:
            target = normalize_patches(target)
        small["voxel_sums"] = patch_sums(features["voxel_prediction"], target, features["patch_mask"])
    if "token_logits" in features:
        small["token_sums"] = token_sums(features["token_logits"], features["token_labels"], features["token_selected"])
        pair = features["reconstructed_sentences"], features["original_sentences"]
        small["sentence_sums"] = sentence_sums(*pair, features["sentence_mask"])
    return small


def multitask_loss(features: Features, batch: Batch, objectives: ConfigDict) -> tuple[jax.Array, Metrics]:
    """Sum of `weight * loss` over the enabled objectives, from the features that `per_patient` returned.

    The metrics carry the total as `loss`, each unweighted loss as `NAME` and its details as `NAME/...`.
    """
    total, metrics = jnp.float32(0.0), {}
    for name in enabled(objectives):
        loss, details = OBJECTIVES[name](features, batch, objectives[name])
        total += objectives[name].weight * loss
        metrics |= {name: loss} | {f"{name}/{key}": value for key, value in details.items()}
    return total, {"loss": total} | metrics
