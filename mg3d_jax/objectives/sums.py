"""Means over what was masked, in the whole global batch, in two halves: sums and counts per patient, then their ratio.

The sums are all that the second half needs, so that micro-batches can be put together exactly (`gradient_cache`), and what
was summed, voxels or logits over the vocabulary, need not be kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]  # arrays [B], "count" among them


def masked_sums(mask: jax.Array, **values: jax.Array) -> Sums:
    """Sums over axis 1 of the values [B, n] where `mask`, and their "count"."""
    mask = jnp.asarray(mask).astype(jnp.bool_)
    sums = {name: jnp.sum(jnp.where(mask, value, 0.0), axis=1) for name, value in values.items()}
    return sums | {"count": jnp.sum(mask, axis=1, dtype=jnp.float32)}


def mean_of_sums(sums: Sums, valid: jax.Array | None = None) -> dict[str, jax.Array]:
    """Means over the patients in `valid` [B] bool (None: all), by name, and the total "count"; 0 for no count."""
    totals = {name: jnp.sum(value if valid is None else jnp.where(valid, value, 0.0)) for name, value in sums.items()}
    count = totals.pop("count")
    return {name: total / jnp.maximum(count, 1.0) for name, total in totals.items()} | {"count": count}
