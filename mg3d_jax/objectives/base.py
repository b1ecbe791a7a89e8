"""What an objective declares; tasks are declared in the same form.

The step asks in this order: `draw` what is random, compute the `needs` of all that are enabled once, let each make its
`features` of them, one row per patient, and take its `loss` over the whole batch. Everything is pure and traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.batch import FIELDS, OF_RECORDS, Field, abstract
from mg3d_jax.config.parts import DataConfig, ModelConfig
from mg3d_jax.errors import UserError
from mg3d_jax.options import Group
from mg3d_jax.registry import OBJECTIVES, TASKS

Batch = dict[str, jax.Array]  # see `mg3d_jax.batch`
Features = dict[str, Any]  # trees of arrays [B, ...]
Metrics = dict[str, jax.Array]

# Metrics under this prefix are no scalars but means of embeddings [k], named after the projection of the model whose bias
# follows them, or the bias (`training.step.follow_centers`).
CENTERS = "center/"
VOLUME_BIAS, REPORT_BIAS = DIRECTION_BIASES = ("volume_direction_bias", "report_direction_bias")


@dataclass(frozen=True)
class Context:
    """What is fixed when a program is traced: sizes of batch and model, and the tokenizer's ids."""

    data: DataConfig
    model: ModelConfig
    vocab_size: int
    special: Group  # ids by role: "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"; empty in the model
    train: bool = False  # whether what is drawn is for training; False in the model


def no_problems(options: Any, config: Any) -> list[str]:
    """Nothing to check."""
    return []


def no_modules(options: Any, context: Context) -> dict[str, Any]:
    """No parameters beyond the model's."""
    return {}


def reads_nothing(options: Any) -> tuple[str, ...]:
    """Nothing of a record beyond `batch.FIELDS`."""
    return ()


def needs_tokens(key: str, config: Any) -> list[str]:
    """The problem of an objective that reads tokens of a report where only its sentences are given (`model.report_input`)."""
    if config.model.report_input == "tokens":
        return []
    return [
        f'{key} reads the tokens of a report, and model.report_input = "{config.model.report_input}": set it to "tokens"'
    ]


def as_needed(modules: Any, needed: Features, options: Any) -> Features:
    """What it needs, as it is."""
    return dict(needed)


Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> ids of each: [CLS] text [SEP]
Lookup = Callable[[np.ndarray], np.ndarray]  # ids of texts [..., L] -> their features [..., e]


@dataclass(frozen=True)
class TextFields:
    """Further fields of a batch that an objective makes of a report's sentences, on the host, once per report.

    Args:
        fields: `(options, context) -> {name: Field}`, shapes as numbers, without the batch axis.
        make: `(sentences, encode, options, context) -> {name: array}` of one report; no sentences for a record that cannot
            be read. The same report gives the same arrays.

    With `model.report_encoder.precompute` a batch has features float16 [..., e] in place of a field of `texts`.
    """

    fields: Callable[[Any, Context], dict[str, Field]]
    make: Callable[[Sequence[str], Encode, Any, Context], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Objective:
    """An objective or a task.

    Args:
        options: frozen dataclass of `options.key` fields, with a `weight`; weight 0 switches it off.
        needs: `options -> names` of the features of the model (`models.steps.STEPS` lists them all) and of what `draw` gave.
        loss: `(features, batch, options) -> (scalar, metrics)` over the whole batch, rows where `batch["valid"]` is False
            left out. `features` are its own, and beside them `logit_scale` and, in the sigmoid form, `logit_bias`.
        features: `(modules, needed, options) -> features`: what the loss reads, each row made of one patient only, and small
            where possible: with `optimizer.gradient_cache` they are kept for the whole batch.
        draw: `(key, batch, options, context) -> inputs` of the model: masks, views. Drawn anew in each step; the names
            must be free.
        modules: `(options, context) -> {name: Linen module}`: parameters of its own, at the top of the parameter tree. What
            depends on whether dropout is on is left to the model: modules are called without `train`.
        problems: `(own options, whole config) -> [problem, ...]`, said before anything is built.
        texts: what it adds to a batch that only the words of a report give, e.g. its sentences in other words.
        reads: `options -> names` of `batch.OF_RECORDS` that the records must hold: a batch has them only where asked for. They
            are inputs of the model, too, augmented as the volume is.
        data_problems: `(own options, PreparedData) -> [problem, ...]`, said before the model is built.
    """

    options: type
    needs: Callable[[Any], tuple[str, ...]]
    loss: Callable[[Features, Batch, Any], tuple[jax.Array, Metrics]]
    features: Callable[[Mapping[str, Any], Features, Any], Features] = as_needed
    draw: Callable[[jax.Array, Batch, Any, Context], dict[str, Any]] | None = None
    modules: Callable[[Any, Context], dict[str, Any]] = no_modules
    problems: Callable[[Any, Any], list[str]] = no_problems
    texts: TextFields | None = None
    reads: Callable[[Any], tuple[str, ...]] = reads_nothing
    data_problems: Callable[[Any, Any], list[str]] = no_problems


@dataclass(frozen=True)
class Enabled:
    """An objective or task that is on, by name, with its options."""

    name: str
    objective: Objective
    options: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of what it needs, each once."""
        return tuple(dict.fromkeys(self.objective.needs(self.options)))


def enabled(objectives: Group, tasks: Group | None = None) -> tuple[Enabled, ...]:
    """What has a positive weight, objectives first, in the order of registration.

    `UserError` where an objective and a task have the same name: their metrics would.
    """
    found = []
    for registry, group in ((OBJECTIVES, objectives), (TASKS, tasks or Group({}))):
        on = [name for name in registry if name in group and group[name].weight > 0]
        found += [Enabled(name, registry[name], group[name]) for name in on]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice} name both an objective and a task that are on: rename one of them")
    return tuple(found)


def label_count(on: Sequence[Enabled]) -> int:
    """Labels of a record, as what is on expects them (an option `num_labels`); 1 where none says it."""
    return max((getattr(one.options, "num_labels", 1) for one in on), default=1)


def record_fields(on: Sequence[Enabled]) -> dict[str, Field]:
    """The fields of `batch.OF_RECORDS` that objectives and tasks read."""
    return {name: OF_RECORDS[name] for one in on for name in one.objective.reads(one.options)}


def check_data(on: Sequence[Enabled], data: Any) -> None:
    """`UserError` with all that objectives and tasks cannot do with a prepared data set."""
    if problems := [problem for one in on for problem in one.objective.data_problems(one.options, data)]:
        raise UserError("the data do not suit the configuration:\n  - " + "\n  - ".join(problems))


def reads_masks(on: Sequence[Enabled]) -> bool:
    """Whether something that is on reads the masks of the records."""
    return "mask" in record_fields(on)


def added_fields(on: Sequence[Enabled], context: Context) -> dict[str, Field]:
    """All fields that a batch has beyond `batch.FIELDS`: `record_fields` and `text_fields`."""
    return record_fields(on) | text_fields(on, context)


def abstract_batch(
    on: Sequence[Enabled], context: Context, batch_size: int = 1, grid: tuple[int, int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every field of a batch, with volumes of `grid`, or of the size that the volume encoder takes."""
    size, labels = grid or context.model.volume_size, label_count(on)
    return abstract(batch_size, size, context.data.max_tokens, labels, added_fields(on, context))


def text_fields(on: Sequence[Enabled], context: Context) -> dict[str, Field]:
    """The fields that objectives and tasks add to a batch. `UserError` where two have the same name."""
    found = declared_text_fields(on, context)
    encoder = context.model.report_encoder
    if not encoder.precompute:
        return found
    width = encoder.sizes.width
    return {
        name: Field((*field.shape[:-1], width), np.float16, field.meaning) if field.texts else field
        for name, field in found.items()
    }


def declared_text_fields(on: Sequence[Enabled], context: Context) -> dict[str, Field]:
    """As `text_fields`, with the ids of texts whether they are precomputed or not."""
    found: dict[str, Field] = {}
    for one in on:
        own = one.objective.texts.fields(one.options, context) if one.objective.texts else {}
        if taken := sorted(own.keys() & (found.keys() | FIELDS.keys() | OF_RECORDS.keys())):
            raise UserError(f"the objective {one.name!r} adds {taken} to a batch, which has them already: rename them")
        found |= own
    return found


def text_maker(
    on: Sequence[Enabled], encode: Encode, context: Context, lookup: Lookup | None = None
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """`sentences of a report -> the arrays of text_fields`.

    Args:
        encode: of the run's tokenizer (`data.tokens.ReportTokenizer.encode`).
        lookup: features of texts, for `model.report_encoder.precompute`.
    """
    makers = [(one.objective.texts.make, one.options) for one in on if one.objective.texts]
    texts = {name for name, field in declared_text_fields(on, context).items() if field.texts}

    def make(sentences: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for maker, options in makers:
            found |= maker(sentences, encode, options, context)
        if lookup is not None:
            found |= {name: lookup(found[name]) for name in texts}
        return found

    return make


def single_texts(texts: jax.Array, lengths: jax.Array, context: Context) -> dict[str, jax.Array]:
    """What the model reads of texts that stand by themselves, from a field of `texts`.

    Args:
        texts: ids [..., L], or with `model.report_encoder.precompute` their features [..., e].
        lengths: tokens of each [...]; 0 for no text.

    Returns:
        `there` [...], and `features`, or `token_ids`, `token_mask`, `sentence_index` [..., L].
    """
    there = lengths > 0
    if context.model.report_encoder.precompute:
        return {"features": texts, "there": there}
    position, length = jnp.arange(texts.shape[-1]), lengths[..., None]
    return {
        "token_ids": jnp.where(position < length, texts, context.special["[PAD]"]),
        "token_mask": position < jnp.maximum(length, 1),  # attention needs something to read
        "sentence_index": ((position >= 1) & (position < length - 1)).astype(jnp.int32),
        "there": there,
    }
