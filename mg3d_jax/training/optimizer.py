"""AdamW and Muon with clipping, learning-rate multipliers, weight-decay masks and freezing by regex over parameter names.

A parameter's name is its path, e.g. `volume_encoder/stack/blocks/block/attention/query/kernel`. Every parameter belongs to
exactly one group: that of the first row of `optimizer.learning_rate_multipliers` that matches its whole name, or "frozen".
Rows and patterns without effect are errors, because they are typos.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mg3d_jax.config.parts import ModelConfig, OptimizerConfig
from mg3d_jax.errors import UserError

FROZEN = "frozen"

# What Muon turns: the matrices [..., in, out] inside attention layers, MLPs and gates; axes before them are stacks of layers.
MUON_MATRICES = r"(.*/)?[^/]*(attention|mlp|gate)/(query|key|value|out|up|down)/kernel"
MUON_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
MUON_MOMENTUM = 0.95  # Jordan's
MUON_RMS = (
    0.2  # root mean square of an update, as AdamW's usually is: one learning rate and decay fit both (Liu et al.)
)

# A regex over whole names, and a share, or an array of shares that broadcasts to the parameters.
Row = tuple[str, float | np.ndarray]


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning-rate multiplier; `factor` 0 is frozen."""

    factor: float
    parameters: tuple[str, ...]


def parameter_names(params: Any) -> Any:
    """A tree like `params` whose leaves are the slash-separated names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(p.key) for p in path), params)


def multipliers(params: Any, config: OptimizerConfig, rows: Sequence[Row] = ()) -> Any:
    """Learning-rate factor of every parameter: a float, or float32 that broadcasts to it where only some layers train.

    Args:
        params: may be abstract.
        config: `config.optimizer`.
        rows: factors are multiplied by the share of every row that matches. A stack of which the first two of four layers
            are frozen has `[0, 0, 1, 1]` with trailing axes of 1.

    Raises `UserError` for a parameter that no row covers, for a row that is left no parameter by those before it, and for
    a pattern of `freeze` or `no_weight_decay` that matches none.
    """
    names = parameter_names(params)
    factors = _factors(jax.tree.leaves(names), config)
    shapes = {name: np.shape(p) for name, p in zip(jax.tree.leaves(names), jax.tree.leaves(params), strict=True)}
    for pattern, share in rows:
        for name in (name for name in factors if re.fullmatch(pattern, name)):
            np.broadcast_to(share, shapes[name])
            factor = np.float32(factors[name] * np.asarray(share))
            # Nothing of it trained: a plain 0, so that neither a backward pass nor moments are spent on it.
            factors[name] = factor if factor.ndim and factor.any() else float(factor.max())
    return jax.tree.map(factors.__getitem__, names)


def rows_by_depth(model: ModelConfig, config: OptimizerConfig) -> tuple[Row, ...]:
    """What depends on the depth at which a parameter stands, for `multipliers`: frozen layers and layer-wise decay."""
    return (*trained_rows(model), *layer_decay_rows(model, config.layer_decay))


def trained_rows(model: ModelConfig) -> tuple[Row, ...]:
    """`(regex over whole parameter names, share)` for `multipliers`.

    The share is 0.0 where everything is frozen. Where an array stacks layers it is float32 [layers, 1, ...], 0 at the
    frozen ones and 1 at the others, and broadcasts to the array. Parameters that no row matches are trained.
    """
    rows: list[Row] = []
    for name, encoder in model.encoders().items():
        if encoder.frozen_layers == -1:
            rows.append((f"{name}/.*", 0.0))
        elif encoder.frozen_layers:
            frozen = encoder.tower.frozen(encoder.sizes, encoder.frozen_layers)
            rows += [(f"{name}/{pattern}", share) for pattern, share in frozen]
    return tuple(rows)


def layer_decay_rows(model: ModelConfig, decay: float) -> tuple[Row, ...]:
    """Factors of `optimizer.layer_decay` = `decay` in the form of `trained_rows`, for both towers; none where it is 1.

    Of a tower with L layers the last one has the factor decay, the first decay^L, what comes before the layers
    decay^(L + 1); what comes behind them, and everything outside of the towers, has 1 (He et al. 2022, as BEiT's).
    """
    if decay == 1:
        return ()
    rows: list[Row] = []
    for name, encoder in model.encoders().items():
        for layers in range(encoder.sizes.depth + 1):
            # Once for each number of layers with which the parameter would be frozen: the more, the nearer to the input.
            for pattern, share in encoder.tower.frozen(encoder.sizes, layers):
                rows.append((f"{name}/{pattern}", np.where(np.asarray(share) == 0, np.float32(decay), np.float32(1))))
    return tuple(rows)


def groups(params: Any, config: OptimizerConfig, factors: Any) -> dict[str, Group]:
    """The groups by name, "x5" for a multiplier of 5 and "frozen"; each parameter is in exactly one.

    `factors` as `multipliers` gave them; a parameter of which some layers train is in the group of its multiplier.
    """
    rows = _factors(jax.tree.leaves(parameter_names(params)), config)
    members: dict[float, list[str]] = {}
    for (name, row), factor in zip(rows.items(), jax.tree.leaves(factors), strict=True):
        members.setdefault(row if np.any(factor) else 0.0, []).append(name)
    ordered = sorted(members.items(), key=lambda item: (item[0] == 0, item[0]))
    return {f"x{factor:.9g}" if factor else FROZEN: Group(factor, tuple(found)) for factor, found in ordered}


def _factors(names: list[str], config: OptimizerConfig) -> dict[str, float]:
    """The factor of each name by the config's tables alone."""
    matching = {
        key: [_matching(key, pattern, names) for pattern in getattr(config, key)]
        for key in ("freeze", "no_weight_decay")
    }
    harmless = set(OptimizerConfig().no_weight_decay)  # a model may be without what the default spares
    for key, found in matching.items():
        for pattern, matched in zip(getattr(config, key), found, strict=True):
            if not matched and not (key == "no_weight_decay" and pattern in harmless):
                raise UserError(f"optimizer.{key}: {pattern!r} matches no parameter; names look like {names[0]}")
    factors: dict[str, float] = {}
    for pattern, factor in config.learning_rate_multipliers:
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"optimizer.learning_rate_multipliers: {factor} of {pattern!r} must not be negative")
        matched = _matching("learning_rate_multipliers", pattern, names)
        own = matched - factors.keys()
        if not own:
            why = "earlier rows take every parameter that it matches" if matched else "it matches no parameter"
            raise UserError(
                f"optimizer.learning_rate_multipliers: {pattern!r} does nothing, {why}: correct or remove it"
            )
        factors |= dict.fromkeys(own, float(factor))
    if uncovered := [name for name in names if name not in factors]:
        raise UserError(
            f"optimizer.learning_rate_multipliers has no row for {uncovered[0]} ({len(uncovered)} parameters in all): add "
            "('.*', 1.0) at the end"
        )
    frozen = set().union(*matching["freeze"])
    return {name: 0.0 if name in frozen else factors[name] for name in names}


def _matching(key: str, pattern: str, names: list[str]) -> set[str]:
    try:
        return {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(f"optimizer.{key}: {pattern!r} is not a regular expression: {error}") from error


def freeze(params: Any, factors: Any) -> Any:
    """`params` with the gradient cut at wholly frozen ones, so that no backward pass is spent on them."""
    return jax.tree.map(lambda p, factor: p if np.any(factor) else jax.lax.stop_gradient(p), params, factors)


def trained_gradient(grads: Any, factors: Any) -> Any:
    """`grads` with zeros at all that is frozen: it counts neither for clipping nor as a non-finite gradient."""

    def trained(grad: jax.Array, factor: float | np.ndarray) -> jax.Array:
        if np.all(factor):
            return grad
        return jnp.where(factor != 0, grad, 0) if np.any(factor) else jnp.zeros_like(grad)

    return jax.tree.map(trained, grads, factors)


def decay_mask(params: Any, config: OptimizerConfig) -> Any:
    """True where weight decay acts."""
    return jax.tree.map(
        lambda name: not any(re.fullmatch(pattern, name) for pattern in config.no_weight_decay), parameter_names(params)
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, params: Any, factors: Any
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of the run: `update(grads, state, params, step=step)`.

    An update is `clip -> direction -> + decay -> * multiplier -> * -schedule(step)`. The direction is Adam's; with "muon"
    it is Muon's (Jordan 2024; scaled as by Liu et al., arXiv 2502.16982) for the `MUON_MATRICES`, each layer of a stack by
    itself. `step` is the run's, not the number of updates: the schedule ends with the run even if updates were skipped.
    Moments are float32; frozen parameters have none.

    Args:
        params: may be abstract.
        factors: from `multipliers`. `grads` are expected as `trained_gradient` leaves them.
    """
    names = parameter_names(params)

    def label(name: str, factor: float | np.ndarray) -> str:
        if not np.any(factor):
            return FROZEN
        return "muon" if config.name == "muon" and re.fullmatch(MUON_MATRICES, name) else "adam"

    decayed = jax.tree.map(lambda yes, factor: yes and bool(np.any(factor)), decay_mask(params, config), factors)

    def scale(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda u, factor: u * factor if np.any(factor) else u, updates, factors)

    directions = {"adam": optax.scale_by_adam(config.b1, config.b2), "muon": _muon(), FROZEN: optax.set_to_zero()}
    labels = jax.tree.map(label, names, factors)
    present = set(jax.tree.leaves(labels))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.partition({name: tx for name, tx in directions.items() if name in present}, labels),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(scale),
        _descend(schedule),
    )


def _muon() -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of matrices, scaled to the same root mean square whatever their shape."""

    def axes(updates: Any) -> Any:
        return jax.tree.map(lambda _: MUON_AXES, updates)

    def scale(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda u: u * (MUON_RMS * math.sqrt(max(u.shape[-2:]))), updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=axes), optax.stateless(scale)
    )


def _descend(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate of `step`."""

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def update_average(average: Any, before: Any, after: Any, step: jax.Array, decay: float) -> Any:
    """One step of the exponential moving average of the parameters, float32.

    The decay grows as min(decay, (1 + t) / (10 + t)), so that the average does not remember the start of the run. It
    starts from the parameters `before` step 0, wherever those came from.
    """
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def one(mean: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        mean = jnp.where(step == 0, old, mean)
        return mean + rate * (new - mean)  # in this form what is frozen stays as it is, to the last bit

    return jax.tree.map(one, average, before, after)
