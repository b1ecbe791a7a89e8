"""Losses of the masked parts: voxels of hidden patches, tokens of hidden words, and the sentences they belong to.

Each is a mean over what was masked, in the whole global batch; what was visible never counts. The `*_sums` functions
are the first half of each: sums and counts per patient, which is all that the second half needs, so that micro-batches
can be put together exactly (`gradient_cache`) and voxels and logits need not be kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.objectives.pairwise import check_shapes, l2_normalize, zero_unless

Metrics = dict[str, jax.Array]
Sums = dict[str, jax.Array]  # arrays [B], "count" among them


def normalize_patches(patches: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """[B, N, P] -> float32: mean 0 and variance 1 over the P values of each patch (He et al. 2022); constant ones to 0.

    `epsilon` is added to the variance, in units of the windowed intensity squared.
    """
    patches = patches.astype(jnp.float32)
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def _masked_sums(mask: jax.Array, **values: jax.Array) -> Sums:
    """Sums over axis 1 of the values [B, n] where `mask`, and their "count"."""
    mask = jnp.asarray(mask).astype(jnp.bool_)
    sums = {name: jnp.sum(jnp.where(mask, value, 0.0), axis=1) for name, value in values.items()}
    return sums | {"count": jnp.sum(mask, axis=1, dtype=jnp.float32)}


def mean_of_sums(sums: Sums, valid: jax.Array | None = None) -> dict[str, jax.Array]:
    """Means over the patients in `valid` [B] bool (None: all), by name, and the total "count"; 0 for no count."""
    totals = {name: jnp.sum(value if valid is None else jnp.where(valid, value, 0.0)) for name, value in sums.items()}
    count = totals.pop("count")
    return {name: total / jnp.maximum(count, 1.0) for name, total in totals.items()} | {"count": count}


def patch_sums(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: the summed mean squared error ("loss") and "count" of the masked patches; see `masked_patch_mse`."""
    shape = np.shape(prediction)
    check_shapes("prediction and target are [B, N, P], mask [B, N]", target=(target, shape), mask=(mask, shape[:-1]))
    target = jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))
    errors = zero_unless(mask, jnp.asarray(prediction, jnp.float32)) - zero_unless(mask, target)
    return _masked_sums(mask, loss=jnp.mean(jnp.square(errors), axis=-1))


def token_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: summed cross-entropy ("loss"), "accuracy" and "count"; see `masked_token_cross_entropy`."""
    shape = np.shape(logits)[:-1]
    check_shapes("logits are [B, T, V], labels and mask [B, T]", labels=(labels, shape), mask=(mask, shape))
    logits, labels = zero_unless(mask, jnp.asarray(logits, jnp.float32)), jnp.asarray(labels)
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return _masked_sums(mask, loss=jax.nn.logsumexp(logits, axis=-1) - of_label, accuracy=correct)


def sentence_sums(reconstructed: jax.Array, original: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: summed cosine distance ("loss") and "count" of the sentences; see `sentence_alignment`."""
    shape = np.shape(reconstructed)
    check_shapes("both are [B, S, k], mask [B, S]", original=(original, shape), mask=(mask, shape[:-1]))
    reconstructed, original = (l2_normalize(zero_unless(mask, side)) for side in (reconstructed, original))
    cosine = jnp.sum(reconstructed * jax.lax.stop_gradient(original), axis=-1)
    return _masked_sums(mask, loss=1.0 - cosine)


def masked_patch_mse(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean squared error over the voxels of the masked patches.

    Args:
        prediction, target: [B, N, P]: N patches of P values (voxels times channels). For the per-patch normalised
            target pass `normalize_patches(target)`. The target gets no gradient.
        mask: bool [B, N], True where the patch was hidden and therefore counts.

    Returns:
        The loss (0 where nothing is masked), and as metric the `patches` that counted.
    """
    means = mean_of_sums(patch_sums(prediction, target, mask))
    return means["loss"], {"patches": means["count"]}


def masked_token_cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Cross-entropy over the masked tokens.

    Args:
        logits: [B, T, V], any float dtype; the softmax is float32.
        labels: int [B, T], the original token ids; whatever stands where `mask` is False, -100 for example, is ignored.
        mask: bool [B, T], True where the token was selected for prediction.

    Returns:
        The loss (0 where nothing is masked), and metrics: `accuracy` over the masked tokens, `tokens` (their number).
    """
    means = mean_of_sums(token_sums(logits, labels, mask))
    return means["loss"], {"accuracy": means["accuracy"], "tokens": means["count"]}


def sentence_alignment(reconstructed: jax.Array, original: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean cosine distance between each sentence as reconstructed from its masked tokens and the unmasked sentence.

    Args:
        reconstructed, original: [B, S, k] projected mean features of the sentences. `original` gets no gradient:
            otherwise both sides could meet in a constant.
        mask: bool [B, S], False for sentences that only pad.

    Returns:
        The loss, in [0, 2] (0 where there is no sentence), and as metric the `sentences` that counted.
    """
    means = mean_of_sums(sentence_sums(reconstructed, original, mask))
    return means["loss"], {"sentences": means["count"]}
