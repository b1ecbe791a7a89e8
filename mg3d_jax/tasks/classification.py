"""Classification of the volume: a linear head on the pooled volume features, trained on the record's labels.

"multi_label": every label is a finding of its own. "multi_class": the labels exclude one another, and a volume's class is
the one that is present.
"""

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
from mg3d_jax.options import choice, key

KINDS = ("multi_label", "multi_class")
HEAD = "classification_head"


@dataclass(frozen=True)
class ClassificationOptions:
    """Classification of the batch's labels."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    num_labels: int = key(18, "labels of a record; CT-RATE has 18")
    positive_weight: float = key(1.0, "weight of a present label in the loss; above 1 where present ones are rare")
    kind: str = key(
        "multi_label",
        "multi_label: a sigmoid for each label; multi_class: a softmax over them, of volumes with one present label",
        neutral="multi_label",
    )
    balance: bool = key(
        False,
        "do the outcomes of a label (multi_label), or the classes, of a batch weigh the same however frequent they are?",
        neutral=False,
    )


def problems(options: ClassificationOptions, config: Any) -> list[str]:
    """A head of no labels, an unknown kind, a weight that this kind does not read."""
    found = choice("tasks.classification.kind", options.kind, KINDS)
    least = 2 if options.kind == "multi_class" else 1
    if options.num_labels < least:
        found.append(f"tasks.classification.num_labels = {options.num_labels}: must be at least {least}")
    if options.balance and options.positive_weight != 1:
        found.append("tasks.classification: give balance or a positive_weight, not both")
    if options.kind == "multi_class" and options.positive_weight != 1:
        found.append(
            f"tasks.classification.positive_weight = {options.positive_weight} means nothing with kind = 'multi_class': "
            "leave it at 1"
        )
    return found


def modules(options: ClassificationOptions, context: Context) -> dict[str, nn.Module]:
    """One linear layer. It starts at zero: every label at probability 1/2, and no step into the tower that means nothing."""
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", None))
    return {HEAD: nn.Dense(options.num_labels, kernel_init=zeros)}  # float32, whatever the towers compute in


def features(modules: Any, needed: Features, options: ClassificationOptions) -> Features:
    """`classification_logits` float32 [B, L]."""
    return {"classification_logits": modules[HEAD](needed["volume_pooled"].astype(jnp.float32))}


def loss(features: Features, batch: Batch, options: ClassificationOptions) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy over what is known in the global batch.

    "multi_label": binary, over the known labels, present ones counting `positive_weight` times. Metrics: `accuracy`,
    `sensitivity` and `specificity` at probability 1/2, over all labels together, and how many are `known`.
    "multi_class": of the softmax, over the volumes with exactly one present label. Metrics: `accuracy` of the most likely
    class, and how many volumes are `known`.
    With `balance` both outcomes of each label, and all classes, that the batch has weigh the same in the sum.

    Raises:
        UserError: the batch has another number of labels than the head.
    """
    logits, labels = features["classification_logits"], batch["labels"]
    if labels.shape != logits.shape:
        raise UserError(
            f"the records have {labels.shape[1]} labels, the head {options.num_labels}: set "
            f"tasks.classification.num_labels={labels.shape[1]}"
        )
    if options.kind == "multi_class":
        return _multi_class_loss(logits, labels, batch["valid"], balance=options.balance)
    known = (labels != UNKNOWN_LABEL) & batch["valid"][:, None]
    logits = zero_unless(known, logits[..., None])[..., 0]
    present, absent = known & (labels == 1), known & (labels == 0)
    weights: tuple[Any, ...] = (options.positive_weight, 1.0)
    if options.balance:  # of each label, over the batch
        weights = even_weights(jnp.sum(present, axis=0), jnp.sum(absent, axis=0))
    losses = weights[0] * present * jax.nn.softplus(-logits) + weights[1] * absent * jax.nn.softplus(logits)
    found, cleared = present & (logits > 0), absent & (logits <= 0)
    metrics = {
        "accuracy": _share(found | cleared, known),
        "sensitivity": _share(found, present),
        "specificity": _share(cleared, absent),
        "known": jnp.sum(known, dtype=jnp.float32),
    }
    return jnp.sum(losses) / jnp.maximum(metrics["known"], 1.0), jax.lax.stop_gradient(metrics)


def even_weights(*counts: jax.Array) -> tuple[jax.Array, ...]:
    """A weight for each group of so many, with which all groups that are not empty weigh the same and the sum of the weights is
    the number of all."""
    groups = jnp.maximum(sum((count > 0).astype(jnp.float32) for count in counts), 1.0)
    return tuple(sum(counts) / (groups * jnp.maximum(count, 1)) for count in counts)


def _multi_class_loss(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, balance: bool
) -> tuple[jax.Array, Metrics]:
    present = labels == 1
    known = (jnp.sum(present, axis=1) == 1) & valid
    logits = zero_unless(known, logits)
    losses = jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * present, axis=1)
    right = known & (jnp.argmax(logits, axis=1) == jnp.argmax(present, axis=1))
    metrics = {"accuracy": _share(right, known), "known": jnp.sum(known, dtype=jnp.float32)}
    weights = known.astype(jnp.float32)
    if balance:
        of_class = present & known[:, None]
        even = jnp.stack(even_weights(*jnp.sum(of_class, axis=0)))
        weights *= jnp.sum(of_class * even, axis=1)
    mean = jnp.sum(losses * weights) / jnp.maximum(metrics["known"], 1.0)
    return mean, jax.lax.stop_gradient(metrics)


def _share(hits: jax.Array, among: jax.Array) -> jax.Array:
    return jnp.sum(hits, dtype=jnp.float32) / jnp.maximum(jnp.sum(among, dtype=jnp.float32), 1.0)


CLASSIFICATION = Objective(
    options=ClassificationOptions,
    needs=lambda options: ("volume_pooled",),
    loss=loss,
    features=features,
    modules=modules,
    problems=problems,
)
