"""Autoregressive decoder of reports: a causal transformer whose tokens also read those of the volume.

Two ways through the same parameters. In training all tokens of a report go through at once, each seeing those before it
(`ReportDecoder.__call__`). A report is written token by token (`step`): keys and values of what was written are kept, and
those of the volume are computed once (`start`), so that a step costs one token.

With `num_findings` it also reads which findings there are: what a classifier says of the volume is added to every token, so
that what is stated is decided by a classifier and how by the decoder (as PromptMRG, arXiv 2308.12604, does by prompts).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.models.attention import dot_product_attention
from mg3d_jax.models.transformer import ACTIVATION_AXES, TABLE_INIT, Mlp, constrain, dense, layer_norm, make_remat, part

KeysValues = dict[str, jax.Array]  # "key" and "value", [B, T, H, head_dim]
# "written": of every layer [B K, L, H, head_dim], "volume": of every layer [B, N, H, head_dim], "findings" [B, 1, d]
Cache = dict[str, Any]


class CachedAttention(nn.Module):
    """Multi-head attention whose keys and values are made apart from its queries: once, for many queries."""

    width: int
    num_heads: int
    dtype: str = "float32"

    def setup(self) -> None:
        self.query = dense(self.width, ("embed", "heads"), self.dtype)
        self.key = dense(self.width, ("embed", "heads"), self.dtype)
        self.value = dense(self.width, ("embed", "heads"), self.dtype)
        self.out = dense(self.width, ("heads", "embed"), self.dtype)

    def _heads(self, flat: jax.Array) -> jax.Array:
        flat = constrain(flat, ("batch", "length", "heads"))
        return flat.reshape(*flat.shape[:2], self.num_heads, -1)

    def keys_values(self, tokens: jax.Array) -> KeysValues:
        """Of the tokens [B, T, e] that are read."""
        return {"key": self._heads(self.key(tokens)), "value": self._heads(self.value(tokens))}

    def __call__(self, tokens: jax.Array, read: KeysValues, mask: jax.Array | None, backend: str) -> jax.Array:
        """[B, Tq, d] -> [B, Tq, d]. `mask` is bool [B, Tk] or [B, Tq, Tk], True where a key may be read; None: everywhere."""
        query = self._heads(self.query(tokens))
        mixed = dot_product_attention(query, read["key"], read["value"], mask, backend)
        return self.out(constrain(mixed.reshape(*tokens.shape[:2], self.width), ("batch", "length", "heads")))


class DecoderBlock(nn.Module):
    """Pre-norm: attention to what was written, attention to the volume, MLP."""

    width: int
    num_heads: int
    mlp_dim: int
    dtype: str = "float32"

    def setup(self) -> None:
        self.self_norm = layer_norm(self.dtype)
        self.self_attention = CachedAttention(self.width, self.num_heads, self.dtype)
        self.cross_norm = layer_norm(self.dtype)
        self.context_norm = layer_norm(self.dtype)
        self.cross_attention = CachedAttention(self.width, self.num_heads, self.dtype)
        self.mlp_norm = layer_norm(self.dtype)
        self.mlp = Mlp(self.mlp_dim, self.dtype)

    def read(self, volume_tokens: jax.Array) -> KeysValues:
        """Keys and values of the volume [B, N, e]."""
        return self.cross_attention.keys_values(self.context_norm(volume_tokens))

    def __call__(self, tokens: jax.Array, volume_tokens: jax.Array, backend: str) -> jax.Array:
        """All tokens [B, T, d] at once, each with those before it."""
        entering, length = self.self_norm(tokens), tokens.shape[1]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (tokens.shape[0], length, length))
        # Reports are short beside volumes: their [T, T] weights are small, and fused kernels differ in what masks they take.
        tokens = tokens + self.self_attention(entering, self.self_attention.keys_values(entering), causal, "xla")
        return self._rest(tokens, self.read(volume_tokens), backend)

    def step(
        self, tokens: jax.Array, written: KeysValues, volume: KeysValues, position: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """One more token [B, K, d] of K texts per volume.

        Args:
            written: [B K, L, H, head_dim], of the tokens before `position`.
        """
        rows = self.self_norm(tokens).reshape(-1, 1, self.width)
        new = self.self_attention.keys_values(rows)
        written = {
            name: jax.lax.dynamic_update_slice_in_dim(written[name], new[name].astype(written[name].dtype), position, 1)
            for name in written
        }
        there = jnp.arange(written["key"].shape[1]) <= position
        seen = self.self_attention(rows, written, jnp.broadcast_to(there, (rows.shape[0], there.shape[0])), "xla")
        # The K texts of a volume are so many queries to the same keys: the volume is not copied for each.
        return self._rest(tokens + seen.reshape(tokens.shape), volume, "xla"), written

    def _rest(self, tokens: jax.Array, volume: KeysValues, backend: str) -> jax.Array:
        tokens = tokens + self.cross_attention(self.cross_norm(tokens), volume, None, backend)
        return constrain(tokens + self.mlp(self.mlp_norm(tokens)), ACTIVATION_AXES)


class ReportDecoder(nn.Module):
    """`(token_ids int32 [B, T], volume_tokens [B, N, e], findings [B, L] or None) -> logits [B, T, vocab_size]` in the compute
    dtype.

    Logits at position t are of the token that follows `token_ids[:, t]`. T is at most `max_tokens`. The table of words is
    that of the logits, too (Press & Wolf 2017). The width e of the volume tokens may be any. `findings`: 1 present, 0
    absent, anything else unknown; L is `num_findings`.
    """

    vocab_size: int
    max_tokens: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    remat: str = "none"
    attention_backend: str = "xla"
    num_findings: int = 0

    def setup(self) -> None:
        if self.num_findings:  # of the present ones, then of the absent ones
            shape = (2 * self.num_findings, self.width)
            self.finding_embedding = self.param("finding_embedding", part(TABLE_INIT, (None, "embed")), shape)
        self.word_embedding = self.param(
            "word_embedding", part(TABLE_INIT, ("vocab", "embed")), (self.vocab_size, self.width)
        )
        self.position_embedding = self.param(
            "position_embedding", part(TABLE_INIT, ("position", "embed")), (self.max_tokens, self.width)
        )
        block = make_remat(self.remat, scanned=False)(DecoderBlock)
        mlp_dim = round(self.width * self.mlp_ratio)
        self.layers = [block(self.width, self.num_heads, mlp_dim, self.dtype) for _ in range(self.depth)]
        self.norm = layer_norm(self.dtype)

    def __call__(self, token_ids: jax.Array, volume_tokens: jax.Array, findings: jax.Array | None = None) -> jax.Array:
        tokens = self._embedded(token_ids, jnp.arange(token_ids.shape[1])) + self._of_findings(findings)
        tokens = constrain(tokens, ACTIVATION_AXES)
        volume_tokens = volume_tokens.astype(self.dtype)
        for layer in self.layers:
            tokens = layer(tokens, volume_tokens, self.attention_backend)
        return self._logits(tokens)

    def start(self, volume_tokens: jax.Array, texts: int, length: int, findings: jax.Array | None = None) -> Cache:
        """The cache for `texts` texts of at most `length` tokens per volume, nothing written yet.

        Args:
            volume_tokens: [B, N, e].
            findings: [B, L], as for the call.
        """
        shape = (volume_tokens.shape[0] * texts, length, self.num_heads, self.width // self.num_heads)
        empty = jnp.zeros(shape, self.dtype)
        volume_tokens = volume_tokens.astype(self.dtype)
        return {
            "written": [{"key": empty, "value": empty} for _ in self.layers],
            "volume": [layer.read(volume_tokens) for layer in self.layers],
            "findings": self._of_findings(findings),
        }

    def step(self, token_ids: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, K, vocab_size] of what follows `token_ids` [B, K], which stand at `position`, and the cache with them."""
        tokens, written = self._embedded(token_ids, position) + cache["findings"], []
        for layer, before, volume in zip(self.layers, cache["written"], cache["volume"], strict=True):
            tokens, now = layer.step(tokens, before, volume, position)
            written.append(now)
        return self._logits(tokens), cache | {"written": written}

    def _of_findings(self, findings: jax.Array | None) -> jax.Array:
        """What is added to every token [B, 1, d]; without findings 0, [1, 1, 1]."""
        if not self.num_findings:
            return jnp.zeros((1, 1, 1), self.dtype)
        assert findings is not None, "a decoder that reads findings was given none"
        states = jnp.concatenate([findings == 1, findings == 0], axis=-1).astype(self.dtype)
        return (states @ self.finding_embedding.astype(self.dtype))[:, None]

    def _embedded(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        # Whole along its width, as in the report encoder: looking up pieces of rows would replicate the batch on the way.
        words = jnp.take(constrain(self.word_embedding, ("vocab", None)), token_ids, axis=0)
        return (words + jnp.take(self.position_embedding, positions, axis=0)).astype(self.dtype)

    def _logits(self, tokens: jax.Array) -> jax.Array:
        return jnp.einsum("btd,vd->btv", self.norm(tokens), self.word_embedding.astype(self.dtype))
