"""Global alignment of volume and report (MG-3D, arXiv 2412.05876): InfoNCE, or SigLIP's sigmoid form.

Two pairs: (a) the volume's embedding against the report's, which makes zero-shot classification and retrieval possible;
(b) the fused embedding of a patient against the two of (a) side by side.

Pair (b) as published compares patients, and on both sides stands what has read the report: its words tell the patients apart,
whatever the volume shows. In the form "same_words" it asks instead which volume a report belongs to: a linear head scores the
report fused with its own volume and with those of other patients, as image-text matching does (ALBEF, arXiv 2107.07651), but
by a softmax over the volumes, in which the report is the same throughout.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.batch import Field, zeros
from mg3d_jax.language.statements import statements
from mg3d_jax.objectives.base import (
    CENTERS,
    REPORT_BIAS,
    VOLUME_BIAS,
    Batch,
    Context,
    Encode,
    Features,
    Metrics,
    Objective,
    TextFields,
)
from mg3d_jax.objectives.contrastive import info_nce, sigmoid_contrastive
from mg3d_jax.objectives.pairwise import l2_normalize, masked_mean, mean_vector
from mg3d_jax.objectives.same_words import (
    FORM_MEANING,
    FORMS,
    PUBLISHED,
    SAME_WORDS,
    other_patients,
    own_among_others,
    too_few_rows,
)
from mg3d_jax.objectives.views import random_groups, sentence_views, text_views
from mg3d_jax.options import choice, key

FUSED_HEAD = "fused_pair_head"
# Features for pair (b) in the form "same_words"; the last is drawn.
FUSED_PAIRS = ("fused_volume", "fused_report", "fused_volume_others", "fused_report_others", "fused_pairs")


@dataclass(frozen=True)
class AlignmentOptions:
    """Global alignment of volume and report."""

    weight: float = key(1.0, "weight in the loss; 0: off")
    temperature: float = key(
        0.1, "softmax temperature; the one at the start if learn_temperature. Pair (b) always has this one"
    )
    learn_temperature: bool = key(False, "is the temperature trained?")
    report_view: str = key(
        "sentences",
        '"report": the whole report; "sentences": random sentences of it, each a text of its own; "subsets": the same '
        "sentences in random groups, each group the mean direction of its sentences",
    )
    report_sentences: int = key(8, 'sentences drawn per report and step, for the view "sentences"')
    sentence_tokens: int = key(48, "length of one, [CLS] and [SEP] included; what does not fit is cut")
    subset_sizes: tuple[int, ...] = key(
        (1, 4, 0), 'sentences of a group, one group of each size, for the view "subsets"; 0: all that are drawn',
        neutral=(1, 4, 0),
    )  # fmt: skip
    reworded: float = key(
        0.0, "share of a report's statements of presence or absence that are said in other words (objectives.negation)",
        neutral=0.0,
    )  # fmt: skip
    language: str = key("en", "rules for other words: a language of the package, or a .toml file", neutral="en")
    center: bool = key(
        True, "subtract the mean of the batch from the embeddings; at test time the projections' biases stand in for it"
    )
    form: str = key("softmax", 'of pair (a): "softmax", InfoNCE, or "sigmoid", SigLIP with a learned bias')
    volume_report_weight: float = key(1.0, "weight of pair (a): volume against report")
    fused_weight: float = key(0.0, "weight of pair (b): fused patient against its two embeddings")
    fused_form: str = key(PUBLISHED, f"of pair (b): {FORM_MEANING}", neutral=PUBLISHED)
    block_size: int = key(0, "columns of the similarity matrix at a time; 0 chooses by size")


def problems(options: AlignmentOptions, config: Any) -> list[str]:
    """Unknown choices, and views that no report encoder can read."""
    found = [
        *choice("objectives.alignment.form", options.form, ("softmax", "sigmoid")),
        *choice("objectives.alignment.report_view", options.report_view, ("report", "sentences", "subsets")),
        *choice("objectives.alignment.fused_form", options.fused_form, FORMS),
    ]
    if options.weight > 0 and _asks_which_volume(options):
        found += too_few_rows("objectives.alignment, pair (b)", config)
    if options.weight > 0 and config.data.batch_size < 2:
        found.append(
            f"objectives.alignment compares patients, and data.batch_size = {config.data.batch_size}: at least 2, the more the "
            "better"
        )
    if not options.subset_sizes or min(options.subset_sizes) < 0:
        found.append(f"objectives.alignment.subset_sizes = {options.subset_sizes}: give sizes, e.g. (1, 4, 0)")
    if options.report_sentences < 1:
        found.append(f"objectives.alignment.report_sentences = {options.report_sentences}: must be at least 1")
    if config.model.report_input == "sentences" and (options.weight == 0 or options.report_view == "report"):
        found.append(
            'model.report_input = "sentences": the sentences are those of objectives.alignment: give it a weight and '
            'report_view = "sentences" or "subsets"'
        )
    if not 0 <= options.reworded <= 1:
        found.append(f"objectives.alignment.reworded = {options.reworded}: a share, from 0 to 1")
    elif options.reworded:
        statements(options.language)
    most = config.model.report_encoder.max_positions
    if not 3 <= options.sentence_tokens <= most:
        found.append(
            f"objectives.alignment.sentence_tokens = {options.sentence_tokens}: from 3 to "
            f"model.report_encoder.max_positions = {most}"
        )
    return found


def made_on_host(options: AlignmentOptions, context: Context) -> bool:
    """Do the sentences come as texts of their own, and are not cut out of the report on the device?"""
    return options.report_view != "report" and (context.model.report_encoder.precompute or options.reworded > 0)


def fields(options: AlignmentOptions, context: Context) -> dict[str, Field]:
    """The sentences of a report as texts, where they are `made_on_host`; with `reworded` each in another wording, too."""
    if not made_on_host(options, context):
        return {}
    shape = (context.data.max_sentences, 2 if options.reworded else 1)
    return {
        "sentences": Field((*shape, options.sentence_tokens), np.int32, "the sentences of the report", texts=True),
        "sentence_lengths": Field(shape, np.int32, "tokens of each; 0: there is none"),
        "sentence_hash": Field(shape[:1], np.int32, "equal for equal sentences"),
    }


def make(
    sentences: Sequence[str], encode: Encode, options: AlignmentOptions, context: Context
) -> dict[str, np.ndarray]:
    """The arrays of `fields`. A sentence that is too long is cut, and still ends with [SEP]."""
    arrays = zeros(fields(options, context))
    if not arrays:
        return arrays
    most, kept = options.sentence_tokens, sentences[: context.data.max_sentences]
    for wording, texts in enumerate((kept, other_words(kept, options))):
        found = [(row, text) for row, text in enumerate(texts) if text is not None]
        for (row, _), ids in zip(found, encode([text for _, text in found]), strict=True):
            cut = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
            arrays["sentences"][row, wording, : len(cut)] = cut
            arrays["sentence_lengths"][row, wording] = len(cut)
    arrays["sentence_hash"][: len(kept)] = [zlib.crc32(sentence.encode()) >> 1 for sentence in kept]
    return arrays


def other_words(sentences: Sequence[str], options: AlignmentOptions) -> list[str | None]:
    """A further wording of each sentence that is a statement, the same for the same report; None for the others."""
    if not options.reworded:
        return []
    rules, rng = statements(options.language), random.Random("\n".join(sentences))
    found = [rules.parse(sentence) for sentence in sentences]
    return [rng.choice(statement.said) if statement else None for statement in found]


def _asks_which_volume(options: AlignmentOptions) -> bool:
    """Is pair (b) on, in the form "same_words"?"""
    return options.fused_weight > 0 and options.fused_form == SAME_WORDS


def draw(rng: jax.Array, batch: Batch, options: AlignmentOptions, context: Context) -> dict[str, Any]:
    """`views`: random sentences of each report, and for the view "subsets" `view_groups` bool [B, G, V], the groups. For the
    form "same_words" of pair (b) also `fused_pairs` bool [B, K]: which other volumes count for a report."""
    drawn = _draw_views(rng, batch, options, context) if options.report_view != "report" else {}
    if _asks_which_volume(options):
        has_text = batch["valid"] & jnp.any(batch["sentence_index"] > 0, axis=1)
        pairs = other_patients(batch["valid"], batch["report_id"], context.model.fusion.other_volumes)
        drawn["fused_pairs"] = pairs & has_text[:, None]
    return drawn


def _draw_views(rng: jax.Array, batch: Batch, options: AlignmentOptions, context: Context) -> dict[str, Any]:
    if made_on_host(options, context):
        views = text_views(rng, batch, options.report_sentences, context, reworded=options.reworded)
    else:
        views = sentence_views(
            rng,
            batch,
            sentences=options.report_sentences,
            tokens=options.sentence_tokens,
            max_sentences=context.data.max_sentences,
            special=context.special,
        )
    if options.report_view == "sentences":
        return {"views": views}
    there = views["there"] if "there" in views else jnp.any(views["sentence_index"] > 0, axis=-1)
    return {"views": views, "view_groups": random_groups(jax.random.fold_in(rng, 1), there, options.subset_sizes)}


def needs(options: AlignmentOptions) -> tuple[str, ...]:
    """The embeddings of both sides, and the fused one where pair (b) has a weight."""
    report: tuple[str, ...] = ("view_embeddings", "view_mask", "view_id")
    if options.report_view == "report":
        report = ("report_embedding", "sentence_mask")
    elif options.report_view == "subsets":
        report = (*report, "view_groups")
    fused: tuple[str, ...] = ("fused_embedding",) if options.fused_weight > 0 else ()
    return "volume_embedding", *report, *(FUSED_PAIRS if _asks_which_volume(options) else fused)


def modules(options: AlignmentOptions, context: Context) -> dict[str, nn.Module]:
    """The head of pair (b) in the form "same_words": one linear layer to a score; a bias would be the same for all volumes."""
    if not _asks_which_volume(options):
        return {}
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
    return {FUSED_HEAD: nn.Dense(1, use_bias=False, kernel_init=kernel)}


def features(modules: Any, needed: Features, options: AlignmentOptions) -> Features:
    """What it needs; of fused tokens only `fused_scores` [B, 1 + K], the report with its own volume first."""
    found = dict(needed)
    if _asks_which_volume(options):
        own = jnp.concatenate([found.pop("fused_volume"), found.pop("fused_report")], axis=-1)
        other = jnp.concatenate([found.pop("fused_volume_others"), found.pop("fused_report_others")], axis=-1)
        fused = jnp.concatenate([own[:, None], other], axis=1).astype(jnp.float32)
        found["fused_scores"] = modules[FUSED_HEAD](fused)[..., 0]
    return found


def loss(features: Features, batch: Batch, options: AlignmentOptions) -> tuple[jax.Array, Metrics]:
    """Over the global batch: two pairs, each with its own weight. A report without any sentence takes no part."""
    scale, report_ids = features["logit_scale"], batch["report_id"]
    has_text = jnp.any(features["view_mask" if "view_mask" in features else "sentence_mask"], axis=1)
    valid, block_size = batch["valid"] & has_text, options.block_size or None
    spread = _spread(features, batch["valid"], valid)  # before centring, which would hide a collapse
    centers: Metrics = {}
    if options.center:
        center = _center_directions if options.report_view == "subsets" else _center
        features, centers = center(features, batch["valid"], valid)
    volume = features["volume_embedding"]
    if "view_embeddings" in features:
        report = _direction_of_views(features["view_embeddings"], features["view_mask"])
    else:
        report = features["report_embedding"]

    def pair(text: jax.Array, groups: jax.Array, there: jax.Array) -> tuple[jax.Array, Metrics]:
        contrast: Callable = partial(info_nce, temperature=1.0 / scale)
        if options.form == "sigmoid":
            contrast = partial(sigmoid_contrastive, scale=scale, bias=features["logit_bias"])
        return contrast(volume, text, group_ids=groups, valid=there, block_size=block_size)

    if "view_groups" in features:
        total, metrics = _mean_over_groups(pair, features, report_ids, valid, center=options.center)
    elif "view_embeddings" in features:
        total, metrics = _mean_over_views(pair, features, report_ids, valid)
    else:
        total, metrics = pair(report, report_ids, valid)
    total *= options.volume_report_weight
    metrics |= {"temperature": 1.0 / scale} | spread | centers
    if "fused_scores" in features:
        fused, found = own_among_others(features["fused_scores"], features["fused_pairs"])
        total += options.fused_weight * fused
        metrics |= {"fused_loss": fused, "fused_accuracy": found["accuracy"], "fused_chance": found["chance"]}
    elif options.fused_weight:  # pair (b): InfoNCE at the configured temperature, also where pair (a) learns its own
        single = jnp.concatenate([report, volume], axis=-1)
        fused, fused_metrics = info_nce(
            features["fused_embedding"],
            single,
            temperature=options.temperature,
            group_ids=report_ids,
            valid=valid,
            block_size=block_size,
        )
        total += options.fused_weight * fused
        metrics |= {"fused_loss": fused, "fused_accuracy": fused_metrics["accuracy"]}
    return total, metrics


def embedding_statistics(embeddings: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean norm, and mean cosine over all pairs, of the rows of [..., k] where `mask` [...]; 0 where there are too few.

    A cosine near 1 means that the embeddings have collapsed. The sum of all pairs' cosines is the squared length of the
    sum of the unit vectors, less one for each of them, so that no pair is ever formed.
    """
    embeddings = jax.lax.stop_gradient(embeddings.astype(jnp.float32))
    axes, units = tuple(range(mask.ndim)), l2_normalize(embeddings) * mask[..., None]
    count = jnp.sum(mask, dtype=jnp.float32)
    pairs = jnp.sum(jnp.square(jnp.sum(units, axis=axes))) - jnp.sum(jnp.square(units))
    norm = masked_mean(jnp.linalg.norm(embeddings, axis=-1), mask)
    return norm, pairs / jnp.maximum(count * (count - 1.0), 1.0)


def _spread(features: Features, has_volume: jax.Array, has_text: jax.Array) -> Metrics:
    """`volume_norm`, `volume_cosine`, `report_norm`, `report_cosine` of the embeddings as they are, before centring.

    With single-sentence views the report's are those of the sentences.
    """
    texts, present = _texts(features, has_text)
    metrics: Metrics = {}
    for name, embeddings, mask in (
        ("volume", features["volume_embedding"], has_volume),
        ("report", features[texts], present),
    ):
        metrics[f"{name}_norm"], metrics[f"{name}_cosine"] = embedding_statistics(embeddings, mask)
    return metrics


def _texts(features: Features, has_text: jax.Array) -> tuple[str, jax.Array]:
    """Name of the text embeddings that the alignment reads, and which of them there are: [B], or [B, V] for views."""
    if "view_embeddings" in features:
        return "view_embeddings", has_text[:, None] & features["view_mask"]
    return "report_embedding", has_text


def _center(features: Features, has_volume: jax.Array, has_text: jax.Array) -> tuple[Features, Metrics]:
    """The embeddings minus their mean over the global batch, and those means [k] under `CENTERS`.

    Early in training the embeddings are nearly equal (cosines of 0.99): a large common vector and small differences.
    InfoNCE then falls fastest by shrinking the differences, until the gradient vanishes and the loss stays at log B, its
    value for equal embeddings. Subtracting the mean removes the common vector. The mean then no longer reaches the loss, so
    the projections' biases get no gradient; `training.step.follow_centers` moves them against the mean instead (as DINO's
    center, arXiv 2104.14294). At test time the bias does the centring, and no batch is needed.
    """
    centered, centers = dict(features), {}
    texts, present = _texts(features, has_text)
    for name, mask, projection in (("volume_embedding", has_volume, "volume"), (texts, present, "report")):
        weights = mask[..., None].astype(jnp.float32)
        axes = tuple(range(mask.ndim))
        mean = jnp.sum(features[name] * weights, axis=axes) / jnp.maximum(jnp.sum(weights), 1.0)
        centered[name] = features[name] - mean
        centers[f"{CENTERS}{projection}_projection"] = jax.lax.stop_gradient(mean)
    return centered, centers


def _center_directions(features: Features, has_volume: jax.Array, has_text: jax.Array) -> tuple[Features, Metrics]:
    """As `_center`, of the unit vectors of volumes; texts are centred group by group (`_mean_over_groups`).

    A mean of embeddings of any length is that of the few longest ones. Where some volumes' are 20 times as long as the
    others', all the others came out as its opposite, and single sentences were not learned (`docs/objectives.md`).
    """
    units = l2_normalize(features["volume_embedding"])
    mean = mean_vector(units, has_volume)
    return features | {"volume_embedding": units - mean}, {CENTERS + VOLUME_BIAS: jax.lax.stop_gradient(mean)}


def _direction_of_views(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, V, k], [B, V] -> [B, k]: the sum of the unit vectors of a report's sentences, which stands for the report."""
    return jnp.sum(l2_normalize(embeddings) * mask[..., None], axis=1)


def _mean_over_views(
    pair: Callable, features: Features, report_ids: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Pair (a) on sentence views: one loss per view over all patients, averaged with the number of sentences as weight, so
    that every sentence counts the same however many its report has.

    Patients that drew the same sentence are not each other's negatives, nor are those with the same report.
    """
    # Two ids a row, [B, V, 2]: rows that share either one are no negatives of each other.
    groups = jnp.stack([jnp.broadcast_to(report_ids[:, None], features["view_id"].shape), features["view_id"]], axis=-1)
    there = valid[:, None] & features["view_mask"]
    per_view = jax.vmap(pair, in_axes=1)(features["view_embeddings"], groups, there)
    count = jnp.sum(there, axis=0, dtype=jnp.float32)
    shares = count / jnp.maximum(jnp.sum(count), 1.0)
    return jax.tree.map(lambda values: jnp.sum(values * shares), per_view)


def _mean_over_groups(
    pair: Callable, features: Features, report_ids: jax.Array, valid: jax.Array, *, center: bool
) -> tuple[jax.Array, Metrics]:
    """Pair (a) on groups of sentences, `view_groups` [B, G, V]: the mean of one loss per size.

    Groups of the same sentences are not each other's negatives: their sums of ids are equal.

    What all sentences have in common outweighs what is a report's own in the mean over its sentences, which is short.
    `center` subtracts the mean over the batch, and the bias of that name follows it.
    """
    groups = features["view_groups"] & features["view_mask"][:, None]
    sums = jnp.einsum("bgv,bvk->gbk", groups.astype(jnp.float32), l2_normalize(features["view_embeddings"]))
    texts = sums / jnp.maximum(jnp.sum(groups, axis=-1).T, 1)[..., None]
    ids = jnp.sum(jnp.where(groups, features["view_id"][:, None], 0), axis=-1).T  # [G, B], modulo 2^32
    same = jnp.stack([jnp.broadcast_to(report_ids, ids.shape), ids], axis=-1)
    there = valid & jnp.any(groups, axis=-1).T
    centers: Metrics = {}
    if center:
        means = mean_vector(texts, there)  # [G, k]
        texts = texts - means[:, None]
        centers[CENTERS + REPORT_BIAS] = jax.lax.stop_gradient(jnp.mean(means, axis=0))
    total, metrics = jax.tree.map(jnp.mean, jax.vmap(pair)(texts, same, there))
    return total, metrics | centers


ALIGNMENT = Objective(
    options=AlignmentOptions,
    needs=needs,
    loss=loss,
    features=features,
    draw=draw,
    modules=modules,
    problems=problems,
    texts=TextFields(fields, make),
)
