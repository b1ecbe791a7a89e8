"""Sentence-wise semantic matching between patients (MG-3D, arXiv 2412.05876).

Two patients whose reports say the same should look the same where they say it. For two sentences of different patients
whose report-side features have cosine `t`, the sentence-conditioned volume features (what a sentence attends to in its own
volume) are pulled to cosine `t` when `t >= high` ("attract") and pushed to cosine 0 when `t <= low` ("repel"); between the
thresholds there is no loss.

With B patients of S sentences there are (B S)^2 pairs of sentences. That matrix never exists: every device compares its own
patients with one block of patients at a time, a tile (`pairwise.pair_sum`), and the backward pass computes each tile again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Batch, Features, Metrics, Objective
from mg3d_jax.objectives.pairwise import Tree, check_shapes, default_ids, l2_normalize, pair_sum, zero_unless
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
        *choice("objectives.matching.sentence_source", options.sentence_source, tuple(SENTENCE_SOURCES)),
    ]
    if not -1 <= options.low < options.high <= 1:
        found.append(
            f"objectives.matching.low = {options.low}, high = {options.high}: cosines with low < high are needed"
        )
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


def needs(options: MatchingOptions) -> tuple[str, ...]:
    """Features of the model (`models.mg3d.STEPS`): the sentence-conditioned volume `z`, and the report side of the options."""
    return "z", SENTENCE_SOURCES[options.sentence_source], "sentence_mask"


def features(modules: Any, needed: Features, options: MatchingOptions) -> Features:
    """The report side only gives the targets, so it gets no gradient."""
    targets = jax.lax.stop_gradient(needed[SENTENCE_SOURCES[options.sentence_source]])
    return {"z": needed["z"], "sentence_targets": targets, "sentence_mask": needed["sentence_mask"]}


def loss(features: Features, batch: Batch, options: MatchingOptions) -> tuple[jax.Array, Metrics]:
    """`sentence_matching` over the global batch. Scans of one patient are never paired."""
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


MATCHING = Objective(options=MatchingOptions, needs=needs, loss=loss, features=features, problems=problems)
