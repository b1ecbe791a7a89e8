"""Sentences against their opposites: a volume is told what its report says from the contrary, in the same words.

Contrast between patients teaches which findings a sentence is about, hardly whether it says that they are there: most
sentences of real reports state absence, and any two patients' sentences differ in more than that. Here a sentence ("Pleural
effusion was not detected.") and its opposite ("Pleural effusion is observed.") are compared for one volume, as a zero-shot
prompt pair is: `softplus(-(cos(v, said) - cos(v, opposite)) / temperature)`. Hard negatives by negation are also used by
NegCLIP (arXiv 2210.01936) and ConCLIP (arXiv 2403.20312); the pairs come from rules (`language.statements`), which also say
half of the sentences in other words, so that no wording stands for presence by itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.batch import Field, zeros
from mg3d_jax.language.statements import Statement, statements
from mg3d_jax.objectives.base import Batch, Context, Encode, Features, Metrics, Objective, TextFields, single_texts
from mg3d_jax.objectives.pairwise import l2_normalize, masked_mean, mean_vector
from mg3d_jax.objectives.views import one_wording
from mg3d_jax.options import key

# What a statement says, in the batch field `statement_kind`. 0: there is none.
PRESENT, ABSENT, STATE = 1, 2, 3
KINDS = {True: PRESENT, False: ABSENT, None: STATE}
REWORDED = 0.5  # share of the statements that are said in other words than the report's


@dataclass(frozen=True)
class NegationOptions:
    """Sentences against their opposites."""

    weight: float = key(0.0, "weight in the loss; 0: off", neutral=0.0)
    statements: int = key(4, "statements drawn per report and step; each is encoded with its opposite", neutral=4)
    present_share: float = key(
        0.5, "share of presence among the statements that are drawn, where a report has both", neutral=0.5
    )
    tokens: int = key(32, "length of a statement, [CLS] and [SEP] included; what does not fit is left out", neutral=32)
    wordings: int = key(
        1, "pairs of wordings of each statement and its opposite, of which a step draws one; more of them are less "
        "easily learned by heart, and more texts to encode", neutral=1,
    )  # fmt: skip
    temperature: float = key(0.1, "divides the difference of the two cosines", neutral=0.1)
    language: str = key(
        "en", "rules for presence and absence: a language of the package, or a .toml file", neutral="en"
    )


def problems(options: NegationOptions, config: Any) -> list[str]:
    """Numbers out of range. An unknown language is a `UserError` where the rules are read."""
    found, name = [], "objectives.negation"
    if options.weight <= 0:
        return []
    if not 1 <= options.statements <= config.data.max_sentences:
        found.append(
            f"{name}.statements = {options.statements}: from 1 to data.max_sentences = {config.data.max_sentences}"
        )
    if options.wordings < 1:
        found.append(f"{name}.wordings = {options.wordings}: must be at least 1")
    if not 0 < options.present_share < 1:
        found.append(f"{name}.present_share = {options.present_share}: must be between 0 and 1")
    most = config.model.report_encoder.max_positions
    if not 3 <= options.tokens <= most:
        found.append(f"{name}.tokens = {options.tokens}: from 3 to model.report_encoder.max_positions = {most}")
    if options.temperature <= 0:
        found.append(f"{name}.temperature = {options.temperature}: must be positive")
    statements(options.language)
    return found


def fields(options: NegationOptions, context: Context) -> dict[str, Field]:
    """P statements of a report, at most one per sentence: W pairs of wordings of what is said and of its opposite."""
    shape = (context.data.max_sentences, options.wordings, 2)
    count = shape[0]
    return {
        "statements": Field((*shape, options.tokens), np.int32, "a statement and its opposite", texts=True),
        "statement_lengths": Field(shape, np.int32, "tokens of each; 0: there is no such statement"),
        "statement_kind": Field((count,), np.int8, "1 presence, 2 absence, 3 how something is, 0 none"),
    }


def worded(sentence: str, found: Statement, rng: random.Random) -> tuple[str, str]:
    """A statement, as the report has it or in other words, and a wording of its opposite."""
    said = rng.choice(found.said) if rng.random() < REWORDED else sentence
    return said, rng.choice(found.opposite)


def make(sentences: Sequence[str], encode: Encode, options: NegationOptions, context: Context) -> dict[str, np.ndarray]:
    """The statements of a report. Its own words choose the wordings: other reports get others, each the same every time."""
    arrays = zeros(fields(options, context))
    rules, report = statements(options.language), "\n".join(sentences)
    texts: list[str] = []
    kinds: list[int] = []
    for number, sentence in enumerate(sentences[: context.data.max_sentences]):
        if found := rules.parse(sentence):
            for which in range(options.wordings):
                seed = f"{number}\n{report}" if which == 0 else f"{which} of {number}\n{report}"
                texts += worded(sentence, found, random.Random(seed))
            kinds.append(KINDS[found.present])
    encoded, row = encode(texts), 0
    pairs = list(zip(encoded[::2], encoded[1::2], strict=True))
    for number, kind in enumerate(kinds):
        of_one = pairs[number * options.wordings : (number + 1) * options.wordings]
        # A statement that is cut may have lost the word that makes the difference.
        if not (fitting := [pair for pair in of_one if max(map(len, pair)) <= options.tokens]):
            continue
        for which in range(options.wordings):
            for side, ids in enumerate(fitting[which % len(fitting)]):
                arrays["statements"][row, which, side, : len(ids)] = ids
                arrays["statement_lengths"][row, which, side] = len(ids)
        arrays["statement_kind"][row] = kind
        row += 1
    return arrays


def draw(rng: jax.Array, batch: Batch, options: NegationOptions, context: Context) -> dict[str, Any]:
    """`drawn_statements`: V of each report without replacement, texts [B, V, 2] (`single_texts`) and their `kind` [B, V], 0
    where a report has fewer. Presence is drawn as often as `present_share` says, as far as there is any."""
    kind = batch["statement_kind"]
    present, others = kind == PRESENT, kind > PRESENT
    shares = jnp.where(present, options.present_share, 1.0 - options.present_share)
    count = jnp.where(present, _count(present), _count(others))
    # The largest of log weight + Gumbel noise are a weighted draw without replacement.
    scores = jnp.log(shares / count) + jax.random.gumbel(rng, kind.shape)
    chosen = jax.lax.top_k(jnp.where(kind > 0, scores, -jnp.inf), options.statements)[1]
    wording = jax.random.randint(jax.random.fold_in(rng, 1), chosen.shape, 0, options.wordings)
    texts = one_wording(jnp.take_along_axis(batch["statements"], chosen[..., None, None, None], axis=1), wording)
    lengths = one_wording(jnp.take_along_axis(batch["statement_lengths"], chosen[..., None, None], axis=1), wording)
    drawn = single_texts(texts, lengths, context)
    return {"drawn_statements": drawn | {"kind": jnp.take_along_axis(kind, chosen, axis=1)}}


def _count(mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)


def loss(features: Features, batch: Batch, options: NegationOptions) -> tuple[jax.Array, Metrics]:
    """Mean over all statements of the global batch; `accuracy` is the share told from their opposites, in all and by kind."""
    volume = l2_normalize(features["volume_embedding"].astype(jnp.float32))
    # Less the mean of the batch: or which of two texts is true could be learned from the texts alone, without a volume.
    # Of unit vectors: that of embeddings of any length is the mean of the longest ones.
    volume = l2_normalize(volume - mean_vector(volume, batch["valid"]))
    texts, kind = l2_normalize(features["statement_embeddings"].astype(jnp.float32)), features["statement_kind"]
    margin = jnp.einsum("bk,bvk->bv", volume, texts[:, :, 0] - texts[:, :, 1])
    there = (kind > 0) & batch["valid"][:, None]
    right = (margin > 0).astype(jnp.float32)
    metrics = {
        "accuracy": masked_mean(right, there),
        "present_accuracy": masked_mean(right, there & (kind == PRESENT)),
        "absent_accuracy": masked_mean(right, there & (kind == ABSENT)),
    }
    return masked_mean(jax.nn.softplus(-margin / options.temperature), there), metrics


NEGATION = Objective(
    options=NegationOptions,
    needs=lambda options: ("volume_embedding", "statement_embeddings", "statement_kind"),
    loss=loss,
    draw=draw,
    problems=problems,
    texts=TextFields(fields, make),
)
