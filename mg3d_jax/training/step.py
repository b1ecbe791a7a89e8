"""The one compiled program: window, masks, towers, objectives, gradient, optimizer. And its evaluation twin.

In bfloat16 only activations are bfloat16; parameters, moments and the reductions of losses are float32. Losses are not
scaled: bfloat16 has the exponent range of float32, so gradients do not underflow as they do in float16.

A step whose loss or gradient is not finite changes nothing but `state["step"]`: the next one reads other data with other
random numbers, as it would have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mg3d_jax import sharding
from mg3d_jax.models.mg3d import MAX_LOGIT_SCALE
from mg3d_jax.objectives.base import CENTERS, DIRECTION_BIASES
from mg3d_jax.objectives.gradient_cache import cached_value_and_grad, split
from mg3d_jax.objectives.multitask import multitask_loss
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import optimizer
from mg3d_jax.training.state import Setup, State

Batch = dict[str, jax.Array]

CENTER_RATE = 0.1  # share of the distance to the batch mean that a projection's bias goes per step
GRADIENTS = "losses_and_gradients"  # the scope of both in the traced step
TOWERS = (
    "volume_encoder",
    "report_encoder",
    "fusion",
    "voxel_decoder",
    "report_decoder",
)  # whose gradients are reported one by one


class Losses:
    """The loss in two halves, both pure: features of each patient, then the objectives over the whole batch.

    Cut there, because micro-batches of features can be put together exactly (`objectives.gradient_cache`).

    Args:
        special: ids of the tokenizer's special tokens, by name.
        train: augmentation and dropout on.
    """

    def __init__(self, setup: Setup, special: dict[str, int], *, train: bool):
        self.model, self.special, self.train = setup.model, special, train
        self.balance = setup.config.optimizer.balance

    def features(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """What the losses need to know of each patient, by the name of the objective or task."""
        input_key, dropout_key = jax.random.split(key)
        inputs = step_inputs.model_inputs(batch, input_key, self.model, special=self.special, train=self.train)
        return self.model.apply({"params": params}, inputs, train=self.train, rngs={"dropout": dropout_key})

    def objectives(self, params: Any, features: dict[str, Any], batch: Batch) -> tuple[jax.Array, dict]:
        """Loss and metrics of the whole batch."""
        logits = self.model.apply({"params": params}, method="logits")
        return multitask_loss(features, logits, batch, self.model.on, self.balance)

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        return self.objectives(params, self.features(params, batch, key), batch)


def train_step(setup: Setup, special: dict[str, int]) -> _in_mesh:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    With `optimizer.accumulation` = A the batch is walked in A micro-batches. Their gradients are averaged, and in-batch
    negatives come from the micro-batch; or, with `optimizer.gradient_cache`, the gradient is that of the whole batch.
    Either way the average is clipped once. The metrics are float32 scalars: the objectives' own, `valid_share` (of the
    rows of the batch), and those of `_update`.
    """
    gradients, whole = _gradients(setup, Losses(setup, special, train=True)), sharding.replicated(setup.mesh)

    def step(state: State, batch: Batch) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(setup.config.seed), state["step"])
        grads, metrics = gradients(state["params"], batch, key)
        state, metrics = _update(setup, state, optimizer.trained_gradient(grads, setup.factors), metrics)
        return state, metrics | {"valid_share": jnp.mean(batch["valid"], dtype=jnp.float32)}

    return _in_mesh(setup, jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(setup.shardings, sharding.batch_sharding(setup.mesh)),
        out_shardings=(setup.shardings, whole),
    ))  # fmt: skip


def _gradients(setup: Setup, loss_fn: Losses) -> Callable[[Any, Batch, jax.Array], tuple[Any, dict]]:
    """`(params, batch, key) -> (gradient of the mean loss, metrics)`, by micro-batches where the config says so."""
    options, pieces = setup.config.optimizer, setup.config.optimizer.accumulation

    def loss_of(p: Any, b: Batch, k: jax.Array) -> tuple[jax.Array, dict]:
        return loss_fn(optimizer.freeze(p, setup.factors), b, k)

    def whole(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
        with jax.named_scope(GRADIENTS):
            return jax.grad(loss_of, has_aux=True)(params, batch, key)

    def cached(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
        (_, metrics), grads = cached_value_and_grad(
            lambda p, b, k: loss_fn.features(optimizer.freeze(p, setup.factors), b, k),
            lambda p, features: loss_fn.objectives(optimizer.freeze(p, setup.factors), features, batch),
            *(params, batch, key),
            microbatch_size=batch["valid"].shape[0] // pieces,
        )
        return grads, metrics

    def accumulated(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
        def micro(total: tuple, piece: tuple) -> tuple:
            return jax.tree.map(jnp.add, total, whole(params, *piece)), None

        pieces_of = (split(batch, batch["valid"].shape[0] // pieces), jax.random.split(key, pieces))
        shapes = jax.eval_shape(whole, params, *jax.tree.map(lambda x: x[0], pieces_of))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(micro, zeros, pieces_of)
        return jax.tree.map(lambda x: x / pieces, total)

    if pieces == 1:
        return whole
    return cached if options.gradient_cache else accumulated


def _update(setup: Setup, state: State, grads: Any, metrics: dict) -> tuple[State, dict]:
    """The next state; the old one but for its step where the loss or the gradient is not finite.

    The metrics get `finite` (1 or 0), `learning_rate` and, with several groups, one per group, the norm of the gradient
    before clipping, in total and per tower, and `update_ratio`, the norm of the update over that of the parameters.
    """
    step, norms = state["step"], gradient_norms(grads, setup.factors)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norms["gradient_norm"])
    updates, opt_state = setup.tx.update(grads, state["opt_state"], state["params"], step=step)
    params = clip_logit_scale(optax.apply_updates(state["params"], updates))
    params, metrics = follow_centers(params, metrics, setup.factors)
    changed = {"params": params, "opt_state": opt_state}
    if "ema" in state:
        decay = setup.config.optimizer.ema
        changed["ema"] = optimizer.update_average(state["ema"], state["params"], params, step, decay)
    # Not `lax.cond`: for its branch the host of a GPU waits until the gradient is there, and dispatches nothing ahead.
    kept = {name: state[name] for name in changed}
    changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
    ratio = optax.tree.norm(updates) / optax.tree.norm(_trained(state["params"], setup.factors))
    metrics |= norms | learning_rates(setup, step) | {"finite": finite.astype(jnp.float32), "update_ratio": ratio}
    return changed | {"step": step + 1}, metrics


def clip_logit_scale(params: Any) -> Any:
    """The parameters with a temperature of at least 0.01, as CLIP's (arXiv 2103.00020)."""
    return dict(params) | {"logit_scale": jnp.minimum(params["logit_scale"], np.float32(np.log(MAX_LOGIT_SCALE)))}


def gradient_norms(grads: Any, factors: Any) -> dict[str, jax.Array]:
    """`gradient_norm` over everything, and `gradient_norm/TOWER` for each of `TOWERS` and the "heads", if it is trained."""
    squares: dict[str, list[jax.Array]] = {}
    for name, part in _trained(grads, factors).items():
        tower = name if name in TOWERS else "heads"
        squares.setdefault(tower, []).extend(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(part))
    sums = {tower: sum(parts) for tower, parts in squares.items() if parts}
    norms = {f"gradient_norm/{tower}": jnp.sqrt(total) for tower, total in sums.items()}
    return {"gradient_norm": jnp.sqrt(sum(sums.values()))} | norms


def learning_rates(setup: Setup, step: jax.Array) -> dict[str, jax.Array]:
    """`learning_rate` of a multiplier of 1, and `learning_rate/GROUP` where several groups are trained."""
    rate = setup.learning_rate(step)
    factors = {name: group.factor for name, group in setup.groups.items() if group.factor}
    several = {f"learning_rate/{name}": factor * rate for name, factor in factors.items()} if len(factors) > 1 else {}
    return {"learning_rate": rate} | several


def _trained(tree: dict, factors: Any) -> dict:
    """The tree with None in place of what is wholly frozen."""
    return jax.tree.map(lambda x, factor: x if np.any(factor) else None, tree, factors)


def follow_centers(params: Any, metrics: dict, factors: Any) -> tuple[Any, dict]:
    """Moves biases against the batch means that a loss subtracted; see `objectives.base.CENTERS`.

    Returns the parameters, and the metrics without those means. What is frozen stays.
    """
    params, (scalars, centers) = dict(params), _split_centers(metrics)
    for name, mean in centers.items():
        if name in DIRECTION_BIASES:  # which the loss does not add: the mean is that of the directions alone
            if np.any(factors[name]):
                params[name] = params[name] - CENTER_RATE * (mean + params[name])
        elif np.any(factors[name]["out"]["bias"]):
            out = params[name]["out"]
            params[name] = params[name] | {"out": out | {"bias": out["bias"] - CENTER_RATE * mean}}
    return params, scalars


def _split_centers(metrics: dict) -> tuple[dict, dict]:
    """The scalar metrics, and the means of embeddings by parameter, in an order that all processes share."""
    scalars = {name: value for name, value in metrics.items() if not name.startswith(CENTERS)}
    return scalars, {name.removeprefix(CENTERS): metrics[name] for name in sorted(metrics.keys() - scalars.keys())}


def evaluation_step(setup: Setup, special: dict[str, int]) -> _in_mesh:
    """The jitted held-out loss `(params, batch, key) -> metrics`: no augmentation, no dropout. `valid_share` as in training."""
    loss_fn, whole = Losses(setup, special, train=False), sharding.replicated(setup.mesh)

    def evaluate(params: Any, batch: Batch, key: jax.Array) -> dict:
        metrics, _ = _split_centers(loss_fn(params, batch, key)[1])
        return metrics | {"valid_share": jnp.mean(batch["valid"], dtype=jnp.float32)}

    return _in_mesh(setup, jax.jit(
        evaluate,
        in_shardings=(setup.shardings["params"], sharding.batch_sharding(setup.mesh), whole),
        out_shardings=whole,
    ))  # fmt: skip


class _in_mesh:
    """Calls and compiles a jitted function under `sharding.in_mesh`."""

    def __init__(self, setup: Setup, jitted: Any):
        self._mesh, self.jitted = setup.mesh, jitted

    def __call__(self, *args: Any) -> Any:
        with sharding.in_mesh(self._mesh):
            return self.jitted(*args)

    def compile(self, *args: Any, look: Callable[[jax.stages.Traced], None] | None = None) -> jax.stages.Compiled:
        """Ahead of time, from arrays or abstract values. `look` sees the traced program first."""
        with sharding.in_mesh(self._mesh):
            traced = self.jitted.trace(*args)
            if look is not None:
                look(traced)
            return traced.lower().compile()
