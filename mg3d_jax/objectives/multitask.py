"""The weighted sum of the objectives and tasks that are on."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.base import CENTERS, Batch, Enabled, Features, Metrics

SOLVED = 1e-6  # a loss below that is not divided by, and has no gradient


def by_uncertainty(loss: jax.Array) -> jax.Array:
    """`1 + log(loss)`, whose gradient is that of the loss divided by its value.

    Kendall, Gal and Cipolla (arXiv 1705.07115) divide the loss of each task by its noise v, a parameter, and add log v. Where v
    follows the loss at once that sum is at its minimum over v, `v = loss`, which is this: nothing has to be learned.
    """
    return 1.0 + jnp.log(jnp.maximum(loss, SOLVED))


def multitask_loss(
    features: Mapping[str, Features], logits: Metrics, batch: Batch, on: tuple[Enabled, ...], balance: str = "fixed"
) -> tuple[jax.Array, Metrics]:
    """Sum of `weight * loss`, or with the balance "uncertainty" of `weight * by_uncertainty(loss)`.

    Args:
        features: of each that is on, by its name: what the model returned.
        logits: scalars of the model that a loss may read beside its features (`models.mg3d.MG3D.logits`).

    Returns:
        The total, and metrics: it as `loss`, each unweighted loss as `NAME`, its details as `NAME/...`.
    """
    total, metrics = jnp.asarray(0.0, jnp.float32), dict[str, jax.Array]()
    for one in on:
        loss, details = one.objective.loss(features[one.name] | logits, batch, one.options)
        total += one.options.weight * (by_uncertainty(loss) if balance == "uncertainty" else loss)
        metrics |= {one.name: loss}
        metrics |= {key if key.startswith(CENTERS) else f"{one.name}/{key}": value for key, value in details.items()}
    return total, {"loss": total} | metrics
