"""AdamW with clipping, learning-rate multipliers, weight-decay masks and freezing by regex over parameter names.

A parameter's name is its path, e.g. `volume_encoder/stack/blocks/block/attention/query/kernel`.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mg3d_jax.errors import UserError


def parameter_names(params: Any) -> Any:
    """A tree like `params` whose leaves are the slash-separated names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(p.key) for p in path), params)


def first_match(name: str, table: tuple[tuple[str, float], ...]) -> float | None:
    """The value of the first row whose regex matches the whole name."""
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), None)


def multipliers(params: Any, config: ConfigDict) -> Any:
    """Learning-rate factor of every parameter; 0 where frozen. `UserError` for a parameter that no row covers and for a
    regex that matches nothing."""
    names = parameter_names(params)
    flat = jax.tree.leaves(names)
    for key in ("freeze", "no_weight_decay", "learning_rate_multipliers"):
        for row in config[key]:
            pattern = row if isinstance(row, str) else row[0]
            try:
                matched = any(re.fullmatch(pattern, name) for name in flat)
            except re.error as error:
                raise UserError(f"optimizer.{key}: {pattern!r} is not a regular expression: {error}") from error
            if key == "freeze" and not matched:
                raise UserError(f"optimizer.freeze: {pattern!r} matches no parameter; names look like {flat[0]}")

    def factor(name: str) -> float:
        if any(re.fullmatch(pattern, name) for pattern in config.freeze):
            return 0.0
        value = first_match(name, config.learning_rate_multipliers)
        if value is None:
            raise UserError(f"optimizer.learning_rate_multipliers has no row for {name}; add ('.*', 1.0) at the end")
        return value

    return jax.tree.map(factor, names)


def freeze(params: Any, factors: Any) -> Any:
    """`params` with the gradient cut at frozen ones, so that no backward pass is spent on them."""
    return jax.tree.map(lambda p, factor: p if factor else jax.lax.stop_gradient(p), params, factors)


def decay_mask(params: Any, config: ConfigDict) -> Any:
    """True where weight decay acts."""
    return jax.tree.map(
        lambda name: not any(re.fullmatch(pattern, name) for pattern in config.no_weight_decay), parameter_names(params)
    )


def make_optimizer(config: ConfigDict, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """The gradient transformation of the run. `params` may be abstract. Frozen parameters keep no moments.

    The update is `clip -> adam -> + decay -> * multiplier -> * -schedule(step)`; moments are float32.
    """
    factors = multipliers(params, config)
    factor_of = dict(zip(jax.tree.leaves(parameter_names(params)), jax.tree.leaves(factors), strict=True))

    def scale(updates: Any, _: Any = None) -> Any:
        # By name, not by tree: under `partition` the frozen leaves are missing from `updates`.
        return jax.tree.map(lambda name, u: u * factor_of[name], parameter_names(updates), updates)

    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=lambda p: decay_mask(p, config)),
        optax.stateless(scale),
        optax.scale_by_learning_rate(schedule),
    )
    labels = jax.tree.map(lambda factor: "trained" if factor else "frozen", factors)
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
