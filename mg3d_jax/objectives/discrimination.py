"""Patient discrimination (MG-3D, arXiv 2412.05876): a volume is told from others by what its sentences find."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.contrastive import Metrics, info_nce


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
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bsk,bs->bk", z.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    mean = total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)[:, None]
    has_sentences = jnp.any(mask, axis=1)
    valid = has_sentences if valid is None else valid & has_sentences
    return info_nce(volume, mean, temperature=temperature, group_ids=group_ids, valid=valid, block_size=block_size)
