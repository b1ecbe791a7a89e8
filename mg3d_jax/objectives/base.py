"""What an objective declares; tasks are declared in the same form.

The step asks in this order: `draw` what is random, compute the `needs` of all that are enabled once, let each make its
`features` of them, one row per patient, and take its `loss` over the whole batch. Everything is pure and traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mg3d_jax.config.parts import DataConfig, ModelConfig
from mg3d_jax.errors import UserError
from mg3d_jax.options import Group
from mg3d_jax.registry import OBJECTIVES, TASKS

Batch = dict[str, jax.Array]  # see `mg3d_jax.batch`
Features = dict[str, Any]  # trees of arrays [B, ...]
Metrics = dict[str, jax.Array]

# Metrics under this prefix are no scalars but means of embeddings [k], named after the projection of the model whose bias
# follows them (`training.step.follow_centers`).
CENTERS = "center/"


@dataclass(frozen=True)
class Context:
    """What is fixed when a program is traced: sizes of batch and model, and the tokenizer's ids."""

    data: DataConfig
    model: ModelConfig
    vocab_size: int
    special: Group  # ids by role: "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"; empty in the model


def no_problems(options: Any, config: Any) -> list[str]:
    """Nothing to check."""
    return []


def no_modules(options: Any, context: Context) -> dict[str, Any]:
    """No parameters beyond the model's."""
    return {}


def as_needed(modules: Any, needed: Features, options: Any) -> Features:
    """What it needs, as it is."""
    return dict(needed)


@dataclass(frozen=True)
class Objective:
    """An objective or a task.

    Args:
        options: frozen dataclass of `options.key` fields, with a `weight`; weight 0 switches it off.
        needs: `options -> names` of the features of the model (`models.mg3d.STEPS` lists them all) and of what `draw` gave.
        loss: `(features, batch, options) -> (scalar, metrics)` over the whole batch, rows where `batch["valid"]` is False
            left out. `features` are its own, and beside them `logit_scale` and, in the sigmoid form, `logit_bias`.
        features: `(modules, needed, options) -> features`: what the loss reads, each row made of one patient only, and small
            where possible: with `optimizer.gradient_cache` they are kept for the whole batch.
        draw: `(key, batch, options, context) -> inputs` of the model: masks, views. Drawn anew in each step; the names
            must be free.
        modules: `(options, context) -> {name: Linen module}`: parameters of its own, at the top of the parameter tree. What
            depends on whether dropout is on is left to the model: modules are called without `train`.
        problems: `(own options, whole config) -> [problem, ...]`, said before anything is built.
    """

    options: type
    needs: Callable[[Any], tuple[str, ...]]
    loss: Callable[[Features, Batch, Any], tuple[jax.Array, Metrics]]
    features: Callable[[Mapping[str, Any], Features, Any], Features] = as_needed
    draw: Callable[[jax.Array, Batch, Any, Context], dict[str, Any]] | None = None
    modules: Callable[[Any, Context], dict[str, Any]] = no_modules
    problems: Callable[[Any, Any], list[str]] = no_problems


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


def label_count(tasks: Group) -> int:
    """Labels of a record, as the tasks expect them (an option `num_labels`); 1 where none says it."""
    return max((getattr(options, "num_labels", 1) for options in tasks.values()), default=1)
