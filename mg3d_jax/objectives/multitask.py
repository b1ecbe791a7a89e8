"""The weighted sum of the objectives and tasks that are on."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.base import CENTERS, Batch, Enabled, Features, Metrics


def multitask_loss(
    features: Mapping[str, Features], logits: Metrics, batch: Batch, on: tuple[Enabled, ...]
) -> tuple[jax.Array, Metrics]:
    """Sum of `weight * loss`.

    Args:
        features: of each that is on, by its name: what the model returned.
        logits: scalars of the model that a loss may read beside its features (`models.mg3d.MG3D.logits`).

    Returns:
        The total, and metrics: it as `loss`, each unweighted loss as `NAME`, its details as `NAME/...`.
    """
    total, metrics = jnp.asarray(0.0, jnp.float32), dict[str, jax.Array]()
    for one in on:
        loss, details = one.objective.loss(features[one.name] | logits, batch, one.options)
        total += one.options.weight * loss
        metrics |= {one.name: loss}
        metrics |= {key if key.startswith(CENTERS) else f"{one.name}/{key}": value for key, value in details.items()}
    return total, {"loss": total} | metrics
