"""Volume-guided masked report modelling (MG-3D, arXiv 2412.05876): hidden words from the others and the volume.

Words are hidden whole. The tokens of the corrupted report read the whole volume and are predicted; within it, the mean
feature of each sentence as reconstructed is aligned with that of the sentence unmasked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective, needs_tokens
from mg3d_jax.objectives.masking import most_selected, selected_positions, whole_word_mask
from mg3d_jax.objectives.pairwise import check_shapes, l2_normalize, zero_unless
from mg3d_jax.objectives.sums import Sums, masked_sums, mean_of_sums
from mg3d_jax.options import key


@dataclass(frozen=True)
class ReportReconstructionOptions:
    """Volume-guided masked report modelling."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    mask_ratio: float = key(0.15, "share of the words that are hidden")
    sentence_weight: float = key(0.1, "weight of the sentence alignment within it")


def draw(rng: jax.Array, batch: Batch, options: ReportReconstructionOptions, context: Context) -> dict[str, Any]:
    """`corrupted_ids` int32 [B, T]; of the tokens that are to be predicted the positions `predicted` int32 [B, N], and which
    of those count, `selected` bool [B, N]."""
    most = most_selected(context.data.max_tokens, options.mask_ratio)
    corrupted, selected = whole_word_mask(
        rng,
        batch["token_ids"],
        batch["token_mask"],
        batch["word_index"],
        ratio=options.mask_ratio,
        most=most,
        mask_id=context.special["[MASK]"],
        vocab_size=context.vocab_size,
        special_ids=tuple(context.special.values()),
    )
    predicted, selected = selected_positions(selected, most)
    return {"corrupted_ids": corrupted, "predicted": predicted, "selected": selected}


def token_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: summed cross-entropy ("loss"), "accuracy" and "count" of the tokens that are to be predicted.

    Args:
        logits: [B, T, V], any float dtype; the softmax is float32.
        labels: int [B, T], the original token ids; whatever stands where `mask` is False, -100 for example, is ignored.
        mask: bool [B, T], True where the token was selected for prediction.
    """
    shape = np.shape(logits)[:-1]
    check_shapes("logits are [B, T, V], labels and mask [B, T]", labels=(labels, shape), mask=(mask, shape))
    logits, labels = zero_unless(mask, jnp.asarray(logits, jnp.float32)), jnp.asarray(labels)
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return masked_sums(mask, loss=jax.nn.logsumexp(logits, axis=-1) - of_label, accuracy=correct)


def sentence_sums(reconstructed: jax.Array, original: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: summed cosine distance ("loss", each in [0, 2]) and "count" of the sentences.

    Args:
        reconstructed, original: [B, S, k] projected mean features of each sentence, from the corrupted and from the whole
            report. `original` gets no gradient: otherwise both sides could meet in a constant.
        mask: bool [B, S], False for sentences that only pad.
    """
    shape = np.shape(reconstructed)
    check_shapes("both are [B, S, k], mask [B, S]", original=(original, shape), mask=(mask, shape[:-1]))
    reconstructed, original = (l2_normalize(zero_unless(mask, side)) for side in (reconstructed, original))
    cosine = jnp.sum(reconstructed * jax.lax.stop_gradient(original), axis=-1)
    return masked_sums(mask, loss=1.0 - cosine)


def features(modules: Any, needed: Features, options: ReportReconstructionOptions) -> Features:
    """`token_sums` and `sentence_sums`; logits of the whole batch need not be kept."""
    pair = needed["reconstructed_sentences"], needed["original_sentences"]
    return {
        "token_sums": token_sums(needed["token_logits"], needed["token_labels"], needed["selected"]),
        "sentence_sums": sentence_sums(*pair, needed["sentence_mask"]),
    }


def loss(features: Features, batch: Batch, options: ReportReconstructionOptions) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the hidden tokens of the global batch, and the sentence alignment by its weight."""
    tokens = mean_of_sums(features["token_sums"], batch["valid"])
    sentences = mean_of_sums(features["sentence_sums"], batch["valid"])
    metrics = {"tokens": tokens["count"], "token_loss": tokens["loss"], "accuracy": tokens["accuracy"]}
    metrics["sentence_loss"] = sentences["loss"]
    return tokens["loss"] + options.sentence_weight * sentences["loss"], metrics


def problems(options: ReportReconstructionOptions, config: Any) -> list[str]:
    """Words to hide in a report of which no words are given."""
    return needs_tokens("objectives.report_reconstruction", config) if options.weight > 0 else []


REPORT_RECONSTRUCTION = Objective(
    options=ReportReconstructionOptions,
    needs=lambda options: (
        *("token_logits", "token_labels", "selected"),
        *("reconstructed_sentences", "original_sentences", "sentence_mask"),
    ),
    loss=loss,
    features=features,
    draw=draw,
    problems=problems,
)
