"""Report generation: a decoder that reads the volume's tokens learns to write the report, token by token.

Teacher forcing: each token of the report is predicted from the volume and the tokens before it, all in one pass. The decoder
itself is part of the model (`models.report_decoder`); `evaluation.generation` lets it write.

With `findings` the decoder also reads which findings there are. It learns to with the labels of the record, some of them hidden
so that it looks for itself, too; when it writes it is given what the classification head finds, which is trained beside it
(`tasks.classification`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective
from mg3d_jax.objectives.pairwise import zero_unless
from mg3d_jax.objectives.sums import Sums, masked_sums, mean_of_sums
from mg3d_jax.options import key


@dataclass(frozen=True)
class GenerationOptions:
    """Writing of the report."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    label_smoothing: float = key(0.0, "share of the target's probability that is spread over the vocabulary")
    findings: bool = key(
        False,
        "does the decoder read which findings there are: in training the record's labels, when it writes what the head of "
        "tasks.classification finds?",
        neutral=False,
    )
    hidden_findings: float = key(0.2, "share of the labels that it is not told in training, with findings", neutral=0.2)


def problems(options: GenerationOptions, config: Any) -> list[str]:
    """A share outside of [0, 1), a decoder that cannot be built, findings that no head finds."""
    found, decoder = [], config.model.report_decoder
    if not 0 <= options.label_smoothing < 1:
        found.append(f"tasks.generation.label_smoothing = {options.label_smoothing}: from 0 to below 1")
    if not 0 <= options.hidden_findings < 1:
        found.append(f"tasks.generation.hidden_findings = {options.hidden_findings}: from 0 to below 1")
    classification = config.tasks["classification"]
    if options.findings and (not classification.weight or classification.kind != "multi_label"):
        found.append(
            "tasks.generation.findings: needs a head that finds them; set tasks.classification.weight above 0, and its kind "
            "to 'multi_label'"
        )
    for name in ("width", "depth", "num_heads"):
        if getattr(decoder, name) < 1:
            found.append(f"model.report_decoder.{name} = {getattr(decoder, name)}: must be at least 1")
    if decoder.num_heads >= 1 and decoder.width % decoder.num_heads:
        found.append(
            f"model.report_decoder.num_heads = {decoder.num_heads} does not divide its width = {decoder.width}"
        )
    return found


def data_problems(options: GenerationOptions, data: Any) -> list[str]:
    """Findings of records that have no labels."""
    if not options.findings or data.label_names:
        return []
    folders = ", ".join(str(reader.folder) for reader in data.readers)
    return [
        f"{folders}: the records have no labels, and tasks.generation.findings reads them: set tasks.generation.findings=False "
        "and tasks.classification.weight=0"
    ]


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


def draw(key: jax.Array, batch: Batch, options: GenerationOptions, context: Context) -> dict[str, jax.Array]:
    """With `findings`: `findings` int8 [B, L], the labels, in training some of them unknown."""
    if not options.findings:
        return {}
    findings = batch["labels"]
    if context.train and options.hidden_findings:
        keys = jax.vmap(lambda record: jax.random.fold_in(key, record))(batch["record_index"])
        share, count = options.hidden_findings, findings.shape[1:]
        hidden = jax.vmap(lambda one: jax.random.bernoulli(one, share, count))(keys)
        findings = jnp.where(hidden, UNKNOWN_LABEL, findings)
    return {"findings": findings}


def _logits(options: GenerationOptions) -> str:
    return "next_token_logits_of_findings" if options.findings else "next_token_logits"


def features(modules: Any, needed: Features, options: GenerationOptions) -> Features:
    """`next_token_sums`; logits of the whole batch need not be kept. A record without a report says nothing."""
    report = needed["report"]
    has_text = jnp.any(report["sentence_index"] > 0, axis=1, keepdims=True)
    mask = report["token_mask"][:, 1:] & has_text
    targets, smoothing = report["token_ids"][:, 1:], options.label_smoothing
    return {"sums": next_token_sums(needed[_logits(options)], targets, mask, label_smoothing=smoothing)}


def loss(features: Features, batch: Batch, options: GenerationOptions) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of the tokens of the global batch, [SEP] included. Metrics: `token_accuracy`, `perplexity` (without
    label smoothing) and how many `tokens`."""
    means = mean_of_sums(features["sums"], batch["valid"])
    metrics = {"token_accuracy": means["accuracy"], "perplexity": jnp.exp(means["nll"]), "tokens": means["count"]}
    return means["loss"], jax.lax.stop_gradient(metrics)


GENERATION = Objective(
    options=GenerationOptions,
    needs=lambda options: (_logits(options), "report"),
    loss=loss,
    features=features,
    draw=draw,
    problems=problems,
    data_problems=data_problems,
)
