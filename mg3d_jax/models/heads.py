"""Pooling and projection heads, and sentence features."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.models.transformer import TABLE_INIT, Attention, dense, part


class AttentionPool(nn.Module):
    """One learned query reads the tokens: `(tokens [B, N, d], mask bool [B, N] or None) -> [B, d]`.

    A row whose mask is empty (a report without sentences) gives zeros.
    """

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        batch, _, width = tokens.shape
        query = self.param("query", part(TABLE_INIT, (None, None, "embed")), (1, 1, width))
        query = jnp.broadcast_to(query.astype(tokens.dtype), (batch, 1, width))
        # The plain backend: with a single query there is no [N, N] matrix to avoid.
        pooled = Attention(self.num_heads, self.dtype, name="attention")(query, tokens, mask)[:, 0]
        return pooled if mask is None else jnp.where(mask.any(axis=1)[:, None], pooled, 0)


class Projection(nn.Module):
    """Linear, into the space of cosine similarities: [..., d] -> [..., dim].

    With `use_bias` the output can be centred (`objectives.alignment.center`).
    """

    dim: int
    dtype: str = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        return dense(self.dim, ("embed", "projection"), self.dtype, "out", use_bias=self.use_bias)(features)


def mean_pool(tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the valid tokens: [B, N, d], bool [B, N] or None -> [B, d]; zeros where none is valid."""
    if mask is None:
        return tokens.astype(jnp.float32).mean(axis=1).astype(tokens.dtype)
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bnd,bn->bd", tokens, weights.astype(tokens.dtype), preferred_element_type=jnp.float32)
    return (total / jnp.maximum(weights.sum(axis=1), 1)[:, None]).astype(tokens.dtype)


def sentence_means(tokens: jax.Array, sentence_index: jax.Array, max_sentences: int) -> tuple[jax.Array, jax.Array]:
    """Mean token feature of each sentence.

    Args:
        tokens: [B, T, d].
        sentence_index: int [B, T]: 1..S, 0 where the token belongs to no sentence.
        max_sentences: S.

    Returns:
        Means [B, S, d] in the dtype of `tokens` (zeros for absent sentences) and mask bool [B, S].
    """
    member = sentence_index[:, None, :] == jnp.arange(1, max_sentences + 1)[None, :, None]  # [B, S, T]
    count = member.sum(axis=-1)
    total = jnp.einsum("bst,btd->bsd", member.astype(tokens.dtype), tokens, preferred_element_type=jnp.float32)
    return (total / jnp.maximum(count, 1)[..., None]).astype(tokens.dtype), count > 0
