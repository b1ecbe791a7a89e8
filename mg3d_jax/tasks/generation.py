"""Report generation: a decoder that reads the volume's tokens learns to write the report, token by token.

Teacher forcing: each token of the report is predicted from the volume and the tokens before it, all in one pass. The decoder
itself is part of the model (`models.report_decoder`); `evaluation.generation` lets it write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.base import Batch, Features, Metrics, Objective
from mg3d_jax.objectives.pairwise import zero_unless
from mg3d_jax.objectives.sums import Sums, masked_sums, mean_of_sums
from mg3d_jax.options import key


@dataclass(frozen=True)
class GenerationOptions:
    """Writing of the report."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    label_smoothing: float = key(0.0, "share of the target's probability that is spread over the vocabulary")


def problems(options: GenerationOptions, config: Any) -> list[str]:
    """A share outside of [0, 1), a decoder that cannot be built."""
    found, decoder = [], config.model.report_decoder
    if not 0 <= options.label_smoothing < 1:
        found.append(f"tasks.generation.label_smoothing = {options.label_smoothing}: from 0 to below 1")
    for name in ("width", "depth", "num_heads"):
        if getattr(decoder, name) < 1:
            found.append(f"model.report_decoder.{name} = {getattr(decoder, name)}: must be at least 1")
    if decoder.num_heads >= 1 and decoder.width % decoder.num_heads:
        found.append(
            f"model.report_decoder.num_heads = {decoder.num_heads} does not divide its width = {decoder.width}"
        )
    return found


def next_token_sums(logits: jax.Array, targets: jax.Array, mask: jax.Array, *, label_smoothing: float = 0.0) -> Sums:
    """Per patient: summed cross-entropy ("loss"), negative log likelihood ("nll"), "accuracy" and "count" of the tokens.

    Args:
        logits: [B, T, V], any float dtype; the softmax is float32.
        targets: int [B, T]. mask: bool [B, T], True where a token is predicted.
        label_smoothing: the target's share of 1 is lowered by it, and all V tokens get an equal part of it.
    """
    logits = zero_unless(mask, logits.astype(jnp.float32))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (normalizer - jnp.mean(logits, axis=-1))
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return masked_sums(mask, loss=loss, nll=nll, accuracy=correct)


def features(modules: Any, needed: Features, options: GenerationOptions) -> Features:
    """`next_token_sums`; logits of the whole batch need not be kept. A record without a report says nothing."""
    report = needed["report"]
    has_text = jnp.any(report["sentence_index"] > 0, axis=1, keepdims=True)
    mask = report["token_mask"][:, 1:] & has_text
    targets, smoothing = report["token_ids"][:, 1:], options.label_smoothing
    return {"sums": next_token_sums(needed["next_token_logits"], targets, mask, label_smoothing=smoothing)}


def loss(features: Features, batch: Batch, options: GenerationOptions) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of the tokens of the global batch, [SEP] included. Metrics: `token_accuracy`, `perplexity` (without
    label smoothing) and how many `tokens`."""
    means = mean_of_sums(features["sums"], batch["valid"])
    metrics = {"token_accuracy": means["accuracy"], "perplexity": jnp.exp(means["nll"]), "tokens": means["count"]}
    return means["loss"], jax.lax.stop_gradient(metrics)


GENERATION = Objective(
    options=GenerationOptions,
    needs=lambda options: ("next_token_logits", "report"),
    loss=loss,
    features=features,
    problems=problems,
)
