"""Patient discrimination (MG-3D, arXiv 2412.05876): a volume is told from others by what its sentences find.

Published, both sides have read the report of the patient, the fused volume and the mean of what its sentences find: the words
alone tell patients apart. In the form "same_words" some sentences of a report ask, its own volume and those of other patients,
and the other sentences answer: what was found must be closest to them in the patient's own volume. The sentence that asks is
not the one that answers, and in the softmax over volumes the words are the same throughout. Comparing what one volume shows to
two sentences instead would need no report, and whatever tells scans apart, noise too, would solve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.objectives.pairwise import check_shapes, l2_normalize, mean_vector, zero_unless
from mg3d_jax.objectives.same_words import (
    FORM_MEANING,
    FORMS,
    PUBLISHED,
    SAME_WORDS,
    other_patients,
    own_among_others,
    too_few_rows,
)
from mg3d_jax.options import choice, key

ANSWERS = "discrimination_answers"


@dataclass(frozen=True)
class DiscriminationOptions:
    """Patient discrimination."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    form: str = key(PUBLISHED, FORM_MEANING, neutral=PUBLISHED)
    temperature: float = key(0.1, "of the softmax")
    block_size: int = key(0, "columns of the similarity matrix at a time; 0 chooses by size")


def problems(options: DiscriminationOptions, config: Any) -> list[str]:
    """An unknown form, and a batch with no other volumes."""
    found = choice("objectives.discrimination.form", options.form, FORMS)
    if options.weight > 0 and options.form == SAME_WORDS:
        found += too_few_rows("objectives.discrimination", config)
    return found


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


def answered_discrimination(
    found: jax.Array, answers: jax.Array, there: jax.Array, *, temperature: float
) -> tuple[jax.Array, Metrics]:
    """The form "same_words": in which of the volumes do the sentences that ask find what the report goes on to say?

    Args:
        found: [B, 1 + K, k], mean of what the asking sentences of a report find in its own volume, and in K others.
        answers: [B, k], of the sentences that answer. Both are l2-normalised here in float32.
        there: bool [B, K], the other volumes that count; a row without any takes no part.

    Returns:
        The mean cross-entropy of a softmax over the volumes, and metrics: those of `same_words.own_among_others`.
    """
    cosines = jnp.einsum("bok,bk->bo", l2_normalize(found), l2_normalize(answers))
    return own_among_others(cosines / temperature, there)


def draw(rng: jax.Array, batch: Batch, options: DiscriminationOptions, context: Context) -> dict[str, Any]:
    """For the form "same_words": `asking` bool [B, S], the random half of each report's sentences that asks, and
    `discrimination_pairs` bool [B, K]: which other volumes count, none for a report of less than two sentences."""
    if options.form == PUBLISHED:
        return {}
    numbers = jnp.arange(1, context.data.max_sentences + 1)
    exists = jnp.any(batch["sentence_index"][:, :, None] == numbers, axis=1)  # [B, S]
    place = jnp.argsort(jnp.argsort(jnp.where(exists, jax.random.uniform(rng, exists.shape), 2.0), axis=1), axis=1)
    count = jnp.sum(exists, axis=1)
    pairs = other_patients(batch["valid"], batch["report_id"], context.model.fusion.other_volumes)
    return {"asking": place < count[:, None] // 2, "discrimination_pairs": pairs & (count >= 2)[:, None]}


def needs(options: DiscriminationOptions) -> tuple[str, ...]:
    """Features of the model, and what `draw` gave."""
    if options.form == PUBLISHED:
        return "fused_volume_embedding", "z", "sentence_mask"
    return "z", "z_others", "sentences", "sentence_mask", "asking", "discrimination_pairs"


def modules(options: DiscriminationOptions, context: Context) -> dict[str, nn.Module]:
    """The projection of the sentences that answer, for the form "same_words"."""
    if options.form == PUBLISHED:
        return {}
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "projection"))
    return {ANSWERS: nn.Dense(context.model.matching_dim, use_bias=False, kernel_init=kernel)}


def features(modules: Any, needed: Features, options: DiscriminationOptions) -> Features:
    """What it needs; for the form "same_words" `found`, `answers`, `there` of `answered_discrimination`."""
    if options.form == PUBLISHED:
        return dict(needed)
    asking = needed["asking"]
    z = jnp.concatenate([needed["z"][:, None], needed["z_others"]], axis=1)  # [B, 1 + K, S, m]
    answering = needed["sentence_mask"] & ~asking
    answers = modules[ANSWERS](mean_vector(needed["sentences"].astype(jnp.float32), answering))
    return {"found": mean_vector(z, asking[:, None]), "answers": answers, "there": needed["discrimination_pairs"]}


def loss(features: Features, batch: Batch, options: DiscriminationOptions) -> tuple[jax.Array, Metrics]:
    """Fused volume against what its sentences find, over the global batch, or `answered_discrimination`; scans that share a
    report are no negatives."""
    if options.form == SAME_WORDS:
        own = (features[name] for name in ("found", "answers", "there"))
        return answered_discrimination(*own, temperature=options.temperature)
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
    needs=needs,
    loss=loss,
    features=features,
    draw=draw,
    modules=modules,
    problems=problems,
)
