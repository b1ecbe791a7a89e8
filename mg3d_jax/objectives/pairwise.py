"""All pairs of a global batch, one tile at a time: how the contrastive and matching losses reach every other patient.

`walk` holds the rows of the batch where they are and streams blocks of columns past them. On one device that is a scan
over blocks; on a mesh every device starts with its own shard of the columns and hands it to its neighbour after each
pass (a ring of `ppermute`s over the batch axes of the mesh), so that no device ever holds more than one foreign shard
and one tile of pairs. `pair_sum` adds its exact gradient: the backward pass walks the ring again, recomputes each tile,
and lets the columns' gradient travel with the columns until it is home. Nothing is saved per tile, so peak memory
depends on the rows of one device and on the block, not on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mg3d_jax.errors import UserError
from mg3d_jax.sharding import BATCH_AXES

Tree = Any  # a pytree of arrays that all have the patients as their leading axis
States = tuple[Tree, Tree]  # what was gathered per row, and per column
Tile = Callable[[Tree, Tree, Tree, Tree], States]

TILE_ELEMENTS = 2**22  # with `block_size=None`, a tile holds about this many similarities: 16 MiB in float32
SHORTEST = 1e-6  # a vector shorter than this has no direction


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors along the last axis, in float32. A vector shorter than 1e-6 becomes zero, with zero gradient; NaN
    stays NaN, so that a model that has diverged shows it."""
    x = jnp.asarray(x, jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    short = squared <= SHORTEST**2
    return jnp.where(short, 0.0, x * jax.lax.rsqrt(jnp.where(short, 1.0, squared)))


def check_shapes(wanted: str, **arrays: tuple[jax.Array | None, tuple[int, ...]]) -> None:
    """`UserError` where an array has another shape than stands beside it; None is no array. Sizes that broadcast would
    give a wrong loss without a word. `wanted` says the shapes in letters."""
    for name, (array, shape) in arrays.items():
        if array is not None and np.shape(array) != shape:
            raise UserError(f"{name} has the shape {np.shape(array)} instead of {shape}: {wanted}")


def zero_unless(mask: jax.Array, values: jax.Array) -> jax.Array:
    """[..., k] with zeros where not `mask` [...]: NaN in what does not count must not reach the gradient (0 * NaN)."""
    return jnp.where(jnp.asarray(mask).astype(jnp.bool_)[..., None], values, 0)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask` is True; 0 (and a zero gradient) where it never is."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


def mean_vector(values: jax.Array, mask: jax.Array) -> jax.Array:
    """[..., n, k] -> [..., k]: the mean of the vectors where `mask` bool [..., n]; 0 without any."""
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(values.dtype)
    return jnp.sum(zero_unless(mask, values), axis=-2) / count[..., None]


def default_ids(ids: jax.Array | None, batch_size: int) -> jax.Array:
    """`ids`, or one distinct id per row. `UserError` for ids that JAX would cut to 32 bits."""
    if ids is None:
        return jnp.arange(batch_size, dtype=jnp.int32)
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
        if not np.array_equal(ids.astype(jax.dtypes.canonicalize_dtype(ids.dtype)), ids):
            raise UserError(
                "group_ids do not fit into 32 bits: number them anew, np.unique(ids, return_inverse=True)[1]"
            )
    return jnp.asarray(ids)


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh set by `jax.set_mesh` that shard the batch; empty without a mesh or inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in BATCH_AXES if axis in kinds and kinds[axis] != AxisType.Manual)


def _pad(tree: Tree, rows: int) -> Tree:
    """Appends `rows` rows of zeros (False for masks, so that padding is never valid)."""
    return jax.tree.map(lambda a: jnp.pad(a, ((0, rows),) + ((0, 0),) * (a.ndim - 1)), tree) if rows else tree


def _rows(tree: Tree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _walk_blocks(
    tile: Callable, rows: Tree, row_state: Tree, columns: Tree, column_state: Tree, block: int
) -> tuple[Tree, Tree]:
    """Scans over blocks of the columns that are on this device."""
    count = _rows(columns)
    blocks = -(-count // block)

    def split(tree: Tree) -> Tree:
        return jax.tree.map(lambda a: a.reshape(blocks, block, *a.shape[1:]), _pad(tree, blocks * block - count))

    def body(row_state: Tree, xs: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        return tile(rows, row_state, *xs)

    row_state, column_state = jax.lax.scan(body, row_state, (split(columns), split(column_state)))
    return row_state, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], column_state)


def walk(
    tile: Tile,
    rows: Tree,
    row_state: Tree,
    columns: Tree,
    column_state: Tree,
    *,
    block_size: int | None,
    pair_elements: int = 1,
) -> States:
    """Shows every row every column, block by block; returns the final `(row_state, column_state)`.

    `tile(rows, row_state, columns, column_state) -> (row_state, column_state)` sees all rows of one device and one
    block of columns. All trees have the same leading axis, the global batch. Padding is added as zeros: `tile` must
    ignore columns that its own validity mask (a leaf of `columns`) calls False. `block_size` counts columns; None
    picks it so that a tile of `pair_elements` per pair holds about `TILE_ELEMENTS`. Not differentiable by itself.
    """
    batch_size = _rows(rows)
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size = {block_size} must be positive, or None for a size that fits")
    if not batch_size or not pair_elements:
        return row_state, column_state
    axes = batch_axes()
    devices = 1
    for axis in axes:
        devices *= jax.sharding.get_abstract_mesh().shape[axis]
    padding = -batch_size % devices
    local = (batch_size + padding) // devices
    wanted = block_size or max(1, TILE_ELEMENTS // (local * pair_elements))
    block = -(-local // -(-local // min(wanted, local)))  # blocks of equal size, none larger than wanted
    if devices == 1:
        return _walk_blocks(tile, rows, row_state, columns, column_state, block)

    def ring(rows: Tree, row_state: Tree, columns: Tree, column_state: Tree) -> tuple[Tree, Tree]:
        neighbours = [(i, (i + 1) % devices) for i in range(devices)]

        def hop(_: jax.Array, carry: tuple[Tree, Tree, Tree]) -> tuple[Tree, Tree, Tree]:
            row_state, columns, column_state = carry
            row_state, column_state = _walk_blocks(tile, rows, row_state, columns, column_state, block)
            travellers = jax.tree.map(lambda a: jax.lax.ppermute(a, axes, neighbours), (columns, column_state))
            return row_state, *travellers

        row_state, _, column_state = jax.lax.fori_loop(0, devices, hop, (row_state, columns, column_state))
        return row_state, column_state

    # The replication check is off because the loops carry constants into varying values; no gradient passes.
    ring = jax.shard_map(ring, in_specs=P(axes), out_specs=P(axes), check_vma=False)
    states = ring(*(_pad(tree, padding) for tree in (rows, row_state, columns, column_state)))
    return jax.tree.map(lambda a: a[:batch_size], states)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def pair_sum(
    tile: Callable[[Tree, Tree, Tree, Tree], Tree],
    block_size: int | None,
    pair_elements: int,
    rows: Tree,
    columns: Tree,
    row_constants: Tree,
    column_constants: Tree,
) -> Tree:
    """Sums over all columns, per row, of what `tile(rows, columns, row_constants, column_constants)` returns per row.

    `tile` returns a tree of `[rows]` arrays, each already summed over the block. Differentiable in `rows` and `columns`
    (exactly, tile by tile); the constants get no gradient.
    """

    def accumulate(rows: Tree, sums: Tree, columns: Tree, _: None) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, sums, tile(rows[0], columns[0], rows[1], columns[1])), None

    shapes = jax.eval_shape(tile, rows, columns, row_constants, column_constants)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    both = (rows, row_constants), zeros, (columns, column_constants), None
    return walk(accumulate, *both, block_size=block_size, pair_elements=pair_elements)[0]


def _pair_sum_forward(tile: Callable, block_size: int | None, pair_elements: int, *trees: Tree) -> tuple[Tree, Tree]:
    return pair_sum(tile, block_size, pair_elements, *trees), trees


def _pair_sum_backward(tile: Callable, block_size: int | None, pair_elements: int, saved: Tree, g: Tree) -> tuple:
    rows, columns, row_constants, column_constants = saved

    def accumulate(rows: Tree, row_gradient: Tree, columns: Tree, column_gradient: Tree) -> tuple[Tree, Tree]:
        rows, row_constants, g = rows
        columns, column_constants = columns
        _, pull = jax.vjp(lambda r, c: tile(r, c, row_constants, column_constants), rows, columns)
        return jax.tree.map(jnp.add, (row_gradient, column_gradient), pull(g))

    zeros = jax.tree.map(jnp.zeros_like, (rows, columns))
    gradients = walk(
        accumulate,
        (rows, row_constants, g),
        zeros[0],
        (columns, column_constants),
        zeros[1],
        block_size=block_size,
        pair_elements=pair_elements,
    )
    return *gradients, None, None


pair_sum.defvjp(_pair_sum_forward, _pair_sum_backward)
