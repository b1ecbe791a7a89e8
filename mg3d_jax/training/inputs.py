"""What the compiled step does to a batch before the towers see it: HU windows, augmentation, the view of the report.

Everything random is drawn here from a key that depends on `(seed, step)` only: a resumed run draws the same, and so does
the same run on another mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

AIR_HU = -1024


def window(volume: jax.Array, windows: tuple[tuple[float, float], ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """HU `[B, X, Y, Z]` -> `[B, X, Y, Z, C]` in [0, 1], one channel per `(lower, upper)` window in HU."""
    hounsfield = volume.astype(jnp.float32)
    channels = [jnp.clip((hounsfield - low) / (high - low), 0.0, 1.0) for low, high in windows]
    return jnp.stack(channels, axis=-1).astype(dtype)


def augment(key: jax.Array, volume: jax.Array, options: ConfigDict) -> jax.Array:
    """Random shift (voxels, filled with air), intensity scale and offset (HU), noise (HU). HU in, float32 HU out.

    Never a flip: reports name sides.
    """
    batch = volume.shape[0]
    shift_key, scale_key, offset_key, noise_key = jax.random.split(key, 4)
    hounsfield = volume.astype(jnp.float32)
    if options.shift:
        pad = options.shift
        padded = jnp.pad(hounsfield, ((0, 0), *((pad, pad),) * 3), constant_values=AIR_HU)
        starts = jax.random.randint(shift_key, (batch, 3), 0, 2 * pad + 1)
        hounsfield = jax.vmap(lambda v, s: jax.lax.dynamic_slice(v, s, volume.shape[1:]))(padded, starts)
    per_patient = (batch, 1, 1, 1)
    if options.scale:
        factor = 1 + options.scale * jax.random.uniform(scale_key, per_patient, minval=-1, maxval=1)
        hounsfield = (hounsfield - AIR_HU) * factor + AIR_HU
    if options.offset:
        hounsfield += options.offset * jax.random.uniform(offset_key, per_patient, minval=-1, maxval=1)
    if options.noise:
        hounsfield += options.noise * jax.random.normal(noise_key, hounsfield.shape)
    return hounsfield


def sentence_view(
    key: jax.Array, batch: dict[str, jax.Array], *, sentences: int, tokens: int, max_sentences: int, pad_id: int
) -> dict[str, jax.Array]:
    """A random subset of each report's sentences, as a shorter report in the original order.

    Prompts are single sentences: a text tower that only ever saw whole reports is not at home with them.

    Args:
        sentences: how many to keep (fewer where a report has fewer).
        tokens: length of the result; what does not fit is cut.

    Returns:
        `token_ids, token_mask, sentence_index, word_index`, each `[B, tokens]`, with [CLS] and [SEP] kept.
    """
    index, mask = batch["sentence_index"], batch["token_mask"]
    scores = jax.random.uniform(key, (index.shape[0], max_sentences))
    numbers = jnp.arange(1, max_sentences + 1)
    exists = jnp.any(index[:, :, None] == numbers, axis=1)  # [B, S]
    scores = jnp.where(exists, scores, -1.0)
    threshold = jax.lax.top_k(scores, min(sentences, max_sentences))[0][:, -1:]
    chosen = exists & (scores >= threshold)
    of_token = jnp.take_along_axis(jnp.pad(chosen, ((0, 0), (1, 0)), constant_values=True), index, axis=1)
    keep = mask & of_token
    # The last kept token is [SEP]; it must survive the cut, so at most tokens - 1 others stay before it.
    is_last = keep & (jnp.flip(jnp.cumsum(jnp.flip(keep, 1), axis=1), 1) == 1)
    keep &= (jnp.cumsum(keep, axis=1) <= tokens - 1) | is_last
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :tokens]
    kept = jnp.take_along_axis(keep, order, axis=1)
    fills = {"token_ids": pad_id, "token_mask": False, "sentence_index": 0, "word_index": 0}
    return {
        name: jnp.where(kept, jnp.take_along_axis(batch[name], order, axis=1), jnp.asarray(fill, batch[name].dtype))
        for name, fill in fills.items()
    }
