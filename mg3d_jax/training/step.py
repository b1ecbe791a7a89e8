"""The one compiled program: window, masks, towers, objectives, gradient, optimizer. And its evaluation twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mg3d_jax import sharding
from mg3d_jax.objectives.gradient_cache import cached_value_and_grad
from mg3d_jax.objectives.multitask import CENTERS, multitask_loss, per_patient
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.optimizer import freeze
from mg3d_jax.training.state import Setup, State

Batch = dict[str, jax.Array]

CENTER_RATE = 0.1  # share of the distance to the batch mean that a projection's bias goes per step


class Losses:
    """The loss in two halves, both pure: features of each patient, then the objectives over the whole batch.

    Cut there, because micro-batches of features can be put together exactly (`objectives.gradient_cache`).

    Args:
        special: ids of the tokenizer's special tokens, by name.
        train: augmentation and dropout on.
    """

    def __init__(self, setup: Setup, special: dict[str, int], *, train: bool):
        self.model, self.config, self.special, self.train = setup.model, setup.config, special, train

    def features(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """What the objectives need to know of each patient."""
        input_key, dropout_key = jax.random.split(key)
        common = {"special": self.special, "vocab_size": self.model.vocab_size, "train": self.train}
        inputs = step_inputs.model_inputs(batch, input_key, self.config, **common)
        features = self.model.apply({"params": params}, inputs, train=self.train, rngs={"dropout": dropout_key})
        return per_patient(features, self.config.objectives)

    def objectives(self, params: Any, features: dict[str, Any], batch: Batch) -> tuple[jax.Array, dict]:
        """Loss and metrics of the whole batch."""
        logits = self.model.apply({"params": params}, method="logits")
        return multitask_loss(features | logits, batch, self.config.objectives)

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        return self.objectives(params, self.features(params, batch, key), batch)


def train_step(setup: Setup, special: dict[str, int]) -> Callable[[State, Batch], tuple[State, dict]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    With `optimizer.accumulation` = A the batch is walked in A micro-batches. Their gradients are averaged, and in-batch
    negatives come from the micro-batch; or, with `optimizer.gradient_cache`, the gradient is that of the whole batch.
    """
    config, pieces = setup.config, setup.config.optimizer.accumulation
    loss_fn, whole = Losses(setup, special, train=True), sharding.replicated(setup.mesh)

    def gradients(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
        def loss_of(p: Any, b: Batch, k: jax.Array) -> tuple[jax.Array, dict]:
            return loss_fn(freeze(p, setup.factors), b, k)

        if pieces == 1:
            return jax.grad(loss_of, has_aux=True)(params, batch, key)
        if config.optimizer.gradient_cache:
            (_, metrics), grads = cached_value_and_grad(
                lambda p, b, k: loss_fn.features(freeze(p, setup.factors), b, k),
                lambda p, features: loss_fn.objectives(freeze(p, setup.factors), features, batch),
                *(params, batch, key),
                microbatch_size=batch["valid"].shape[0] // pieces,
            )
            return grads, metrics

        def split(x: jax.Array) -> jax.Array:  # interleaved, so that every device keeps its own rows
            return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)

        def micro(total: tuple, piece: tuple) -> tuple:
            return jax.tree.map(jnp.add, total, jax.grad(loss_of, has_aux=True)(params, *piece)), None

        pieces_of = (jax.tree.map(split, batch), jax.random.split(key, pieces))
        shapes = jax.eval_shape(jax.grad(loss_of, has_aux=True), params, *jax.tree.map(lambda x: x[0], pieces_of))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(micro, zeros, pieces_of)
        return jax.tree.map(lambda x: x / pieces, total)

    def step(state: State, batch: Batch) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        grads, metrics = gradients(state["params"], batch, key)
        updates, opt_state = setup.tx.update(grads, state["opt_state"], state["params"])
        params, metrics = follow_centers(optax.apply_updates(state["params"], updates), metrics, setup.factors)
        metrics |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": setup.learning_rate(state["step"])}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return _in_mesh(setup, jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(setup.shardings, sharding.batch_sharding(setup.mesh)),
        out_shardings=(setup.shardings, whole),
    ))  # fmt: skip


def follow_centers(params: Any, metrics: dict, factors: Any) -> tuple[Any, dict]:
    """Moves the biases of the projections against the batch means that the alignment subtracted; see `multitask.CENTERS`.

    Returns the parameters, and the metrics without those means. A frozen projection stays.
    """
    params, (scalars, centers) = dict(params), _split_centers(metrics)
    for projection, mean in centers.items():
        if factors[projection]["out"]["bias"]:
            out = params[projection]["out"]
            params[projection] = params[projection] | {"out": out | {"bias": out["bias"] - CENTER_RATE * mean}}
    return params, scalars


def _split_centers(metrics: dict) -> tuple[dict, dict]:
    """The scalar metrics, and the means of embeddings by the name of their projection."""
    scalars = {name: value for name, value in metrics.items() if not name.startswith(CENTERS)}
    return scalars, {name.removeprefix(CENTERS): metrics[name] for name in metrics.keys() - scalars.keys()}


def evaluation_step(setup: Setup, special: dict[str, int]) -> Callable[[Any, Batch, jax.Array], dict]:
    """The jitted held-out loss `(params, batch, key) -> metrics`: no augmentation, no dropout."""
    loss_fn, whole = Losses(setup, special, train=False), sharding.replicated(setup.mesh)
    return _in_mesh(setup, jax.jit(
        lambda params, batch, key: _split_centers(loss_fn(params, batch, key)[1])[0],
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

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """Ahead of time, from arrays or abstract values."""
        with sharding.in_mesh(self._mesh):
            return self.jitted.lower(*args).compile()
