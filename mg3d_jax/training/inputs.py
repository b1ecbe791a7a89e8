"""What the compiled step does to a batch before the towers see it: HU windows, augmentation, the view of the report.

Everything random is drawn here from a key that depends on `(seed, step)` only: a resumed run draws the same, and so does
the same run on another mesh.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.batch import AIR_HU
from mg3d_jax.config import Config
from mg3d_jax.config.parts import AugmentConfig
from mg3d_jax.objectives.masking import (
    most_selected,
    nested_patch_mask,
    random_patch_mask,
    selected_positions,
    whole_word_mask,
)
from mg3d_jax.objectives.multitask import enabled

TEXT_FIELDS = ("token_ids", "token_mask", "sentence_index", "word_index")


def window(volume: jax.Array, windows: tuple[tuple[float, float], ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """HU `[B, X, Y, Z]` -> `[B, X, Y, Z, C]` in [0, 1], one channel per `(lower, upper)` window in HU."""
    hounsfield = volume.astype(jnp.float32)
    channels = [jnp.clip((hounsfield - low) / (high - low), 0.0, 1.0) for low, high in windows]
    return jnp.stack(channels, axis=-1).astype(dtype)


def augment(key: jax.Array, volume: jax.Array, options: AugmentConfig) -> jax.Array:
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


def sentence_views(
    key: jax.Array,
    text: dict[str, jax.Array],
    *,
    sentences: int,
    tokens: int,
    max_sentences: int,
    special: dict[str, int],
) -> dict[str, jax.Array]:
    """A random choice of each report's sentences, each as a text of its own: [CLS] sentence [SEP].

    Prompts are single sentences, and so are these views: a text tower that only ever saw whole reports is not at home
    with a prompt (`docs/objectives.md` has the comparison).

    Args:
        text: the text fields of a batch, [B, T].
        sentences: how many to draw per report, K; without replacement.
        tokens: L, special tokens included; a longer sentence is cut.

    Returns:
        `token_ids`, `token_mask`, `sentence_index` [B, K, L], and `view_id` int32 [B, K], equal for equal sentences. Where
        a report has fewer than K sentences, the views left over have `sentence_index` 0 throughout.
    """
    index, numbers = text["sentence_index"], jnp.arange(1, max_sentences + 1)
    exists = jnp.any(index[:, :, None] == numbers, axis=1)  # [B, S]
    scores = jnp.where(exists, jax.random.uniform(key, exists.shape), -1.0)
    chosen = jax.lax.top_k(scores, min(sentences, max_sentences))[1]  # [B, K]
    there = jnp.take_along_axis(exists, chosen, axis=1)[..., None]  # [B, K, 1]
    member = (index[:, None, :] == numbers[chosen][..., None]) & there  # [B, K, T]
    length = jnp.minimum(jnp.sum(member, axis=-1, keepdims=True), tokens - 2)  # [B, K, 1]
    position = jnp.arange(tokens)
    source = jnp.clip(jnp.argmax(member, axis=-1)[..., None] + position - 1, 0, index.shape[1] - 1)
    ids = jnp.take_along_axis(text["token_ids"][:, None, :], source, axis=2)
    inside = (position >= 1) & (position <= length)
    ids = jnp.where(inside, ids, special["[PAD]"])
    ids = jnp.where(position == length + 1, special["[SEP]"], ids).at[..., 0].set(special["[CLS]"])
    # A polynomial hash modulo 2^32: equal sentences must be found without a table of all sentences.
    powers = jnp.uint32(1_000_003) ** position.astype(jnp.uint32)
    view_id = jnp.sum(ids.astype(jnp.uint32) * powers, axis=-1, dtype=jnp.uint32).astype(jnp.int32)
    return {
        "token_ids": ids,
        "token_mask": position <= length + 1,
        "sentence_index": jnp.where(inside & there, 1, 0),
        "view_id": view_id,
    }


def model_inputs(
    batch: dict[str, jax.Array],
    key: jax.Array,
    config: Config,
    *,
    special: dict[str, int],
    vocab_size: int,
    train: bool,
) -> dict[str, Any]:
    """Batch -> what the model takes: windowed (in training: augmented) volume, views of the report, masks.

    Args:
        special: ids of the special tokens by role ("[PAD]", "[MASK]", ...), whatever the tokenizer calls them.

    Returns:
        `volume` [B, X, Y, Z, C]; `report`, the text fields that the report embedding reads, [B, T] for whole reports or
        [B, K, L] for single sentences (with `full_report` [B, T] beside them); and for the objectives that
        need them `full_report`, `visible`, `patch_mask` (`objectives.masking`), `corrupted_ids`, and of the tokens that are
        to be predicted the positions `predicted` and which of those count, `selected`, both [B, N].
    """
    augment_key, view_key, patch_key, word_key = jax.random.split(key, 4)
    volume, names = batch["volume"], enabled(config.objectives)
    if train:
        volume = augment(augment_key, volume, config.data.augment)
    text = {name: batch[name] for name in TEXT_FIELDS}
    inputs = {"volume": window(volume, config.data.windows), "report": text}
    options = config.objectives["alignment"]
    if options.report_view == "sentences":
        inputs["full_report"] = text
        inputs["report"] = sentence_views(
            view_key,
            text,
            sentences=options.report_sentences,
            tokens=options.sentence_tokens,
            max_sentences=config.data.max_sentences,
            special=special,
        )
    if "volume_reconstruction" in names:
        inputs["visible"], inputs["patch_mask"] = patch_mask(patch_key, volume.shape[0], config)
    if "report_reconstruction" in names:
        ratio = config.objectives["report_reconstruction"].mask_ratio
        most = most_selected(config.data.max_tokens, ratio)
        inputs["corrupted_ids"], selected = whole_word_mask(
            word_key,
            *(text[name] for name in ("token_ids", "token_mask", "word_index")),
            ratio=ratio,
            most=most,
            mask_id=special["[MASK]"],
            vocab_size=vocab_size,
            special_ids=tuple(special.values()),
        )
        inputs["predicted"], inputs["selected"] = selected_positions(selected, most)
    return inputs


def patch_mask(key: jax.Array, batch_size: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """The visible patches and the mask of hidden ones, as `objectives.volume_reconstruction` says."""
    grid, options = config.model.token_grid(), config.objectives["volume_reconstruction"]
    if options.masking == "nested":
        return nested_patch_mask(key, batch_size, grid, options.mask_ratio)
    return random_patch_mask(key, batch_size, math.prod(grid), options.mask_ratio)
