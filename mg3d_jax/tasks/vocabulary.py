"""Vocabulary fine-tuning: prompts as classes. The model stays what zero-shot classification asks, and learns the answers.

A volume is compared with "X is present." and "X is not present." for a few of its known labels; the loss is the cross-entropy
of the softmax over the two, `softplus(-+(cos(v, present) - cos(v, absent)) / temperature)`. So CT-CLIP's "VocabFine" is
fine-tuned (arXiv 2403.17834). Both sides are compared as zero-shot classification compares them, so that the first step has
the class scores of the run that it starts from. No head is added: `mg3d evaluate --only zero_shot` with the same prompts says
what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.batch import Field, zeros
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Batch, Context, Encode, Features, Metrics, Objective, TextFields, single_texts
from mg3d_jax.objectives.pairwise import masked_mean
from mg3d_jax.options import key

PRESENT, ABSENT = 1, 2  # what a label says, in `statement_kind`; 0: unknown


@dataclass(frozen=True)
class VocabularyOptions:
    """Prompts as classes."""

    weight: float = key(0.0, "weight in the loss; 0: off", neutral=0.0)
    labels: tuple[str, ...] = key((), "names of the records' labels, in their order", neutral=())
    present: str = key("{} is present.", "prompt of a present label; {} is its name", neutral="{} is present.")
    absent: str = key("{} is not present.", "prompt of an absent label", neutral="{} is not present.")
    labels_per_step: int = key(6, "labels of a volume that a step asks about", neutral=6)
    tokens: int = key(16, "length of a prompt, [CLS] and [SEP] included", neutral=16)
    temperature: float = key(0.1, "divides the difference of the two cosines", neutral=0.1)
    direction_bias: bool = key(
        False,
        "does the model keep the mean directions of a centred run, which its zero-shot classification subtracts? The recipe "
        "does as the run that it starts from",
        neutral=False,
    )

    @property
    def num_labels(self) -> int:
        """Of a record."""
        return len(self.labels)


def problems(options: VocabularyOptions, config: Any) -> list[str]:
    """No labels, more than there are, prompts without a name."""
    if options.weight <= 0:
        return []
    found, name = [], "tasks.vocabulary"
    if not 1 <= options.labels_per_step <= max(len(options.labels), 1):
        found.append(f"{name}.labels_per_step = {options.labels_per_step}: from 1 to the {len(options.labels)} labels")
    if not options.labels:
        found.append(f"{name}.labels is empty: name the labels of the records, in their order")
    found += [
        f"{name}.{key} = {text!r}: {{}} must stand for the label"
        for key, text in (("present", options.present), ("absent", options.absent))
        if "{}" not in text
    ]
    if options.temperature <= 0:
        found.append(f"{name}.temperature = {options.temperature}: must be positive")
    if config.objectives["negation"].weight > 0:
        found.append(f"{name} and objectives.negation ask the model for the same statements: switch one of them off")
    return found


def fields(options: VocabularyOptions, context: Context) -> dict[str, Field]:
    """The prompts, the same with every report."""
    shape = (len(options.labels), 2)
    return {
        "prompts": Field((*shape, options.tokens), np.int32, "prompt of each label: present, absent", texts=True),
        "prompt_lengths": Field(shape, np.int32, "tokens of each"),
    }


def make(
    sentences: Sequence[str], encode: Encode, options: VocabularyOptions, context: Context
) -> dict[str, np.ndarray]:
    """The arrays of `fields`, whatever the report. `UserError` for a prompt that is too long: it would lose its end."""
    arrays = zeros(fields(options, context))
    texts = [pattern.format(label) for label in options.labels for pattern in (options.present, options.absent)]
    for number, ids in enumerate(encode(texts)):
        if len(ids) > options.tokens:
            raise UserError(
                f"the prompt {texts[number]!r} has {len(ids)} tokens: set tasks.vocabulary.tokens to as many"
            )
        place = divmod(number, 2)
        arrays["prompts"][place][: len(ids)] = ids
        arrays["prompt_lengths"][place] = len(ids)
    return arrays


def draw(rng: jax.Array, batch: Batch, options: VocabularyOptions, context: Context) -> dict[str, Any]:
    """`drawn_statements`: of each volume `labels_per_step` labels, known ones first, texts [B, V, 2], and their `kind` [B, V].

    Raises:
        UserError: the records have another number of labels.
    """
    labels = batch["labels"]
    if labels.shape[1] != len(options.labels):
        raise UserError(
            f"the records have {labels.shape[1]} labels, tasks.vocabulary.labels names {len(options.labels)}: name those of "
            "the records"
        )
    kind = jnp.where(labels == 1, PRESENT, jnp.where(labels == 0, ABSENT, 0))
    scores = jnp.where(kind > 0, 1.0, 0.0) + jax.random.uniform(rng, kind.shape)
    chosen = jax.lax.top_k(scores, options.labels_per_step)[1]
    texts = jnp.take_along_axis(batch["prompts"], chosen[..., None, None], axis=1)
    lengths = jnp.take_along_axis(batch["prompt_lengths"], chosen[..., None], axis=1)
    drawn = single_texts(texts, lengths, context)
    return {"drawn_statements": drawn | {"kind": jnp.take_along_axis(kind, chosen, axis=1)}}


def loss(features: Features, batch: Batch, options: VocabularyOptions) -> tuple[jax.Array, Metrics]:
    """Mean over the labels that were asked about in the global batch; `accuracy` is the share that was answered rightly."""
    volume, texts, kind = features["volume_direction"], features["statement_directions"], features["statement_kind"]
    margin = jnp.einsum("bk,bvk->bv", volume, texts[:, :, 0] - texts[:, :, 1]) / options.temperature
    known = (kind > 0) & batch["valid"][:, None]
    signed = jnp.where(kind == PRESENT, margin, -margin)
    right = (signed > 0).astype(jnp.float32)
    metrics = {
        "accuracy": masked_mean(right, known),
        "sensitivity": masked_mean(right, known & (kind == PRESENT)),
        "specificity": masked_mean(right, known & (kind == ABSENT)),
    }
    return masked_mean(jax.nn.softplus(-signed), known), metrics


VOCABULARY = Objective(
    options=VocabularyOptions,
    needs=lambda options: ("volume_direction", "statement_directions", "statement_kind"),
    loss=loss,
    draw=draw,
    problems=problems,
    texts=TextFields(fields, make),
)
