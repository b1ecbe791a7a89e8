"""The weighted sum of the enabled objectives.

An objective is a pure function `(features, batch, options) -> (loss, metrics)`: `features` is what the model returned,
reduced by `per_patient`; `batch` what the pipeline gave; `options` its part of `config.objectives`. It has a row in
`OBJECTIVES` and a weight in the config; weight 0 switches it off, and the model then skips what only it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.contrastive import info_nce, sigmoid_contrastive
from mg3d_jax.objectives.discrimination import patient_discrimination
from mg3d_jax.objectives.matching import sentence_matching
from mg3d_jax.objectives.pairwise import l2_normalize, masked_mean
from mg3d_jax.objectives.reconstruction import mean_of_sums, normalize_patches, patch_sums, sentence_sums, token_sums
from mg3d_jax.options import Group

Features = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Objective = Callable[[Features, Batch, Any], tuple[jax.Array, Metrics]]


def alignment(features: Features, batch: Batch, options: Any) -> tuple[jax.Array, Metrics]:
    """Global alignment over the global batch (method.md, loss 1): two pairs, each with its own weight.

    (a) volume embedding against report embedding; (b) the fused patient embedding against the two uni-modal ones side
    by side. A report without any sentence has no embedding and takes no part.
    """
    scale, report_ids = features["logit_scale"], batch["report_id"]
    valid, block_size = batch["valid"] & features["report_has_text"], options.block_size or None
    spread = _spread(features, batch["valid"], valid)
    features, centers = _center(features, batch["valid"], valid) if options.center else (features, {})
    volume = features["volume_embedding"]
    if "view_embeddings" in features:
        report = _direction_of_views(features["view_embeddings"], features["view_mask"])
    else:
        report = features["report_embedding"]

    def pair(text: jax.Array, groups: jax.Array, there: jax.Array) -> tuple[jax.Array, Metrics]:
        common = {"group_ids": groups, "valid": there, "block_size": block_size}
        if options.form == "sigmoid":
            return sigmoid_contrastive(volume, text, scale=scale, bias=features["logit_bias"], **common)
        return info_nce(volume, text, temperature=1.0 / scale, **common)

    if "view_embeddings" in features:
        loss, metrics = _mean_over_views(pair, features, report_ids, valid)
    else:
        loss, metrics = pair(report, report_ids, valid)
    loss *= options.volume_report_weight
    metrics |= {"temperature": 1.0 / scale} | spread | centers
    if options.fused_weight:
        single = jnp.concatenate([report, volume], axis=-1)
        fused, fused_metrics = info_nce(
            features["fused_embedding"],
            single,
            temperature=options.temperature,
            group_ids=report_ids,
            valid=valid,
            block_size=block_size,
        )
        loss += options.fused_weight * fused
        metrics |= {"fused_loss": fused, "fused_accuracy": fused_metrics["accuracy"]}
    return loss, metrics


def embedding_statistics(embeddings: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean norm, and mean cosine over all pairs, of the rows of [..., k] where `mask` [...]; 0 where there are too few.

    A cosine near 1 means that the embeddings have collapsed. The sum of all pairs' cosines is the squared length of the
    sum of the unit vectors, less one for each of them, so that no pair is ever formed.
    """
    embeddings = jax.lax.stop_gradient(embeddings.astype(jnp.float32))
    axes, units = tuple(range(mask.ndim)), l2_normalize(embeddings) * mask[..., None]
    count = jnp.sum(mask, dtype=jnp.float32)
    pairs = jnp.sum(jnp.square(jnp.sum(units, axis=axes))) - jnp.sum(jnp.square(units))
    norm = masked_mean(jnp.linalg.norm(embeddings, axis=-1), mask)
    return norm, pairs / jnp.maximum(count * (count - 1.0), 1.0)


def _spread(features: Features, has_volume: jax.Array, has_text: jax.Array) -> Metrics:
    """`volume_norm`, `volume_cosine`, `report_norm`, `report_cosine` of the embeddings as they are, before centring.

    With single-sentence views the report's are those of the sentences.
    """
    texts, present = _texts(features, has_text)
    metrics: Metrics = {}
    for name, embeddings, mask in (
        ("volume", features["volume_embedding"], has_volume),
        ("report", features[texts], present),
    ):
        metrics[f"{name}_norm"], metrics[f"{name}_cosine"] = embedding_statistics(embeddings, mask)
    return metrics


def _texts(features: Features, has_text: jax.Array) -> tuple[str, jax.Array]:
    """Name of the text embeddings that the alignment reads, and which of them there are: [B], or [B, K] for views."""
    if "view_embeddings" in features:
        return "view_embeddings", has_text[:, None] & features["view_mask"]
    return "report_embedding", has_text


def _center(features: Features, has_volume: jax.Array, has_text: jax.Array) -> tuple[Features, Metrics]:
    """The embeddings minus their mean over the global batch, and those means [k] under `CENTERS`.

    Averaging over many patches makes the embeddings of a young model nearly equal (cosines of 0.99): their norm is all
    common part. InfoNCE then falls fastest by shrinking what differs until no gradient is left, and the model is stuck at
    log B. Without the common part normalised embeddings cannot shrink. The means leave the loss, so the biases of the two
    projections get no gradient: the step lets them follow the means instead (as DINO's center, arXiv 2104.14294), and an
    embedding at test time needs no batch.
    """
    centered, centers = dict(features), {}
    texts, present = _texts(features, has_text)
    for name, mask, projection in (("volume_embedding", has_volume, "volume"), (texts, present, "report")):
        weights = mask[..., None].astype(jnp.float32)
        axes = tuple(range(mask.ndim))
        mean = jnp.sum(features[name] * weights, axis=axes) / jnp.maximum(jnp.sum(weights), 1.0)
        centered[name] = features[name] - mean
        centers[f"{CENTERS}{projection}_projection"] = jax.lax.stop_gradient(mean)
    return centered, centers


def _direction_of_views(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, k], [B, K] -> [B, k]: the mean direction of a report's sentences, which stands for the report."""
    return jnp.sum(l2_normalize(embeddings) * mask[..., None], axis=1)


def _mean_over_views(
    pair: Callable, features: Features, report_ids: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Each drawn sentence is one text of its patient: the losses of the K-th sentences of all patients, averaged over K by
    the number of sentences, so that every sentence counts the same however many its report has.

    Patients that drew the same sentence are not each other's negatives, nor are those with the same report.
    """
    groups = jnp.stack([jnp.broadcast_to(report_ids[:, None], features["view_id"].shape), features["view_id"]], axis=-1)
    there = valid[:, None] & features["view_mask"]
    per_view = jax.vmap(pair, in_axes=1)(features["view_embeddings"], groups, there)
    count = jnp.sum(there, axis=0, dtype=jnp.float32)
    shares = count / jnp.maximum(jnp.sum(count), 1.0)
    return jax.tree.map(lambda values: jnp.sum(values * shares), per_view)


def volume_reconstruction(features: Features, batch: Batch, options: Any) -> tuple[jax.Array, Metrics]:
    """Report-guided masked volume modelling (method.md, loss 2)."""
    means = mean_of_sums(features["voxel_sums"], batch["valid"])
    return means["loss"], {"patches": means["count"]}


def report_reconstruction(features: Features, batch: Batch, options: Any) -> tuple[jax.Array, Metrics]:
    """Volume-guided masked report modelling with the sentence-alignment term (method.md, loss 2)."""
    tokens = mean_of_sums(features["token_sums"], batch["valid"])
    sentences = mean_of_sums(features["sentence_sums"], batch["valid"])
    metrics = {"tokens": tokens["count"], "token_loss": tokens["loss"], "accuracy": tokens["accuracy"]}
    metrics["sentence_loss"] = sentences["loss"]
    return tokens["loss"] + options.sentence_weight * sentences["loss"], metrics


def matching(features: Features, batch: Batch, options: Any) -> tuple[jax.Array, Metrics]:
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


def discrimination(features: Features, batch: Batch, options: Any) -> tuple[jax.Array, Metrics]:
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

# Metrics under this prefix are means of embeddings [k], named after the projection whose bias follows them.
CENTERS = "center/"

# What the objectives read of the model's features as it is: one row per patient, small.
SMALL_FEATURES = (
    "volume_embedding", "report_embedding", "report_has_text", "view_embeddings", "view_mask", "view_id",
    "fused_embedding", "fused_volume_embedding", "z", "sentence_targets", "sentence_mask",
)  # fmt: skip


def enabled(objectives: Group) -> tuple[str, ...]:
    """Names of the objectives with a positive weight, in the table's order."""
    return tuple(name for name in OBJECTIVES if objectives[name].weight > 0)


def per_patient(features: Features, objectives: Group) -> Features:
    """The model's features, reduced to what the losses need: embeddings, and sums of the reconstruction losses."""
    small = {name: features[name] for name in SMALL_FEATURES if name in features}
    if "voxel_prediction" in features:
        target = features["patches"]
        if objectives["volume_reconstruction"].normalize_target:
            target = normalize_patches(target)
        small["voxel_sums"] = patch_sums(features["voxel_prediction"], target, features["patch_mask"])
    if "token_logits" in features:
        small["token_sums"] = token_sums(features["token_logits"], features["token_labels"], features["token_selected"])
        pair = features["reconstructed_sentences"], features["original_sentences"]
        small["sentence_sums"] = sentence_sums(*pair, features["sentence_mask"])
    return small


def multitask_loss(features: Features, batch: Batch, objectives: Group) -> tuple[jax.Array, Metrics]:
    """Sum of `weight * loss` over the enabled objectives, from the features that `per_patient` returned.

    The metrics carry the total as `loss`, each unweighted loss as `NAME` and its details as `NAME/...`.
    """
    total, metrics = jnp.float32(0.0), {}
    for name in enabled(objectives):
        loss, details = OBJECTIVES[name](features, batch, objectives[name])
        total += objectives[name].weight * loss
        metrics |= {name: loss}
        metrics |= {key if key.startswith(CENTERS) else f"{name}/{key}": value for key, value in details.items()}
    return total, {"loss": total} | metrics
