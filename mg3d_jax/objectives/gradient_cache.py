"""The exact gradient of a contrastive loss over a batch that does not fit (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs the features of the whole batch at once, but not the activations that led to them. So: (1)
embed the batch in micro-batches and keep only the features; (2) take the loss and its gradient with respect to the
features; (3) embed each micro-batch again and pull its slice of that gradient back to the parameters. One more forward
pass buys activations of one micro-batch only. Unlike gradient accumulation, the loss sees every negative of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.pairwise import Tree, batch_axes

Embed = Callable[[Any, Tree, jax.Array], Tree]
Loss = Callable[[Any, Tree], tuple[jax.Array, dict[str, jax.Array]]]


def _shard(tree: Tree, *before: None) -> Tree:
    """Asks for the batch axis, which follows the axes `before`, to be sharded over the mesh; nothing without a mesh."""
    axes = batch_axes()
    if not axes:
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, PartitionSpec(*before, axes)), tree)


def split(tree: Tree, size: int) -> Tree:
    """[B, ...] -> [B / size, size, ...]. Micro-batch j takes every (B / size)-th row: so no row changes its device."""
    return _shard(jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]).swapaxes(0, 1), tree), None)


def _join(tree: Tree) -> Tree:
    """The inverse of `split`."""
    return _shard(jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), tree))


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cached_value_and_grad(
    embed: Embed, loss: Loss, params: Any, batch: Tree, rng: jax.Array, *, microbatch_size: int
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
    """`jax.value_and_grad(loss of all features, has_aux=True)`, with the activations of one micro-batch at a time.

    Args:
        embed: `(params, rows of the batch, rng) -> features`, a tree of arrays `[rows, ...]`, each row of which depends
            on the same row of the batch only. Sums per patient (reconstruction) can be features too. Called twice per
            micro-batch, with the same key. Masks and other non-float features pass through without a gradient.
        loss: `(params, features of the whole batch) -> (loss, metrics)`, in the order of the batch; what it needs of
            the batch besides (report ids) it closes over.
        params: what the gradient is taken for, in `embed` and in `loss` (a learned temperature).
        batch: tree of arrays `[B, ...]`.
        microbatch_size: rows at a time; must divide B and should be a multiple of the devices that share the batch.

    Returns:
        `((loss, metrics), gradient)`.
    """
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    if microbatch_size < 1 or batch_size % microbatch_size:
        raise UserError(
            f"a batch of {batch_size} cannot be cut into micro-batches of {microbatch_size}: use a divisor."
        )
    microbatches = split(batch, microbatch_size)
    keys = jax.random.split(rng, batch_size // microbatch_size)

    def forward(_: None, rows: tuple[Tree, jax.Array]) -> tuple[None, Tree]:
        return None, embed(params, *rows)

    features, structure = jax.tree.flatten(_join(jax.lax.scan(forward, None, (microbatches, keys))[1]))

    def loss_of_floats(params: Any, floats: list[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = iter(floats)
        return loss(params, jax.tree.unflatten(structure, [next(values) if _is_float(f) else f for f in features]))

    floats = [f for f in features if _is_float(f)]
    value, (gradient, d_floats) = jax.value_and_grad(loss_of_floats, argnums=(0, 1), has_aux=True)(params, floats)

    def backward(gradient: Any, rows: tuple[Tree, jax.Array, list[jax.Array]]) -> tuple[Any, None]:
        microbatch, key, d_rows = rows
        _, pull = jax.vjp(lambda p: [f for f in jax.tree.leaves(embed(p, microbatch, key)) if _is_float(f)], params)
        return jax.tree.map(jnp.add, gradient, pull(d_rows)[0]), None

    gradient, _ = jax.lax.scan(backward, gradient, (microbatches, keys, split(d_floats, microbatch_size)))
    return value, gradient
