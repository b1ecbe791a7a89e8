"""Sentence-wise semantic matching between patients (MG-3D, arXiv 2412.05876).

Two patients whose reports say the same should look the same where they say it. For two sentences of different patients
whose report-side features have cosine `t`, the sentence-conditioned volume features (what a sentence attends to in its own
volume) are pulled to cosine `t` when `t >= high` ("attract") and pushed to cosine 0 when `t <= low` ("repel"); between the
thresholds there is no loss.

With B patients of S sentences there are (B S)^2 pairs of sentences. That matrix never exists: every device compares its own
patients with one block of patients at a time, a tile (`pairwise.pair_sum`), and the backward pass computes each tile again.

Published, the two sentences of a pair ask their own volumes, and their words decide both the target and, by the places that
they attend to, what is compared: similar sentences attend alike, and the loss falls without a look at the volumes. In the form
"same_words" one sentence asks both volumes. The target is whether the other patient's report says it too: `t` is the largest
cosine of the sentence with those of that report. Attraction and repulsion count a half each, so that whoever does not tell
agreement from disagreement, because all volumes look the same or because all look different, stays at a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective, needs_tokens
from mg3d_jax.objectives.pairwise import (
    Tree,
    check_shapes,
    default_ids,
    l2_normalize,
    masked_mean,
    pair_sum,
    zero_unless,
)
from mg3d_jax.objectives.same_words import (
    FORM_MEANING,
    FORMS,
    PUBLISHED,
    SAME_WORDS,
    other_patients,
    others,
    too_few_rows,
)
from mg3d_jax.options import choice, key

AVERAGES = ("pairs", "patients")
# `sentence_source` -> the feature of the model that holds the report side of each sentence.
SENTENCE_SOURCES = {"encoder": "sentences", "embeddings": "sentence_embeddings", "words": "sentence_words"}
ROUNDING = 1e-6  # error of the cosine of two equal unit vectors in float32
# [rows, S, k] and [block, S, k] of unit vectors -> [rows, S, block, S]. A TPU would otherwise multiply in bfloat16.
_cosines = partial(jnp.einsum, "isk,jtk->isjt", precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class MatchingOptions:
    """Sentence-wise semantic matching between patients."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    form: str = key(PUBLISHED, FORM_MEANING, neutral=PUBLISHED)
    high: float = key(0.9, "sentences of two patients attract from this report-side cosine on")
    low: float = key(0.6, "sentences of two patients repel up to this report-side cosine")
    average: str = key("pairs", 'mean over "pairs" of sentences, or over pairs of "patients" as in MG-3D\'s release')
    sentence_source: str = key(
        "encoder",
        'report-side feature of a sentence, a mean over its tokens: of the report encoder\'s output ("encoder") or input '
        '("embeddings"), both of which change unless the encoder is frozen; or of fixed random word vectors ("words")',
    )
    block_size: int = key(0, "patients per block: memory and speed, never the value; 0 chooses by size")


def problems(options: MatchingOptions, config: Any) -> list[str]:
    """Unknown choices, and thresholds that are no cosines."""
    found = [
        *choice("objectives.matching.average", options.average, AVERAGES),
        *choice("objectives.matching.form", options.form, FORMS),
        *choice("objectives.matching.sentence_source", options.sentence_source, tuple(SENTENCE_SOURCES)),
    ]
    if not -1 <= options.low < options.high <= 1:
        found.append(
            f"objectives.matching.low = {options.low}, high = {options.high}: cosines with low < high are needed"
        )
    if options.weight > 0 and options.sentence_source != "encoder":
        found += needs_tokens(f"objectives.matching.sentence_source = {options.sentence_source!r}", config)
    if options.weight > 0 and options.form == SAME_WORDS:
        found += too_few_rows("objectives.matching", config)
    return found


def _tile(rows: Tree, columns: Tree, row_constants: Tree, column_constants: Tree, *, high: float, low: float) -> Tree:
    """What `pair_sum` adds up: of each row's patient [rows], sums over its sentence pairs with one block of patients.

    Args:
        rows, columns: `z` of the row patients [rows, S, k] and of the block's [block, S, k].
        row_constants, column_constants: of the same patients "s" [., S, d], "mask" [., S] and "group" [.], without gradient.
    """
    similarity, target = _cosines(rows, columns), _cosines(row_constants["s"], column_constants["s"])
    target = jnp.where(target > 1.0 - ROUNDING, 1.0, target)  # equal sentences reach `high` = 1 too
    other = row_constants["group"][:, None] != column_constants["group"]  # [rows, block]
    # [rows, S, block, S], as `similarity` and `target`: True for the sentence pairs that count.
    pair = row_constants["mask"][:, :, None, None] & column_constants["mask"] & other[:, None, :, None]
    # Not `target >= high`: NaN would be neither, and a report encoder that has diverged would pass unseen.
    attract, repel = pair & ~(target < high), pair & (target <= low)
    errors = {
        "attract": jnp.where(attract, jnp.abs(similarity - target), 0.0),
        "repel": jnp.where(repel, jnp.abs(similarity), 0.0),
    }
    counts = {"attract_pairs": attract, "repel_pairs": repel, "pairs": pair}
    sums = {name: jnp.sum(part, axis=(1, 2, 3), dtype=jnp.float32) for name, part in (errors | counts).items()}
    # [rows, block]: the mean error of two patients over all their sentence pairs, those without loss counting as 0.
    error_of_patients = jnp.sum(errors["attract"] + errors["repel"], axis=(1, 3)) / jnp.maximum(
        jnp.sum(pair, axis=(1, 3)), 1
    )
    sums["patient_means"] = jnp.sum(error_of_patients, axis=1)
    sums["patient_pairs"] = jnp.sum(jnp.any(pair, axis=(1, 3)), axis=1, dtype=jnp.float32)
    return sums


def sentence_matching(
    z: jax.Array,
    s: jax.Array,
    mask: jax.Array,
    *,
    group_ids: jax.Array | None = None,
    high: float = 0.9,
    low: float = 0.6,
    block_size: int | None = None,
    average: str = "pairs",
) -> tuple[jax.Array, Metrics]:
    """L1 distance of the cosines of `z` to their targets, over the sentence pairs of all different patients.

    Args:
        z: [B, S, k] sentence-conditioned volume features, l2-normalised here in float32.
        s: [B, S, d] report-side sentence features, l2-normalised here; they get no gradient.
        mask: bool [B, S], False for sentences that only pad. A patient may have none.
        group_ids: int [B]; rows with the same id, such as scans of one patient, are not paired. None: all rows differ.
        high, low: pairs with report-side cosine >= high attract, <= low repel, the rest is ignored.
        block_size: patients per block; it changes memory and speed, never the value. None chooses it by size.
        average: "pairs": the mean over the attracting and repelling sentence pairs, so neither padding nor ignored
            pairs dilute it. "patients" (MG-3D's release): the mean over pairs of patients of the mean over all their
            sentence pairs, ignored ones counting as 0; patients without sentences are left out.

    Returns:
        The loss (0 without any pair) and metrics: `attract` and `repel` (mean errors of either kind),
        `attract_fraction` and `repel_fraction` (of all sentence pairs).

    Raises:
        UserError: shapes that do not fit together, an unknown `average`, `block_size` below 1, ids of more than 32 bits.
    """
    if average not in AVERAGES:
        raise UserError(f"matching average {average!r} is unknown; choose one of {', '.join(AVERAGES)}.")
    mask = jnp.asarray(mask).astype(jnp.bool_)
    # B and S; 0 for an axis that the mask lacks, which `check_shapes` then reports. k and d may be anything.
    batch_size, sentences = shape = (*mask.shape, 0, 0)[:2]
    check_shapes(
        "z is [B, S, k], s [B, S, d], mask [B, S], group_ids [B]",
        mask=(mask, shape),
        z=(z, (*shape, *np.shape(z)[-1:])),
        s=(s, (*shape, *np.shape(s)[-1:])),
        group_ids=(group_ids, (batch_size,)),
    )
    z, s = (l2_normalize(zero_unless(mask, side)) for side in (z, s))
    constants = {"s": s, "mask": mask, "group": default_ids(group_ids, batch_size)}
    tile = partial(_tile, high=high, low=low)
    sums = pair_sum(tile, block_size, sentences**2, z, z, constants, constants)  # sums per patient, [B]
    total = {name: jnp.sum(values) for name, values in sums.items()}

    def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
        return part / jnp.maximum(whole, 1.0)

    if average == "pairs":
        loss = ratio(total["attract"] + total["repel"], total["attract_pairs"] + total["repel_pairs"])
    else:
        loss = ratio(total["patient_means"], total["patient_pairs"])
    metrics = {
        "attract": ratio(total["attract"], total["attract_pairs"]),
        "repel": ratio(total["repel"], total["repel_pairs"]),
        "attract_fraction": ratio(total["attract_pairs"], total["pairs"]),
        "repel_fraction": ratio(total["repel_pairs"], total["pairs"]),
    }
    return loss, jax.lax.stop_gradient(metrics)


def agreement_matching(
    z: jax.Array, z_others: jax.Array, targets: jax.Array, pairs: jax.Array, *, high: float = 0.9, low: float = 0.6
) -> tuple[jax.Array, Metrics]:
    """The form "same_words": what a sentence finds in its own volume against what it finds in others.

    Args:
        z: [B, S, k], found in the own volume; l2-normalised here in float32, as `z_others` is.
        z_others: [B, K, S, k], by the same sentence in the volumes of K other patients.
        targets: [B, K, S], how much the other patient's report says the same (`agreement`); without gradient.
        pairs: bool [B, K, S], what counts.
        high, low: targets >= high attract, <= low repel, the rest is ignored.

    Returns:
        Half the mean of |cos - target| over what attracts and half the mean of |cos| over what repels; 0 where the batch has
        pairs of one kind only, which would teach to make all volumes alike, or all different. Metrics as `sentence_matching`.
    """
    cosines = jnp.einsum("bsk,bosk->bos", l2_normalize(z), l2_normalize(zero_unless(pairs, z_others)))
    targets = jax.lax.stop_gradient(targets)
    # As in `_tile`: NaN on the report side shows.
    attract, repel = pairs & ~(targets < high), pairs & (targets <= low)
    attracted = masked_mean(jnp.abs(cosines - targets), attract)
    repelled = masked_mean(jnp.abs(cosines), repel)
    both = jnp.any(attract) & jnp.any(repel)
    count = jnp.maximum(jnp.sum(pairs, dtype=jnp.float32), 1.0)
    metrics = {
        "attract": attracted,
        "repel": repelled,
        "attract_fraction": jnp.sum(attract, dtype=jnp.float32) / count,
        "repel_fraction": jnp.sum(repel, dtype=jnp.float32) / count,
    }
    return jnp.where(both, (attracted + repelled) / 2, 0.0), jax.lax.stop_gradient(metrics)


def agreement(s: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """[B, K, S]: the largest cosine of each sentence of `s` [B, S, d] with those, by `mask` bool [B, S], of each of the reports
    of the `count` rows that follow. -1 for a report without sentences."""
    s = l2_normalize(zero_unless(mask, s))
    cosines = jnp.einsum("isk,ijtk->ijst", s, others(s, count), precision=jax.lax.Precision.HIGHEST)
    largest = jnp.max(jnp.where(others(mask, count)[:, :, None], cosines, -1.0), axis=-1)
    return jnp.where(largest > 1.0 - ROUNDING, 1.0, largest)


def draw(rng: jax.Array, batch: Batch, options: MatchingOptions, context: Context) -> dict[str, Any]:
    """`matching_pairs` bool [B, K] for the form "same_words": other volumes of other patients, with a report. Not random."""
    if options.form == PUBLISHED:
        return {}
    has_text = batch["valid"] & jnp.any(batch["sentence_index"] > 0, axis=1)
    return {"matching_pairs": other_patients(has_text, batch["patient_id"], context.model.fusion.other_volumes)}


def needs(options: MatchingOptions) -> tuple[str, ...]:
    """Features of the model (`models.steps.STEPS`): the sentence-conditioned volume `z`, and the report side of the options."""
    more = () if options.form == PUBLISHED else ("z_others", "matching_pairs")
    return "z", SENTENCE_SOURCES[options.sentence_source], "sentence_mask", *more


def features(modules: Any, needed: Features, options: MatchingOptions) -> Features:
    """The report side only gives the targets, so it gets no gradient."""
    targets, mask = jax.lax.stop_gradient(needed[SENTENCE_SOURCES[options.sentence_source]]), needed["sentence_mask"]
    if options.form == PUBLISHED:
        return {"z": needed["z"], "sentence_targets": targets, "sentence_mask": mask}
    pairs = needed["matching_pairs"]
    return {
        "z": needed["z"],
        "z_others": needed["z_others"],
        "targets": agreement(targets, mask, pairs.shape[1]),
        "pairs": pairs[..., None] & mask[:, None],
    }


def loss(features: Features, batch: Batch, options: MatchingOptions) -> tuple[jax.Array, Metrics]:
    """`sentence_matching` over the global batch, or `agreement_matching`. Scans of one patient are never paired."""
    if options.form == SAME_WORDS:
        found = (features[name] for name in ("z", "z_others", "targets", "pairs"))
        return agreement_matching(*found, high=options.high, low=options.low)
    return sentence_matching(
        features["z"],
        features["sentence_targets"],
        features["sentence_mask"] & batch["valid"][:, None],
        group_ids=batch["patient_id"],
        high=options.high,
        low=options.low,
        average=options.average,
        block_size=options.block_size or None,
    )


MATCHING = Objective(options=MatchingOptions, needs=needs, loss=loss, features=features, draw=draw, problems=problems)
