"""The one compiled program: window, masks, towers, objectives, gradient, optimizer. And its evaluation twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mg3d_jax import sharding
from mg3d_jax.objectives.multitask import multitask_loss
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training.optimizer import freeze
from mg3d_jax.training.state import Setup, State

Batch = dict[str, jax.Array]


def model_inputs(batch: Batch, key: jax.Array, config: ConfigDict, *, pad_id: int, train: bool) -> dict[str, Any]:
    """Batch -> what the model takes: windowed (in training: augmented) volume, and the view of the report."""
    augment_key, view_key = jax.random.split(key)
    volume = batch["volume"]
    if train:
        volume = step_inputs.augment(augment_key, volume, config.data.augment)
    text = {name: batch[name] for name in ("token_ids", "token_mask", "sentence_index", "word_index")}
    options = config.objectives.alignment
    if options.report_view == "sentences":
        text = step_inputs.sentence_view(
            view_key,
            text,
            sentences=options.report_sentences,
            tokens=min(options.report_tokens, config.data.max_tokens),
            max_sentences=config.data.max_sentences,
            pad_id=pad_id,
        )
    return {"volume": step_inputs.window(volume, config.data.windows), "report": text}


def loss_function(setup: Setup, pad_id: int, *, train: bool) -> Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict]]:
    """`(params, batch, key) -> (loss, metrics)`, pure."""

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        input_key, dropout_key, objective_key = jax.random.split(key, 3)
        inputs = model_inputs(batch, input_key, setup.config, pad_id=pad_id, train=train)
        features = setup.model.apply({"params": params}, inputs, train=train, rngs={"dropout": dropout_key})
        return multitask_loss(features, batch, objective_key, setup.config.objectives)

    return loss_fn


def train_step(setup: Setup, pad_id: int) -> Callable[[State, Batch], tuple[State, dict]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    With `optimizer.accumulation` = A the batch is walked in A micro-batches whose gradients are averaged; in-batch
    negatives then come from the micro-batch.
    """
    config, pieces = setup.config, setup.config.optimizer.accumulation
    loss_fn, whole = loss_function(setup, pad_id, train=True), sharding.replicated(setup.mesh)

    def gradients(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
        def loss_of(p: Any, b: Batch, k: jax.Array) -> tuple[jax.Array, dict]:
            return loss_fn(freeze(p, setup.factors), b, k)

        if pieces == 1:
            return jax.grad(loss_of, has_aux=True)(params, batch, key)

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
        params = optax.apply_updates(state["params"], updates)
        metrics |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": setup.learning_rate(state["step"])}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return _in_mesh(setup, jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(setup.shardings, sharding.batch_sharding(setup.mesh)),
        out_shardings=(setup.shardings, whole),
    ))  # fmt: skip


def evaluation_step(setup: Setup, pad_id: int) -> Callable[[Any, Batch, jax.Array], dict]:
    """The jitted held-out loss `(params, batch, key) -> metrics`: no augmentation, no dropout."""
    loss_fn, whole = loss_function(setup, pad_id, train=False), sharding.replicated(setup.mesh)
    return _in_mesh(setup, jax.jit(
        lambda params, batch, key: loss_fn(params, batch, key)[1],
        in_shardings=(setup.shardings["params"], sharding.batch_sharding(setup.mesh), whole),
        out_shardings=whole,
    ))  # fmt: skip


class _in_mesh:
    """Calls and lowers a jitted function under the mesh and the axis rules (without both, constraints are silent no-ops)."""

    def __init__(self, setup: Setup, jitted: Any):
        self._mesh, self.jitted = setup.mesh, jitted

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
            return self.jitted(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """Ahead of time, from arrays or abstract values."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
            return self.jitted.lower(*args).compile()
