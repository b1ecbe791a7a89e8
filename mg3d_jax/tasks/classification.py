"""Multi-label classification of the volume: a linear head on the pooled volume features, trained on the record's labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective
from mg3d_jax.objectives.pairwise import zero_unless
from mg3d_jax.options import key

HEAD = "classification_head"


@dataclass(frozen=True)
class ClassificationOptions:
    """Multi-label classification of the batch's labels."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    num_labels: int = key(18, "labels of a record; CT-RATE has 18")
    positive_weight: float = key(1.0, "weight of a present label in the loss; above 1 where present ones are rare")


def problems(options: ClassificationOptions, config: Any) -> list[str]:
    """A head of no labels."""
    if options.num_labels < 1:
        return [f"tasks.classification.num_labels = {options.num_labels}: must be at least 1"]
    return []


def modules(options: ClassificationOptions, context: Context) -> dict[str, nn.Module]:
    """One linear layer. It starts at zero: every label at probability 1/2, and no step into the tower that means nothing."""
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", None))
    return {HEAD: nn.Dense(options.num_labels, kernel_init=zeros)}  # float32, whatever the towers compute in


def features(modules: Any, needed: Features, options: ClassificationOptions) -> Features:
    """`classification_logits` float32 [B, L]."""
    return {"classification_logits": modules[HEAD](needed["volume_pooled"].astype(jnp.float32))}


def loss(features: Features, batch: Batch, options: ClassificationOptions) -> tuple[jax.Array, Metrics]:
    """Mean binary cross-entropy over the known labels of the global batch, present ones counting `positive_weight` times.

    Metrics: `accuracy`, `sensitivity` and `specificity` at probability 1/2, over all labels together, and how many are
    `known`.

    Raises:
        UserError: the batch has another number of labels than the head.
    """
    logits, labels = features["classification_logits"], batch["labels"]
    if labels.shape != logits.shape:
        raise UserError(
            f"the records have {labels.shape[1]} labels, the head {options.num_labels}: set "
            f"tasks.classification.num_labels={labels.shape[1]}"
        )
    known = (labels != UNKNOWN_LABEL) & batch["valid"][:, None]
    logits = zero_unless(known, logits[..., None])[..., 0]
    present, absent = known & (labels == 1), known & (labels == 0)
    losses = options.positive_weight * present * jax.nn.softplus(-logits) + absent * jax.nn.softplus(logits)
    count = jnp.sum(known, dtype=jnp.float32)

    def share(hits: jax.Array, among: jax.Array) -> jax.Array:
        return jnp.sum(hits, dtype=jnp.float32) / jnp.maximum(jnp.sum(among, dtype=jnp.float32), 1.0)

    found, cleared = present & (logits > 0), absent & (logits <= 0)
    metrics = {
        "accuracy": share(found | cleared, known),
        "sensitivity": share(found, present),
        "specificity": share(cleared, absent),
        "known": count,
    }
    return jnp.sum(losses) / jnp.maximum(count, 1.0), jax.lax.stop_gradient(metrics)


CLASSIFICATION = Objective(
    options=ClassificationOptions,
    needs=lambda options: ("volume_pooled",),
    loss=loss,
    features=features,
    modules=modules,
    problems=problems,
)
