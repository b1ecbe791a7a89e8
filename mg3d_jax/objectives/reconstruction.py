"""Losses of the masked parts: voxels of hidden patches, tokens of hidden words, and the sentences they belong to.

Each is a mean over what was masked, in the whole global batch; what was visible never counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.pairwise import l2_normalize, masked_mean

Metrics = dict[str, jax.Array]


def normalize_patches(patches: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """[B, N, P] -> float32: mean 0 and variance 1 over the P values of each patch (He et al. 2022); constant ones to 0.

    `epsilon` is added to the variance, in units of the windowed intensity squared.
    """
    patches = patches.astype(jnp.float32)
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def masked_patch_mse(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean squared error over the voxels of the masked patches.

    Args:
        prediction, target: [B, N, P]: N patches of P values (voxels times channels). For the per-patch normalised
            target pass `normalize_patches(target)`. The target gets no gradient.
        mask: bool [B, N], True where the patch was hidden and therefore counts.

    Returns:
        The loss (0 where nothing is masked), and as metric the `masked_fraction` of the patches.
    """
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    per_patch = jnp.mean(jnp.square(prediction.astype(jnp.float32) - target), axis=-1)
    return masked_mean(per_patch, mask), {"masked_fraction": jnp.mean(mask.astype(jnp.float32))}


def masked_token_cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Cross-entropy over the masked tokens.

    Args:
        logits: [B, T, V], any float dtype; the softmax is float32.
        labels: int [B, T], the original token ids.
        mask: bool [B, T], True where the token was selected for prediction.

    Returns:
        The loss (0 where nothing is masked), and metrics: `accuracy` over the masked tokens, `tokens` (their number).
    """
    logits = logits.astype(jnp.float32)
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = masked_mean(jax.nn.logsumexp(logits, axis=-1) - of_label, mask)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return loss, {"accuracy": masked_mean(correct, mask), "tokens": jnp.sum(mask).astype(jnp.float32)}


def sentence_alignment(reconstructed: jax.Array, original: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean cosine distance between each sentence as reconstructed from its masked tokens and the unmasked sentence.

    Args:
        reconstructed, original: [B, S, k] projected mean features of the sentences. `original` gets no gradient:
            otherwise both sides could meet in a constant.
        mask: bool [B, S], False for sentences that only pad.

    Returns:
        The loss, in [0, 2] (0 where there is no sentence), and no metrics.
    """
    cosine = jnp.sum(l2_normalize(reconstructed) * jax.lax.stop_gradient(l2_normalize(original)), axis=-1)
    return masked_mean(1.0 - cosine, mask), {}
