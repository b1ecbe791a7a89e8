"""A checksum per array that does not depend on how the array lies on the mesh; computed where the array is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def checksums(tree: Any) -> dict[str, int]:
    """`{path of an array: 32 bits}`, the same on every mesh. All processes must call it.

    The sum modulo 2^32 of one number per element, in which its bits and its position are mixed one-to-one (the finalizer of
    MurmurHash3). So a change of one element never goes unseen, and any other change or exchange with probability 2^-32.
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    mesh = leaves[0].sharding.mesh if isinstance(leaves[0].sharding, NamedSharding) else None
    whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    sums = jax.device_get(_sums(whole)(leaves))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums, strict=True)}


@functools.cache
def _sums(whole: NamedSharding | None) -> Callable[[Sequence[jax.Array]], jax.Array]:
    """Jitted: arrays -> uint32 [number of arrays], which every process has."""
    return jax.jit(lambda leaves: jnp.stack([_sum(leaf) for leaf in leaves]), out_shardings=whole)


def _sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = bits + position * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
