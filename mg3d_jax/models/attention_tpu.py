"""Splash attention (Pallas) on TPUs, with padding masks, odd lengths and sharded batches and heads.

The kernel works on blocks of 128 positions and one example; here lengths are padded to whole blocks, padding is a
segment that nobody reads, examples are mapped, and on a mesh every device runs the kernel on its own rows and heads.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

LANES = 128
BLOCKS = (512, 384, 256, 128)
READABLE, PADDING = 1, 0


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """Attention output [B, Tq, H, head_dim]; arguments as in `attention.dot_product_attention`.

    `interpret` runs the kernel's Python on any device, for tests.
    """
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    call = partial(_local, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows, heads = _sharded_axes(mesh, query.shape[0], query.shape[2])
        array, flags = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
        call = jax.shard_map(call, in_specs=(array, array, array, flags), out_specs=array, check_vma=False)
    return call(query, key, value, mask)


def _sharded_axes(mesh: jax.sharding.AbstractMesh, batch: int, heads: int) -> tuple:
    """Mesh axes of the batch and the heads, by the logical-axis rules in force; None where the mesh does not divide."""
    axes = nn.logical_to_mesh_axes(("batch", "heads")) or (None, None)
    chosen = []
    for axis, size in zip(axes, (batch, heads), strict=True):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        shards = 1
        for name in names:
            shards *= mesh.shape[name]
        chosen.append(axis if names and size % shards == 0 else None)
    return tuple(chosen)


def _local(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, interpret: bool) -> jax.Array:
    length, heads, head_dim = query.shape[1:]
    query = _padded(query * head_dim**-0.5)
    key, value = _padded(key), _padded(value)
    mask = jnp.pad(mask, ((0, 0), (0, key.shape[1] - mask.shape[1])))
    kernel = _kernel(heads, query.shape[1], key.shape[1], interpret)
    readers = jnp.full(query.shape[1], READABLE, jnp.int32)

    def example(q: jax.Array, k: jax.Array, v: jax.Array, readable: jax.Array) -> jax.Array:
        segments = splash.SegmentIds(readers, jnp.where(readable, READABLE, PADDING))
        q, k, v = (array.transpose(1, 0, 2) for array in (q, k, v))
        return kernel(q, k, v, segment_ids=segments).transpose(1, 0, 2)

    return jax.vmap(example)(query, key, value, mask)[:, :length].astype(value.dtype)


def _padded(array: jax.Array) -> jax.Array:
    """[B, T, H, head_dim] with T rounded up to whole blocks."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % LANES), (0, 0), (0, 0)))


def _kernel(heads: int, query_length: int, key_length: int, interpret: bool) -> splash.SplashAttentionKernel:
    block_q = next(block for block in BLOCKS if query_length % block == 0)
    block_kv = next(block for block in BLOCKS if key_length % block == 0)
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    full = splash_mask.MultiHeadMask([splash_mask.FullMask((query_length, key_length))] * heads)
    return splash.make_splash_mha_single_device(full, block_sizes=blocks, interpret=interpret)
