"""Patient discrimination (MG-3D, arXiv 2412.05876): a volume is told from others by what its sentences find."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.objectives.base import Batch, Features, Metrics, Objective
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.objectives.pairwise import check_shapes, zero_unless
from mg3d_jax.options import key


@dataclass(frozen=True)
class DiscriminationOptions:
    """Patient discrimination."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    temperature: float = key(0.1, "of the softmax")
    block_size: int = key(0, "columns of the similarity matrix at a time; 0 chooses by size")


def patient_discrimination(
    volume: jax.Array,
    z: jax.Array,
    mask: jax.Array,
    *,
    temperature: jax.Array | float,
    group_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """Symmetric InfoNCE of `volume` [B, k] (fused) with the mean of `z` [B, S, k] over the sentences in `mask` [B, S].

    A patient without sentences has no such mean and takes no part. The other arguments are those of `info_nce`.
    """
    mask = jnp.asarray(mask).astype(jnp.bool_)
    batch_size, width = (*np.shape(volume), 0, 0)[:2]
    sentences = (*mask.shape, 0, 0)[1]
    check_shapes(
        "volume is [B, k], z [B, S, k], mask [B, S], valid [B]",
        mask=(mask, (batch_size, sentences)),
        z=(z, (batch_size, sentences, width)),
        valid=(valid, (batch_size,)),
    )
    total = jnp.sum(zero_unless(mask, z), axis=1, dtype=jnp.float32)
    mean = total / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    has_sentences = jnp.any(mask, axis=1)
    valid = has_sentences if valid is None else jnp.asarray(valid).astype(jnp.bool_) & has_sentences
    return info_nce(volume, mean, temperature=temperature, group_ids=group_ids, valid=valid, block_size=block_size)


def loss(features: Features, batch: Batch, options: DiscriminationOptions) -> tuple[jax.Array, Metrics]:
    """Fused volume against what its sentences find, over the global batch; scans that share a report are no negatives."""
    return patient_discrimination(
        features["fused_volume_embedding"],
        features["z"],
        features["sentence_mask"],
        temperature=options.temperature,
        group_ids=batch["report_id"],
        valid=batch["valid"],
        block_size=options.block_size or None,
    )


DISCRIMINATION = Objective(
    options=DiscriminationOptions,
    needs=lambda options: ("fused_volume_embedding", "z", "sentence_mask"),
    loss=loss,
)
