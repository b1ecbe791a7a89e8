"""Random sentences of a report as texts of their own, and random groups of them: what the alignment compares volumes with."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.base import Batch, Context, single_texts


def sentence_views(
    rng: jax.Array,
    text: dict[str, jax.Array],
    *,
    sentences: int,
    tokens: int,
    max_sentences: int,
    special: Mapping[str, int],
) -> dict[str, jax.Array]:
    """A random choice of each report's sentences, each as a text of its own: [CLS] sentence [SEP].

    Zero-shot prompts are single sentences, and so are these views: a report encoder that saw whole reports only does worse
    on prompts (`docs/objectives.md`).

    Args:
        text: `token_ids` and `sentence_index` [B, T] of a batch (`mg3d_jax.batch`).
        sentences: V, how many to draw per report without replacement; at most `max_sentences`.
        tokens: L, special tokens included; a longer sentence is cut.
        max_sentences: S, the largest value of `sentence_index`.
        special: ids of "[PAD]", "[CLS]", "[SEP]".

    Returns:
        `token_ids`, `token_mask`, `sentence_index` [B, V, L], and `view_id` int32 [B, V], equal for equal sentences. Where
        a report has fewer than V sentences, the views left over have `sentence_index` 0 throughout. Other sentences share
        an id only where a 32-bit hash collides; they are then merely no negatives of each other.
    """
    index, numbers = text["sentence_index"], jnp.arange(1, max_sentences + 1)
    exists = jnp.any(index[:, :, None] == numbers, axis=1)  # [B, S]: has the report a sentence s?
    # Random scores, -1 for sentences that are not there: the largest are a draw without replacement.
    scores = jnp.where(exists, jax.random.uniform(rng, exists.shape), -1.0)
    chosen = jax.lax.top_k(scores, min(sentences, max_sentences))[1]  # [B, V]
    there = jnp.take_along_axis(exists, chosen, axis=1)[..., None]  # [B, V, 1]
    member = (index[:, None, :] == numbers[chosen][..., None]) & there  # [B, V, T]
    length = jnp.minimum(jnp.sum(member, axis=-1, keepdims=True), tokens - 2)  # [B, V, 1]
    position = jnp.arange(tokens)
    # Place 0 is [CLS], so place p reads token p - 1 of the sentence. The tokens of a sentence are contiguous.
    source = jnp.clip(jnp.argmax(member, axis=-1)[..., None] + position - 1, 0, index.shape[1] - 1)
    ids = jnp.take_along_axis(text["token_ids"][:, None, :], source, axis=2)
    inside = (position >= 1) & (position <= length)
    ids = jnp.where(inside, ids, special["[PAD]"])
    ids = jnp.where(position == length + 1, special["[SEP]"], ids).at[..., 0].set(special["[CLS]"])
    # A polynomial hash modulo 2^32 recognises equal sentences without a table of all sentences.
    powers = jnp.uint32(1_000_003) ** position.astype(jnp.uint32)
    view_id = jnp.sum(ids.astype(jnp.uint32) * powers, axis=-1, dtype=jnp.uint32).astype(jnp.int32)
    return {
        "token_ids": ids,
        "token_mask": position <= length + 1,
        "sentence_index": jnp.where(inside & there, 1, 0),
        "view_id": view_id,
    }


def text_views(
    rng: jax.Array, batch: Batch, sentences: int, context: Context, *, reworded: float = 0.0
) -> dict[str, jax.Array]:
    """As `sentence_views`, of the batch's fields: what `single_texts` gives of V sentences a report, and `view_id`.

    `reworded`: the share of sentences that are taken in their other wording, where they have one. Both have one `view_id`.
    """
    lengths = batch["sentence_lengths"]
    scores = jnp.where(lengths[..., 0] > 0, jax.random.uniform(rng, lengths.shape[:2]), -1.0)
    chosen = jax.lax.top_k(scores, min(sentences, lengths.shape[1]))[1]
    texts = jnp.take_along_axis(batch["sentences"], chosen[..., None, None], axis=1)
    lengths = jnp.take_along_axis(lengths, chosen[..., None], axis=1)
    wording = jnp.zeros(chosen.shape, jnp.int32)
    if reworded:
        other = jax.random.bernoulli(jax.random.fold_in(rng, 2), reworded, chosen.shape)
        wording = (other & (lengths[..., 1] > 0)).astype(jnp.int32)
    views = single_texts(one_wording(texts, wording), one_wording(lengths, wording), context)
    return views | {"view_id": jnp.take_along_axis(batch["sentence_hash"], chosen, axis=1)}


def one_wording(texts: jax.Array, which: jax.Array) -> jax.Array:
    """[B, V, W, ...] and the number of a wording [B, V] -> [B, V, ...]."""
    return jnp.take_along_axis(texts, which.reshape(*which.shape, *[1] * (texts.ndim - 2)), axis=2)[:, :, 0]


def random_groups(rng: jax.Array, there: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Random groups of the sentences that are `there` bool [B, V]: bool [B, G, V], one of each size, the sizes 0 and those
    that are too large for a report being all of its sentences."""
    scores = jnp.where(there[:, None], jax.random.uniform(rng, (there.shape[0], len(sizes), there.shape[1])), 2.0)
    place = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
    limits = jnp.array([size or there.shape[1] for size in sizes])[:, None]
    return (place < limits) & there[:, None]
