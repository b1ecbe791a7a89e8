"""The weighted sum of the enabled objectives.

An objective is a pure function `(features, batch, rng, options) -> (loss, metrics)`: `features` is what the model returned,
`batch` what the pipeline gave, `options` its part of `config.objectives`. It has a row in `OBJECTIVES` and a weight in the
config; weight 0 switches it off, and the model then does not compute what only it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mg3d_jax.objectives.contrastive import info_nce

Features = dict[str, Any]
Metrics = dict[str, jax.Array]
Objective = Callable[[Features, dict[str, jax.Array], jax.Array, ConfigDict], tuple[jax.Array, Metrics]]


def alignment(
    features: Features, batch: dict[str, jax.Array], rng: jax.Array, options: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Volume embedding against report embedding of the same patient, over the global batch (method.md, loss 1a)."""
    del rng
    temperature = 1.0 / features["logit_scale"]
    loss, metrics = info_nce(
        features["volume_embedding"],
        features["report_embedding"],
        temperature=temperature,
        group_ids=batch["report_id"],
        valid=batch["valid"],
        block_size=options.block_size or None,
    )
    return loss, metrics | {"temperature": temperature}


OBJECTIVES: dict[str, Objective] = {"alignment": alignment}


def enabled(objectives: ConfigDict) -> tuple[str, ...]:
    """Names of the objectives with a positive weight, in the table's order."""
    return tuple(name for name in OBJECTIVES if objectives[name].weight > 0)


def multitask_loss(
    features: Features, batch: dict[str, jax.Array], rng: jax.Array, objectives: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Sum of `weight * loss` over the enabled objectives; metrics carry each unweighted loss as `NAME` and `NAME/...`."""
    total, metrics = jnp.float32(0.0), {}
    for number, name in enumerate(enabled(objectives)):
        loss, details = OBJECTIVES[name](features, batch, jax.random.fold_in(rng, number), objectives[name])
        total += objectives[name].weight * loss
        metrics |= {name: loss} | {f"{name}/{key}": value for key, value in details.items()}
    return total, {"loss": total} | metrics
